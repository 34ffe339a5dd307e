"""The meaning of the uniform-state NELBO, in plain torch."""

from __future__ import annotations

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
    """NELBO per token (...) and (2, ...) float64: the logsumexp and V - Σ 1/(1 + c p).

    With c = Vα/(1-α), ℓ_j = log1p(c p_j), S = Σ ℓ_j, Λ = log1p(c), w = -α'/(Vα), n = V/(1-α), e = exp(-ℓ_z):
    z = x: w·{(V·ℓ_z - S - (V-1)·Λ)/(1+c) - n·(1/(1+c) - e)}
    z ≠ x: w·{(1+c)·Λ + c·(ℓ_z - ℓ_x) + V·ℓ_z - S - n·(1 - e)}
    """
    log_p = torch.log_softmax(transform(materialize(logits, weight, bias), z, shift), -1)
    dtype, vocab = log_p.dtype, log_p.shape[-1]
    alpha, dalpha = alpha.double().expand(z.shape), dalpha.double().expand(z.shape)
    log_p = log_p.double()
    log_c = (torch.log(alpha) + torch.log(torch.tensor(vocab)) - torch.log1p(-alpha)).unsqueeze(-1)
    ell = F.softplus(log_c + log_p, threshold=700)
    c = log_c.exp().squeeze(-1)
    lam = F.softplus(log_c.squeeze(-1), threshold=700)
    total = ell.sum(-1)
    at_z, at_x = (ell.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (z, x))
    n = vocab / (1 - alpha)
    same = (vocab * at_z - total - (vocab - 1) * lam) / (1 + c) - n * (1 / (1 + c) - (-at_z).exp())
    other = (1 + c) * lam + c * (at_z - at_x) + vocab * at_z - total + n * torch.expm1(-at_z)
    loss = -dalpha / (vocab * alpha) * torch.where(z == x, same, other)
    lse = torch.logsumexp(transform(materialize(logits, weight, bias), z, shift).double(), -1)
    ratio = (-torch.expm1(-ell)).sum(-1)
    return loss.to(dtype), torch.stack([lse, ratio]).detach()
