"""The meaning of the vocabulary drifts on the sphere, in plain torch.

A drift is P_x(Σ_k softmax_k g(<x, E_k>) E_k): the paths differ in the radial weight g alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlcore.reference.categorical import _invalid, materialize, wide

#: Cosines below this count as this: next to -1 SLERP's weight has no bound.
LOWEST_COSINE = -1 + 2.0**-20
#: Below this, ω / sin ω is taken from its series in 1 - cos ω, with so many terms.
_NEAR, _TERMS = 0.25, 20


def slerp_weight(cosine: Tensor) -> Tensor:
    """ω / sin ω for ω = arccos(cosine); Σ_n u^n n!/(2n+1)!! in u = 1 - cosine where that is small."""
    c = cosine.clamp(min=LOWEST_COSINE)
    near = 1 - c < _NEAR
    u, far = torch.where(near, 1 - c, 0), torch.where(near, 0, c)
    series = torch.ones_like(u)
    for n in range(_TERMS, 0, -1):
        series = 1 + series * u * (n / (2 * n + 1))
    return torch.where(near, series, torch.arccos(far) / torch.sqrt((1 - far) * (1 + far)))


class Series(NamedTuple):
    """The radial weight of the vMF path at one or several κ, all float64.

    ψ(μ) = (1 - m²) / ((d-1)(1 + mμ)) · Σ_n coefficients[n] T_n(z), z = (μ + m) / (1 + mμ).
    """

    m: Tensor
    rest: Tensor  # 1 - m
    coefficients: Tensor  # (..., n)


def _degree(dim: int) -> int:
    """Enough for nine digits at every κ."""
    return max(12, 24 if dim < 64 else 0, 32 if dim < 12 else 0, min(96, 240 // dim))


def vmf_series(kappa: Tensor, dim: int) -> Series:
    """Solves the equation that the weight ψ of the vMF path's velocity satisfies.

    (1 - μ²)(ψ' + κψ) - qμψ = A - μ, q = d - 1, has one solution without a pole at either end, and that for
    one A only, the mean resultant length. With κm² + qm - κ = 0 and z, ψ as in `Series` all its terms are
    polynomials in z, and the sum ρ(z) over T_n is smooth at every κ:

        (1-z²)(1-mz)((1-mz)ρ' - mρ) + q(2m - (1+m²)z)ρ = q(A(1-mz) + m - z).

    Collocation in z, with A as one more unknown, needs no condition at the ends: they are singular points.
    """
    q, k = dim - 1.0, kappa.double().unsqueeze(-1)
    root = torch.hypot(torch.full_like(k, q), 2 * k)
    m, rest = 2 * k / (q + root), q * (1 + q / (root + 2 * k)) / (q + root)
    degree = _degree(dim)
    angle = torch.arange(degree + 2, dtype=torch.float64, device=k.device) * (math.pi / (degree + 1))
    n = torch.arange(degree + 1, dtype=torch.float64, device=k.device)
    z, above = torch.cos(angle), 2 * torch.sin(angle / 2) ** 2  # above = 1 - z
    values = torch.cos(angle.unsqueeze(-1) * n)
    # (1 - z²) T_n' = n (T_{n-1} - z T_n) = n sin(angle) sin(n angle).
    slopes = n * torch.sin(angle).unsqueeze(-1) * torch.sin(angle.unsqueeze(-1) * n)
    w = (rest + m * above).unsqueeze(-1)  # 1 - mz
    flat = m * torch.sin(angle) ** 2
    level = q * (2 * m - (1 + m * m) * z)
    rows = w * w * slopes + (level - flat * w.squeeze(-1)).unsqueeze(-1) * values
    matrix = torch.cat([rows, -q * w], -1)
    scale = matrix.abs().amax(-1)
    # Never singular, and not asked whether it is: that would wait for a GPU.
    solution, _ = torch.linalg.solve_ex(matrix / scale.unsqueeze(-1), q * (m - z) / scale)
    return Series(m.squeeze(-1), rest.squeeze(-1), solution[..., :-1])


def chebyshev(coefficients: Tensor, z: Tensor) -> Tensor:
    """Σ_n coefficients[..., n] T_n(z), for coefficients (..., 1, n) and z (..., V): Clenshaw's recurrence."""
    last, before = torch.zeros_like(z), torch.zeros_like(z)
    for c in reversed(coefficients.unbind(-1)[1:]):
        last, before = c + 2 * z * last - before, last
    return coefficients[..., 0] + z * last - before


def vmf_weight(cosine: Tensor, kappa: Tensor, dim: int) -> Tensor:
    """ψ(cosine) for cosine (..., V) and kappa that broadcasts to (...)."""
    series = vmf_series(kappa, dim)
    m, rest = (x.to(cosine.dtype).unsqueeze(-1) for x in series[:2])
    above = 1 + cosine.clamp(min=-1)
    inverse = 1 / (m * above + rest)
    factor = chebyshev(series.coefficients.to(cosine.dtype).unsqueeze(-2), (above - rest) * inverse)
    return rest * (1 + m) / (dim - 1) * inverse * factor


def radial_weight(cosine: Tensor, kappa: Tensor | None, dim: int) -> Tensor:
    """The vMF path's weight at κ, SLERP's without one."""
    return slerp_weight(cosine) if kappa is None else vmf_weight(cosine, kappa, dim)


def velocity(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    table: Tensor,
    kappa: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """P_x m (..., d), <x, m> (...) and the logsumexp (...), of m = Σ_k softmax_k g(<x, E_k>) E_k."""
    dense = wide(materialize(logits, weight, bias))
    invalid = _invalid(dense, dense)
    lse = torch.logsumexp(dense, -1).masked_fill(invalid, torch.nan)
    x, table = wide(x), wide(table)
    p = torch.softmax(dense, -1).masked_fill(invalid.unsqueeze(-1), torch.nan)
    q = p * radial_weight(x @ table.mT, kappa, table.shape[1])
    mean = q @ table
    radial = (x * mean).sum(-1)
    return mean - radial.unsqueeze(-1) * x, radial, lse.double()


def largest(logits: Tensor, weight: Tensor | None, bias: Tensor | None, count: int) -> Tensor:
    """Ids (..., count) of the largest logits, descending, ties to the lowest id; -1 in invalid rows."""
    dense = materialize(logits, weight, bias)
    order = torch.sort(dense, dim=-1, descending=True, stable=True).indices[..., :count]
    return order.masked_fill(_invalid(dense, dense).unsqueeze(-1), -1)


def slerp_logits(x: Tensor, table: Tensor, noise: Tensor) -> Tensor:
    """(d-2)·ln(sin(θ/s)/sin θ) (..., V), -inf where θ >= sπ; the noise fraction s is (..., 1)."""
    cosine, dim = x @ table.mT, table.shape[1]
    inside = cosine.abs() < 1
    sine = torch.sqrt(torch.where(inside, (1 - cosine) * (1 + cosine), 1))
    angle = torch.atan2(torch.where(inside, sine, 0), cosine)
    ratio = torch.sinc(angle / (math.pi * noise)) / torch.sinc(angle / math.pi) / noise
    reached = (angle < math.pi * noise) & (ratio > 0)
    logits = (dim - 2) * torch.log(torch.where(reached, ratio, 1))
    return logits.where(reached | (noise == 1), -torch.inf)
