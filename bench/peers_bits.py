"""Bitstream diffusion's torch chains, from the formulas of the public code (CoBit, arXiv 2605.07013)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


def logits(x: Tensor, residual: Tensor, sigma: float) -> Tensor:
    """The residual plus the clipped matched filter, in the residual's dtype as in the public code."""
    return residual + ((x - 0.5) / max(sigma**2, 1e-12)).clamp(-30, 30).to(residual.dtype)


def step(x: Tensor, residual: Tensor, sigma: float, sigma_next: float) -> Pair:
    """An Euler step by way of the score."""
    probs = torch.sigmoid(logits(x, residual, sigma))
    score = (probs - x) / sigma**2
    return x + (sigma_next - sigma) * (-sigma * score), probs


def churned_step(x: Tensor, residual: Tensor, sigma: float, sigma_next: float, gamma: float) -> Pair:
    """The same, then noise for the next call."""
    moved, probs = step(x, residual, sigma, sigma_next)
    raised = sigma_next * (1 + gamma)
    spread = max(raised**2 - sigma_next**2, 0.0) ** 0.5
    return moved + spread * 1.003 * torch.randn_like(moved), probs


def squared_loss(residual: Tensor, x: Tensor, bits: Tensor, sigma: float) -> Tensor:
    """The mean squared error of the posterior per row."""
    return (torch.sigmoid(logits(x, residual, sigma)) - bits).square().mean(-1)


def bce_loss(residual: Tensor, x: Tensor, bits: Tensor, sigma: float) -> Tensor:
    """The mean binary cross-entropy per row."""
    losses = F.binary_cross_entropy_with_logits(logits(x, residual, sigma), bits, reduction="none")
    return losses.mean(-1)


def encode(tokens: Tensor, width: int) -> Tensor:
    """Most significant bit first."""
    places = torch.arange(width - 1, -1, -1, device=tokens.device)
    return ((tokens.unsqueeze(-1) >> places) & 1).float()


def decode(probs: Tensor, vocab: int) -> Tensor:
    """Bits above a half, weighed with powers of two, modulo the vocabulary."""
    width = probs.shape[-1]
    weights = 2 ** torch.arange(width - 1, -1, -1, device=probs.device)
    return ((probs > 0.5).long() * weights).sum(-1) % vocab


def copies(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As much traffic as reading these and writing as many results."""
    return tuple(x.clone() for x in tensors)
