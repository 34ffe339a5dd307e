"""The eager torch chains that the sphere's maps and draws are measured against, in the public code's form.

Each is written from its formulas: clamped arc cosines in place of an atan2, the masked loop of public
von Mises-Fisher samplers (Ulrich's and Wood's rejection, up to 200 rounds, boolean indexing).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _dot(x: Tensor, y: Tensor) -> Tensor:
    product: Tensor = (x * y).sum(-1, keepdim=True)
    return product


def _angle(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cosine, the angle and its sine, clamped as S-FLM's code does."""
    cosine = _dot(x, y).clamp(-1 + 1e-6, 1 - 1e-6)
    omega = torch.acos(cosine)
    return cosine, omega, torch.sin(omega).clamp(min=1e-6)


def slerp(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
    """S-FLM's interpolation."""
    _, omega, sine = _angle(x, y)
    t = t.unsqueeze(-1)
    return torch.sin((1 - t) * omega) / sine * x + torch.sin(t * omega) / sine * y


def log_map(x: Tensor, y: Tensor) -> Tensor:
    """(ω/sin ω)(y - cos ω x)."""
    cosine, omega, sine = _angle(x, y)
    return omega / sine * (y - cosine * x)


def exp_map(x: Tensor, v: Tensor) -> Tensor:
    """cos‖v‖ x + sin‖v‖ v/‖v‖."""
    size: Tensor = v.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return torch.cos(size) * x + torch.sin(size) * v / size


def rotate(x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """x + (⟨s, x⟩t - ⟨t, x⟩s) + the square of that map over 1 + ⟨s, t⟩."""
    cosine, s_x, t_x = _dot(source, target), _dot(source, x), _dot(target, x)
    both = (s_x + t_x) / (1 + cosine)
    return x - both * (source + target) + 2 * s_x * target


def correct(x: Tensor, score: Tensor, step_size: float) -> Tensor:
    """A Langevin step by the exponential integrator, with torch's normal numbers."""
    q = x.shape[-1] - 1
    a = q * step_size
    noise = torch.randn_like(x)
    noise = noise - _dot(noise, x) * x
    moved = math.exp(-a) * x - math.expm1(-a) / q * score + math.sqrt(-math.expm1(-2 * a) / q) * noise
    return torch.nn.functional.normalize(moved, dim=-1)


def sample_vmf(mean: Tensor, kappa: Tensor) -> Tensor:
    """The masked loop: Wood's cosine for the rows that have none yet, then a random tangent."""
    q = mean.shape[1] - 1
    b = (-2 * kappa + torch.sqrt(4 * kappa**2 + q * q)) / q
    x0 = (1 - b) / (1 + b)
    c = kappa * x0 + q * torch.log(1 - x0**2)
    cosine, missing = torch.ones_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
    half = torch.tensor(q / 2, device=mean.device)
    beta = torch.distributions.Beta(half, half)
    for _ in range(200):
        count = int(missing.sum().item())
        if count == 0:
            break
        z, u = beta.sample((count,)), torch.rand(count, device=mean.device)
        b_m, k_m = b[missing], kappa[missing]
        w = (1 - (1 + b_m) * z) / (1 - (1 - b_m) * z)
        taken = k_m * w + q * torch.log(1 - x0[missing] * w) - c[missing] >= torch.log(u)
        index = missing.nonzero().squeeze(-1)[taken]
        cosine[index] = w[taken]
        missing[index] = False
    return _at_cosine(mean, cosine)


def sample_vmf_in_rounds(mean: Tensor, kappa: Tensor, rounds: int = 8) -> Tensor:
    """The same without asking how many rows are left: each takes the first that so many rounds accept."""
    q = mean.shape[1] - 1
    b = (-2 * kappa + torch.sqrt(4 * kappa**2 + q * q)) / q
    x0 = (1 - b) / (1 + b)
    c = kappa * x0 + q * torch.log(1 - x0**2)
    cosine, missing = torch.ones_like(kappa), torch.ones_like(kappa, dtype=torch.bool)
    half = torch.full_like(kappa, q / 2)
    for _ in range(rounds):
        one, other = torch._standard_gamma(half), torch._standard_gamma(half)
        z = one / (one + other)
        w = (1 - (1 + b) * z) / (1 - (1 - b) * z)
        taken = kappa * w + q * torch.log(1 - x0 * w) - c >= torch.log(torch.rand_like(kappa))
        cosine = torch.where(missing & taken, w, cosine)
        missing = missing & ~taken
    return _at_cosine(mean, cosine)


def _at_cosine(mean: Tensor, cosine: Tensor) -> Tensor:
    """Unit vectors at a cosine to the mean, elsewhere in a random direction."""
    noise = torch.randn_like(mean)
    tangent = torch.nn.functional.normalize(noise - _dot(noise, mean) * mean, dim=-1)
    w = cosine.unsqueeze(-1)
    return w * mean + torch.sqrt((1 - w * w).clamp(min=0)) * tangent


def sample_von_mises_fisher(mean: Tensor, kappa: Tensor) -> Tensor:
    """The same around e_1, then reflected to the mean, as in hyperspherical autoencoders."""
    rows, d = mean.shape
    first = torch.zeros_like(mean)
    first[:, 0] = 1
    x = sample_vmf(first, kappa)
    axis = torch.nn.functional.normalize(first - mean, dim=-1)
    assert x.shape == (rows, d)
    return x - 2 * _dot(axis, x) * axis


def mean_cosine(kappa: float, d: int) -> float:
    """A_d(κ) roughly, for a check: Amos's two bounds, averaged."""
    nu = d / 2 - 1
    return 0.5 * sum(kappa / (nu + 0.5 + math.sqrt((nu + s) ** 2 + kappa**2)) for s in (0.5, 1.5))
