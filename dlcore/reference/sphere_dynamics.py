"""The meaning of the Langevin corrector on the sphere, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore.reference import rng, sphere
from dlcore.reference.backward import gradients
from dlcore.reference.categorical import wide
from dlcore.reference.rng import Domain


def correct(x: Tensor, score: Tensor, step_size: Tensor, key: Tensor) -> Tensor:
    """normalize(e^{-a} x + ((1 - e^{-a}) score + √((d-1)(1 - e^{-2a})) P_x ξ)/(d-1)), a = (d-1)·step_size."""
    q, state = x.shape[-1] - 1, wide(x)
    keys = rng.row_keys(key, x.shape[:-1])
    noise = rng.normal_noise(keys, Domain.ELEMENT, torch.arange(q + 1, device=x.device)).to(state.dtype)
    noise = noise - (noise * state).sum(-1, keepdim=True) * state
    a = (q * step_size.to(state.dtype)).unsqueeze(-1)
    drift, spread = -torch.expm1(-a) / q, torch.sqrt(-torch.expm1(-2 * a) / q)
    moved = torch.exp(-a) * state + drift * wide(score) + spread * noise
    return sphere.normalize(moved).to(x.dtype)


def correct_backward(
    grad: Tensor, x: Tensor, score: Tensor, step_size: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, score and step_size, with the noise drawn anew."""
    x_grad, score_grad, step_grad = gradients(correct, (x, score, step_size, key), (0, 1, 2), grad)
    return x_grad, score_grad, step_grad
