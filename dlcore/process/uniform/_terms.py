"""What the parts share: rows of logits and their tokens, and the shifted logit between the two predictors."""

from __future__ import annotations

import math
from typing import overload

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


@overload
def lift(alpha: Tensor, size: int) -> Tensor: ...


@overload
def lift(alpha: rows.Number, size: int) -> rows.Number: ...


def lift(alpha: rows.Number, size: int) -> rows.Number:
    """log1p(c): what a token's own observation adds to its logit; 0 where alpha = 1, beyond any shift."""
    if isinstance(alpha, float):
        return math.log1p(size * alpha / (1 - alpha)) if alpha < 1 else 0.0
    noisy = alpha < 1
    return torch.where(noisy, torch.log1p(size * alpha / torch.where(noisy, 1 - alpha, 1)), 0)


@overload
def shift(parameterization: str, alpha: Tensor, size: int) -> Tensor | None: ...


@overload
def shift(parameterization: str, alpha: rows.Number, size: int) -> rows.Number | None: ...


def shift(parameterization: str, alpha: rows.Number, size: int) -> rows.Number | None:
    """What makes leave-one-out logits of the network's."""
    return None if parameterization == "loo" else -lift(alpha, size)


def add_at(x: Tensor, z: Tensor, shift: Tensor) -> Tensor:
    return x.scatter_add(-1, z.unsqueeze(-1), shift.to(x.dtype).expand(z.shape).unsqueeze(-1))
