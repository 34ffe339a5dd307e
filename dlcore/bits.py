"""Bitstream diffusion: tokens as `width` bits, x = bit + σ·noise per bit, and a posterior per bit.

Codings: bits are {0, 1} ("01": CoBit) or {-1, 1} ("pm1": Analog Bits); σ is in the coding's own units, so
x and σ of "pm1" are 2x - 1 and 2σ of "01". Probabilities are always those of a set bit, in [0, 1].

What x alone says of its bit is the matched filter, the logit (x - 1/2)/σ² ("01") or 2x/σ² ("pm1"), clamped to
±clip; a network adds a residual logit. Sums are made in float32 whatever the inputs' dtypes; a float64 input
makes everything float64 (on the reference).

Noise levels sigma and gamma are ``float | Tensor``: they broadcast to the leading dimensions of x (one per
sequence of x (B, S), one per token of x (B, L, w)), or, with as many dimensions as x, to x itself (one per
bit). Row r of x is x.flatten(0, -2)[r]; its noise is `rng.normal` of its key to 2e-6 (float32), so chunks of
rows with `rng.split` keys agree with the whole; it costs least on long rows: noise x (B, S), not (B, L, w).
NaN in x or in a residual gives NaN at that place alone, be the place held or moved.

Sources: CoBit, Batzolis et al., arXiv 2605.07013; Analog Bits, Chen, Zhang and Hinton, ICLR 2023.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore.bit_codes import decode, encode, patch, unpatch, values_of
from dlcore.entropy_schedule import EntropySchedule

__all__ = [
    "EntropySchedule",
    "churn",
    "churn_gamma",
    "corrupt",
    "decode",
    "edm_weight",
    "encode",
    "euler_step",
    "heun_step",
    "loss",
    "matched_filter",
    "patch",
    "posterior",
    "scale_input",
    "step",
    "unpatch",
]

#: σ² is taken to be at least this, so that x exactly between the two bits has logit 0 at σ = 0 too.
LEAST_VARIANCE = 1e-12
#: The most that public samplers (EDM) raise a noise level by.
MOST_CHURN = math.sqrt(2) - 1
LIMITS = torch.finfo(torch.float32)


def _clip(op: str, clip: float) -> float:
    return checks.real(op, "clip", clip, 0.0)


def _inputs(op: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating tensors of one shape and device, all in float64 if one is."""
    first, like = next(iter(tensors.items()))
    for name, x in tensors.items():
        checks.floating(op, name, x)
        if x.shape != like.shape:
            wanted = f"{first}'s shape {tuple(like.shape)}"
            raise ValueError(f"{op}: {name} must have {wanted}, got {tuple(x.shape)}")
        checks.on_device(op, name, x, like.device)
    if any(x.dtype == torch.float64 for x in tensors.values()):
        return tuple(x.double() for x in tensors.values())
    return tuple(tensors.values())


