"""Corruption: bits to noisy bits, and noisy bits to noisier ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._gaussian import perturb
from dlcore.bits.levels import aligned, inputs, level, parameters, spread, wide

#: The most that public samplers (EDM) raise a noise level by.
MOST_CHURN = math.sqrt(2) - 1


def corrupt(
    bits: Tensor,
    sigma: float | Tensor,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noisy bits x = bits + σ·noise. Returns (..., S) float32 or wider. Differentiable.

    Args:
        bits: (..., S) of either coding.
        sigma: at least 0.
        key: int64 (2,) or one per row (*bits.shape[:-1], 2), see `dlcore.rng`; else drawn from `generator` or
            torch's own.

    Raises:
        TypeError: dtypes. ValueError: shapes, sigma.

    Example:
        >>> import torch, dlcore
        >>> from dlcore import bits
        >>> bits.corrupt(torch.ones(2, 8), 0.5, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "bits.corrupt"
    (bits,) = inputs(op, bits=bits)
    return perturb(op, bits, parameters(bits, level(op, "sigma", sigma, bits))[0], key, generator)


def churn(
    x: Tensor,
    sigma: float | Tensor,
    gamma: float | Tensor,
    *,
    noise_scale: float | Tensor = 1.003,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float | Tensor]:
    """Noise that lifts x from σ to σ̂ = σ·(1 + γ): x̂ = x + √(σ̂² - σ²)·noise_scale·noise.

    Args:
        x: (..., S) noisy bits of either coding.
        sigma: at least 0.
        gamma: at least 0; see `churn_gamma`.
        noise_scale: S_noise; 1 is what leaves the law of an exact sampler alone.
        key, generator: as in `corrupt`.

    Returns:
        x̂ (..., S) float32 or wider, differentiable, and σ̂, a number if sigma and gamma are, else a tensor
        float32 or wider.

    Raises:
        TypeError: dtypes. ValueError: shapes, sigma, gamma, noise_scale.

    Source:
        Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", Algorithm 2.

    Example:
        >>> import torch, dlcore
        >>> from dlcore import bits
        >>> x_hat, sigma_hat = bits.churn(torch.zeros(2, 8), 2.0, 0.25, key=dlcore.rng.key(7))
        >>> sigma_hat
        2.5
    """
    op = "bits.churn"
    (x,) = inputs(op, x=x)
    levels = (level(op, "sigma", sigma, x), level(op, "gamma", gamma, x))
    noise = parameters(x, spread(*levels, level(op, "noise_scale", noise_scale, x)))[0]
    sigma, gamma = aligned(x, wide(sigma), wide(gamma))
    return perturb(op, x, noise, key, generator), sigma * (1 + gamma)


def churn_gamma(
    sigma: float | Tensor, s_churn: float, num_steps: int, *, window: tuple[float, float] | None = None
) -> float | Tensor:
    """The gamma of one of num_steps steps: min(s_churn/num_steps, √2 - 1) inside the window, else 0.

    Entropy-gated churn is this with `EntropySchedule.window` and steps on `EntropySchedule.grid`.

    Args:
        sigma: the level before churn, at least 0 and of any shape.
        s_churn: the sum of the gammas where the cap does not bind; CoBit's is γ·(evaluations - 1).
        num_steps: of the grid, one less than its levels.
        window: (lowest, highest) sigma that is churned, both included; None for all.

    Returns:
        A float for a float, else a tensor of sigma's shape.

    Raises:
        TypeError: types. ValueError: values out of range.

    Example:
        >>> from dlcore import bits
        >>> [bits.churn_gamma(sigma, 25.0, 250, window=(0.1, 10.0)) for sigma in (20.0, 1.0)]
        [0.0, 0.1]
    """
    op = "bits.churn_gamma"
    checks.integer(op, "num_steps", num_steps)
    if num_steps < 1:
        raise ValueError(f"{op}: num_steps must be at least 1, got {num_steps}")
    gamma = min(checks.real(op, "s_churn", s_churn, 0.0) / num_steps, MOST_CHURN)
    low, high = (0.0, math.inf) if window is None else _window(op, window)
    if isinstance(sigma, Tensor):
        checks.non_negative(op, "sigma", sigma)
        return torch.where((sigma >= low) & (sigma <= high), gamma, torch.zeros_like(sigma))
    return gamma if low <= checks.real(op, "sigma", sigma, 0.0) <= high else 0.0


def _window(op: str, window: object) -> tuple[float, float]:
    if not isinstance(window, (tuple, list)):
        raise TypeError(f"{op}: window must be a pair of numbers, got {checks.describe(window)}")
    if len(window) != 2:
        raise ValueError(f"{op}: window must be a pair (lowest, highest), got {window!r}")
    low, high = (checks.real(op, "window", end) for end in window)
    if low > high:
        raise ValueError(f"{op}: window must be (lowest, highest), got {window!r}")
    return low, high
