"""Bitstream diffusion on the compiled kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcore import _C
from dlcore._tensors import empty
from dlcore.cpu.tensors import DTYPES, keyed, rows_contiguous, threads, view

#: What drawing a normal costs, in elements read.
_NOISE = 8


class Rows:
    """Tensors like x and parameters (n, ...) that broadcast to it, as kernels take them; keeps memory alive.

    With `join`, rows that share their parameters and lie back to back are one long row.
    """

    def __init__(self, parameters: Tensor, *tensors: Tensor | None, join: bool = False) -> None:
        self.tensors = tuple(None if x is None else rows_contiguous(x) for x in tensors)
        present = [x for x in self.tensors if x is not None]
        count, shape = parameters.shape[0], present[0].shape
        missing = len(shape) + 1 - parameters.dim()
        # The leading dimensions of x that the parameters tell apart.
        told = max((missing + i for i, n in enumerate(parameters.shape[1:], 1) if n != 1), default=0)
        each = told == len(shape)
        join = join and not each and all(x.is_contiguous() for x in present)
        kept = shape if each else shape[: told if join else -1]
        long = (kept.numel(), shape[told:].numel())
        self.views: tuple[Any, ...] = tuple(  # a View each, or None
            None if x is None else (x.data_ptr(), DTYPES[x.dtype], long, (long[1], 1)) if join else view(x)
            for x in self.tensors
        )
        if told == 0:
            self.values, strides = parameters.contiguous(), (1, 0, 0)
        else:
            own = parameters.reshape(count, *(1,) * missing, *parameters.shape[1:])
            own = own.reshape(own.shape[: len(kept) + 1])
            self.values = own.expand(count, *kept).contiguous()
            strides = (kept.numel(), shape[-1], 1) if each else (kept.numel(), 1, 0)
        self.parameters = (self.values.data_ptr(), *strides)


def _result(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)


def encode(tokens: Tensor, width: int, msb: bool, gray: bool, low: float, high: float) -> Tensor:
    """A fresh float32 (..., width), contiguous; tokens are copied unless contiguous."""
    tokens = tokens.contiguous()
    out = empty((*tokens.shape, width), torch.float32)
    used = threads(out.numel())
    _C.bit_encode(tokens.data_ptr(), tokens.numel(), width, msb, gray, (low, high), out.data_ptr(), used)
    return out


def decode(x: Tensor, msb: bool, gray: bool, threshold: float, vocab: int) -> Tensor:
    """A fresh int64 (...), contiguous; x may have any strides but in its last dimension."""
    x = rows_contiguous(x)
    tokens = empty(x.shape[:-1], torch.int64)
    _C.bit_decode(view(x), msb, gray, threshold, vocab, tokens.data_ptr(), threads(x.numel()))
    return tokens


def _logits(
    x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float, sigmoid: bool
) -> Tensor:
    """A fresh float32 tensor of x's shape; rows that share a slope and lie back to back go as one."""
    rows, out = Rows(slope.unsqueeze(0), x, residual, join=True), _result(x)
    used = threads(x.numel())
    seen, own = rows.views
    _C.bit_logits(seen, own, rows.parameters, (center, center, clip), sigmoid, out.data_ptr(), used)
    return out


def matched_filter(x: Tensor, slope: Tensor, center: float, clip: float) -> Tensor:
    """A fresh, contiguous float32 tensor, whatever x's dtype."""
    return _logits(x, None, slope, center, clip, sigmoid=False)


def posterior(x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float) -> Tensor:
    """A fresh, contiguous float32 tensor; x and residual are read once, in their own dtypes."""
    return _logits(x, residual, slope, center, clip, sigmoid=True)


def step(
    x: Tensor,
    residual: Tensor | None,
    coefficients: Tensor,
    low: float,
    high: float,
    clip: float,
    key: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Two fresh, contiguous float32 tensors, written in one pass; with a key each row draws its own noise."""
    key = None if key is None else key.contiguous()
    rows, moved, probs = Rows(coefficients, x, residual, join=key is None), _result(x), _result(x)
    seen, own = rows.views
    _C.bit_step(
        seen,
        own,
        rows.parameters,
        (low, high, clip),
        None if key is None else keyed(key),
        moved.data_ptr(),
        probs.data_ptr(),
        threads(x.numel() * (1 if key is None else _NOISE)),
    )
    return moved, probs


def perturb(x: Tensor, spread: Tensor, key: Tensor) -> Tensor:
    """A fresh, contiguous float32 tensor; the noise is made on the way and never stored."""
    key, rows, out = key.contiguous(), Rows(spread.unsqueeze(0), x), _result(x)
    _C.bit_perturb(rows.views[0], rows.parameters, keyed(key), out.data_ptr(), threads(x.numel() * _NOISE))
    return out


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
    """Float32 means (...) from float64 sums of spans, added in one order, whatever the threads."""
    rows = Rows(slope.unsqueeze(0), residual, x, bits)
    sums = empty((*x.shape[:-1], _C.bit_spans(x.shape[-1])), torch.float64)
    _C.bit_loss(
        (rows.views, rows.parameters, (low, high, clip), squared), sums.data_ptr(), threads(x.numel())
    )
    return (sums.sum(-1) / x.shape[-1]).float()


def loss_backward(
    grad: Tensor,
    residual: Tensor,
    x: Tensor,
    bits: Tensor,
    slope: Tensor,
    low: float,
    high: float,
    clip: float,
    squared: bool,
    with_x: bool,
) -> tuple[Tensor, Tensor]:
    """Contiguous gradients in the dtypes of residual and x; that of x is empty unless `with_x`."""
    rows = Rows(slope.unsqueeze(0), residual, x, bits)
    grad = (grad / x.shape[-1]).contiguous()
    residual_grad = empty(x.shape, residual.dtype)
    x_grad = empty(x.shape if with_x else (0,), x.dtype)
    _C.bit_loss_backward(
        (rows.views, rows.parameters, (low, high, clip), squared),
        grad.data_ptr(),
        view(residual_grad),
        view(x_grad) if with_x else None,
        threads(x.numel()),
    )
    return residual_grad, x_grad
