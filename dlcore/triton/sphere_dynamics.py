"""The Langevin corrector in Triton: noise, drift and projection in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._tensors import empty
from dlcore.reference import sphere_dynamics as reference
from dlcore.triton.functions import exponential, normals, one_minus_exponential, over, power_of_two_below
from dlcore.triton.launch import launch
from dlcore.triton.noise import ELEMENT, row_key
from dlcore.triton.rows import per_row, row_offset, rows_of
from dlcore.triton.sphere import tiling


@triton.jit
def _dot(a, b):
    return tl.sum(a * b, 1, keep_dims=True)


@triton.jit
def _load(data, start, column, columns):
    return tl.load(data + start + column, column < columns, 0.0).to(tl.float32)


@triton.jit
def _coefficients(steps, at, q):
    """e^-a of x, (1 - e^-a)/q of the score, √((1 - e^-2a)/q) of the noise across x, a = q·step_size."""
    a = (tl.load(steps + at).to(tl.float64) * q).to(tl.float32)
    return exponential(-a), one_minus_exponential(a) / q, tl.sqrt_rn(one_minus_exponential(2.0 * a) / q)


@triton.jit
def _moved(
    x, x_start, score, s_start, seed, offset, by_x, by_score, by_noise, first, columns, BLOCK: tl.constexpr
):
    """A tile of the moved points, 0 past the end."""
    column = first + tl.arange(0, BLOCK)[None, :]
    y = _load(x, x_start, column, columns) * by_x + _load(score, s_start, column, columns) * by_score
    y += normals(seed, offset, ELEMENT, first, BLOCK) * by_noise
    return tl.where(column < columns, y, 0.0)


@triton.jit(do_not_specialize=["rows", "x_inner", "s_inner"])
def sphere_correct_kernel(
    x, x_inner, x_outer, x_step, score, s_inner, s_outer, s_step, steps, steps_step, keys, out, rows, columns,
    PER_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A correction per row; WHOLE if one tile holds a row, else every pass draws the noise anew."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    row = tl.where(live, row, 0)
    x_start, s_start = row_offset(row, x_inner, x_outer, x_step), row_offset(row, s_inner, s_outer, s_step)
    start, lane = row * columns, tl.arange(0, BLOCK)[None, :]
    seed, offset = row_key(keys, row, PER_ROW)
    by_x, by_score, by_noise = _coefficients(steps, row * steps_step, columns - 1.0)
    product = _dot(_load(x, x_start, lane, columns), normals(seed, offset, ELEMENT, 0, BLOCK))
    if not WHOLE:
        for first in range(BLOCK, columns, BLOCK):
            noise = normals(seed, offset, ELEMENT, first, BLOCK)
            product += _dot(_load(x, x_start, first + lane, columns), noise)
    by_x = by_x - by_noise * product

    y = _moved(x, x_start, score, s_start, seed, offset, by_x, by_score, by_noise, 0, columns, BLOCK)
    largest = tl.max(tl.abs(y), 1, keep_dims=True)
    if not WHOLE:
        for first in range(BLOCK, columns, BLOCK):
            y = _moved(
                x, x_start, score, s_start, seed, offset, by_x, by_score, by_noise, first, columns, BLOCK
            )
            largest = tl.maximum(largest, tl.max(tl.abs(y), 1, keep_dims=True))
    # A result of any length: its largest entry is brought next to 1.
    factor = power_of_two_below(largest)
    if WHOLE:
        y = y * factor
        y = (y * over(1.0, tl.sqrt_rn(_dot(y, y)))).to(out.dtype.element_ty)
        tl.store(out + start + lane, y, live & (lane < columns))
    else:
        square = tl.zeros_like(factor)
        for first in range(0, columns, BLOCK):
            y = _moved(
                x, x_start, score, s_start, seed, offset, by_x, by_score, by_noise, first, columns, BLOCK
            )
            square += _dot(y * factor, y * factor)
        scale = over(1.0, tl.sqrt_rn(square))
        for first in range(0, columns, BLOCK):
            y = _moved(
                x, x_start, score, s_start, seed, offset, by_x, by_score, by_noise, first, columns, BLOCK
            )
            column = first + lane
            y = (y * factor * scale).to(out.dtype.element_ty)
            tl.store(out + start + column, y, live & (column < columns))


@triton.jit(do_not_specialize=["rows", "x_inner", "s_inner", "g_inner"])
def sphere_correct_backward_kernel(
    grad, g_inner, g_outer, g_step, x, x_inner, x_outer, x_step, score, s_inner, s_outer, s_step,
    steps, steps_step, keys, x_grad, score_grad, steps_grad, rows, columns,
    PER_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a correction, its noise drawn anew; one tile holds a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    row = tl.where(live, row, 0)
    lane, q = tl.arange(0, BLOCK)[None, :], columns - 1.0
    here = _load(x, row_offset(row, x_inner, x_outer, x_step), lane, columns)
    pull = _load(score, row_offset(row, s_inner, s_outer, s_step), lane, columns)
    g = _load(grad, row_offset(row, g_inner, g_outer, g_step), lane, columns)
    seed, offset = row_key(keys, row, PER_ROW)
    noise = tl.where(lane < columns, normals(seed, offset, ELEMENT, 0, BLOCK), 0.0)
    decay, by_score, by_noise = _coefficients(steps, row * steps_step, q)
    product = _dot(here, noise)
    y = here * (decay - by_noise * product) + pull * by_score + noise * by_noise
    factor = power_of_two_below(tl.max(tl.abs(y), 1, keep_dims=True))
    y = y * factor
    scale = over(1.0, tl.sqrt_rn(_dot(y, y)))
    y = y * scale
    g = (g - y * _dot(y, g)) * scale * factor
    along, across = _dot(here, g), _dot(noise, g)
    mask, at = live & (lane < columns), row * columns + lane
    in_x = g * (decay - by_noise * product) - noise * (by_noise * along)
    tl.store(x_grad + at, in_x.to(x_grad.dtype.element_ty), mask)
    tl.store(score_grad + at, (g * by_score).to(score_grad.dtype.element_ty), mask)
    # The spread's slope is infinite where the step is 0.
    slope = tl.where(
        by_noise == 0, float("inf"), decay * decay / (tl.where(by_noise == 0, 1.0, by_noise) * q)
    )
    in_a = decay * (_dot(pull, g) / q - along) + slope * (across - product * along)
    tl.store(steps_grad + row, (q * in_a).to(steps_grad.dtype.element_ty), live)


def correct(x: Tensor, score: Tensor, step_size: Tensor, key: Tensor) -> Tensor:
    """Points of x's shape and dtype."""
    lead, columns = x.shape[:-1], x.shape[-1]
    out = empty(x.shape, x.dtype, x.device)
    steps, steps_step = per_row(step_size, lead)
    programs, constants = tiling(lead.numel(), columns, noise=True)
    launch(
        sphere_correct_kernel,
        programs,
        x,
        *rows_of(x),
        *rows_of(score),
        steps,
        steps_step,
        key.contiguous(),
        out,
        lead.numel(),
        columns,
        PER_ROW=key.dim() > 1,
        **constants,
    )
    return out


