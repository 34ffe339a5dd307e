"""EDM's preconditioning and noise levels (Karras et al. 2022, arXiv 2206.00364)."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._gaussian import Precondition, precondition


def edm_precondition(sigma: float | Tensor, *, sigma_data: float = 0.5) -> Precondition:
    """Coefficients that keep a network's input and target at unit variance (EDM, Table 1).

    With h = hypot(σ, σ_data): c_skip = (σ_data/h)², c_out = σσ_data/h, c_in = 1/h, c_noise = ln(σ)/4,
    λ = (h/(σσ_data))². No square of σ is formed, so none overflows. σ = 0: c_skip = 1, c_out = 0,
    c_noise = -inf, λ = inf.

    Args:
        sigma: (...), >= 0 and finite, a number or a real tensor.
        sigma_data: standard deviation of clean data, > 0: 1/2 for EDM, and for fair {0, 1} bits.

    Returns:
        Precondition of tensors like sigma, float32 or wider. Differentiable.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import flow
        >>> found = flow.edm_precondition(1.2, sigma_data=0.5)
        >>> [round(float(c), 4) for c in (found.c_skip, found.c_out, found.c_in)]
        [0.1479, 0.4615, 0.7692]
    """
    op = "flow.edm_precondition"
    lead = sigma.shape if isinstance(sigma, Tensor) else torch.Size()
    device = sigma.device if isinstance(sigma, Tensor) else torch.device("cpu")
    dtype = torch.promote_types(sigma.dtype, torch.float32) if isinstance(sigma, Tensor) else torch.float32
    level = checks.within(op, "sigma", checks.number(op, "sigma", sigma, lead, device), 0, torch.inf, "[)")
    data = checks.number(op, "sigma_data", sigma_data, torch.Size(), device)
    checks.within(op, "sigma_data", data, 0, torch.inf, "()")
    return Precondition(*(c.to(dtype) for c in precondition(level, data)))


def edm_grid(steps: int, *, sigma_max: float = 80.0, sigma_min: float = 0.002, rho: float = 7.0) -> Tensor:
    """Noise levels sigma_max = σ_0 > ... > σ_{steps-1} = sigma_min, even in σ^(1/ρ), then 0 (EDM).

    Args:
        steps: >= 1, of the sampler. With one there is sigma_max and 0 alone.
        sigma_max, sigma_min: sigma_max > sigma_min > 0.
        rho: > 0 and so large that sigma_max^(1/rho) is a float64; larger is denser near sigma_min. 7 is
            EDM's, and Karras's.

    Returns:
        (steps + 1,) float64 on the CPU, times of the path "edm".

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import flow
        >>> [round(s, 3) for s in flow.edm_grid(4).tolist()]
        [80.0, 9.723, 0.47, 0.002, 0.0]
    """
    op = "flow.edm_grid"
    checks.integer(op, "steps", steps)
    if steps < 1:
        raise ValueError(f"{op}: steps must be at least 1, got {steps}")
    for name, value in (("sigma_max", sigma_max), ("sigma_min", sigma_min), ("rho", rho)):
        number = checks.number(op, name, value, torch.Size(), torch.device("cpu"))
        checks.within(op, name, number, 0, torch.inf, "()")
    if not sigma_min < sigma_max:
        raise ValueError(f"{op}: sigma_min must lie below sigma_max {sigma_max!r}, got {sigma_min!r}")
    if abs(math.log(sigma_max)) / rho > math.log(sys.float_info.max):
        raise ValueError(f"{op}: rho is too small for sigma_max {sigma_max!r}, got {rho!r}")
    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels = torch.linspace(*ends, steps, dtype=torch.float64) ** rho
    levels[-1], levels[0] = sigma_min, sigma_max
    return torch.nn.functional.pad(levels, (0, 1))
