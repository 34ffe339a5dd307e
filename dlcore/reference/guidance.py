"""The meaning of guided draws, in plain torch over two streams of (..., V) logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore.reference.categorical import _invalid, draw, transform


def blend(c: Tensor, u: Tensor, gamma: Tensor) -> Tensor:
    """γ·c + (1-γ)·u, with -inf wherever a stream of non-zero weight has it."""
    g = gamma.to(torch.promote_types(c.dtype, u.dtype)).unsqueeze(-1)
    never_c, never_u = torch.isneginf(c), torch.isneginf(u)
    blended = torch.lerp(u.masked_fill(never_u, 0).to(g.dtype), c.masked_fill(never_c, 0).to(g.dtype), g)
    return blended.masked_fill((never_c & (g != 0)) | (never_u & (g != 1)), -torch.inf)


def cfg_uniform_step(
    cond: Tensor, uncond: Tensor, z: Tensor, coefficients: Tensor, exclude: int | None, key: Tensor
) -> Tensor:
    """A draw from γ·log m_c(y) + (1-γ)·log m_u(y) + bonus·1[y = z], where m(y) = α_s·p(y) + (1-α_s)/V.

    p is the softmax of (logits + shift·1[y = z]) / temperature, `exclude` has probability 0 and does not
    count in V. coefficients (..., 6): gamma, temperature, shift, alpha_s, bonus, and whether to keep z, which
    needs no logits. Where alpha_s = 1, a token with -inf in a stream of non-zero weight is impossible. -1
    where either stream is broken, whatever its weight, and where no token is possible.

    Source: D-CFG, arXiv 2412.10193, on posteriors.
    """
    gamma, temperature, shift, alpha_s, bonus, keep = coefficients.expand(*z.shape, -1).unbind(-1)
    signal = alpha_s.log().unsqueeze(-1)
    noise = (torch.log1p(-alpha_s) - math.log(cond.shape[-1] - (exclude is not None))).unsqueeze(-1)
    streams = [transform(x.double(), z, shift, temperature, None, exclude) for x in (cond, uncond)]
    c, u = (torch.logaddexp(signal + torch.log_softmax(x, -1), noise.expand_as(x)) for x in streams)
    guided = transform(blend(c, u, gamma), z, bonus, None, None, exclude)
    broken = torch.isneginf(guided).all(-1)
    for logits, x in zip((cond, uncond), streams, strict=True):
        broken |= _invalid(logits, x, exclude)
    tokens = draw(guided.masked_fill(broken.unsqueeze(-1), 0), key).masked_fill(broken, -1)
    return torch.where(keep != 0, z, tokens)
