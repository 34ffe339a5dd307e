"""Flows: the step that every family shares, and ELF's stochastic one, at a batch of ELF's states."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.case import Case, Shape, Work, name, nbytes, normal, rows, rows_agree
from dlcore import rng
from dlcore.process import flow

SHAPE, TINY = (32, 1024, 512), (2, 8, 16)
T, NEXT, GAMMA, SCALE = 0.4, 0.43, 1.5, 2.0
#: The one kernel here adds noise; `step` itself is torch's lerp.
NOISE = "bits.perturb"


def elf_step(x: Tensor, clean: Tensor) -> Tensor:
    """Velocity, then Euler: z + (t' - t)(x̂ - z)/max(1 - t, 0.05)."""
    velocity = (clean - x) / max(1 - T, 0.05)
    return x + (NEXT - T) * velocity


def elf_sde_step(x: Tensor, clean: Tensor) -> Tensor:
    """a·z + (1 - a)·s·ε, then Euler from a·t."""
    a = min(max(1 - GAMMA * (NEXT - T), 0.0), 1.0)
    x = a * x + (1 - a) * SCALE * torch.randn_like(x)
    velocity = (clean - x) / max(1 - a * T, 0.05)
    return x + (NEXT - a * T) * velocity


def euler_of(path: str) -> Callable[[Tensor, Tensor], Tensor]:
    """DDIM as it is mostly written: the noise first, then both terms of the new state."""

    def ddim(x: Tensor, clean: Tensor) -> Tensor:
        noise = (x - math.sqrt(T) * clean) / math.sqrt(1 - T)
        return math.sqrt(NEXT) * clean + math.sqrt(1 - NEXT) * noise

    return elf_step if path == "linear" else ddim


def _step(shape: Shape, path: str) -> Work:
    x, clean = normal(shape), normal(shape, seed=1)
    eager = euler_of(path)
    return Work(
        inputs=(x, clean),
        functions={"dlcore": lambda x, c: flow.step(x, c, T, NEXT, path=path), "eager": eager},
        check=rows_agree(eager),
        bytes=3 * nbytes(x),
    )


def _sde_step(shape: Shape) -> Work:
    x, clean, key = normal(shape), normal(shape, seed=1), rng.key(7)

    def ours(x: Tensor, clean: Tensor) -> Tensor:
        return flow.sde_step(x, lambda *_: clean, T, NEXT, GAMMA, exact=False, scale=SCALE, key=key)

    def spread(result: Tensor, x: Tensor, clean: Tensor) -> None:
        a = 1 - GAMMA * (NEXT - T)
        noise = result - ((NEXT - a * T) * clean + (1 - NEXT) * a * x) / (1 - a * T)
        wanted = (1 - NEXT) / (1 - a * T) * (1 - a) * SCALE
        assert abs(float(noise.std()) / wanted - 1) < 5 / noise.numel() ** 0.5

    return Work(
        inputs=(x, clean),
        functions={"dlcore": ours, "eager": elf_sde_step},
        check=spread,
        bytes=3 * nbytes(x),
    )


CASES = (
    Case("flow.step", SHAPE, TINY, partial(_step, path="linear"), "linear: ELF, FLM", NOISE),
    Case("flow.step", SHAPE, TINY, partial(_step, path="vp"), "vp: DDIM", NOISE),
    Case("flow.sde_step", SHAPE, TINY, _sde_step, "ELF", NOISE),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_flow(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
