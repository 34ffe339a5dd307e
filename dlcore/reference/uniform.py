"""The meaning of the uniform-state NELBO, in plain torch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dlcore.reference.categorical import materialize, transform


def nelbo(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    x: Tensor,
    alpha: Tensor,
    dalpha: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """NELBO per token (...), and (5, ...) float64 for its gradient.

    The five are logsumexp, log p(z), log p(x), Σ log1p(c p) and Σ c p / (1 + c p).

    With c = Vα/(1-α), ℓ_j = log1p(c p_j), S = Σ ℓ_j, Λ = log1p(c), w = -α'/(Vα), n = V/(1-α), e = exp(-ℓ_z):
    z = x: w·{(V·ℓ_z - S - (V-1)·Λ)/(1+c) - n·(1/(1+c) - e)}
    z ≠ x: w·{(1+c)·Λ + c·(ℓ_z - ℓ_x) + V·ℓ_z - S - n·(1 - e)}
    """
    raw = transform(materialize(logits, weight, bias), z, shift)
    dtype, vocab = raw.dtype, raw.shape[-1]
    lse = torch.logsumexp(raw.double(), -1)
    log_p = raw.double() - lse.unsqueeze(-1)
    alpha, dalpha = alpha.double().expand(z.shape), dalpha.double().expand(z.shape)
    log_c = torch.log(alpha) + math.log(vocab) - torch.log1p(-alpha)
    c, lam = log_c.exp(), F.softplus(log_c, threshold=700)
    ell = F.softplus(log_c.unsqueeze(-1) + log_p, threshold=700)
    total = ell.sum(-1)
    at_z, at_x = _gather(ell, z), _gather(ell, x)
    n = vocab / (1 - alpha)
    same = (vocab * at_z - total - (vocab - 1) * lam) / (1 + c) - n * (1 / (1 + c) - (-at_z).exp())
    other = (1 + c) * lam + c * (at_z - at_x) + vocab * at_z - total + n * torch.expm1(-at_z)
    loss = -dalpha / (vocab * alpha) * torch.where(z == x, same, other)
    ratio = (-torch.expm1(-ell)).sum(-1)
    saved = torch.stack([lse, _gather(log_p, z), _gather(log_p, x), total, ratio])
    return loss.to(dtype), saved.detach()


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(-1, index.unsqueeze(-1)).squeeze(-1)
