"""The meaning of bitstream diffusion's ops in torch: x = bit + σ·noise, bits of values low and high."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dlcore.reference import rng


def encode(tokens: Tensor, width: int, msb: bool, gray: bool, low: float, high: float) -> Tensor:
    """(...) -> (..., width)."""
    code = tokens ^ (tokens >> 1) if gray else tokens
    bits = (code.unsqueeze(-1) >> _places(width, msb, tokens.device)) & 1
    return bits.to(torch.float32) * (high - low) + low


def decode(x: Tensor, msb: bool, gray: bool, threshold: float, vocab: int) -> Tensor:
    """(..., width) -> (...); codes wrap around at `vocab` unless 0; -1 where a bit is NaN."""
    width = x.shape[-1]
    code = ((x > threshold).long() << _places(width, msb, x.device)).sum(-1)
    if gray:
        for shift in (1, 2, 4, 8, 16, 32):
            code = code ^ (code >> shift)
    if vocab > 0:
        code = code % vocab
    return code.masked_fill(x.isnan().any(-1), -1)


def _places(width: int, msb: bool, device: torch.device) -> Tensor:
    places = torch.arange(width, device=device)
    return places.flip(0) if msb else places


def matched_filter(x: Tensor, slope: Tensor, center: float, clip: float) -> Tensor:
    """clamp(slope·(x - center), ±clip): what x alone says of its bit."""
    return ((_wide(x) - center) * slope).clamp(-clip, clip).contiguous()


def posterior(x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float) -> Tensor:
    """sigmoid(residual + matched filter)."""
    return torch.sigmoid(_logits(x, residual, slope, center, clip)).contiguous()


def step(
    x: Tensor,
    residual: Tensor | None,
    coefficients: Tensor,
    low: float,
    high: float,
    clip: float,
    key: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """m + ratio·(x - m) + spread·normal with m the posterior mean, and the probabilities.

    coefficients (3, ...): slope, ratio, spread. Where the ratio is 1, x stays.
    """
    slope, ratio, spread = coefficients.unbind(0)
    probs = posterior(x, residual, slope, (low + high) / 2, clip)
    mean, x = low + (high - low) * probs, _wide(x)
    moved = torch.where(ratio == 1, x, mean + ratio * (x - mean)).contiguous()
    return moved if key is None else perturb(moved, spread, key), probs


def perturb(x: Tensor, spread: Tensor, key: Tensor) -> Tensor:
    """x + spread·normal; row r draws `rng.normal` of its key."""
    x = _wide(x)
    noise = rng.normal(rng.row_keys(key, x.shape[:-1]), [x.shape[-1]], x.dtype)
    return (x + spread * noise).contiguous()


def loss(
    residual: Tensor,
    x: Tensor,
    bits: Tensor,
    slope: Tensor,
    low: float,
    high: float,
    clip: float,
    squared: bool,
) -> Tensor:
    """Mean over the last dimension of (posterior mean - bit)², or of the cross-entropy."""
    logits = _logits(x, residual, slope, (low + high) / 2, clip)
    bit = (_wide(bits) - low) / (high - low)
    # By way of logarithms neither p - b nor p·(1 - p) cancels at either end, nor do their derivatives.
    log_set, log_clear = F.logsigmoid(logits), F.logsigmoid(-logits)
    if not squared:
        return -(bit * log_set + (1 - bit) * log_clear).mean(-1)
    error = (1 - bit) * log_set.exp() - bit * log_clear.exp()
    return (((high - low) * error) ** 2).mean(-1)


def _logits(x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float) -> Tensor:
    own = matched_filter(x, slope, center, clip)
    return own if residual is None else _wide(residual) + own


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
