"""Vocabulary drifts on the sphere as public code computes them, written from its formulas.

All take logits (rows, V), states x (rows, d) and a table (V, d) of unit rows, and keep several tensors of
rows × V.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: S-FLM's clamps.
_SHORT = 1e-6
#: Cells of the vMF table in the cosine and in κ.
CELLS = 1000


def slerp(logits: Tensor, x: Tensor, table: Tensor) -> Tensor:
    """The mean log map (S-FLM), in the dtype of x and table: float64 by its default."""
    p = torch.log_softmax(logits.to(x.dtype), -1).exp()
    cosine = (x @ table.T).clamp(-1 + _SHORT, 1 - _SHORT)
    omega = torch.arccos(cosine)
    weighed = p * (omega / torch.sin(omega).clamp(min=_SHORT))
    return weighed @ table - (weighed * cosine).sum(-1, keepdim=True) * x


def vmf_table(dim: int, kappa_max: float) -> Tensor:
    """ψ on a uniform grid of κ (rows) and the cosine, by the trapezoidal rule."""
    mu = torch.linspace(-1, 1, CELLS, dtype=torch.float64)[1:-1]
    kappa = torch.linspace(1e-3, kappa_max, CELLS, dtype=torch.float64).unsqueeze(-1)
    log_f = kappa * mu + (dim - 3) / 2 * torch.log1p(-mu * mu)
    f = (log_f - log_f.amax(-1, keepdim=True)).exp()
    moment = (mu * f).sum(-1, keepdim=True) / f.sum(-1, keepdim=True)
    total = torch.cumulative_trapezoid((mu - moment) * f, mu, dim=-1)
    psi = -torch.cat([total[:, :1], total], -1) / (f * (1 - mu * mu))
    fine = f * (1 - mu * mu) > 1e-14
    psi = torch.where(fine, psi, 1 / (dim - 1.0))
    return torch.cat([psi[:, :1], psi, psi[:, -1:]], -1).float()


def vmf(logits: Tensor, x: Tensor, table: Tensor, psi: Tensor, kappa: float, kappa_max: float) -> Tensor:
    """The vMF path's velocity by a bilinear look-up of ψ for every row and token (Spherical Flows)."""
    p = torch.softmax(logits, -1)
    cosine = (x @ table.T).clamp(-1, 1)
    column = (cosine + 1) / 2 * (CELLS - 1)
    left = column.floor().clamp(max=CELLS - 2)
    share, left = column - left, left.long()
    row = kappa / kappa_max * (CELLS - 1)
    below, part = int(row), row - int(row)
    at = [psi[r][left].lerp(psi[r][left + 1], share) for r in (below, below + 1)]
    weighed = p * at[0].lerp(at[1], part)
    return weighed @ table - (weighed * cosine).sum(-1, keepdim=True) * x


def score(logits: Tensor, x: Tensor, table: Tensor) -> Tensor:
    """The projected mean: the spherical Cauchy path's velocity, and the vMF score without its κ."""
    mean = torch.softmax(logits, -1) @ table
    return mean - (mean * x).sum(-1, keepdim=True) * x
