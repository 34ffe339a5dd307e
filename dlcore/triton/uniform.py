"""The uniform-state NELBO on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._tensors import empty
from dlcore.triton import noise
from dlcore.triton.categorical_losses import probability, split
from dlcore.triton.categorical_scan import INDEX_LOGIT, TARGET_LOGIT, load_state, log_prob, scan
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.linear_logits import HeadGradient, tiles, vocab_size
from dlcore.triton.rows import per_row, row_offset
from dlcore.triton.softmax import Softmax, entries, row_shift

_ROWS = 128


@triton.jit
def _ratio(alpha, vocab):
    """c = Vα / (1 - α)."""
    return vocab * alpha / (1.0 - alpha)


@triton.jit
def _log1p(x):
    """In float64; the rounding of 1 + x is given back to first order."""
    w = 1.0 + x
    return tl.log(w) + (x - (w - 1.0)) / w


@triton.jit
def _expm1(x):
    """In float64, for x <= 0: a series next to 0, where the difference cancels."""
    p = 1.0 + x / 8.0
    p = 1.0 + x / 7.0 * p
    p = 1.0 + x / 6.0 * p
    p = 1.0 + x / 5.0 * p
    p = 1.0 + x / 4.0 * p
    p = 1.0 + x / 3.0 * p
    p = x * (1.0 + x / 2.0 * p)
    return tl.where(x > -0.01, p, tl.exp(x) - 1.0)


@triton.jit(do_not_specialize=["rows"])
def start_nelbo_kernel(numbers, rows, saved, BLOCK: tl.constexpr):
    """The first three of `saved` (5, rows): logsumexp, log p(z), log p(x); 0 for the two sums."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    rows = rows.to(tl.int64)
    zero = tl.full(row.shape, 0.0, tl.float64)
    tl.store(saved + row, -log_prob(numbers, zero, row, rows, inside), inside)
    at_z = load_state(numbers, row, rows, inside, INDEX_LOGIT)
    at_x = load_state(numbers, row, rows, inside, TARGET_LOGIT)
    tl.store(saved + rows + row, log_prob(numbers, at_z, row, rows, inside), inside)
    tl.store(saved + 2 * rows + row, log_prob(numbers, at_x, row, rows, inside), inside)
    tl.store(saved + 3 * rows + row, zero, inside)
    tl.store(saved + 4 * rows + row, zero, inside)


@triton.jit(do_not_specialize=["first", "vocab", "rows", "parts"])
def nelbo_kernel(
    logits,
    inner,
    outer_stride,
    inner_stride,
    first,
    columns,
    index,
    shift,
    shift_step,
    vocab,
    alpha,
    alpha_step,
    saved,
    rows,
    sums,
    parts,
    BLOCK: tl.constexpr,
):
    """sums (2, rows, parts): Σ log1p(c p) and Σ c p / (1 + c p) over a part of a row."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    at, bonus = row_shift(row, index, shift, shift_step)
    data = logits + row_offset(row, inner, outer_stride, inner_stride)
    column = program % parts * BLOCK + tl.arange(0, BLOCK)
    x = entries(data, column, columns, first, at, bonus, None, None)
    p = probability(x, tl.load(saved + row), tl.full((), 1.0, tl.float32))
    y = p * _ratio(tl.load(alpha + row * alpha_step), vocab).to(tl.float32)
    to = sums + row * parts + program % parts
    tl.store(to, tl.sum(noise.log1p(y), 0).to(tl.float64))
    tl.store(to + rows.to(tl.int64) * parts, tl.sum(y / (y + 1.0), 0).to(tl.float64))


@triton.jit(do_not_specialize=["rows", "parts"])
def sum_nelbo_kernel(sums, saved, rows, parts, BLOCK: tl.constexpr):
    """Add the parts of a tile to the last two of `saved`, always in the same order."""
    row = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    logs = tl.load(saved + 3 * rows + row)
    ratios = tl.load(saved + 4 * rows + row)
    for start in range(0, parts, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at = sums + row * parts + part
        logs += tl.sum(tl.load(at, part < parts, 0.0), 0)
        ratios += tl.sum(tl.load(at + rows * parts, part < parts, 0.0), 0)
    tl.store(saved + 3 * rows + row, logs)
    tl.store(saved + 4 * rows + row, ratios)


@triton.jit(do_not_specialize=["rows", "vocab"])
def finish_nelbo_kernel(
    saved, rows, vocab, z, x, alpha, alpha_step, dalpha, dalpha_step, loss, BLOCK: tl.constexpr
):
    """loss (rows), nats; see the reference."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    rows = rows.to(tl.int64)
    row = tl.where(inside, row, 0)
    level = tl.load(alpha + row * alpha_step)
    v = tl.full(row.shape, 0.0, tl.float64) + vocab
    c = _ratio(level, v)
    n = v / (1.0 - level)
    whole = _log1p(c)
    total = tl.load(saved + 3 * rows + row)
    at_z = _log1p(c * tl.exp(tl.load(saved + rows + row)))
    at_x = _log1p(c * tl.exp(tl.load(saved + 2 * rows + row)))
    same = (v * at_z - total - (v - 1.0) * whole) / (1.0 + c) - n * (1.0 / (1.0 + c) - tl.exp(-at_z))
    other = (1.0 + c) * whole + c * (at_z - at_x) + v * at_z - total + n * _expm1(-at_z)
    w = -tl.load(dalpha + row * dalpha_step) / (v * level)
    result = w * tl.where(tl.load(z + row) == tl.load(x + row), same, other)
    tl.store(loss + row, result.to(tl.float32), inside)


