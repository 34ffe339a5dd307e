"""Reading logits as a softmax takes them: its parameters on the host, and device functions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton.rows import per_row

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(float("-inf"))
#: 2^d below this counts as 0.
FLOOR = tl.constexpr(-126.0)


class Softmax:
    """(softcap(logits) + shift·1[index]) / temperature, `exclude` at probability 0; as arguments."""

    def __init__(
        self,
        lead: torch.Size,
        index: Tensor | None = None,
        shift: Tensor | None = None,
        temperature: Tensor | None = None,
        softcap: float | None = None,
        exclude: int | None = None,
    ) -> None:
        self.index = None if index is None else index.contiguous()
        shift, shift_step = per_row(shift, lead)
        self.temperature = per_row(temperature, lead)
        self.entry = (self.index, shift, shift_step, softcap, exclude)
        self.args = (*self.entry, *self.temperature)


@triton.jit
def capped(x, cap):
    """cap·tanh(x / cap); +inf, which no row may hold, becomes NaN."""
    a = x / cap
    size = tl.abs(a)
    e = tl.exp2(size * -2.8853900817779268)
    far = (1.0 - e) / (1.0 + e)
    # Close to 0 its series, where 1 - e cancels.
    square = size * size
    p = tl.fma(square, -0.02186948853615520, 0.05396825396825397)
    p = tl.fma(square, p, -0.13333333333333333)
    p = tl.fma(square, p, 0.3333333333333333)
    tanh = tl.where(size < 0.3, size - size * square * p, far)
    return tl.where(x == float("inf"), float("nan"), tl.where(a < 0.0, -tanh, tanh) * cap)


@triton.jit
def row_shift(row, index, shift, shift_step):
    """(index, shift) of rows; -1 and 0 where there is none."""
    at = tl.full(row.shape, -1, tl.int64)
    bonus = tl.full(row.shape, 0.0, tl.float32)
    if index is not None:
        at = tl.load(index + row)
        if shift is not None:
            bonus = tl.load(shift + row * shift_step)
    return at, bonus


@triton.jit
def inverse_temperature(row, temperature, step):
    """1 / temperature of rows; temperature 0 counts as 1."""
    if temperature is None:
        return tl.full(row.shape, 1.0, tl.float32)
    else:
        t = tl.load(temperature + row * step)
        return tl.div_rn(tl.full(t.shape, 1.0, tl.float32), tl.where(t == 0.0, 1.0, t))


@triton.jit
def transformed(x, token, at, bonus, softcap, exclude):
    """Entries of a row before the temperature, float32."""
    x = x.to(tl.float32)
    if softcap is not None:
        x = capped(x, softcap)
    x = tl.where(token == at, x + bonus, x)
    if exclude is not None:
        x = tl.where(token == exclude, NONE, x)
    return x


@triton.jit
def entries(data, column, columns, first, at, bonus, softcap, exclude):
    """Transformed entries in some columns of a tile that starts at token `first`, -inf past its end."""
    inside = column < columns
    x = transformed(tl.load(data + column, inside, NONE), first + column, at, bonus, softcap, exclude)
    return tl.where(inside, x, NONE)


@triton.jit
def power(d):
    """2^d, 0 far below; NaN stays NaN."""
    return tl.where(d < FLOOR, 0.0, tl.exp2(d))


@triton.jit
def sums(x, top, scale):
    """Each row's Σ 2^d and Σ 2^d·d, where d is an entry's distance to `top` times scale."""
    d = (x - tl.where(top > NONE, top, 0.0)[:, None]) * scale
    e = power(d)
    return tl.sum(e, 1), tl.sum(e * tl.maximum(d, FLOOR), 1)


@triton.jit
def summary(x, scale):
    """Each row's largest entry, and the sums relative to it."""
    top = tl.max(x, 1)
    total, weighted = sums(x, top, scale)
    return top, total, weighted
