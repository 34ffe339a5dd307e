"""Masses and rates of hybrid noise: GIDD's schedule and any other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore.process import _rows as rows


class Level(NamedTuple):
    """The noise of one moment; float64 tensors that broadcast together.

    Attributes:
        alpha: the mass of the clean token.
        mask: μ, the mass of the mask.
        uniform: υ, the mass spread over the N other tokens.
        mask_rate: d log(μ/α)/dt, at least 0.
        uniform_rate: d log(υ/α)/dt, at least 0.
    """

    alpha: Tensor
    mask: Tensor
    uniform: Tensor
    mask_rate: Tensor
    uniform_rate: Tensor


def schedule(t: float | Tensor, *, p_uniform: float = 0.1, gamma: float = 1.0) -> Level:
    """GIDD's levels: μ/α = t/(1-t) and υ/α = c/(1-t), c = B·(t·(1-t))^{γ/2}, B = 2^γ·p_u/(1-p_u).

    At t = 1/2 the mass υ of uniform noise is p_u; both ends are pure.

    Args:
        t: in [0, 1], a number or (...); 0 is clean, 1 all masked.
        p_uniform: p_u in [0, 1); 0 is masked diffusion with α = 1-t.
        gamma: in (0, 2]; beyond 2 uniform noise would have to be undone near t = 1.

    Returns:
        A `Level` of tensors (...); its rates are infinite at the two ends.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import hybrid
        >>> at = hybrid.schedule(0.5, p_uniform=0.2)
        >>> [round(float(mass), 3) for mass in at[:3]]
        [0.4, 0.4, 0.2]
    """
    op = "hybrid.schedule"
    lead = t.shape if isinstance(t, Tensor) else torch.Size()
    device = t.device if isinstance(t, Tensor) else torch.device("cpu")
    t = rows.level(op, "t", t, lead, device)
    share, power = (
        checks.number(op, *named, torch.Size(), device)
        for named in (("p_uniform", p_uniform), ("gamma", gamma))
    )
    checks.within(op, "p_uniform", share, 0, 1, "[)")
    checks.within(op, "gamma", power, 0, 2, "(]")
    c = 2**power * share / (1 - share) * (t * (1 - t)) ** (power / 2)
    inside = (t > 0) & (t < 1)
    slope = 1 / (t * (1 - t)).where(inside, 1)
    return Level(
        (1 - t) / (1 + c),
        t / (1 + c),
        c / (1 + c),
        slope.where(inside, torch.inf),
        ((power / 2 * (1 - 2 * t) + t) * slope).where(inside, torch.inf),
    )


def level(
    alpha: float | Tensor, mask: float | Tensor, dalpha: float | Tensor, dmask: float | Tensor
) -> Level:
    """Any hybrid level, from the masses of the clean token and of the mask and their slopes in time.

    Args:
        alpha, mask: α and μ in [0, 1], α + μ <= 1; the rest is uniform. Numbers or tensors (...).
        dalpha, dmask: dα/dt <= 0 and dμ/dt.

    Returns:
        A `Level`. A noise without mass has rate 0.

    Raises:
        TypeError: dtypes. ValueError: values, shapes that do not broadcast, a noise that would be undone.

    Example:
        >>> from dlcore.process import hybrid
        >>> float(hybrid.level(0.5, 0.25, -1.0, 0.5).uniform)
        0.25
    """
    op = "hybrid.level"
    given = {"alpha": alpha, "mask": mask, "dalpha": dalpha, "dmask": dmask}
    lead, device = rows.together(op, **given)
    a, m = rows.level(op, "alpha", alpha, lead, device), rows.level(op, "mask", mask, lead, device)
    da = rows.slope(op, dalpha, lead, device)
    dm = checks.number(op, "dmask", dmask, lead, device)
    rest = (1 - a) - m
    checks.within(op, "1 - alpha - mask", rest, -1e-12, 1)
    rest = rest.clamp(min=0)

    def rate(mass: Tensor, slope: Tensor) -> Tensor:
        some = (mass > 0) & (a > 0)
        return torch.where(some, slope / mass.where(some, 1) - da / a.where(some, 1), 0)

    rates = rate(m, dm), rate(rest, -da - dm)
    for name, value in zip(("mask", "uniform"), rates, strict=True):
        checks.within(op, f"d log({name}/alpha)/dt", value, 0, torch.inf)
    return Level(a, m, rest, *rates)


def checked(op: str, name: str, value: Level, lead: torch.Size, device: torch.device) -> Level:
    """A level whose parts broadcast to `lead`."""
    if not isinstance(value, Level):
        raise TypeError(f"{op}: {name} must be a hybrid.Level, got {checks.describe(value)}")
    masses = (
        rows.level(op, f"{name}.{part}", getattr(value, part), lead, device) for part in Level._fields[:3]
    )
    rates = (
        checks.within(
            op,
            f"{name}.{part}",
            checks.number(op, f"{name}.{part}", getattr(value, part), lead, device),
            0,
            torch.inf,
        )
        for part in Level._fields[3:]
    )
    return Level(*masses, *rates)
