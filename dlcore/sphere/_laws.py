"""What the laws on the sphere share: κ per row, and draws."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._beside import keys_beside
from dlcore.sphere.geometry import dimension, project, vectors

#: The largest concentration: what a float32 holds.
LARGEST = torch.finfo(torch.float32).max


def concentration(op: str, kappa: float | Tensor, lead: torch.Size, device: torch.device) -> Tensor:
    """κ in float64, checked, broadcast to `lead` but not expanded."""
    wide = checks.per_row(op, "kappa", kappa, lead, device, torch.float64)
    if wide is None:
        raise TypeError(f"{op}: kappa must be a number or a Tensor, got None")
    checks.value_range(op, "kappa", wide, 0, LARGEST)
    return wide


def tangent(x: Tensor, mean: Tensor) -> Tensor:
    """mean's part across x in float32 at least, exact also where they meet: x itself has none."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, mean = x.to(wide), mean.to(wide)
    return project(x, mean - x)


def sample(
    op: str,
    mean: Tensor,
    kappa: float | Tensor,
    key: Tensor | None,
    generator: torch.Generator | None,
    *,
    reject: bool,
) -> Tensor:
    """One point per row of `mean`."""
    (mean,) = vectors(op, mean=mean)
    dimension(op, mean, "mean")
    lead = mean.shape[:-1]
    wide = concentration(op, kappa, lead, mean.device).detach()
    key = keys_beside(mean, checks.key(op, key, generator, lead, mean.device), lead)
    drawn: Tensor = torch.ops.dlcore.sphere_sample(mean.detach(), wide, key, reject)
    return drawn
