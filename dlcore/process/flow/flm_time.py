"""FLM's change of time: how much of the token is decided at γ, and back (arXiv 2602.16813)."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore.process import _rows as rows
from dlcore.process._argmax import FAR, ArgmaxIntegral


def _argument(op: str, name: str, value: float | Tensor, vocab_size: int) -> Tensor:
    checks.integer(op, "vocab_size", vocab_size)
    if vocab_size < 2:
        raise ValueError(f"{op}: vocab_size must be at least 2, got {vocab_size}")
    value = value.detach() if isinstance(value, Tensor) else value
    lead = value.shape if isinstance(value, Tensor) else torch.Size()
    return rows.level(op, name, value, lead, torch.device("cpu"))


def flm_alpha(gamma: float | Tensor, vocab_size: int) -> Tensor:
    """α(γ), the probability that the largest of z = γ·1_k + (1-γ)·noise is token k, rescaled to [0, 1].

    α = K/(K-1)·(E[Φ(ξ + γ/(1-γ))^{K-1}] - 1/K) with ξ standard normal and K = vocab_size. For K = 2 it is
    2Φ(γ/((1-γ)√2)) - 1; for K = 50,257, α(0.8) = 0.413. Relative error below 1e-12 for K from 2 to 2^18, also
    near γ = 0. No gradient.

    Args:
        gamma: (...) in [0, 1], a number or a tensor, FLM's time from noise to clean.
        vocab_size: K >= 2.

    Returns:
        (...) float64, on gamma's device; computed on the CPU.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import flow
        >>> flow.flm_alpha(0.8, 50_257)
        tensor(0.4127, dtype=torch.float64)
    """
    g = _argument("flow.flm_alpha", "gamma", gamma, vocab_size)
    a = (g / (1 - g)).clamp(max=FAR).reshape(-1)
    alpha = ArgmaxIntegral(vocab_size)(a)[0].clamp(0, 1)
    return torch.where(a < FAR, alpha, 1).reshape(g.shape).to(_device(gamma))


def flm_gamma(alpha: float | Tensor, vocab_size: int) -> Tensor:
    """γ(α), the inverse of `flm_alpha`: FLM draws α uniformly, and steps are even in it.

    By Newton's rule, kept inside a bracket; α = 0 gives 0 and α = 1 gives 1. No gradient.

    Args:
        alpha: (...) in [0, 1], a number or a tensor.
        vocab_size: K >= 2.

    Returns:
        (...) float64, on alpha's device; computed on the CPU. flm_alpha of it is alpha to a few float64
        roundings.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import flow
        >>> flow.flm_gamma(0.5, 50_257)
        tensor(0.8087, dtype=torch.float64)
    """
    target = _argument("flow.flm_gamma", "alpha", alpha, vocab_size)
    integral, goal = ArgmaxIntegral(vocab_size), target.reshape(-1)
    low, high = torch.zeros_like(goal), torch.full_like(goal, FAR)
    a = (low + high) / 2
    for _ in range(64):
        value, slope = integral(a)
        below = value < goal
        low, high = torch.where(below, a, low), torch.where(below, high, a)
        newton = a - (value - goal) / slope
        new = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
        settled = bool(((new - a).abs() <= 4e-16 * a).all())
        a = new
        if settled:
            break
    gamma = torch.where(goal < 1, a / (1 + a), 1)
    return torch.where(goal > 0, gamma, 0).reshape(target.shape).to(_device(alpha))


def _device(value: float | Tensor) -> torch.device:
    return value.device if isinstance(value, Tensor) else torch.device("cpu")
