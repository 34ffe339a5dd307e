"""Every op under opcheck, torch.compile(fullgraph=True), the meta device and vmap-free tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import dlcore
from dlcore import LinearLogits, _dispatch, attention, categorical, rng

KEY = rng.key(5)
LEAD, VOCAB = (2, 3), 300


def arguments(op: str, dtype: torch.dtype, linear: bool, grad: bool) -> tuple[Any, ...]:
    """A call of the registered op with every optional argument that it has."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)

    def head() -> tuple[Tensor | None, ...]:
        return (
            (normal(*LEAD, 8), normal(VOCAB, 8), normal(VOCAB))
            if linear
            else (normal(*LEAD, VOCAB), None, None)
        )

    z = torch.randint(0, VOCAB, LEAD, generator=generator)
    shift, temperature = torch.tensor(0.5), torch.full(LEAD, 0.7)
    level, slope = torch.full(LEAD, 0.4, dtype=torch.float64), torch.full((), -1.0, dtype=torch.float64)
    row = (z, shift, temperature, 5.0, 2)
    coefficients = torch.tensor([1.0, 1, 0.2, 1, 0.5, 0], dtype=torch.float64)
    guided = torch.tensor([1.5, 0.7, -0.5, 0.4, 2.0, 0.0], dtype=torch.float64)
    starts = torch.tensor([[0, 0], [1, 4], [3, 3], [0, 2], [5, 0]], dtype=torch.int32).unsqueeze(0)
    stops = torch.tensor([[6, 0], [3, 6], [3, 3], [1, 5], [6, 4]], dtype=torch.int32).unsqueeze(0)
    step = (torch.tensor([2, 3], dtype=torch.int32), None, 7, 2, torch.tensor([True, False]), 4, True)
    packs: dict[str, tuple[Any, ...]] = {
        "attention.decode": (
            *(normal(2, 4, heads, columns) for heads, columns in ((4, 8), (2, 8), (2, 3))),
            normal(2, 7, 2, 8),
            normal(2, 7, 2, 3),
            *step,
            0.3,
            5.0,
        ),
        "attention.intervals": (
            normal(2, 5, 4, 8),
            normal(2, 6, 2, 8),
            normal(2, 6, 2, 3),
            starts,
            stops,
            None,
            0.3,
            5.0,
        ),
        "rng.fold_in": (KEY.expand(3, 2), torch.arange(3)),
        "rng.uniform": (KEY, [4, 5], torch.float32),
        "rng.normal": (rng.split(KEY, 3), [5], torch.float64),
        "rng.gumbel": (KEY, [], torch.float32),
        "categorical.stats": (*head(), *row),
        "categorical.summary": (*head(), 256, z + 256, shift, z + 256, temperature, 5.0, 2, z < 0, KEY),
        "categorical.sample": (*head(), *row, torch.tensor(20), torch.tensor(0.9), torch.tensor(0.01), KEY),
        "categorical.sample_mixture": (*head(), z, coefficients, -1, shift, temperature, 5.0, 2, KEY),
        "categorical.log_probs": (*head(), z, z, shift, 5.0, 2),
        "categorical.kl": (*head(), *head(), temperature),
        "categorical.expectation": (*head(), normal(VOCAB, 4), temperature, 5.0, 2),
        "categorical.sample_expectation": (*head(), normal(VOCAB, 4), temperature, 5.0, 2, z, KEY),
        "guidance.cfg_uniform_step": (normal(*LEAD, VOCAB), normal(*LEAD, VOCAB), z, guided, 2, KEY),
        "uniform.nelbo": (*head(), z, (z + 1) % VOCAB, level, slope, shift),
    }
    return packs[op]


