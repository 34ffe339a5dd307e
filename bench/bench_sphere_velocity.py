"""Vocabulary drifts on the sphere, beside the matrix products that no code gets around."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import dlcore
from bench import peers_sphere_velocity as peers
from bench.case import COMPARED, Case, Shape, Work, close, name, nbytes, normal, rows
from dlcore import sphere
from dlcore.cpu.linear_logits import matmul, tile_width

SHAPE, TINY = (512, 50257, 768), (6, 1003, 16)
KAPPA, KAPPA_MAX = 100.0, 500.0
BARE = ("mm", "dlcore's mm")


def points(shape: Shape, seed: int) -> Tensor:
    return torch.nn.functional.normalize(normal(shape, seed=seed), dim=-1)


def _mm(*pairs: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
    """Bare products into tensors that exist."""
    outs = [torch.empty(a.shape[0], b.shape[1]) for a, b in pairs]

    def run(*_: Tensor) -> Tensor:
        for (a, b), out in zip(pairs, outs, strict=True):
            torch.mm(a, b, out=out)
        return outs[-1]

    return run


def _tiled(x: Tensor, table: Tensor, *heads: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
    """The same products by dlcore's own, tile by tile as its velocity takes them."""
    width = tile_width(len(x))
    tile, out = torch.empty(len(x) * width), torch.empty(len(x), table.shape[1])

    def run(*_: Tensor) -> Tensor:
        out.zero_()
        for first in range(0, len(table), width):
            piece = table[first : first + width]
            weights = tile[: len(x) * len(piece)].view(len(x), len(piece))
            for hidden, weight in heads:
                matmul(hidden, weight[first : first + width].mT, weights)
            matmul(x, piece.mT, weights)
            matmul(weights, piece, out, add=True)
        return out

    return run


def _velocity(
    shape: Shape,
    ours: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    *,
    products: int = 2,
    linear: bool = False,
    dtype: torch.dtype = torch.float32,
    others: dict[str, Callable[..., Tensor]] | None = None,
    wide: tuple[str, ...] = (),
) -> Work:
    """shape is (rows, V, d). `products` with the table; one more with a head's weight if `linear`.

    A look-up in the vMF table is not checked: it is off by 0.3% here, by more at other d and κ.
    """
    count, vocab, dim = shape
    x, table = points((count, dim), 2), points((vocab, dim), 3).to(dtype)
    hidden, weight = normal((count, dim), seed=4) / dim**0.5, normal((vocab, dim), seed=5)
    logits = 4 * normal((count, vocab)).to(dtype)
    inputs = (weight, hidden, x, table) if linear else (logits, x, table)

    def of_head(function: Callable[..., Tensor], lazy: bool) -> Callable[..., Tensor]:
        def run(weight: Tensor, hidden: Tensor, x: Tensor, table: Tensor) -> Tensor:
            given: Any = dlcore.LinearLogits(hidden, weight) if lazy else hidden @ weight.T
            return function(given, x, table)

        return run if linear else function

    def check(result: Tensor, *inputs: Tensor) -> None:
        few = [t.double() if t.shape[0] == vocab else t[:COMPARED].double() for t in inputs]
        close(result[:COMPARED], of_head(eager, False)(*few))

    functions = {"dlcore": of_head(ours, True), "eager": of_head(eager, False)}
    functions |= {provider: of_head(peer, False) for provider, peer in (others or {}).items()}
    bare = [(x, table.T), (logits, table)][2 - products :]
    heads = [(hidden, weight)] if linear else []
    if dtype == torch.float32:
        functions["mm"] = _mm(*((h, w.T) for h, w in heads), *bare)
        if products == 2:
            functions["dlcore's mm"] = _tiled(x, table, *heads)
    return Work(
        inputs=inputs,
        functions=functions,
        check=check,
        bytes=nbytes(*inputs),
        flops=2 * count * vocab * dim * (products + linear),
        own={provider: (logits, x.double(), table.double()) for provider in wide},
        unlike=(*BARE, "table"),
    )


def _gradients(shape: Shape) -> Work:
    """Of logits, x and table: two products forward; backward the cosines anew, the pulls, one for x and two
    for the table."""
    count, vocab, dim = shape
    logits, x, table = 4 * normal((count, vocab)), points((count, dim), 2), points((vocab, dim), 3)

    def check(result: Any, logits: Tensor, x: Tensor, table: Tensor) -> None:
        few = [t.detach().double() for t in (logits[:COMPARED], x[:COMPARED], table)]
        close(result[0][:COMPARED], peers.slerp(*few))
        leaves = [t.requires_grad_() for t in few]
        wanted = torch.autograd.grad(peers.slerp(*leaves).sum(), leaves[:2])
        for got, want in zip(result[1:3], wanted, strict=True):
            close(got[:COMPARED], want)

    return Work(
        inputs=(logits, x, table),
        functions={"dlcore": lambda a, x, e: sphere.velocity(x, a, e), "eager": peers.slerp},
        check=check,
        bytes=3 * nbytes(logits),
        flops=2 * count * vocab * dim * 7,
        differentiate=3,
    )


def _slerp(logits: Any, x: Tensor, table: Tensor, **options: Any) -> Tensor:
    return sphere.velocity(x, logits, table, **options)


def _vmf(shape: Shape, **options: Any) -> Work:
    psi = peers.vmf_table(shape[2], KAPPA_MAX)
    look_up = partial(peers.vmf, psi=psi, kappa=KAPPA, kappa_max=KAPPA_MAX)
    ours = partial(_slerp, path="vmf", kappa=KAPPA)

    def eager(logits: Tensor, x: Tensor, table: Tensor) -> Tensor:
        p, cosine = torch.softmax(logits, -1), x @ table.T
        weighed = p * sphere.radial_weight(cosine, table.shape[1], path="vmf", kappa=KAPPA)
        return weighed @ table - (weighed * cosine).sum(-1, keepdim=True) * x

    return _velocity(shape, ours, eager, others={"table": look_up}, **options)


OP = "sphere.velocity"
SLERP = partial(_velocity, ours=_slerp, eager=peers.slerp)
CAUCHY = partial(_velocity, ours=partial(_slerp, path="cauchy"), eager=peers.score, products=1)
CASES = (
    Case(
        OP,
        SHAPE,
        TINY,
        partial(SLERP, others={"S-FLM": peers.slerp}, wide=("S-FLM",)),
        "slerp",
        providers=("dlcore", "eager", "S-FLM", "compile", *BARE),
    ),
    Case(
        OP,
        SHAPE,
        TINY,
        partial(SLERP, linear=True),
        "slerp of a linear head",
        providers=("dlcore", "eager", *BARE),
    ),
    Case(OP, SHAPE, TINY, partial(SLERP, dtype=torch.bfloat16), "slerp, bfloat16", providers=("dlcore",)),
    Case(OP, SHAPE, TINY, _vmf, "vMF", providers=("dlcore", "table", *BARE)),
    Case(
        OP,
        SHAPE,
        TINY,
        partial(_vmf, linear=True),
        "vMF of a linear head",
        providers=("dlcore", "table", *BARE),
    ),
    Case(OP, SHAPE, TINY, CAUCHY, "Cauchy", "categorical.expectation", providers=("dlcore", "eager", "mm")),
    Case(OP, (256, 50257, 768), TINY, _gradients, "slerp, forward, backward", providers=("dlcore", "eager")),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_sphere_velocity(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
