"""Uniform-state diffusion: steps, the corrector and the NELBO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.case import (
    Case,
    Shape,
    Work,
    name,
    nbytes,
    normal,
    random_tokens,
    rows,
    rows_agree,
    tokens_in_range,
)
from dlcore import rng
from dlcore.process import uniform

SHAPE, TINY = (4, 128, 50258), (2, 8, 1003)
ALPHA_T, KAPPA = 0.5, 0.9
NEXT = ALPHA_T + 1 / 64
MIXTURE = "categorical.sample_mixture"


def moved_bytes(step: Callable[..., Tensor], logits: Tensor, z: Tensor, *more: Tensor) -> int:
    """The logits of the rows that a step moves: the least that it has to read."""
    moved = int((step(logits, z, *more) != z).sum())
    return moved * logits.shape[-1] * logits.element_size()


def _step(
    shape: Shape,
    alpha_s: float,
    *,
    chains: Mapping[str, Callable[..., Tensor]],
    every_row: bool,
    **options: float | str,
) -> Work:
    logits, z = normal(shape), random_tokens(shape[:-1], shape[-1])
    key = rng.key(7)

    def ours(x: Tensor, z: Tensor) -> Tensor:
        return uniform.step(x, z, ALPHA_T, alpha_s, key=key, **options)  # type: ignore[arg-type]

    return Work(
        inputs=(logits, z),
        functions={"dlcore": ours}
        | {provider: partial(peer, alpha_t=ALPHA_T, alpha_s=alpha_s) for provider, peer in chains.items()},
        check=tokens_in_range,
        bytes=nbytes(logits) if every_row else moved_bytes(ours, logits, z),
    )


def _correct(shape: Shape, count: int = 12) -> Work:
    count = min(count, shape[1])
    logits, z = normal(shape), random_tokens(shape[:-1], shape[-1])
    return Work(
        inputs=(logits, z),
        functions={
            "dlcore": lambda x, z: uniform.correct(x, z, ALPHA_T, count),
            "eager": lambda x, z: peers.corrector(x, z, ALPHA_T, count, 1.0),
        },
        check=tokens_in_range,
        bytes=nbytes(logits),
    )


def _nelbo(shape: Shape) -> Work:
    logits = normal(shape)
    x, z = random_tokens(shape[:-1], shape[-1]), random_tokens(shape[:-1], shape[-1], seed=2)
    z = torch.where(torch.arange(z.numel()).view_as(z) % 2 == 0, x, z)

    def eager(logits: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return peers.duo_nelbo(logits, z, x, ALPHA_T, -1.0)

    return Work(
        inputs=(logits, z, x),
        functions={"dlcore": lambda a, z, x: uniform.nelbo(a, z, x, ALPHA_T, -1.0), "eager": eager},
        check=rows_agree(eager, 1),
        bytes=4 * nbytes(logits),  # read twice, then read and write
        differentiate=1,
    )


LOO = {"eager": peers.loo_step, "Duo": peers.duo_step}
DENOISER = {"eager": peers.loo_step_of_denoiser}
PSI = {"eager": partial(peers.duo_psi_step, kappa=KAPPA)}
QUICK = ("dlcore", "eager")


def _case(note: str, build: Callable[[Shape], Work], providers: tuple[str, ...]) -> Case:
    return Case("uniform.step", SHAPE, TINY, build, note, MIXTURE, providers)


CASES = (
    _case(
        "α_s=1: every row read",
        partial(_step, alpha_s=1.0, chains=LOO, every_row=True),
        ("dlcore", "eager", "Duo", "compile"),
    ),
    _case(
        "a step of 64: rows that surely keep z are not read",
        partial(_step, alpha_s=NEXT, chains=LOO, every_row=False),
        ("dlcore", "eager", "Duo"),
    ),
    _case(
        "denoiser's logits, a step of 64",
        partial(_step, alpha_s=NEXT, chains=DENOISER, every_row=False, parameterization="denoiser"),
        QUICK,
    ),
    _case(
        "ψ, κ=0.9, a step of 64",
        partial(_step, alpha_s=NEXT, chains=PSI, every_row=False, kappa=KAPPA),
        ("dlcore", "eager", "compile"),
    ),
    Case("uniform.correct", SHAPE, TINY, _correct, "12 positions", "categorical.stats"),
    Case("uniform.nelbo", (256, 50257), (6, 1003), _nelbo, "forward, backward"),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_uniform(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