FAMILIES = ("attention", "categorical", "guidance", "rng", "uniform")
FORWARD = [op for op in _dispatch.ops() if op.split(".")[0] in FAMILIES and not op.endswith("_backward")]
HEADLESS = [op for op in FORWARD if op.startswith(("rng.", "attention.", "guidance."))]
LOSSES = ["categorical.log_probs", "categorical.kl", "categorical.expectation", "uniform.nelbo"]
DIFFERENTIABLE = [*LOSSES, "categorical.sample_expectation", "attention.intervals"]


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("linear", [False, True])
def test_opcheck(op, dtype, linear):
    if op in HEADLESS and (linear or (dtype != torch.float32 and op.startswith("rng."))):
        pytest.skip("has no logits")
    function = getattr(torch.ops.dlcore, op.replace(".", "_")).default
    torch.library.opcheck(function, arguments(op, dtype, linear, grad=op in DIFFERENTIABLE))


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("linear", [False, True])
def test_opcheck_backward(op, linear):
    """The backward ops, on what a forward pass saves."""
    args = arguments(op, torch.float32, linear, grad=False)
    name = op.replace(".", "_")
    result = getattr(torch.ops.dlcore, name)(*args)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    saved = outputs if op == "categorical.expectation" else outputs[-1:]
    grad = torch.ones_like(outputs[0])
    torch.library.opcheck(getattr(torch.ops.dlcore, f"{name}_backward").default, (grad, *saved, *args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_attention_backward(dtype):
    """Not float64: the reference calls autograd, which does not run below opcheck's dispatch modes."""
    args = arguments("attention.intervals", dtype, False, grad=False)
    out, lse = torch.ops.dlcore.attention_intervals(*args)
    q, k, v, starts, stops, _, scale, softcap = args
    backward = torch.ops.dlcore.attention_intervals_backward.default
    grads = (torch.ones_like(out), torch.ones_like(lse))
    torch.library.opcheck(backward, (*grads, out, lse, q, k, v, starts, stops, scale, softcap))


def test_opcheck_attention_on_pages():
    pages, table = torch.randn(3, 4, 2, 8), torch.tensor([[2, 0], [1, 0]], dtype=torch.int32)
    q, _, _, starts, stops, *_ = arguments("attention.intervals", torch.float32, False, grad=False)
    op = torch.ops.dlcore.attention_intervals.default
    torch.library.opcheck(op, (q, pages, pages, starts, stops, table, 0.3, 0.0))


def test_opcheck_decoding_on_pages():
    keys, values, table = torch.randn(4, 4, 2, 8), torch.randn(4, 4, 2, 8), torch.tensor([[2, 0], [1, 3]])
    q, k, *_ = arguments("attention.decode", torch.float32, False, grad=False)
    rest = (torch.tensor([3, 0], dtype=torch.int32), table.int(), 8, 0, None, None, False, 0.3, 0.0)
    torch.library.opcheck(torch.ops.dlcore.attention_decode.default, (q, k, k, keys, values, *rest))


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=counter), counter


X, Z = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1)), torch.arange(4)
HEAD = LinearLogits(X[:, :4], X.T)
MIX = torch.tensor([1.0, 1, 0.2, 1, 0.5, 0], dtype=torch.float64)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "stats": lambda t: categorical.stats(X, Z, temperature=t).entropy,
    "sample": lambda t: categorical.sample(X, temperature=t, key=KEY).tokens,
    "draw": lambda t: categorical.sample(X, Z, temperature=t, top_k=5, key=KEY).logprob,
    "mixture": lambda t: categorical.sample_mixture(X, Z, MIX, temperature=t, key=KEY),
    "kl": lambda t: categorical.kl(X, X.flip(0), temperature=t),
    "expectation": lambda t: categorical.expectation(X, X.T, temperature=t),
    "cross_entropy": lambda t: categorical.cross_entropy(X * t, Z),
    "sample and mean": lambda t: categorical.sample_expectation(X, X.T, Z, temperature=t, key=KEY)[1],
    "linear": lambda t: categorical.sample(HEAD, temperature=t, key=KEY).tokens,
    "noise": lambda t: rng.normal(rng.fold_in(KEY, 3), (4,)) * t,
}


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_without_recompiling(name):
    function = CALLS[name]
    call, counter = compiled(function)
    for value in (0.5, 0.7, 1.0, 1.3, 2.0):
        t = torch.tensor(value)
        torch.testing.assert_close(call(t), function(t))
    assert counter.frame_count == 1


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


