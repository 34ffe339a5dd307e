"""The noise levels of bits: per sequence, per token or per bit, as numbers as long as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._gaussian import alike, root
from dlcore._ops.declare import result_dtype

#: σ² is taken to be at least this, so that x exactly between the two bits has logit 0 at σ = 0 too.
LEAST_VARIANCE = 1e-12
LIMITS = torch.finfo(torch.float32)
Level = float | Tensor


def inputs(op: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Floating tensors of one shape and device, all in float64 if one is."""
    alike(op, **tensors)
    if any(x.dtype == torch.float64 for x in tensors.values()):
        return tuple(x.double() for x in tensors.values())
    return tuple(tensors.values())


def with_residual(op: str, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The same for x and a residual that may be missing."""
    if residual is None:
        return inputs(op, x=x)[0], None
    x, residual = inputs(op, x=x, residual=residual)
    return x, residual


def level(op: str, name: str, value: Level, x: Tensor, low: float = 0.0) -> Level:
    """A parameter that broadcasts to x: one per row, or of x's number of dimensions; a number as it is."""
    if not isinstance(value, Tensor) and not torch.compiler.is_compiling():
        return checks.real(op, name, value, low, LIMITS.max)
    per_element = isinstance(value, Tensor) and value.dim() == x.dim()
    lead = x.shape if per_element else x.shape[:-1]
    # A level per bit is as many numbers as x has: no wider than x's results.
    dtype = result_dtype(x) if per_element else torch.float64
    levels = checks.within(op, name, checks.number(op, name, value, lead, x.device, dtype), low, LIMITS.max)
    return levels if per_element else levels.unsqueeze(-1)


def clip_of(op: str, clip: float) -> float:
    """The largest logit."""
    return checks.real(op, "clip", clip, 0.0)


def ratio(op: str, there: Level, here: Level) -> Level:
    """σ'/σ, which float32 must hold."""
    kept = there / here
    if isinstance(kept, Tensor):
        return checks.within(op, "sigma_next / sigma", kept, 0, LIMITS.max)
    return checks.real(op, "sigma_next / sigma", kept, 0.0, LIMITS.max)


def wide(value: Level) -> Level:
    """A tensor in float32 or wider, a number as it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32)) if isinstance(value, Tensor) else value


def aligned(x: Tensor, *values: Level) -> tuple[Level, ...]:
    """Levels that broadcast with one another: those per row get a last dimension if another is per bit."""
    per_bit = [isinstance(v, Tensor) and v.dim() == x.dim() for v in values]
    if not any(per_bit):
        return values
    return tuple(
        v.unsqueeze(-1) if isinstance(v, Tensor) and not whole else v
        for v, whole in zip(values, per_bit, strict=True)
    )


def parameters(x: Tensor, *values: Level, dtype: torch.dtype | None = None) -> Tensor:
    """Parameters (n, ...) that broadcast to x, in the dtype of its results; (n,) if all are numbers."""
    dtype = result_dtype(x) if dtype is None else dtype
    like = next((v for v in values if isinstance(v, Tensor)), None)
    if like is None and x.is_cpu:
        return torch.tensor(values, dtype=dtype)
    if like is None:  # to be filled: a copy from the host would wait for the device
        like = torch.empty((), dtype=dtype, device=x.device)
    tensors = (v if isinstance(v, Tensor) else torch.full_like(like, v) for v in values)
    return torch.stack(torch.broadcast_tensors(*tensors)).to(dtype)


def slope(sigma: Level, coding: tuple[float, float]) -> Level:
    """The matched filter's logit per unit of x."""
    variance = sigma * sigma
    if isinstance(variance, Tensor):
        return (coding[1] - coding[0]) / variance.clamp(min=LEAST_VARIANCE)
    return (coding[1] - coding[0]) / max(variance, LEAST_VARIANCE)


def spread(sigma: Level, gamma: Level, noise_scale: Level) -> Level:
    """The deviation of noise that lifts sigma to sigma·(1 + gamma)."""
    square = gamma * (2 + gamma)
    return noise_scale * sigma * (root(square) if isinstance(square, Tensor) else square**0.5)