# dL/da_k = p_k (G_k - Σ p G) with G_k = w·{-A c r_k + [k=z]·(c r_z (AV + c n) - V/(1-α) c r_z^2) - [k=x] n
# c^2 r_x}, r = 1 / (1 + c p), A = 1/(1+c) and n = 0 where z = x, else 1 and 1.
@triton.jit(do_not_specialize=["first", "vocab", "rows", "parts"])
def nelbo_backward_kernel(
    logits,
    inner,
    outer_stride,
    inner_stride,
    first,
    columns,
    index,
    shift,
    shift_step,
    vocab,
    target,
    alpha,
    alpha_step,
    dalpha,
    dalpha_step,
    grad,
    saved,
    rows,
    out,
    out_stride,
    parts,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    rows = rows.to(tl.int64)
    at, bonus = row_shift(row, index, shift, shift_step)
    x = tl.load(target + row)
    level = tl.load(alpha + row * alpha_step)
    v = tl.full((), 0.0, tl.float64) + vocab
    c = _ratio(level, v)
    w = -tl.load(dalpha + row * dalpha_step) / (v * level) * tl.load(grad + row).to(tl.float64)
    spread = tl.where(at == x, 1.0 / (1.0 + c), 1.0)
    miss = tl.where(at == x, 0.0, 1.0).to(tl.float64)
    p_z = tl.exp(tl.load(saved + rows + row))
    p_x = tl.exp(tl.load(saved + 2 * rows + row))
    r_z, r_x = 1.0 / (1.0 + c * p_z), 1.0 / (1.0 + c * p_x)
    at_z = w * p_z * c * r_z * (spread * v + c * miss - v / (1.0 - level) * r_z)
    at_x = -w * p_x * miss * c * c * r_x
    mean = -w * spread * tl.load(saved + 4 * rows + row) + at_z + at_x
    data = logits + row_offset(row, inner, outer_stride, inner_stride)
    column = program % parts * BLOCK + tl.arange(0, BLOCK)
    token = first + column
    logit = entries(data, column, columns, first, at, bonus, None, None)
    p = probability(logit, tl.load(saved + row), tl.full((), 1.0, tl.float32))
    slope = (-w * spread * c).to(tl.float32)
    g = p * (slope / (1.0 + p * c.to(tl.float32)) - mean.to(tl.float32))
    g += tl.where(token == at, at_z.to(tl.float32), 0.0) + tl.where(token == x, at_x.to(tl.float32), 0.0)
    tl.store(out + row * out_stride + column, g.to(out.dtype.element_ty), column < columns)


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
    """NELBO per token (...) and (5, ...) float64 for its gradient: a scan, and a second read for the sums."""
    lead, head = logits.shape[:-1], (logits, weight, bias)
    softmax, x, rows, vocab = Softmax(lead, z, shift), x.contiguous(), z.numel(), vocab_size(head)
    level, slope = per_row(alpha, lead), per_row(dalpha, lead)
    saved = empty((5, *lead), torch.float64, logits.device)
    state, grid = scan(head, softmax, target=x), ceil_div(rows, _ROWS)
    launch(start_nelbo_kernel, grid, saved, state.numbers, rows, saved, BLOCK=_ROWS)
    for first, columns, tile in tiles(head):
        block, parts = split(columns)
        sums = empty((2, rows, parts), torch.float64, logits.device)
        read = (*tile, first, columns, *softmax.entry[:3], vocab, *level, saved, rows, sums, parts)
        launch(nelbo_kernel, rows * parts, saved, *read, BLOCK=block)
        launch(sum_nelbo_kernel, rows, saved, sums, saved, rows, parts, BLOCK=power_of_two(parts, 1, 256))
    loss = empty(lead, torch.float32, logits.device)
    numbers = (saved, rows, vocab, softmax.index, x, *level, *slope, loss)
    launch(finish_nelbo_kernel, grid, loss, *numbers, BLOCK=_ROWS)
    return loss, saved


def nelbo_backward(
    grad: Tensor,
    saved: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor,
    x: Tensor,
    alpha: Tensor,
    dalpha: Tensor,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the head, tile by tile from the logsumexp."""
    lead, head = logits.shape[:-1], (logits, weight, bias)
    softmax, x, grad, saved = Softmax(lead, z, shift), x.contiguous(), grad.contiguous(), saved.contiguous()
    rows, levels = z.numel(), (*per_row(alpha, lead), *per_row(dalpha, lead))
    result = HeadGradient(head)
    for first, columns, tile in tiles(head):
        out = result.tile(first, columns)
        block, parts = split(columns)
        read = (*tile, first, columns, *softmax.entry[:3], vocab_size(head), x, *levels, grad, saved, rows)
        launch(nelbo_backward_kernel, rows * parts, out, *read, out, out.stride(0), parts, BLOCK=block)
        result.add(first, out)
    return result.result()


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""
    # A tile of a head is as narrow as with thousands of rows.
    lead, vocab, narrow = (4, 8), 126_464, 768
    z = torch.empty(lead, dtype=torch.int64, device=device)
    level = torch.empty(lead, dtype=torch.float64, device=device)
    saved = torch.empty(5, *lead, dtype=torch.float64, device=device)
    grad = torch.empty(lead, device=device)
    weight = torch.empty(narrow, 64, dtype=torch.bfloat16, device=device)
    linear = torch.empty(*lead, 64, dtype=torch.bfloat16, device=device)
    yield partial(nelbo, linear, weight, None, z, z, level, level, None)
    yield partial(nelbo_backward, grad, saved, linear, weight, None, z, z, level, level, None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.empty(*lead, vocab, dtype=dtype, device=device)
        given = (logits, None, None, z, z, level, level[0, 0], grad)
        yield partial(nelbo, *given)
        yield partial(nelbo_backward, grad, saved, *given)