QKV = torch.randn(3, 2, 12, 2, 8, generator=torch.Generator().manual_seed(3)).unbind(0)
ENDS = torch.stack([torch.arange(1, 13), torch.zeros(12)], -1).to(torch.int32).unsqueeze(0)
# name: the function of one changing argument, and its values.
ATTENTION: dict[str, tuple[Callable[[Any], Any], list[Any]]] = {
    "intervals": (lambda x: attention.intervals(*QKV, torch.zeros_like(x), x), [ENDS, ENDS // 2]),
    "block sizes": (lambda x: attention.block_diffusion(*QKV, block_size=x), [ints(2, 3), ints(6, 1)]),
    "documents": (
        lambda x: attention.block_diffusion(*QKV, block_size=2, cu_seqlens=x),
        [ints(0, 2, 6), ints(0, 3, 6)],
    ),
    "copies": (
        lambda x: attention.block_diffusion(
            *(x * t for t in QKV), block_size=2, num_noisy=2, rows="noisy", clean="token", order="clean_first"
        ),
        [torch.tensor(1.0), torch.tensor(2.0)],
    ),
    "offsets": (
        lambda x: attention.block_causal(*QKV, block_size=4, q_offset=x, kv_offset=3, window=5),
        [ints(0, 3), ints(5, 4)],
    ),
    "merge": (
        lambda x: attention.merge(
            *attention.block_causal(*QKV, block_size=4, q_offset=x, return_lse=True),
            *attention.block_causal(*QKV, block_size=4, kv_offset=12, q_offset=x, return_lse=True),
        )[0],
        [ints(0, 3), ints(15, 4)],
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_fullgraph_without_recompiling(name):
    function, values = ATTENTION[name]
    call, counter = compiled(function)
    for value in values:
        torch.testing.assert_close(call(value), function(value))
    assert counter.frame_count == 1


@pytest.mark.parametrize("argument", ["block_size", "q_offset", "window"])
def test_attention_with_python_ints_compiles_twice_at_most(argument):
    """An int is specialised on first sight, then a symbol."""

    def function(value: int) -> Tensor:
        return attention.block_causal(*QKV, **{"block_size": 4, argument: value})

    call, counter = compiled(function)
    for value in (2, 3, 5, 7, 12):
        torch.testing.assert_close(call(value), function(value))
    assert counter.frame_count <= 2


def test_attention_scales_are_constants_of_the_graph():
    """softmax_scale is fixed in practice: each value compiles anew, and correctly."""
    call, _ = compiled(lambda s: attention.block_causal(*QKV, block_size=4, softmax_scale=s))
    for value in (0.1, 0.2, 1.0):
        expected = attention.block_causal(*QKV, block_size=4, softmax_scale=value)
        torch.testing.assert_close(call(value), expected)


@pytest.mark.parametrize("page_size", [None, 5])
def test_decoding_compiles_once(page_size):
    """Two layers, a fused commit and the next commit in one graph; lengths and contents change."""
    caches = [attention.KVCache(2, 2, 40, 2, 8, page_size=page_size) for _ in range(2)]

    def step(cache: attention.KVCache, q: Tensor, causal: Tensor, advance: Tensor) -> Tensor:
        for layer in range(2):
            kw = {"num_commit": 4, "causal": causal, "window": 9}
            q = attention.decode(q, QKV[1], QKV[2], cache, layer, **kw)
        cache.commit(advance)
        return q

    call, counter = compiled(lambda *args: step(caches[0], *args))
    for advance in (ints(3, 0), ints(4, 4), ints(1, 12), ints(0, 0)):
        args = (QKV[0], advance > 3, advance)
        torch.testing.assert_close(call(*args), step(caches[1], *args))
        assert torch.equal(caches[0].lengths, caches[1].lengths)
    assert counter.frame_count == 1


def test_a_compiled_write_past_the_end_is_refused():
    """Sequence 0 must not run into the rows of sequence 1."""
    cache = attention.KVCache(1, 2, 16, 2, 8)
    call, _ = compiled(lambda q: attention.decode(q, q, q, cache, 0))
    call(QKV[0])
    cache.commit(ints(12, 0))
    before = cache.view(0)[0].clone()
    with pytest.raises(ValueError, match="the cache is full: max_len is 16, 24 are needed"):
        call(QKV[0])
    assert torch.equal(cache.view(0)[0], before)
    write, _ = compiled(lambda k: cache.write(0, k, k))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)|index"):
        write(QKV[0])
    assert torch.equal(cache.view(0)[0][:, :12], before[:, :12])


def test_attention_trains_under_compile():
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention.block_diffusion(q, k, v, block_size=2, return_lse=True)
        return out.square().sum() + lse.sum()

    call, _ = compiled(loss)
    found = []
    for function in (call, loss):
        leaves = [x.clone().requires_grad_() for x in QKV]
        found.append(torch.autograd.grad(function(*leaves), leaves))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def test_python_floats_recompile_at_most_once_more():
    """A float is specialised on first sight, then a symbol."""
    call, counter = compiled(lambda x, t: categorical.sample(x, temperature=t, key=KEY).tokens)
    for value in (0.5, 0.7, 0.9, 1.3, 2.0):
        assert torch.equal(call(X, value), categorical.sample(X, temperature=value, key=KEY).tokens)
    assert counter.frame_count <= 2


def test_a_fresh_key_in_the_graph_follows_manual_seed():
    call, _ = compiled(lambda x: categorical.sample(x).tokens)
    torch.manual_seed(3)
    eager = categorical.sample(X).tokens
    torch.manual_seed(3)
    first = call(X)
    assert torch.equal(first, eager)
    assert not torch.equal(first, call(X))


def test_dynamic_batches_compile_twice_at_most():
    call, counter = compiled(lambda x: categorical.sample(x, key=KEY).tokens)
    for batch in (2, 3, 4, 7, 9):
        assert call(torch.randn(batch, VOCAB)).shape == (batch,)
    assert counter.frame_count <= 2


def test_training_step_compiles():
    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return categorical.cross_entropy(LinearLogits(x, weight), Z).sum()

    weight = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(2)).requires_grad_()
    call, _ = compiled(loss)
    call(X, weight).backward()
    got, weight.grad = weight.grad, None
    loss(X, weight).backward()
    torch.testing.assert_close(got, weight.grad)


def test_meta_device_gives_shapes():
    big = torch.empty(2**17, 2**18, device="meta", dtype=torch.bfloat16)
    key = torch.empty(2, dtype=torch.int64, device="meta")
    draw = torch.ops.dlcore.categorical_sample(big, *(None,) * 10, key)
    assert draw[0].shape == (2, 2**17)
    assert dlcore.categorical.stats(big).entropy.shape == (2**17,)
