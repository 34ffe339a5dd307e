"""Bitstream diffusion on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _C
from dlcore.cpu.tensors import View, keyed, rows_contiguous, threads, view

#: What drawing a normal costs, in elements read.
_NOISE = 8


class _Parameters:
    """float32 parameters (n, ...) that broadcast to x, as the kernels take them; keeps their memory alive."""

    def __init__(self, values: Tensor, x: Tensor) -> None:
        count, lead, columns = values.shape[0], x.shape[:-1], x.shape[-1]
        if values.numel() == count:
            shape, strides = (count,), (1, 0, 0)
        elif values.shape[-1] == 1:
            shape, strides = (count, *lead, 1), (lead.numel(), 1, 0)
        else:
            shape, strides = (count, *x.shape), (x.numel(), columns, 1)
        missing = x.dim() + 1 - values.dim()
        whole = values.view(count, *(1,) * missing, *values.shape[1:])
        self.values = (whole.reshape(shape) if len(shape) == 1 else whole.expand(shape)).contiguous()
        self.packed = (self.values.data_ptr(), *strides)


def _view(x: Tensor | None) -> View | None:
    return None if x is None else view(x)


def _rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else rows_contiguous(x)


def encode(tokens: Tensor, width: int, msb: bool, gray: bool, low: float, high: float) -> Tensor:
    tokens = tokens.contiguous()
    out = torch.empty((*tokens.shape, width), dtype=torch.float32)
    used = threads(out.numel())
    _C.bit_encode(tokens.data_ptr(), tokens.numel(), width, msb, gray, (low, high), out.data_ptr(), used)
    return out


def decode(x: Tensor, msb: bool, gray: bool, threshold: float, vocab: int) -> Tensor:
    x = rows_contiguous(x)
    tokens = torch.empty(x.shape[:-1], dtype=torch.int64)
    _C.bit_decode(view(x), msb, gray, threshold, vocab, tokens.data_ptr(), threads(x.numel()))
    return tokens


def _long_rows(
    parameters: Tensor, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with rows that share their parameters joined, where they lie back to back."""
    joinable = x.is_contiguous() and (residual is None or residual.is_contiguous())
    while joinable and x.dim() > 1 and parameters.shape[-1] == 1:
        if parameters.dim() > 2:
            if parameters.shape[-2] != 1:
                break
            parameters = parameters.squeeze(-2)
        x, residual = x.flatten(-2), None if residual is None else residual.flatten(-2)
    return parameters, x, residual


def _logits(
    x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float, sigmoid: bool
) -> Tensor:
    x, residual = rows_contiguous(x), _rows(residual)
    out = torch.empty(x.shape, dtype=torch.float32)
    values, x, residual = _long_rows(slope.unsqueeze(0), x, residual)
    parameters, coding = _Parameters(values, x), (center, center, clip)
    _C.bit_logits(
        view(x),
        _view(residual),
        parameters.packed,
        coding,
        sigmoid,
        out.data_ptr(),
        threads(x.numel()),
    )
    return out


def matched_filter(x: Tensor, slope: Tensor, center: float, clip: float) -> Tensor:
    return _logits(x, None, slope, center, clip, sigmoid=False)


def posterior(x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float) -> Tensor:
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
    x, residual = rows_contiguous(x), _rows(residual)
    key = None if key is None else key.contiguous()
    moved, probs = (torch.empty(x.shape, dtype=torch.float32) for _ in range(2))
    if key is None:
        coefficients, x, residual = _long_rows(coefficients, x, residual)
    parameters = _Parameters(coefficients, x)
    _C.bit_step(
        view(x),
        _view(residual),
        parameters.packed,
        (low, high, clip),
        None if key is None else keyed(key),
        moved.data_ptr(),
        probs.data_ptr(),
        threads(x.numel() * (1 if key is None else _NOISE)),
    )
    return moved, probs


def perturb(x: Tensor, spread: Tensor, key: Tensor) -> Tensor:
    x, key = rows_contiguous(x), key.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32)
    parameters = _Parameters(spread.unsqueeze(0), x)
    used = threads(x.numel() * _NOISE)
    _C.bit_perturb(view(x), parameters.packed, keyed(key), out.data_ptr(), used)
    return out


class _Loss:
    """A loss's inputs as the kernels take them."""

    def __init__(self, inputs: tuple[Tensor, ...], slope: Tensor, code: tuple[float, ...], squared: bool):
        self.inputs = tuple(map(rows_contiguous, inputs))
        self.parameters = _Parameters(slope.unsqueeze(0), self.inputs[1])
        residual, x, bits = map(view, self.inputs)
        low, high, clip = code
        self.packed = ((residual, x, bits), self.parameters.packed, (low, high, clip), squared)


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
    parts = _Loss((residual, x, bits), slope, (low, high, clip), squared)
    sums = torch.empty((*x.shape[:-1], _C.bit_spans(x.shape[-1])), dtype=torch.float64)
    _C.bit_loss(parts.packed, sums.data_ptr(), threads(x.numel()))
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
    parts = _Loss((residual, x, bits), slope, (low, high, clip), squared)
    grad = (grad / x.shape[-1]).contiguous()
    residual_grad = torch.empty(x.shape, dtype=residual.dtype)
    x_grad = torch.empty(x.shape if with_x else (0,), dtype=x.dtype)
    _C.bit_loss_backward(
        parts.packed,
        grad.data_ptr(),
        view(residual_grad),
        view(x_grad) if with_x else None,
        threads(x.numel()),
    )
    return residual_grad, x_grad