def _with_residual(op: str, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if residual is None:
        return _inputs(op, x=x)[0], None
    x, residual = _inputs(op, x=x, residual=residual)
    return x, residual


def _level(op: str, name: str, value: float | Tensor, x: Tensor, low: float = 0.0) -> float | Tensor:
    """A parameter that broadcasts to x: one per row, or of x's number of dimensions; a number as it is."""
    if not isinstance(value, Tensor) and not torch.compiler.is_compiling():
        return checks.real(op, name, value, low, LIMITS.max)
    per_element = isinstance(value, Tensor) and value.dim() == x.dim()
    lead = x.shape if per_element else x.shape[:-1]
    # A level per bit is as many numbers as x has: no wider than x's results.
    level = checks.per_row(
        op, name, value, lead, x.device, _result_dtype(x) if per_element else torch.float64
    )
    if level is None:
        raise TypeError(f"{op}: {name} must be a number or a Tensor, got None")
    checks.value_range(op, name, level, low, LIMITS.max)
    return level if per_element else level.unsqueeze(-1)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(value: float | Tensor) -> float | Tensor:
    """A tensor in float32 or wider, a number as it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32)) if isinstance(value, Tensor) else value


def _aligned(x: Tensor, *values: float | Tensor) -> tuple[float | Tensor, ...]:
    """Levels that broadcast with one another: those per row get a last dimension if another is per bit."""
    per_bit = [isinstance(v, Tensor) and v.dim() == x.dim() for v in values]
    if not any(per_bit):
        return values
    return tuple(
        v.unsqueeze(-1) if isinstance(v, Tensor) and not whole else v
        for v, whole in zip(values, per_bit, strict=True)
    )


def _real_tensor(op: str, name: str, value: Tensor) -> None:
    """Noise levels of any shape."""
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{op}: {name} must be a real Tensor, got {checks.describe(value)}")
    checks.value_range(op, name, value, 0.0)


def _for(x: Tensor, *parameters: float | Tensor) -> Tensor:
    """Parameters (n, ...) that broadcast to x, in the dtype of its results."""
    if not any(isinstance(p, Tensor) for p in parameters):
        return torch.tensor(parameters, dtype=_result_dtype(x), device=x.device).unsqueeze(-1)
    like = next(p for p in parameters if isinstance(p, Tensor))
    tensors = (p if isinstance(p, Tensor) else torch.full_like(like, p) for p in parameters)
    return torch.stack(torch.broadcast_tensors(*tensors)).to(_result_dtype(x))


def _slope(sigma: float | Tensor, coding: tuple[float, float]) -> float | Tensor:
    """The matched filter's logit per unit of x."""
    variance = sigma * sigma
    if isinstance(variance, Tensor):
        return (coding[1] - coding[0]) / variance.clamp(min=LEAST_VARIANCE)
    return (coding[1] - coding[0]) / max(variance, LEAST_VARIANCE)


def _spread(sigma: float | Tensor, gamma: float | Tensor, noise_scale: float | Tensor) -> float | Tensor:
    """The deviation of noise that lifts sigma to sigma·(1 + gamma)."""
    return noise_scale * sigma * (gamma * (2 + gamma)) ** 0.5


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
    (x,) = _inputs(op, x=x)
    checks.no_gradient(op, "sigma", sigma)
    slope = _for(x, _slope(_level(op, "sigma", sigma, x), code))[0]
    filtered: Tensor = torch.ops.dlcore.bits_matched_filter(x, slope, sum(code) / 2, _clip(op, clip))
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
    x, residual = _with_residual(op, x, residual)
    checks.no_gradient(op, "sigma", sigma)
    slope = _for(x, _slope(_level(op, "sigma", sigma, x), code))[0]
    clip = _clip(op, clip)
    probs: Tensor = torch.ops.dlcore.bits_posterior(x, residual, slope, sum(code) / 2, clip)
    return probs


def corrupt(
    bits: Tensor,
    sigma: float | Tensor,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Noisy bits x = bits + σ·noise. Returns (..., S) float32 or wider; not differentiable.

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
    (bits,) = _inputs(op, bits=bits)
    return _perturb(op, bits, _level(op, "sigma", sigma, bits), key, generator)


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
        x̂ (..., S) float32 or wider, not differentiable, and σ̂, a number if sigma and gamma are, else a tensor
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
    (x,) = _inputs(op, x=x)
    levels = (_level(op, "sigma", sigma, x), _level(op, "gamma", gamma, x))
    spread = _spread(*levels, _level(op, "noise_scale", noise_scale, x))
    sigma, gamma = _aligned(x, _wide(sigma), _wide(gamma))
    return _perturb(op, x, spread, key, generator), sigma * (1 + gamma)


def _perturb(
    op: str, x: Tensor, spread: float | Tensor, key: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    key = checks.key(op, key, generator, x.shape[:-1], x.device)
    noisy: Tensor = torch.ops.dlcore.bits_perturb(x, _for(x, spread)[0], key)
    return noisy


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
    x, residual = _with_residual(op, x, residual)
    here, there = _level(op, "sigma", sigma, x, LIMITS.tiny), _level(op, "sigma_next", sigma_next, x)
    spread: float | Tensor = 0.0
    if isinstance(gamma_next, Tensor) or gamma_next != 0:
        gamma = _level(op, "gamma_next", gamma_next, x)
        spread = _spread(there, gamma, _level(op, "noise_scale", noise_scale, x))
        key = checks.key(op, key, generator, x.shape[:-1], x.device)
    else:
        key = None
    coefficients = _for(x, _slope(here, code), there / here, spread)
    clip = _clip(op, clip)
    moved: tuple[Tensor, Tensor] = torch.ops.dlcore.bits_step(x, residual, coefficients, *code, clip, key)
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
    low, high = values_of(op, coding)
    x, probs = _inputs(op, x=x, probs=probs)
    here, there = _level(op, "sigma", sigma, x, LIMITS.tiny), _level(op, "sigma_next", sigma_next, x)
    (ratio,) = _for(x, there / here)
    x = x.to(ratio.dtype)
    mean = low + (high - low) * probs.to(ratio.dtype)
    moved: Tensor = ratio * x + (1 - ratio) * mean
    return moved


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
    low, high = values_of(op, coding)
    x_next, probs, probs_next = _inputs(op, x_next=x_next, probs=probs, probs_next=probs_next)
    here = _level(op, "sigma", sigma, x_next, LIMITS.tiny)
    there = _level(op, "sigma_next", sigma_next, x_next)
    here, there = _for(x_next.double(), here, there)
    weight = torch.where(there > 0, here / torch.where(there > 0, there, 1) - 1, 0) * (high - low) / 2
    weight = weight.to(_result_dtype(x_next))
    return x_next + weight * (probs_next.to(weight.dtype) - probs.to(weight.dtype))


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
        _real_tensor(op, "sigma", sigma)
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
    residual, x, bits = _inputs(op, residual=residual, x=x, bits=bits)
    checks.no_gradient(op, "bits", bits)
    checks.no_gradient(op, "sigma", sigma)
    slope = _for(x, _slope(_level(op, "sigma", sigma, x), code))[0]
    clip = _clip(op, clip)
    mean: Tensor = torch.ops.dlcore.bits_loss(residual, x, bits, slope, *code, clip, kind == "squared")
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
        _real_tensor(op, "sigma", sigma)
        return least + _wide(sigma) ** -2.0
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
    (x,) = _inputs(op, x=x)
    level, deviation = _level(op, "sigma", sigma, x), (high - low) / 2
    (scale,) = _for(x, (level * level + deviation * deviation) ** -0.5)
    scaled: Tensor = (x.to(scale.dtype) - (low + high) / 2) * scale
    return scaled
