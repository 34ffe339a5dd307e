"""The categorical family, the first floor's host overhead, and a call right after a torch op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.case import (
    Case,
    Shape,
    Work,
    close,
    name,
    nbytes,
    normal,
    random_tokens,
    rows,
    rows_agree,
    tokens_in_range,
)
from dlcore import categorical

GPT2, TINY = (512, 50257), (6, 1003)
QUICK = ("dlcore", "eager")


def _sample(
    shape: Shape, *, dtype: torch.dtype = torch.float32, scale: float = 1.0, winner: float | None = None
) -> Work:
    """Draws; `scale` widens the logits, `winner` is the value of one entry in every row."""
    logits = (normal(shape) * scale).to(dtype)
    place = random_tokens(shape[:-1], shape[-1])
    if winner is not None:
        logits.scatter_(-1, place.unsqueeze(-1), winner)

    def check(result: Tensor, logits: Tensor) -> None:
        tokens_in_range(result, logits)
        assert winner is None or result.equal(place)

    return Work(
        inputs=(logits,),
        functions={"dlcore": _tokens, "eager": peers.sample, "eager, clipped": peers.sample_clipped},
        check=check,
        bytes=nbytes(logits),
    )


def _tokens(logits: Tensor) -> Tensor:
    return categorical.sample(logits).tokens


def _truncated(shape: Shape, ours: Callable[[Tensor], categorical.Draw], peer: Callable[..., Tensor]) -> Work:
    logits = normal(shape)
    functions = {"dlcore": lambda x: ours(x).tokens, "eager": peer}
    return Work((logits,), functions, tokens_in_range, nbytes(logits))


def _host(shape: Shape) -> Work:
    """So few rows that the call itself is what costs."""
    return Work((normal(shape),), {"dlcore": _tokens, "eager": peers.sample}, tokens_in_range, bytes=0)


def _stats(shape: Shape) -> Work:
    logits = normal(shape)

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        s = categorical.stats(x)
        return s.logsumexp, s.argmax, s.argmax_logprob, s.margin, s.entropy

    return Work((logits,), {"dlcore": ours, "eager": peers.stats}, rows_agree(peers.stats), nbytes(logits))


def _mixture(shape: Shape, keep: float = 0.25, draw: float = 0.5) -> Work:
    logits, z = normal(shape), random_tokens(shape[:-1], shape[-1])
    # The slope at p(z) is what makes every row needed, as in the uniform bridge.
    coefficients = torch.tensor([1.0, 0.5, keep, 0.5, draw, 0.0], dtype=torch.float64)
    return Work(
        inputs=(logits, z),
        functions={
            "dlcore": lambda x, z: categorical.sample_mixture(x, z, coefficients),
            "eager": lambda x, z: peers.sample_mixture(x, z, keep, draw),
        },
        check=tokens_in_range,
        bytes=nbytes(logits),
    )


def _cross_entropy(shape: Shape) -> Work:
    logits, target = normal(shape), random_tokens(shape[:-1], shape[-1])
    return Work(
        inputs=(logits, target),
        functions={"dlcore": categorical.cross_entropy, "eager": peers.cross_entropy},
        check=rows_agree(peers.cross_entropy, 1),
        bytes=3 * nbytes(logits),  # read, then read and write
        differentiate=1,
    )


def _kl(shape: Shape) -> Work:
    p, q = normal(shape), normal(shape, seed=2)
    return Work(
        inputs=(p, q),
        functions={"dlcore": categorical.kl, "eager": peers.kl},
        check=rows_agree(peers.kl, 2),
        bytes=3 * nbytes(p, q),
        differentiate=2,
    )


def _expectation(shape: Shape, width: int = 128) -> Work:
    logits, table = normal(shape), normal((shape[-1], width), seed=2)

    def check(result: Tensor, logits: Tensor, table: Tensor) -> None:
        close(result[:4], peers.expectation(logits[:4].double(), table.double()))

    return Work(
        inputs=(logits, table),
        functions={"dlcore": categorical.expectation, "eager": peers.expectation},
        check=check,
        bytes=nbytes(logits, table),
        flops=2 * logits.numel() * width,
    )


def _after_torch(shape: Shape, size: int = 512) -> Work:
    """The same draw alone and right after a product by torch, whose threads may still spin."""
    logits, a = normal(shape), normal((size, size), seed=2)
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, a, out=out)

    return Work(
        inputs=(logits,),
        functions={"dlcore": _tokens, "dlcore after mm": _tokens},
        check=tokens_in_range,
        bytes=nbytes(logits),
        prepare={"dlcore after mm": product},
    )


def _of(op: str, build: Callable[[Shape], Work], note: str = "", **options: object) -> Case:
    shape, tiny = options.pop("shape", GPT2), options.pop("tiny", TINY)
    return Case(op, shape, tiny, build, note, **options)  # type: ignore[arg-type]


HALF = (256, 50257)
SAMPLE = "categorical.sample"
TOP_K = partial(
    _truncated, ours=partial(categorical.sample, top_k=50), peer=partial(peers.sample_top_k, k=50)
)
TOP_P = partial(
    _truncated, ours=partial(categorical.sample, top_p=0.9), peer=partial(peers.sample_top_p, top_p=0.9)
)
CASES = (
    _of(SAMPLE, _sample, providers=("dlcore", "eager", "eager, clipped", "compile")),
    _of(SAMPLE, partial(_sample, scale=8.0), "logits of deviation 8", providers=QUICK),
    _of(SAMPLE, partial(_sample, winner=40.0), "one entry at 40", providers=QUICK),
    _of(SAMPLE, partial(_sample, dtype=torch.bfloat16), "bfloat16"),
    _of(SAMPLE, partial(_sample, dtype=torch.float16), "float16", providers=QUICK),
    _of(SAMPLE, _sample, shape=(16, 262144), tiny=(2, 5003)),
    _of(SAMPLE, TOP_K, "top_k=50", providers=QUICK),
    _of(SAMPLE, TOP_P, "top_p=0.9", providers=QUICK),
    _of(SAMPLE, _host, "host overhead", shape=(4, 1000), tiny=(2, 100)),
    _of("categorical.stats", _stats),
    _of("categorical.sample_mixture", _mixture),
    _of(
        "categorical.cross_entropy",
        _cross_entropy,
        "forward, backward",
        shape=HALF,
        kernel="categorical.log_probs",
    ),
    _of("categorical.kl", _kl, "forward, backward", shape=HALF),
    _of("categorical.expectation", _expectation, "128 columns", shape=HALF),
    _of(SAMPLE, _after_torch, "after a torch op", shape=(64, 50257), providers=("dlcore", "dlcore after mm")),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_categorical(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
