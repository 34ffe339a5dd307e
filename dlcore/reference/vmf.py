"""Draws of the von Mises-Fisher and the spherical Cauchy law, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore.reference import rng, sphere
from dlcore.reference.rng import Domain

#: Candidates per row: all are refused with a probability below 1e-14.
CANDIDATES = 32


def candidates(key: Tensor, kappa: Tensor, d: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines to the mean, their sines, and whether Wood's rejection takes them: (*lead, count) each.

    key (*lead, 2), kappa (*lead) float64. A cosine is (m + y)/(1 + my), y that of a uniform point. With
    q = d - 1, y = t/√(q + t²) for Student's t of q degrees of freedom, t²/q = expm1(2E/q) cos²(2πu) for an
    exponential E and a uniform u (Bailey 1994).
    """
    q = d - 1
    b = q / (2 * kappa + torch.sqrt(4 * kappa**2 + q * q)).unsqueeze(-1)
    m, width = (1 - b) / (1 + b), 2 * torch.sqrt(b) / (1 + b)
    first = 4 * torch.arange(count, device=key.device)
    turn = torch.cos(2 * math.pi * rng.uniform_noise(key, Domain.COSINE, first + 1))
    square = turn**2 * torch.expm1(2 / q * rng.exponential(*rng.bits(key, Domain.COSINE, first)))
    y = torch.copysign(torch.sqrt(square / (1 + square)), turn)
    s = m * y
    taken = rng.exponential(*rng.bits(key, Domain.COSINE, first + 2)) >= q * (torch.log1p(s) - s / (1 + s))
    return (m + y) / (1 + s), width / (torch.sqrt(1 + square) * (1 + s)), taken


def sample(mean: Tensor, kappa: Tensor, key: Tensor, reject: bool) -> Tensor:
    """mean (..., d), kappa broadcast to (...), key (2,) or (..., 2); without `reject` the Cauchy law."""
    lead, d = mean.shape[:-1], mean.shape[-1]
    keys = rng.row_keys(key, lead)
    w = sphere.normalize(mean.double())
    g = rng.normal_noise(keys, Domain.DIRECTION, torch.arange(d, device=mean.device))
    for _ in range(3):
        g = sphere.project(w, g)
    cosine, sine, taken = candidates(keys, kappa.double().expand(lead), d, CANDIDATES if reject else 1)
    taken[..., -1] = True
    chosen = taken.int().argmax(-1, keepdim=True)
    v = sphere.normalize(g)
    drawn = cosine.gather(-1, chosen) * w + sine.gather(-1, chosen) * v
    return torch.where((w == 0).all(-1, keepdim=True), v, drawn).to(mean.dtype)