def correct_backward(
    grad: Tensor, x: Tensor, score: Tensor, step_size: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, score and step_size; the reference's for rows longer than a tile."""
    lead, columns = x.shape[:-1], x.shape[-1]
    programs, constants = tiling(lead.numel(), columns, noise=True)
    if not constants.pop("WHOLE"):
        return reference.correct_backward(grad, x, score, step_size, key)
    x_grad, score_grad = (empty(t.shape, t.dtype, t.device) for t in (x, score))
    steps_grad = empty(lead, step_size.dtype, x.device)
    steps, steps_step = per_row(step_size, lead)
    launch(
        sphere_correct_backward_kernel,
        programs,
        x,
        *rows_of(grad),
        *rows_of(x),
        *rows_of(score),
        steps,
        steps_step,
        key.contiguous(),
        x_grad,
        score_grad,
        steps_grad,
        lead.numel(),
        columns,
        PER_ROW=key.dim() > 1,
        **constants,
    )
    return x_grad, score_grad, steps_grad


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""
    key = torch.empty(2, dtype=torch.int64, device=device)
    steps = torch.empty(64, device=device)
    for columns, dtype in (
        (64, torch.float32),
        (768, torch.bfloat16),
        (4096, torch.float32),
        (5000, torch.float32),
    ):
        x = torch.empty(64, columns, dtype=dtype, device=device)
        yield partial(correct, x, x, steps, key)
        if columns < 5000:
            yield partial(correct_backward, x, x, x, steps, key.expand(64, 2))
