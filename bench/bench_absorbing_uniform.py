"""The absorbing-state reformulation of uniform diffusion: its step and its remasking step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.bench_uniform import ALPHA_T, MIXTURE, NEXT, SHAPE, TINY, moved_bytes
from bench.case import Case, Shape, Work, name, nbytes, normal, random_tokens, rows, tokens_in_range
from dlcore import rng
from dlcore.process import absorbing_uniform


def _state(shape: Shape, settled: int) -> tuple[Tensor, Tensor]:
    """(z, u); one position in `settled` has z ≠ u, none if 0."""
    u = random_tokens(shape[:-1], shape[-1])
    if settled == 0:
        return u, u.clone()
    other = (u + 1) % shape[-1]
    return torch.where(torch.arange(u.numel()).view_as(u) % settled == 0, other, u), u


def _step(shape: Shape, alpha_s: float, settled: int) -> Work:
    logits = normal(shape)
    z, u = _state(shape, settled)
    key = rng.key(7)

    def ours(x: Tensor, z: Tensor, u: Tensor) -> Tensor:
        return absorbing_uniform.step(x, z, u, ALPHA_T, alpha_s, key=key)

    return Work(
        inputs=(logits, z, u),
        functions={
            "dlcore": ours,
            "eager": partial(peers.absorbing_step, alpha_t=ALPHA_T, alpha_s=alpha_s),
        },
        check=tokens_in_range,
        bytes=nbytes(logits) if settled == 0 else moved_bytes(ours, logits, z, u),
    )


def _remask(shape: Shape, settled: int) -> Work:
    logits = normal(shape)
    z, u = _state(shape, settled)

    def check(result: tuple[Tensor, Tensor], logits: Tensor, *_: Tensor) -> None:
        for tokens in result:
            tokens_in_range(tokens, logits)

    return Work(
        inputs=(logits, z, u),
        functions={
            "dlcore": lambda x, z, u: absorbing_uniform.remask_step(x, z, u, ALPHA_T, NEXT),
            "eager": partial(peers.absorbing_remask_step, alpha_t=ALPHA_T, alpha_s=NEXT),
        },
        check=check,
        bytes=int((z == u).sum()) * shape[-1] * logits.element_size(),
    )


STEP, REMASK = "absorbing_uniform.step", "absorbing_uniform.remask_step"
CASES = (
    Case(
        STEP,
        SHAPE,
        TINY,
        partial(_step, alpha_s=1.0, settled=0),
        "α_s=1, none settled: every row read",
        MIXTURE,
    ),
    Case(
        STEP,
        SHAPE,
        TINY,
        partial(_step, alpha_s=NEXT, settled=2),
        "a step of 64, half settled: rows that stay are not read",
        MIXTURE,
        ("dlcore", "eager"),
    ),
    Case(
        REMASK,
        SHAPE,
        TINY,
        partial(_remask, settled=0),
        "a step of 64, none settled: every row read",
        MIXTURE,
    ),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_absorbing_uniform(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
