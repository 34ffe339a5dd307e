"""Bitstream diffusion on the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlcore import _cuda
from dlcore._tensors import empty
from dlcore.cpu.bits import Rows
from dlcore.cpu.tensors import keyed, rows_contiguous, view
from dlcore.cuda.tensors import call, scratch


def _result(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    return empty(x.shape if shape is None else shape, dtype, x.device)


def encode(tokens: Tensor, width: int, msb: bool, gray: bool, low: float, high: float) -> Tensor:
    """A fresh float32 tensor (..., width), on the device of the tokens."""
    tokens = tokens.contiguous()
    out = _result(tokens, (*tokens.shape, width))
    code = (tokens.data_ptr(), tokens.numel(), width, msb, gray, (low, high), out.data_ptr())
    call(_cuda.bit_encode, tokens, *code)
    return out


def decode(x: Tensor, msb: bool, gray: bool, threshold: float, vocab: int) -> Tensor:
    """Tokens (...); x is copied only if its last dimension has gaps."""
    x = rows_contiguous(x)
    tokens = _result(x, x.shape[:-1], torch.int64)
    call(_cuda.bit_decode, x, view(x), msb, gray, threshold, vocab, tokens.data_ptr())
    return tokens


def _logits(
    x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float, sigmoid: bool
) -> Tensor:
    rows, out = Rows(slope.unsqueeze(0), x, residual, join=True), _result(x)
    coding = (center, center, clip)
    call(_cuda.bit_logits, x, *rows.views, rows.parameters, coding, sigmoid, out.data_ptr())
    return out


def matched_filter(x: Tensor, slope: Tensor, center: float, clip: float) -> Tensor:
    """`posterior`'s logits without a residual, unsquashed, in a fresh float32 tensor of x's shape."""
    return _logits(x, None, slope, center, clip, sigmoid=False)


def posterior(x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float) -> Tensor:
    """A fresh float32 tensor of x's shape; rows that share a slope and lie back to back go as one."""
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
    noise = None if key is None else keyed(key)
    results = (moved.data_ptr(), probs.data_ptr())
    call(_cuda.bit_step, x, *rows.views, rows.parameters, (low, high, clip), noise, *results)
    return moved, probs


def perturb(x: Tensor, spread: Tensor, key: Tensor) -> Tensor:
    """A fresh, contiguous float32 tensor; the noise is made on the way and never stored."""
    key, rows, out = key.contiguous(), Rows(spread.unsqueeze(0), x), _result(x)
    call(_cuda.bit_perturb, x, *rows.views, rows.parameters, keyed(key), out.data_ptr())
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
    """Float32 means (...) from float64 sums of spans, added in one order and without atomics."""
    rows, means = Rows(slope.unsqueeze(0), residual, x, bits), _result(x, x.shape[:-1])
    sums = scratch(8 * means.numel() * _cuda.bit_loss_sums(means.numel(), x.shape[-1]), x)
    packed = (rows.views, rows.parameters, (low, high, clip), squared)
    call(_cuda.bit_loss, x, packed, sums.data_ptr(), means.data_ptr())
    return means


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
    residual_grad = _result(x, dtype=residual.dtype)
    x_grad = _result(x, x.shape if with_x else (0,), x.dtype)
    packed = (rows.views, rows.parameters, (low, high, clip), squared)
    grads = (view(residual_grad), view(x_grad) if with_x else None)
    call(_cuda.bit_loss_backward, x, packed, grad.data_ptr(), *grads)
    return residual_grad, x_grad
