"""What is known of bits: the matched filter of x alone, the posterior of it and a network, and its losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _gaussian as gaussian
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore._ops.declare import result_dtype
from dlcore.bits.codes import values_of
from dlcore.bits.levels import clip_of, inputs, level, parameters, slope, with_residual


def slope_of(op: str, x: Tensor, sigma: float | Tensor, code: tuple[float, float]) -> Tensor:
    """The matched filter's logit per unit of x, broadcast to x."""
    checks.no_gradient(op, "sigma", sigma)
    return parameters(x, slope(level(op, "sigma", sigma, x), code))[0]


def matched_filter(x: Tensor, sigma: float | Tensor, *, coding: str = "01", clip: float = 30.0) -> Tensor:
    """The logit of a bit given its own noisy value: (x - 1/2)/σ² ("01") or 2x/σ² ("pm1"), within ±clip.

    Args:
        x: (..., S) noisy bits.
        sigma: at least 0. Towards 0 the logit is ±clip, at x exactly between the bits 0; for large σ it is 0.
        coding: "01" or "pm1".
        clip: the largest logit, `inf` for none.

    Returns:
        (..., S) float32 or wider. Differentiable in x, with gradient 0 where the clip binds.

    Raises:
        TypeError: dtypes. ValueError: shapes, sigma, clip. NotImplementedError: a gradient in sigma.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.matched_filter(torch.tensor([0.5, 1.0, 9.0]), 0.5)
        tensor([ 0.,  2., 30.])
    """
    op = "bits.matched_filter"
    code = values_of(op, coding)
    (x,) = inputs(op, x=x)
    gain = slope_of(op, x, sigma, code)
    filtered: Tensor = torch.ops.dlcore.bits_matched_filter(x, gain, sum(code) / 2, clip_of(op, clip))
    return filtered


def posterior(
    x: Tensor,
    sigma: float | Tensor,
    residual: Tensor | None = None,
    *,
    coding: str = "01",
    clip: float = 30.0,
) -> Tensor:
    """The probability that a bit is set: sigmoid(residual + matched filter).

    Args:
        x, sigma, coding, clip: as in `matched_filter`.
        residual: (..., S) logits of a network, None for what x alone says. Independent fair bits need none.

    Returns:
        (..., S) float32 or wider. Differentiable in x and residual.

    Raises:
        TypeError: dtypes. ValueError: shapes, sigma, clip. NotImplementedError: a gradient in sigma.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.posterior(torch.tensor([0.5, 1.0]), 0.5)
        tensor([0.5000, 0.8808])
    """
    op = "bits.posterior"
    code = values_of(op, coding)
    x, residual = with_residual(op, x, residual)
    gain = slope_of(op, x, sigma, code)
    clip = clip_of(op, clip)
    probs: Tensor = torch.ops.dlcore.bits_posterior(x, residual, gain, sum(code) / 2, clip)
    return probs


def loss(
    residual: Tensor,
    x: Tensor,
    bits: Tensor,
    sigma: float | Tensor,
    *,
    kind: str = "squared",
    coding: str = "01",
    clip: float = 30.0,
) -> Tensor:
    """How far the posterior is from the bits: a mean over the last dimension, in one pass.

    "squared": the mean of (posterior mean - bit)², in the coding's units: what `EntropySchedule.fit` takes as
    error, and CoBit's loss when times `edm_weight`. Its gradient in a logit is 2·(p - b)·p·(1 - p) ("01"):
    none where a wrong bit is saturated. "bce": the binary cross-entropy in nats per bit, gradient p - b. Both
    keep their digits for saturated bits: p - b and 1 - p are never differences of near numbers.

    Args:
        residual: (..., S) logits of a network at (x, sigma).
        x: (..., S) noisy bits.
        bits: (..., S) the clean bits in the coding's values; between them they are probabilities.
        sigma: at least 0.
        kind: "squared" or "bce".
        coding, clip: as in `posterior`.

    Returns:
        (...) float32 or wider: per sequence of x (B, S), per token of x (B, L, w). Differentiable in residual
        and x (through the matched filter, 0 where the clip binds), not in bits and sigma. With "bce" an
        infinite logit gives NaN.

    Raises:
        TypeError: dtypes. ValueError: shapes, sigma, clip, kind. NotImplementedError: a gradient in bits or
            sigma is asked for.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> x, clean = torch.tensor([[0.5, 1.0]]), torch.tensor([[0.0, 1.0]])
        >>> bits.loss(torch.zeros(1, 2), x, clean, 0.5)
        tensor([0.1321])
        >>> bits.loss(torch.zeros(1, 2), x, clean, 0.5, kind="bce")
        tensor([0.4100])
    """
    op = "bits.loss"
    code = values_of(op, coding)
    checks.option(op, "kind", kind, ("squared", "bce"))
    residual, x, bits = inputs(op, residual=residual, x=x, bits=bits)
    checks.no_gradient(op, "bits", bits)
    gain = slope_of(op, x, sigma, code)
    clip = clip_of(op, clip)
    mean: Tensor = torch.ops.dlcore.bits_loss(residual, x, bits, gain, *code, clip, kind == "squared")
    return mean


def edm_weight(sigma: float | Tensor, *, coding: str = "01") -> float | Tensor:
    """EDM's λ(σ) = (σ² + σ_d²)/(σ·σ_d)², with σ_d the deviation of a fair bit: 1/2 ("01") or 1 ("pm1").

    Args:
        sigma: at least 0, a number or a real tensor (...). 0 has the weight inf.
        coding: "01" or "pm1".

    Returns:
        A float for a number, else (...) float32 or wider. Differentiable.

    Raises:
        TypeError: types. ValueError: sigma, coding.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.edm_weight(torch.tensor([0.5, 80.0]))
        tensor([8.0000, 4.0002])
    """
    op = "bits.edm_weight"
    low, high = values_of(op, coding)
    least = 4 / (high - low) ** 2
    if isinstance(sigma, Tensor):
        checks.non_negative(op, "sigma", sigma)
        return least + sigma.to(result_dtype(sigma)) ** -2.0
    inverse = 1 / sigma if checks.real(op, "sigma", sigma, 0.0) > 0 else math.inf
    return least + inverse * inverse


def scale_input(x: Tensor, sigma: float | Tensor, *, coding: str = "01") -> Tensor:
    """What a network is fed: (x - centre)/√(σ² + σ_d²), of variance 1 for fair bits. Differentiable in x.

    Also for self-conditioning on probabilities, which CoBit centres and scales alike.

    Example:
        >>> import torch
        >>> from dlcore import bits
        >>> bits.scale_input(torch.tensor([1.0, 0.5]), 0.0)
        tensor([1., 0.])
    """
    op = "bits.scale_input"
    low, high = values_of(op, coding)
    (x,) = inputs(op, x=x)
    (spread,) = parameters(x, level(op, "sigma", sigma, x), dtype=torch.float64)
    gain = gaussian.precondition(spread, (high - low) / 2).c_in
    x = x.to(result_dtype(x))
    scaled: Tensor = (x - (low + high) / 2) * gain.to(x.dtype)
    return scaled
