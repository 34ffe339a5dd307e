"""Bitstream diffusion in Triton: one read and one write, noise included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton.functions import exponential, normals
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.noise import ELEMENT, log1p, row_key
from dlcore.triton.rows import row_offset, rows_of

#: Elements of a program, and so columns of a tile at most.
_TILE = 1024
#: What parameters are shared by: all elements, those of a row, none.
_ALL, _ROW, _ELEMENT = (tl.constexpr(form) for form in range(3))


@triton.jit
def _place(rows, columns, spans, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (ROWS, 1), columns (1, BLOCK), and which of them there are, of a program's tile."""
    program = tl.program_id(0)
    row = (program // spans).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % spans * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _load(data, row, column, live, inner, outer, step):
    return tl.load(data + row_offset(row, inner, outer, step) + column, live, 0.0).to(tl.float32)


@triton.jit
def _parameter(parameters, k, rows, columns, row, column, live, FORM: tl.constexpr):
    """The k-th parameter of a tile's elements."""
    if FORM == _ALL:
        return tl.load(parameters + k)
    elif FORM == _ROW:
        return tl.load(parameters + k * rows + row, row < rows, 0.0)
    else:
        return tl.load(parameters + (k * rows + row) * columns + column, live, 0.0)


@triton.jit
def _noise(keys, row, rows, columns, spans, PER_ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Normal numbers of a tile."""
    seed, offset = row_key(keys, tl.where(row < rows, row, 0), PER_ROW)
    return normals(seed, offset, ELEMENT, tl.program_id(0) % spans * BLOCK, BLOCK)


@triton.jit
def _filter(x, slope, center, clip):
    """What x alone says of its bit, as it is and within ±clip; NaN stays NaN."""
    raw = (x - center) * slope
    return raw, tl.where(raw < -clip, -clip, tl.where(raw > clip, clip, raw))


@triton.jit
def _sigmoid(logit):
    """1 / (1 + e^-l), as of the nearer end for logits beyond ±86."""
    return 1.0 / (exponential(-tl.where(logit < -86.0, -86.0, tl.where(logit > 86.0, 86.0, logit))) + 1.0)


@triton.jit
def _both_sigmoids(logit):
    """sigmoid(l) and 1 - sigmoid(l), both with small relative errors, and exp(-|l|)."""
    size = tl.abs(logit)
    tail = exponential(-tl.where(size > 86.0, 86.0, size))
    large = 1.0 / (tail + 1.0)
    small = tail * large
    return tl.where(logit < 0, small, large), tl.where(logit < 0, large, small), tail


@triton.jit(do_not_specialize=["rows", "spans", "x_inner", "r_inner"])
def bits_logits_kernel(
    x, x_inner, x_outer, x_step, residual, r_inner, r_outer, r_step, slopes, out,
    rows, columns, spans, center, clip,
    RESIDUAL: tl.constexpr, FORM: tl.constexpr, SIGMOID: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual + clamp(slope·(x - center), ±clip), or its sigmoid."""
    row, column, live = _place(rows, columns, spans, ROWS, BLOCK)
    slope = _parameter(slopes, 0, rows, columns, row, column, live, FORM)
    _, logit = _filter(_load(x, row, column, live, x_inner, x_outer, x_step), slope, center, clip)
    if RESIDUAL:
        logit += _load(residual, row, column, live, r_inner, r_outer, r_step)
    if SIGMOID:
        logit = _sigmoid(logit)
    tl.store(out + row * columns + column, logit, live)


@triton.jit(do_not_specialize=["rows", "spans", "x_inner", "r_inner"])
def bits_step_kernel(
    x, x_inner, x_outer, x_step, residual, r_inner, r_outer, r_step, coefficients, keys, moved, probs,
    rows, columns, spans, low, high, clip,
    RESIDUAL: tl.constexpr, FORM: tl.constexpr, NOISE: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p = sigmoid(logits), m = low + (high - low)·p, x <- ratio·x + (1 - ratio)·m + spread·normal."""
    row, column, live = _place(rows, columns, spans, ROWS, BLOCK)
    slope = _parameter(coefficients, 0, rows, columns, row, column, live, FORM)
    ratio = _parameter(coefficients, 1, rows, columns, row, column, live, FORM)
    here = _load(x, row, column, live, x_inner, x_outer, x_step)
    _, logit = _filter(here, slope, (low + high) * 0.5, clip)
    if RESIDUAL:
        logit += _load(residual, row, column, live, r_inner, r_outer, r_step)
    p = _sigmoid(logit)
    # Where the ratio is 1 x stays, to the bit.
    rest = 1.0 - ratio
    next_x = ratio * here + rest * low + rest * (high - low) * p
    if NOISE:
        spread = _parameter(coefficients, 2, rows, columns, row, column, live, FORM)
        next_x += spread * _noise(keys, row, rows, columns, spans, PER_ROW, BLOCK)
    at = row * columns + column
    tl.store(probs + at, p, live)
    tl.store(moved + at, next_x, live)


@triton.jit(do_not_specialize=["rows", "spans", "x_inner"])
def bits_perturb_kernel(
    x, x_inner, x_outer, x_step, spreads, keys, out, rows, columns, spans,
    FORM: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x + spread·normal."""
    row, column, live = _place(rows, columns, spans, ROWS, BLOCK)
    spread = _parameter(spreads, 0, rows, columns, row, column, live, FORM)
    noise = _noise(keys, row, rows, columns, spans, PER_ROW, BLOCK)
    noisy = _load(x, row, column, live, x_inner, x_outer, x_step) + spread * noise
    tl.store(out + row * columns + column, noisy, live)


@triton.jit(do_not_specialize=["rows", "spans", "x_inner", "r_inner", "b_inner"])
def bits_loss_kernel(
    residual, r_inner, r_outer, r_step, x, x_inner, x_outer, x_step, bits, b_inner, b_outer, b_step, slopes,
    sums, grad, residual_grad, x_grad, rows, columns, spans, low, high, clip, scale,
    FORM: tl.constexpr, SQUARED: tl.constexpr, BACKWARD: tl.constexpr, WITH_X: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared errors p - b or cross-entropies, summed over a tile's rows: (rows, spans); or gradients."""
    row, column, live = _place(rows, columns, spans, ROWS, BLOCK)
    slope = _parameter(slopes, 0, rows, columns, row, column, live, FORM)
    noisy = _load(x, row, column, live, x_inner, x_outer, x_step)
    raw, own = _filter(noisy, slope, (low + high) * 0.5, clip)
    logit = _load(residual, row, column, live, r_inner, r_outer, r_step) + own
    bit = (_load(bits, row, column, live, b_inner, b_outer, b_step) - low) / (high - low)
    p, rest, tail = _both_sigmoids(logit)
    # p - b without cancellation at either end.
    error = p * (1.0 - bit) - rest * bit
    if BACKWARD:
        slant = error * scale * tl.load(grad + row, row < rows, 0.0)
        if SQUARED:
            slant *= p * rest
        at = row * columns + column
        tl.store(residual_grad + at, slant.to(residual_grad.dtype.element_ty), live)
        if WITH_X:
            in_x = tl.where(tl.abs(raw) > clip, 0.0, slant * slope)
            tl.store(x_grad + at, in_x.to(x_grad.dtype.element_ty), live)
    else:
        if SQUARED:
            loss = error * error * scale
        else:
            loss = (tl.where(logit < 0, 0.0, logit) - bit * logit + log1p(tail)) * scale
        total = tl.sum(tl.where(live, loss, 0.0), 1, keep_dims=True)
        tl.store(sums + row * spans + tl.program_id(0) % spans, total, row < rows)


@triton.jit(do_not_specialize=["count", "width"])
def bits_encode_kernel(
    tokens, out, count, width, low, high,
    MSB: tl.constexpr, GRAY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens to bits."""
    row, column, live = _place(count, width, 1, ROWS, BLOCK)
    code = tl.load(tokens + row, row < count, 0)
    if GRAY:
        code = code ^ (code >> 1)
    place = width - 1 - column if MSB else column
    # Lanes past the width shift by what there is.
    place = tl.where(column < width, place, 0)
    tl.store(out + row * width + column, tl.where(((code >> place) & 1) != 0, high, low), live)


@triton.jit(do_not_specialize=["rows", "width", "x_inner", "vocab"])
def bits_decode_kernel(
    x, x_inner, x_outer, x_step, tokens, rows, width, threshold, vocab,
    MSB: tl.constexpr, GRAY: tl.constexpr, WRAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Bits to tokens; -1 where a bit is NaN."""
    row, column, live = _place(rows, width, 1, ROWS, BLOCK)
    bit = _load(x, row, column, live, x_inner, x_outer, x_step)
    place = width - 1 - column if MSB else column
    place = tl.where(column < width, place, 0)
    code = tl.sum(((bit > threshold) & live).to(tl.int64) << place, 1, keep_dims=True)
    if GRAY:
        code = code ^ (code >> 1)
        code = code ^ (code >> 2)
        code = code ^ (code >> 4)
        code = code ^ (code >> 8)
        code = code ^ (code >> 16)
        code = code ^ (code >> 32)
    if WRAP:
        code = code % vocab
    broken = tl.max((bit != bit).to(tl.int32), 1, keep_dims=True)
    tl.store(tokens + row, tl.where(broken > 0, -1, code), row < rows)


def _tiling(rows: int, columns: int, warps: int = 4) -> tuple[int, int, dict[str, Any]]:
    """So many programs, tiles abreast in a row, and the programs' constants.

    Fewer `warps` do less twice where there is noise: each of them finds the row's key.
    """
    block = power_of_two(columns, 16, _TILE)
    spans, height = ceil_div(columns, block), _TILE // block
    constants = {"ROWS": height, "BLOCK": block, "num_warps": warps if height == 1 else 4}
    return ceil_div(rows, height) * spans, spans, constants


def _parameters(values: Tensor, x: Tensor) -> tuple[Tensor, int]:
    """float32 parameters (n, ...) that broadcast to x as the kernels take them, and who shares them."""
    count, lead = values.shape[0], x.shape[:-1]
    if values.numel() == count:
        return values.reshape(count), _ALL.value
    missing = x.dim() + 1 - values.dim()
    whole = values.reshape(count, *(1,) * missing, *values.shape[1:])
    if values.shape[-1] == 1:
        return whole.expand(count, *lead, 1).contiguous(), _ROW.value
    return whole.expand(count, *x.shape).contiguous(), _ELEMENT.value


def encode(tokens: Tensor, width: int, msb: bool, gray: bool, low: float, high: float) -> Tensor:
    tokens = tokens.contiguous()
    out = torch.empty((*tokens.shape, width), dtype=torch.float32, device=tokens.device)
    programs, _, constants = _tiling(tokens.numel(), width)
    launch(
        bits_encode_kernel,
        programs,
        tokens,
        tokens,
        out,
        tokens.numel(),
        width,
        low,
        high,
        MSB=msb,
        GRAY=gray,
        **constants,
    )
    return out


def decode(x: Tensor, msb: bool, gray: bool, threshold: float, vocab: int) -> Tensor:
    tokens = torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)
    programs, _, constants = _tiling(tokens.numel(), x.shape[-1])
    launch(
        bits_decode_kernel,
        programs,
        x,
        *rows_of(x),
        tokens,
        tokens.numel(),
        x.shape[-1],
        threshold,
        vocab,
        MSB=msb,
        GRAY=gray,
        WRAP=vocab > 0,
        **constants,
    )
    return tokens


def _logits(
    x: Tensor, residual: Tensor | None, slope: Tensor, center: float, clip: float, sigmoid: bool
) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    slopes, form = _parameters(slope.unsqueeze(0), x)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    programs, spans, constants = _tiling(rows, columns)
    launch(
        bits_logits_kernel,
        programs,
        x,
        *rows_of(x),
        *rows_of(x if residual is None else residual),
        slopes,
        out,
        rows,
        columns,
        spans,
        center,
        clip,
        RESIDUAL=residual is not None,
        FORM=form,
        SIGMOID=sigmoid,
        **constants,
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
    moved, probs = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    values, form = _parameters(coefficients, x)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    programs, spans, constants = _tiling(rows, columns, 4 if key is None else 2)
    launch(
        bits_step_kernel,
        programs,
        x,
        *rows_of(x),
        *rows_of(x if residual is None else residual),
        values,
        values if key is None else key.contiguous(),
        moved,
        probs,
        rows,
        columns,
        spans,
        low,
        high,
        clip,
        RESIDUAL=residual is not None,
        FORM=form,
        NOISE=key is not None,
        PER_ROW=key is not None and key.dim() > 1,
        **constants,
    )
    return moved, probs


def perturb(x: Tensor, spread: Tensor, key: Tensor) -> Tensor:
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    spreads, form = _parameters(spread.unsqueeze(0), x)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    programs, spans, constants = _tiling(rows, columns, 1)
    launch(
        bits_perturb_kernel,
        programs,
        x,
        *rows_of(x),
        spreads,
        key.contiguous(),
        out,
        rows,
        columns,
        spans,
        FORM=form,
        PER_ROW=key.dim() > 1,
        **constants,
    )
    return out


def _loss(
    inputs: tuple[Tensor, Tensor, Tensor],
    slope: Tensor,
    code: tuple[float, float, float],
    squared: bool,
    grad: Tensor | None = None,
    grads: tuple[Tensor, Tensor] | None = None,
    with_x: bool = False,
) -> Tensor:
    """Losses per row and tile, or with `grad` their gradients into `grads`."""
    x, (low, high, clip) = inputs[1], code
    slopes, form = _parameters(slope.unsqueeze(0), x)
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    programs, spans, constants = _tiling(rows, columns)
    sums = x if grad is not None else torch.empty((rows, spans), dtype=torch.float32, device=x.device)
    weight = (high - low) ** 2 if squared else 1.0
    slant = 1.0 if grad is None else 2.0 if squared else 1.0
    launch(
        bits_loss_kernel,
        programs,
        x,
        *(part for t in inputs for part in rows_of(t)),
        slopes,
        sums,
        x if grad is None else grad,
        *(grads or (x, x)),
        rows,
        columns,
        spans,
        low,
        high,
        clip,
        weight * slant / columns,
        FORM=form,
        SQUARED=squared,
        BACKWARD=grad is not None,
        WITH_X=with_x,
        **constants,
    )
    return sums


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
    sums = _loss((residual, x, bits), slope, (low, high, clip), squared)
    return sums.sum(-1).view(x.shape[:-1])


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
    residual_grad = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    x_grad = torch.empty(x.shape if with_x else (0,), dtype=x.dtype, device=x.device)
    grads = (residual_grad, x_grad)
    _loss((residual, x, bits), slope, (low, high, clip), squared, grad.contiguous(), grads, with_x)
    return grads


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    key, keys = tensor(2, dtype=torch.int64), tensor(8, 2, dtype=torch.int64)
    for gray in (False, True):
        yield partial(encode, tensor(8, dtype=torch.int64), 16, not gray, gray, -1.0, 1.0)
        yield partial(decode, tensor(8, 16, dtype=torch.bfloat16), not gray, gray, 0.5, 30522 if gray else 0)
    for shape, dtype, slope in (
        ((8, 16), torch.float32, tensor(8, 1)),
        ((8, 16384), torch.bfloat16, tensor(1)),
        ((8, 16384), torch.float32, tensor(8, 16384)),
    ):
        x, coefficients = tensor(*shape, dtype=dtype), tensor(3, *slope.shape)
        yield partial(matched_filter, x, slope, 0.5, 30.0)
        yield partial(posterior, x, x, slope, 0.5, 30.0)
        yield partial(step, x, x, coefficients, 0.0, 1.0, 30.0, key)
        yield partial(step, x, x, coefficients, 0.0, 1.0, 30.0, keys)
        yield partial(step, x, None, coefficients, 0.0, 1.0, 30.0, None)
        yield partial(perturb, x, slope, key)
        for squared in (True, False):
            yield partial(loss, x, x, x, slope, 0.0, 1.0, 30.0, squared)
            yield partial(loss_backward, tensor(8), x, x, x, slope, 0.0, 1.0, 30.0, squared, squared)
