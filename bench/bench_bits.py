"""Bitstream diffusion: the sampler's step with and without churn, losses, codes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers_bits as peers
from bench.case import Case, Shape, Work, close, name, nbytes, normal, random_tokens, rows, rows_agree
from dlcore import bits, rng

#: Sequences × bits: 64 of 1,024 tokens of 16 bits.
SHAPE, TINY = (64, 16384), (2, 70)
WIDTH, VOCAB = 16, 50257
SIGMA, NEXT, GAMMA = 0.8, 0.7, 0.15


def _state(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Noisy bits and a network's logits."""
    clean = random_tokens(shape, 2).float()
    return clean + SIGMA * normal(shape), normal(shape, dtype, seed=1)


def _step_check(churned: bool, eager: Callable[..., Any]) -> Callable[..., None]:
    plain = rows_agree(eager)

    def check(result: Any, x: Tensor, residual: Tensor) -> None:
        if not churned:
            return plain(result, x, residual)
        moved, probs = result
        want, exact = eager(x.double(), residual.double())
        close(probs, exact, 1e-2 if residual.dtype == torch.bfloat16 else 2e-3)
        noise = (moved - want) / (1.003 * NEXT * (GAMMA * (2 + GAMMA)) ** 0.5)
        assert abs(float(noise.std()) - 1) < 6 / noise.numel() ** 0.5

    return check


def _step(shape: Shape, *, churned: bool, dtype: torch.dtype = torch.float32) -> Work:
    x, residual = _state(shape, dtype)
    key = rng.key(7)
    ours = partial(bits.step, sigma=SIGMA, sigma_next=NEXT)
    plain = partial(peers.step, sigma=SIGMA, sigma_next=NEXT)
    eager = partial(peers.churned_step, sigma=SIGMA, sigma_next=NEXT, gamma=GAMMA)
    return Work(
        inputs=(x, residual),
        functions={
            "dlcore": partial(ours, gamma_next=GAMMA, key=key) if churned else ours,
            "eager": eager if churned else plain,
            "copies": peers.copies,
        },
        check=_step_check(churned, plain),
        bytes=3 * nbytes(x) + nbytes(residual),
        unlike=("copies",),
    )


def _loss(shape: Shape, kind: str) -> Work:
    x, residual = _state(shape)
    clean = random_tokens(shape, 2).float()
    eager = partial(peers.squared_loss if kind == "squared" else peers.bce_loss, sigma=SIGMA)
    return Work(
        inputs=(residual, x, clean),
        functions={"dlcore": partial(bits.loss, sigma=SIGMA, kind=kind), "eager": eager},
        check=rows_agree(eager, 1),
        bytes=7 * nbytes(x),  # read three, twice, and write a gradient
        differentiate=1,
    )


def _encode(shape: Shape) -> Work:
    tokens = random_tokens(shape, VOCAB)

    def check(result: Tensor, tokens: Tensor) -> None:
        assert torch.equal(result, peers.encode(tokens, WIDTH))

    return Work(
        inputs=(tokens,),
        functions={"dlcore": partial(bits.encode, width=WIDTH), "eager": partial(peers.encode, width=WIDTH)},
        check=check,
        bytes=nbytes(tokens) + 4 * WIDTH * tokens.numel(),
    )


def _decode(shape: Shape) -> Work:
    probs = torch.sigmoid(normal((*shape, WIDTH)))

    def check(result: Tensor, probs: Tensor) -> None:
        assert torch.equal(result, peers.decode(probs, VOCAB))

    return Work(
        inputs=(probs,),
        functions={
            "dlcore": partial(bits.decode, vocab_size=VOCAB),
            "eager": partial(peers.decode, vocab=VOCAB),
        },
        check=check,
        bytes=nbytes(probs) + 8 * probs[..., 0].numel(),
    )


WITH_COPIES = ("dlcore", "eager", "compile", "copies")
CASES = (
    Case("bits.step", SHAPE, TINY, partial(_step, churned=False), "", "", WITH_COPIES),
    Case("bits.step", SHAPE, TINY, partial(_step, churned=True), "churned", "", WITH_COPIES),
    Case(
        "bits.step",
        SHAPE,
        TINY,
        partial(_step, churned=True, dtype=torch.bfloat16),
        "churned, bfloat16 residual",
        "",
        ("dlcore", "eager"),
    ),
    Case("bits.loss", SHAPE, TINY, partial(_loss, kind="squared"), "squared, forward, backward"),
    Case("bits.loss", SHAPE, TINY, partial(_loss, kind="bce"), "bce, forward, backward"),
    Case("bits.encode", (64, 1024), (2, 9), _encode, f"{WIDTH} bits"),
    Case("bits.decode", (64, 1024), (2, 9), _decode, f"{WIDTH} bits"),
    Case(
        "bits.step", (1, 256), TINY, partial(_step, churned=False), "host overhead", "", ("dlcore", "eager")
    ),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_bits(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
