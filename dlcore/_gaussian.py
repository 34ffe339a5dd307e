"""Gaussian states x = α·clean + σ·noise and their update: what `bits` and `process.flow` are both made of.

Corruption adds noise (`perturb`); an update moves x with the posterior's mean x̂ to keep·x + take·x̂, where
keep = σ'/σ and take = α' - keep·α (`combine`). Where α and σ are affine in time, as for bits, they add up to
1: a `lerp`. `heun` corrects either for a second x̂; `precondition` is EDM's scaling of a network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import (
    _registry,  # noqa: F401  (stands the backends behind the ops)
    rng,
)
from dlcore._beside import keys_beside


def alike(op: str, **tensors: Tensor) -> None:
    """Floating tensors of one shape and device."""
    first, like = next(iter(tensors.items()))
    for name, x in tensors.items():
        checks.floating(op, name, x)
        if x.shape != like.shape:
            wanted = f"{first}'s shape {tuple(like.shape)}"
            raise ValueError(f"{op}: {name} must have {wanted}, got {tuple(x.shape)}")
        checks.on_device(op, name, x, like.device)


def states(op: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """The same in their common dtype, float32 or wider."""
    alike(op, **tensors)
    dtype = torch.float32
    for x in tensors.values():
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors.values())


def perturb(
    op: str, x: Tensor, spread: Tensor, key: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """x + spread·noise, spread broadcast to x; row r of a shared key draws as the r-th folded key would."""
    lead = x.shape[:-1]
    key = keys_beside(x, checks.key(op, key, generator, lead, x.device), lead)
    if torch.is_grad_enabled() and (x.requires_grad or spread.requires_grad):
        noise = rng.normal(rng.row_keys(key, lead), x.shape[-1:], dtype=spread.dtype)
        return torch.addcmul(x.to(spread.dtype), spread, noise)
    # Without a gradient noise is added in one pass.
    perturbed: Tensor = torch.ops.dlcore.bits_perturb(x, spread, key)
    return perturbed


def lerp(x: Tensor, clean: Tensor, keep: Tensor) -> Tensor:
    """keep·x + (1 - keep)·clean in one pass, with either end exact."""
    return torch.lerp(clean, x, keep)


def combine(x: Tensor, clean: Tensor, keep: Tensor, take: Tensor) -> Tensor:
    """keep·x + take·clean, with memory for one result."""
    return (keep * x).addcmul_(take, clean)


def heun(moved: Tensor, clean: Tensor, later: Tensor, left: Tensor, take: Tensor) -> Tensor:
    """An Euler step `moved` corrected for x̂ = `later` at its end: moved + take·(later - clean)/(2·left).

    `left` is the step's share τ'/τ of the time τ in which the path is affine; where it is 0 the step stands.
    Coefficients broadcast to the states.
    """
    positive = left > 0
    half = (take / (2 * torch.where(positive, left, 1))).to(moved.dtype)
    return torch.addcmul(moved, half, torch.where(positive, later - clean, 0))


class Precondition(NamedTuple):
    """Coefficients of x̂ = c_skip·x + c_out·F(c_in·x, c_noise), and the loss weight; each like sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor
    weight: Tensor
    """λ = 1/c_out², of ‖x̂ - clean‖²."""


def precondition(sigma: Tensor, sigma_data: float | Tensor) -> Precondition:
    """EDM's coefficients (arXiv 2206.00364, Table 1) without a square of σ, so that none overflows."""
    h = torch.hypot(sigma, torch.as_tensor(sigma_data, dtype=sigma.dtype, device=sigma.device))
    share = sigma_data / h
    out = sigma * share
    return Precondition(share**2, out, 1 / h, sigma.log() / 4, out**-2)


def root(square: Tensor) -> Tensor:
    """√square with the derivative 0 where it is 0, not the infinite one that makes NaN of a zero."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
