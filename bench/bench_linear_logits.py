"""Linear heads: logits that never exist, beside the bare matrix product (mm) that would make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.case import (
    COMPARED,
    Case,
    Shape,
    Work,
    close,
    name,
    nbytes,
    normal,
    random_tokens,
    rows,
    tokens_in_range,
)
from dlcore import LinearLogits, categorical

#: rows × D × V.
FULL, TINY = (256, 512, 131072), (6, 16, 1003)
QUICK = ("dlcore", "eager", "mm")


def _head(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """(weight, hidden)."""
    count, inner, vocab = shape
    return normal((vocab, inner), dtype, seed=2), (normal((count, inner)) / inner**0.5).to(dtype)


def _work(
    shape: Shape,
    ours: Callable[..., Any],
    peer: Callable[..., Any],
    *,
    dtype: torch.dtype = torch.float32,
    products: int = 1,
    differentiate: int = 0,
    target: bool = False,
) -> Work:
    """ours and peer take logits, linear or not, then the weight as a table, then targets.

    The first of what they return is compared if it is floating; it takes so many matrix `products`.
    """
    weight, hidden = _head(shape, dtype)
    targets = (random_tokens(shape[:1], shape[2]),) if target else ()

    def of_head(weight: Tensor, hidden: Tensor, *rest: Tensor) -> Any:
        return ours(LinearLogits(hidden, weight), weight, *rest)

    def of_logits(weight: Tensor, hidden: Tensor, *rest: Tensor) -> Any:
        return peer(hidden @ weight.T, weight, *rest)

    def check(result: Any, weight: Tensor, hidden: Tensor, *rest: Tensor) -> None:
        got = result if isinstance(result, tuple) else (result,)
        assert all(bool(x.isfinite().all()) for x in got)
        if not got[0].is_floating_point():
            tokens_in_range(got[0], hidden[:, :1].expand(-1, shape[2]))
            return
        few = (x.detach()[:COMPARED] for x in (hidden, *rest))
        want = of_logits(weight.detach().double(), *(x.double() if x.is_floating_point() else x for x in few))
        close(got[0][:COMPARED], want[0] if isinstance(want, tuple) else want)

    def bare(weight: Tensor, hidden: Tensor, *rest: Tensor) -> Tensor:
        for _ in range(products):
            torch.mm(hidden, weight.T, out=out)
        return out

    out = torch.ones(shape[0], shape[2], dtype=dtype)
    return Work(
        inputs=(weight, hidden, *targets),
        functions={"dlcore": of_head, "eager": of_logits, "mm": bare},
        check=check,
        bytes=nbytes(weight, hidden),
        flops=2 * shape[0] * shape[1] * shape[2] * products,
        differentiate=differentiate,
        unlike=("mm",),
    )


def _sample(shape: Shape, dtype: torch.dtype = torch.float32) -> Work:
    return _work(shape, lambda a, _: categorical.sample(a).tokens, lambda a, _: peers.sample(a), dtype=dtype)


def _stats(shape: Shape) -> Work:
    def ours(a: LinearLogits, _: Tensor) -> tuple[Tensor | None, ...]:
        s = categorical.stats(a)
        return s.logsumexp, s.argmax, s.argmax_logprob, s.margin, s.entropy

    return _work(shape, ours, lambda a, _: peers.stats(a))


def _expectation(shape: Shape) -> Work:
    return _work(shape, categorical.expectation, peers.expectation, products=2)


def _sample_expectation(shape: Shape) -> Work:
    def ours(a: LinearLogits, table: Tensor) -> tuple[Tensor, ...]:
        draw, mean = categorical.sample_expectation(a, table)
        return mean, draw.tokens, draw.stats.argmax, draw.stats.entropy

    return _work(shape, ours, peers.sample_expectation, products=2)


def _cross_entropy(shape: Shape) -> Work:
    """Three products without recomputing, four with it."""
    return _work(
        shape,
        lambda a, _, x: categorical.cross_entropy(a, x),
        lambda a, _, x: peers.cross_entropy(a, x),
        products=3,
        differentiate=2,
        target=True,
    )


def _of(op: str, build: Callable[[Shape], Work], note: str = "linear head", **options: Any) -> Case:
    return Case(f"categorical.{op}", FULL, TINY, build, note, **{"providers": QUICK, **options})


CASES = (
    _of("sample", _sample, providers=(*QUICK, "compile")),
    _of("sample", partial(_sample, dtype=torch.bfloat16), "linear head, bfloat16"),
    _of("stats", _stats),
    _of("expectation", _expectation, "linear head, tied table"),
    _of("sample_expectation", _sample_expectation, "linear head, tied table"),
    _of(
        "cross_entropy",
        _cross_entropy,
        "linear head, forward, backward",
        kernel="categorical.log_probs",
        providers=QUICK[:2],
    ),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_linear_logits(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
