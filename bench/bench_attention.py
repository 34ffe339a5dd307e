"""The attention family: the training mask with its cost over length and block, prefill, decode."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import peers_attention as peers
from bench.case import Case, Function, Shape, Work, close, name, nbytes, normal, rows
from dlcore import attention

MASKED, DENSE, FLEX = "SDPA, mask", "SDPA, no mask", "flex_attention"
CAT, STATIC = "torch.cat, SDPA", "static cache, SDPA"
ALL = ("dlcore", MASKED, DENSE, FLEX)
TRAINED = ("dlcore", MASKED, DENSE)
DECODED = ("dlcore", CAT, STATIC)
#: Floating-point operations per pair of a query and a key that it sees, and per head dimension.
FORWARD, BOTH = 4, 14
#: Rows that are compared with torch in float64; with gradients, all are.
COMPARED = 64


def block_causal_pairs(length: int, block: int) -> int:
    """Pairs of a row and a key of its own or an earlier block; the last block may be short."""
    ends = [(first, min(first + block, length)) for first in range(0, length, block)]
    return sum((end - first) * end for first, end in ends)


def _bhsd(x: Tensor) -> Tensor:
    """The layout that torch likes, with memory of its own."""
    return x.detach().transpose(1, 2).contiguous().requires_grad_(x.requires_grad)


def _bshd(function: Function) -> Function:
    """A peer whose results are seen in dlcore's layout; nothing is moved."""

    def call(*inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        result = function(*inputs)
        if isinstance(result, Tensor):
            return result.transpose(1, 2)
        return tuple(x.transpose(1, 2) for x in result)

    return call


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-3 if dtype == torch.float32 else 3e-2


def _exact(heads: list[Tensor], visible: Tensor) -> Tensor:
    """Attention of one head, q (S, D), k and v (T, D)."""
    q, k, v = heads
    scores = (q @ k.T * q.shape[-1] ** -0.5).masked_fill(~visible, -torch.inf)
    return torch.softmax(scores, -1) @ v


def _agrees(rule: peers.Rule) -> Callable[..., None]:
    """A check that the first head of the first sequence, and its gradients, are those of float64."""

    def check(
        result: Tensor | tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor, gradient: Tensor | None = None
    ) -> None:
        got = (result,) if isinstance(result, Tensor) else result
        assert got[0].shape == q.shape
        queries = torch.arange(0, q.shape[1], 1 if gradient is not None else max(1, q.shape[1] // COMPARED))
        visible = peers.dense(rule, queries, k.shape[1])
        leaves = [x[0, :, 0].detach().double() for x in (q, k, v)]
        leaves[0] = leaves[0][queries]
        with torch.enable_grad():
            want = [_exact([x.requires_grad_() for x in leaves], visible)]
            if gradient is not None:
                want += torch.autograd.grad(want[0], leaves, gradient[0, :, 0].double())
        for a, b in zip((got[0][:, queries], *got[1:]), want, strict=True):
            close(a[0, :, 0], b.detach(), _tolerance(q.dtype))

    return check


def _work(
    tensors: tuple[Tensor, Tensor, Tensor],
    ours: Function,
    rule: peers.Rule,
    pairs: int,
    providers: tuple[str, ...],
    backward: bool = False,
) -> Work:
    """q, k and v as dlcore likes them, and what the providers need, made outside of the timing."""
    q = tensors[0]
    queries, keys = q.shape[1], tensors[1].shape[1]
    make: dict[str, Callable[[], Function]] = {
        MASKED: lambda: peers.masked(rule, queries, keys),
        DENSE: lambda: peers.unmasked,
        FLEX: lambda: peers.flex(rule, queries, keys),
    }
    functions = {"dlcore": ours} | {p: make[p]() for p in providers if p != "dlcore"}
    inputs: tuple[Tensor, ...] = tensors
    if backward:
        inputs = (*(x.requires_grad_() for x in inputs), normal(tuple(q.shape), q.dtype, seed=3))
        functions = {p: peers.trained(f) for p, f in functions.items()}
    own = tuple(map(_bhsd, inputs))
    return Work(
        inputs=inputs,
        functions={p: f if p == "dlcore" else _bshd(f) for p, f in functions.items()},
        check=_agrees(rule),
        bytes=0,
        flops=(BOTH if backward else FORWARD) * q.shape[3] * pairs,
        pairs=pairs,
        own={p: own for p in providers if p != "dlcore"},
        unlike=(DENSE,),
    )


def _triple(queries: int, keys: int, heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v of one sequence, (1, S, H, D)."""
    return tuple(normal((1, n, heads, size), dtype, seed) for seed, n in enumerate((queries, keys, keys)))


def _training(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    backward: bool = False,
    visible: str = "all",
    providers: tuple[str, ...] = ALL,
) -> Work:
    """shape is (L, block size, heads, D)."""
    length, block, heads, size = shape
    queries = 2 * length if visible == "all" else length
    pairs = block_causal_pairs(length, block) * heads * queries // length
    ours = partial(attention.block_diffusion, block_size=block, rows=visible)
    q, k, v = _triple(queries, 2 * length, heads, size, dtype)
    rule = peers.training_rule(length, block)
    return _work((q, k, v), ours, rule, pairs, providers, backward)


def _prefill(shape: Shape, dtype: torch.dtype = torch.float32, providers: tuple[str, ...] = ALL) -> Work:
    """shape is (S, block size, heads, D)."""
    length, block, heads, size = shape
    ours = partial(attention.block_causal, block_size=block)
    q, k, v = _triple(length, length, heads, size, dtype)
    pairs = block_causal_pairs(length, block) * heads
    return _work((q, k, v), ours, peers.causal_rule(block), pairs, providers)


def _decode(shape: Shape, dtype: torch.dtype = torch.float32) -> Work:
    """shape is (batch, cached rows, new rows, query heads, key heads, D)."""
    batch, cached, new, query_heads, key_heads, size = shape
    cache = attention.KVCache(1, batch, cached + new, key_heads, size, dtype=dtype)
    old = [normal((batch, cached, key_heads, size), dtype, seed) for seed in (1, 2)]
    cache.write(0, *old)
    cache.commit(cached)
    q = normal((batch, new, query_heads, size), dtype)
    k, v = (normal((batch, new, key_heads, size), dtype, seed) for seed in (3, 4))
    keys, values = cache.view(0)
    keys[:, cached:], values[:, cached:] = 0, 0  # scratch, which the static cache starts with too
    pairs = batch * query_heads * new * (cached + new)

    def ours(keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention.decode(q, k, v, cache, layer=0)
        assert isinstance(out, Tensor)
        return out

    def check(result: Tensor, keys: Tensor, values: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        assert result.shape == q.shape
        group = query_heads // key_heads
        for b, head in ((0, 0), (batch - 1, query_heads - 1)):
            parts = zip(old, (k, v), strict=True)
            whole = [torch.cat((x[b, :, head // group], y[b, :, head // group])) for x, y in parts]
            want = _exact([x.double() for x in (q[b, :, head], *whole)], torch.tensor(True))
            close(result[b, :, head], want, _tolerance(dtype))

    new_rows = tuple(map(_bhsd, (q, k, v)))
    return Work(
        inputs=(keys, values, q, k, v),
        functions={"dlcore": ours, CAT: _bshd(peers.cat_decode), STATIC: _bshd(peers.static_decode)},
        check=check,
        bytes=nbytes(keys, values, q, q, k, v),  # all keys and values, q and the result; new rows written
        flops=FORWARD * size * pairs,
        pairs=pairs,
        own={CAT: (*map(_bhsd, old), *new_rows), STATIC: (_bhsd(keys), _bhsd(values), *new_rows)},
    )


KERNEL = "attention.intervals"
TRAINING, PREFILL, DECODE = "attention.block_diffusion", "attention.block_causal", "attention.decode"
SHAPE, TINY = (1024, 16, 12, 64), (24, 4, 2, 32)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Beyond this length a dense mask and products over all pairs only take time.
LONGEST = 2048


def _training_case(
    shape: Shape, note: str, providers: tuple[str, ...], dtype: str = "float32", **options: object
) -> Case:
    build = partial(_training, dtype=DTYPES[dtype], providers=providers, **options)  # type: ignore[arg-type]
    note = ", ".join(filter(None, (dtype, note)))
    return Case(TRAINING, shape, TINY, build, note, KERNEL, providers)


def _over(length: int, block: int) -> Case:
    """One point of the cost over length and block size; flex and the unmasked SDPA at one block size."""
    peers_here = (MASKED, DENSE, FLEX) if block == SHAPE[1] else (MASKED,)
    providers = ("dlcore", *(peers_here if length <= LONGEST else ()))
    return _training_case((length, block, *SHAPE[2:]), "", providers)


SWEEP = tuple(_over(length, block) for block in (4, 16, 64) for length in (256, 512, 1024, 2048, 4096))
CASES = (
    *SWEEP,
    _training_case(SHAPE, "", ALL, "bfloat16"),
    *(_training_case(SHAPE, "forward, backward", TRAINED, dtype, backward=True) for dtype in DTYPES),
    _training_case(SHAPE, 'rows="noisy"', ALL, visible="noisy"),
    Case(PREFILL, (1024, 32, 12, 64), TINY, _prefill, "float32", KERNEL, ALL),
    *(
        Case(DECODE, shape, tiny, partial(_decode, dtype=DTYPES[dtype]), dtype, DECODE, DECODED)
        for shape, tiny in (
            ((8, 1024, 16, 12, 12, 64), (2, 24, 4, 2, 2, 32)),
            ((1, 1024, 16, 32, 4, 128), (1, 24, 4, 4, 2, 32)),
        )
        for dtype in DTYPES
    ),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_attention(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
