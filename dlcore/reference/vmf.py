"""Draws of the von Mises-Fisher and the spherical Cauchy law, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore.reference import rng, sphere
from dlcore.reference.rng import Domain

#: Candidates per row: all are refused with a probability below 1e-14.
CANDIDATES = 32


def _cosine(key: Tensor, kappa: Tensor, d: int, reject: bool) -> tuple[Tensor, Tensor]:
    """The cosine to the mean and its sine; key (*lead, 2), kappa (*lead) float64.

    Wood's scheme: (m + y)/(1 + my) with the cosine y of a uniform point, y = t/√(q + t²) for Student's t with
    q = d - 1 degrees of freedom, which is √(q expm1(2E/q)) cos(2πu) (Bailey 1994).
    """
    q = d - 1
    b = q / (2 * kappa + torch.sqrt(4 * kappa**2 + q * q)).unsqueeze(-1)
    m, width = (1 - b) / (1 + b), 2 * torch.sqrt(b) / (1 + b)
    first = 4 * torch.arange(CANDIDATES if reject else 1, device=key.device)
    turn = torch.cos(2 * math.pi * rng.uniform_noise(key, Domain.COSINE, first + 1))
    square = turn**2 * torch.expm1(2 / q * rng.exponential(*rng.bits(key, Domain.COSINE, first)))
    y = torch.copysign(torch.sqrt(square / (1 + square)), turn)
    s = m * y
    taken = rng.exponential(*rng.bits(key, Domain.COSINE, first + 2)) >= q * (torch.log1p(s) - s / (1 + s))
    taken[..., -1] = True
    chosen = taken.int().argmax(-1, keepdim=True)
    cosine, sine = (m + y) / (1 + s), width / (torch.sqrt(1 + square) * (1 + s))
    return cosine.gather(-1, chosen), sine.gather(-1, chosen)


def sample(mean: Tensor, kappa: Tensor, key: Tensor, reject: bool) -> Tensor:
    """mean (..., d), kappa broadcast to (...), key (2,) or (..., 2); without `reject` the Cauchy law."""
    lead, d = mean.shape[:-1], mean.shape[-1]
    keys = rng.row_keys(key, lead)
    w = sphere.normalize(mean.double())
    g = rng.normal_noise(keys, Domain.DIRECTION, torch.arange(d, device=mean.device))
    for _ in range(3):
        g = sphere.project(w, g)
    cosine, sine = _cosine(keys, kappa.double().expand(lead), d, reject)
    v = sphere.normalize(g)
    drawn = torch.where((w == 0).all(-1, keepdim=True), v, cosine * w + sine * v)
    return drawn.to(mean.dtype)
