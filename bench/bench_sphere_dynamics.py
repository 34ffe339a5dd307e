"""Moves on the sphere: steps along a velocity and Langevin corrections."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.case import Case, Shape, Work, close, name, nbytes, normal, rows, rows_agree
from dlcore import sphere

SHAPE, TINY = (8192, 768), (6, 19)
DELTA, SIZE = 0.3, 0.5


def _pairs(shape: Shape) -> tuple[Tensor, Tensor]:
    """Points, and tangents of length 1 or so."""
    x = torch.nn.functional.normalize(normal(shape), dim=-1)
    v = normal(shape, seed=2) / shape[-1] ** 0.5
    return x, v - (v * x).sum(-1, keepdim=True) * x


def eager_step(x: Tensor, v: Tensor) -> Tensor:
    """The exponential map with S-FLM's clamp."""
    v = DELTA * v
    length: Tensor = v.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return torch.cos(length) * x + torch.sin(length) * v / length


def eager_correct(x: Tensor, score: Tensor) -> Tensor:
    """The exponential integrator with torch's normal numbers."""
    q = x.shape[-1] - 1
    a = torch.tensor(SIZE)
    noise = torch.randn_like(x)
    noise = noise - (noise * x).sum(-1, keepdim=True) * x
    moved = (-a).exp() * x + -torch.expm1(-a) / q * score + (-torch.expm1(-2 * a) / q).sqrt() * noise
    return torch.nn.functional.normalize(moved, dim=-1)


def _step(shape: Shape) -> Work:
    return Work(
        inputs=_pairs(shape),
        functions={"dlcore": lambda x, v: sphere.step(x, v, DELTA), "eager": eager_step},
        check=rows_agree(eager_step),
        bytes=3 * shape[0] * shape[1] * 4,
    )


def _correct(shape: Shape) -> Work:
    inputs = _pairs(shape)

    def check(result: Tensor, x: Tensor, _: Tensor) -> None:
        close(result.norm(dim=-1), torch.ones(len(x)))

    return Work(
        inputs=inputs,
        functions={
            "dlcore": lambda x, score: sphere.correct(x, score, SIZE / (x.shape[-1] - 1)),
            "eager": eager_correct,
        },
        check=check,
        bytes=nbytes(*inputs) + nbytes(inputs[0]),
    )


CASES = (
    Case("sphere.step", SHAPE, TINY, _step),
    Case("sphere.correct", SHAPE, TINY, _correct),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_sphere_dynamics(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
