"""Updates: along the probability flow, plain, corrected, or fused with posterior and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _gaussian as gaussian
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore._beside import beside, keys_beside
from dlcore.bits.codes import values_of
from dlcore.bits.levels import LIMITS, clip_of, level, parameters, ratio, slope, spread, with_residual


def _mean(probs: Tensor, coding: tuple[float, float]) -> Tensor:
    """x̂: the expectation of bits that are set with these probabilities."""
    low, high = coding
    return probs if (low, high) == (0, 1) else low + (high - low) * probs


def _kept(
    op: str,
    x: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """σ'/σ, broadcast to x."""
    here, there = level(op, "sigma", sigma, x, LIMITS.tiny), level(op, "sigma_next", sigma_next, x)
    return parameters(x, ratio(op, there, here), dtype=dtype)[0]


def step(
    x: Tensor,
    residual: Tensor | None,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    gamma_next: float | Tensor = 0.0,
    noise_scale: float | Tensor = 1.003,
    coding: str = "01",
    clip: float = 30.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the probability flow from σ to σ', in one pass: x' = m + (σ'/σ)·(x - m), m the mean.

    m is the posterior's. With gamma_next > 0 the same pass also churns the result, up to σ'·(1 + gamma_next):
    that is then the sigma of the next network call and of the next `step`. Where σ' = σ, x stays to the bit
    (NaN in its residual still gives NaN), so clean positions (a prompt) are held by a sigma and sigma_next of
    their own per bit.

    Args:
        x: (..., S) noisy bits at sigma.
        residual: (..., S) logits of a network at (x, sigma), or None.
        sigma: positive, the level of x.
        sigma_next: at least 0. At 0 the result is the posterior mean; above σ the flow runs backwards.
        gamma_next, noise_scale: as in `churn`; a gamma_next of 0.0 (a number) draws no noise and no key.
        coding, clip: as in `posterior`.
        key, generator: as in `corrupt`. The noise is that of `churn` with the same key.

    Returns:
        x_next and probs, (..., S) float32 or wider. Not differentiable; `posterior` and `euler_step` are.

    Raises:
        TypeError: dtypes. ValueError: shapes, levels out of range.

    Source:
        CoBit's stochastic sampler, arXiv 2605.07013, in the form that never divides by σ².

    Example:
        >>> import torch, dlcore
        >>> from dlcore import bits
        >>> x_next, probs = bits.step(torch.tensor([[0.5, 1.0]]), None, 0.5, 0.25)
        >>> x_next
        tensor([[0.5000, 0.9404]])
        >>> x_next, _ = bits.step(x_next, None, 0.25, 0.125, gamma_next=0.1, key=dlcore.rng.key(7))
    """
    op = "bits.step"
    code = values_of(op, coding)
    x, residual = with_residual(op, x, residual)
    here, there = level(op, "sigma", sigma, x, LIMITS.tiny), level(op, "sigma_next", sigma_next, x)
    scale = level(op, "noise_scale", noise_scale, x)
    noise: float | Tensor = 0.0
    if isinstance(gamma_next, Tensor) or gamma_next != 0:
        noise = spread(there, level(op, "gamma_next", gamma_next, x), scale)
        key = keys_beside(x, checks.key(op, key, generator, x.shape[:-1], x.device), x.shape[:-1])
    else:
        checks.unused_key(op, key, generator, x.shape[:-1])
        key = None
    coefficients = beside(x, parameters(x, slope(here, code), ratio(op, there, here), noise))
    limit = clip_of(op, clip)
    moved: tuple[Tensor, Tensor] = torch.ops.dlcore.bits_step(x, residual, coefficients, *code, limit, key)
    return moved


def euler_step(
    x: Tensor, probs: Tensor, sigma: float | Tensor, sigma_next: float | Tensor, *, coding: str = "01"
) -> Tensor:
    """The flow's step of `step` for given probabilities: guided ones, p_u + w·(p_c - p_u), say.

    Args:
        x: (..., S) noisy bits at sigma.
        probs: (..., S) of a set bit, whatever the coding; guidance may leave [0, 1].
        sigma, sigma_next, coding: as in `step`.

    Returns:
        (..., S) float32 or wider. Differentiable.

    Raises:
        TypeError: dtypes. ValueError: shapes, levels out of range.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.euler_step(torch.tensor([1.0]), torch.tensor([0.5]), 0.5, 0.25)
        tensor([0.7500])
    """
    op = "bits.euler_step"
    code = values_of(op, coding)
    x, probs = gaussian.states(op, x=x, probs=probs)
    return gaussian.lerp(x, _mean(probs, code), _kept(op, x, sigma, sigma_next))


def heun_step(
    x_next: Tensor,
    probs: Tensor,
    probs_next: Tensor,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    coding: str = "01",
) -> Tensor:
    """Heun's correction of an Euler step: x' + (σ/σ' - 1)/2·(m' - m), with m' the posterior mean at (x', σ').

    That is the mean of the slopes at both ends, (x - m)/σ and (x' - m')/σ', in a form that keeps the digits.
    Where σ' = 0 the Euler step stands.

    Args:
        x_next: (..., S) the Euler step, without churn.
        probs, probs_next: (..., S) at the step's start and at (x_next, sigma_next).
        sigma, sigma_next, coding: as in `step`.

    Returns:
        (..., S) float32 or wider. Differentiable.

    Raises:
        TypeError: dtypes. ValueError: shapes, levels out of range.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> x, sigma, sigma_next = torch.tensor([0.9]), 0.5, 0.4
        >>> x_next, probs = bits.step(x, None, sigma, sigma_next)
        >>> bits.heun_step(x_next, probs, bits.posterior(x_next, sigma_next), sigma, sigma_next)
        tensor([0.8971])
    """
    op = "bits.heun_step"
    code = values_of(op, coding)
    x_next, probs, probs_next = gaussian.states(op, x_next=x_next, probs=probs, probs_next=probs_next)
    kept = _kept(op, x_next, sigma, sigma_next, torch.float64)
    return gaussian.heun(x_next, _mean(probs, code), _mean(probs_next, code), kept, 1 - kept)
