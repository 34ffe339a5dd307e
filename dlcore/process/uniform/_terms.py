"""What the parts share: rows of logits and their tokens, and the shifted logit between the two predictors."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows

Logits = Tensor | LinearLogits


def observed(op: str, logits: Logits, z: Tensor, exclude: int | None = None) -> int:
    """The number of tokens that noise may take, after checks of logits and z."""
    h = categorical.head(op, logits)
    rows.tokens(op, "z", z, h)
    return rows.vocabulary(op, h.vocab, exclude)


def lift(alpha: Tensor, size: int) -> Tensor:
    """log1p(c): what a token's own observation adds to its logit; 0 where alpha = 1, beyond any shift."""
    noisy = alpha < 1
    return torch.where(noisy, torch.log1p(size * alpha / torch.where(noisy, 1 - alpha, 1)), 0)


def shift(parameterization: str, alpha: Tensor, size: int) -> Tensor | None:
    """What makes leave-one-out logits of the network's."""
    return None if parameterization == "loo" else -lift(alpha, size)


def add_at(x: Tensor, z: Tensor, shift: Tensor) -> Tensor:
    return x.scatter_add(-1, z.unsqueeze(-1), shift.to(x.dtype).expand(z.shape).unsqueeze(-1))
