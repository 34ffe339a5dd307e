"""Paths: (α, σ) of a state x = α·clean + σ·noise as functions of a family's own time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dlcore import _checks as checks

Levels = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Path:
    """α and σ by time, and dx/dt of the flow as (a, b) with dx/dt = a·x + b·x̂.

    Attributes:
        low, high: the times that there are; `ends` says whether those two belong.
        affine: α and σ are affine in t. Then α' - (σ'/σ)α = 1 - σ'/σ, so a step is a lerp from x̂ to x.
    """

    alpha: Levels
    sigma: Levels
    velocity: Callable[[Tensor], tuple[Tensor, Tensor]]
    low: float
    high: float
    ends: str = "[]"
    affine: bool = False


def _log_velocity(gamma: Tensor) -> tuple[Tensor, Tensor]:
    power = torch.sigmoid(-gamma)
    return power / 2, -power.sqrt() / 2


PATHS = {
    "linear": Path(lambda t: t, lambda t: 1 - t, lambda t: (-1 / (1 - t), 1 / (1 - t)), 0, 1, affine=True),
    "edm": Path(torch.ones_like, lambda t: t, lambda t: (1 / t, -1 / t), 0, torch.inf, "[)", affine=True),
    "vp": Path(
        torch.sqrt,
        lambda t: (1 - t).sqrt(),
        lambda t: (-0.5 / (1 - t), 0.5 / (t.sqrt() * (1 - t))),
        0,
        1,
    ),
    "lognsr": Path(
        lambda t: torch.sigmoid(-t).sqrt(),
        lambda t: torch.sigmoid(t).sqrt(),
        _log_velocity,
        -torch.inf,
        torch.inf,
    ),
}


def find(op: str, path: str) -> Path:
    """The path of that name."""
    checks.option(op, "path", path, tuple(PATHS))
    return PATHS[path]


def time(op: str, name: str, value: float | Tensor, x: Tensor, path: Path) -> Tensor:
    """A time of the path per row of x (..., d) in float64, broadcast to x.shape[:-1] but not expanded."""
    at = checks.number(op, name, value, x.shape[:-1], x.device)
    return checks.within(op, name, at, path.low, path.high, path.ends)


def ratio(op: str, what: str, top: Tensor, bottom: Tensor) -> Tensor:
    """top / bottom, both >= 0; 1 where both are 0, as nothing changes; raises where bottom alone is."""
    zero = bottom == 0
    if checks.reads_data(bottom) and checks.reads_data(top) and bool((zero & (top > 0)).any()):
        raise ValueError(f"{op}: {what}")
    return torch.where(zero, 1, top / torch.where(zero, 1, bottom))


def per_row(value: Tensor, x: Tensor) -> Tensor:
    """A coefficient per row in x's dtype, to be multiplied with x (..., d)."""
    return value.to(x.dtype).unsqueeze(-1)
