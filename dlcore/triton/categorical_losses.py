"""Log-probabilities and divergences of softmax on the GPU, and their gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._tensors import empty
from dlcore.triton.categorical_scan import (
    INDEX_LOGIT,
    TARGET_LOGIT,
    load_state,
    log_prob,
    scan,
)
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.linear_logits import GROUP, Head, HeadGradient, tile_width, tiles
from dlcore.triton.rows import per_row, row_offset
from dlcore.triton.softmax import (
    LN2,
    LOG2E,
    NONE,
    Softmax,
    capped,
    entries,
    inverse_temperature,
    power,
    row_shift,
)

_ROWS = 128
_BLOCK = 2048


@triton.jit(do_not_specialize=["rows"])
def finish_log_probs_kernel(numbers, target, rows, out, WITH_INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """out (3, rows): log p[target], log p[index], logsumexp; 0 where target < 0."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    rows = rows.to(tl.int64)
    read = inside & (tl.load(target + row, inside, -1) >= 0)
    lse = -log_prob(numbers, tl.full(row.shape, 0.0, tl.float64), row, rows, read)
    at_target = log_prob(numbers, load_state(numbers, row, rows, read, TARGET_LOGIT), row, rows, read)
    at_index = 0.0 * lse
    if WITH_INDEX:
        at_index = log_prob(numbers, load_state(numbers, row, rows, read, INDEX_LOGIT), row, rows, read)
    tl.store(out + row, tl.where(read, at_target, 0.0), inside)
    tl.store(out + rows + row, tl.where(read, at_index, 0.0), inside)
    tl.store(out + 2 * rows + row, tl.where(read, lse, 0.0), inside)


@triton.jit
def probability(x, logsumexp, scale):
    """exp(x·scale - logsumexp); the rounding of the reference to float32 comes back as a factor."""
    wide = scale.to(tl.float64)
    reference = (logsumexp / wide).to(tl.float32)
    factor = tl.exp(reference.to(tl.float64) * wide - logsumexp).to(tl.float32)
    return power((x - reference) * (scale * LOG2E)) * factor


@triton.jit
def slope(x, softcap):
    """d softcap(x) / dx."""
    t = capped(x, softcap) / softcap
    return 1.0 - t * t


@triton.jit(do_not_specialize=["first", "exclude", "rows", "parts"])
def log_probs_backward_kernel(
    logits,
    inner,
    outer_stride,
    inner_stride,
    first,
    columns,
    index,
    shift,
    shift_step,
    softcap,
    exclude,
    target,
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
    column = program % parts * BLOCK + tl.arange(0, BLOCK)
    token = first + column
    inside = column < columns
    at_row = tl.load(target + row)
    to = out + row * out_stride + column
    if at_row < 0:
        tl.store(to, tl.full((BLOCK,), 0.0, tl.float32).to(out.dtype.element_ty), inside)
        return
    at, bonus = row_shift(row, index, shift, shift_step)
    data = logits + row_offset(row, inner, outer_stride, inner_stride)
    at_target = tl.load(grad + row).to(tl.float32)
    at_index = tl.full((), 0.0, tl.float32)
    if index is not None:
        at_index = tl.load(grad + rows + row).to(tl.float32)
    spread = tl.load(grad + 2 * rows + row).to(tl.float32) - at_target - at_index
    x = entries(data, column, columns, first, at, bonus, softcap, exclude)
    g = probability(x, tl.load(saved + 2 * rows + row), tl.full((), 1.0, tl.float32)) * spread
    open_ = tl.full((BLOCK,), 1, tl.int1)
    if exclude is not None:
        open_ = token != exclude
    g += tl.where(open_ & (token == at_row), at_target, 0.0)
    g += tl.where(open_ & (token == at), at_index, 0.0)
    if softcap is not None:
        g *= slope(tl.load(data + column, inside, 0.0).to(tl.float32), softcap)
    if exclude is not None:
        g = tl.where(open_, g, 0.0)
    tl.store(to, g.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["groups", "parts", "rows"])
def kl_scan_kernel(
    p_logits,
    p_inner,
    p_outer_stride,
    p_inner_stride,
    q_logits,
    q_inner,
    q_outer_stride,
    q_inner_stride,
    columns,
    temperature,
    temperature_step,
    summaries,
    rows,
    groups,
    parts,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """summaries (5, rows, groups): largest logits, Σ 2^dp, Σ 2^dq and Σ 2^dp·(dp - dq) relative to them."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    scale = inverse_temperature(row, temperature, temperature_step) * LOG2E
    group = program % parts * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = column < columns
    p_data = p_logits + row_offset(row, p_inner, p_outer_stride, p_inner_stride)
    q_data = q_logits + row_offset(row, q_inner, q_outer_stride, q_inner_stride)
    p = tl.load(p_data + column, inside, NONE).to(tl.float32)
    q = tl.load(q_data + column, inside, NONE).to(tl.float32)
    p_top, q_top = tl.max(p, 1), tl.max(q, 1)
    dp = (p - tl.where(p_top > NONE, p_top, 0.0)[:, None]) * scale
    dq = (q - tl.where(q_top > NONE, q_top, 0.0)[:, None]) * scale
    # 0 · (-inf - log q) is 0: what p excludes costs nothing.
    gap = tl.where(p == NONE, 0.0, tl.exp2(tl.maximum(dp, -126.0)) * (dp - dq))
    inside_groups = group < groups
    out = summaries + row * groups + group
    size = rows.to(tl.int64) * groups
    tl.store(out, p_top, inside_groups)
    tl.store(out + size, q_top, inside_groups)
    tl.store(out + 2 * size, tl.sum(power(dp), 1), inside_groups)
    tl.store(out + 3 * size, tl.sum(power(dq), 1), inside_groups)
    tl.store(out + 4 * size, tl.sum(gap, 1), inside_groups)


@triton.jit
def _fall(top, largest):
    """How far below the largest, 0 for what is empty."""
    return tl.where(top > NONE, top - largest, 0.0)


@triton.jit
def _logsumexp(top, total):
    """-inf of nothing but -inf, NaN where a NaN or +inf was."""
    lse = top + tl.log(tl.where(total > 0.0, total, 1.0))
    return tl.where(total == 0.0, NONE, tl.where(total < float("inf"), lse, float("nan")))


@triton.jit(do_not_specialize=["groups", "rows", "first"])
def kl_reduce_kernel(
    summaries, rows, groups, first, temperature, temperature_step, state, numbers, BLOCK: tl.constexpr
):
    """Merge a tile's groups into the state (5, rows) and say what it makes: KL and the two logsumexps.

    KL is NaN, and a logsumexp -inf, where a row has nothing but -inf.
    """
    row = tl.program_id(0).to(tl.int64)
    scale = inverse_temperature(row, temperature, temperature_step)
    wide = scale.to(tl.float64)
    rows = rows.to(tl.int64)
    size = rows * groups
    old = first > 0
    p_top = tl.load(state + row, old, NONE)
    q_top = tl.load(state + rows + row, old, NONE)
    p_sum = tl.load(state + 2 * rows + row, old, 0.0)
    q_sum = tl.load(state + 3 * rows + row, old, 0.0)
    gap = tl.load(state + 4 * rows + row, old, 0.0)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < groups
        at = summaries + row * groups + group
        p = tl.load(at, inside, NONE).to(tl.float64) * wide
        q = tl.load(at + size, inside, NONE).to(tl.float64) * wide
        p_part = tl.load(at + 2 * size, inside, 0.0).to(tl.float64)
        q_part = tl.load(at + 3 * size, inside, 0.0).to(tl.float64)
        gap_part = tl.load(at + 4 * size, inside, 0.0).to(tl.float64) * LN2
        p_most, q_most = tl.maximum(p_top, tl.max(p, 0)), tl.maximum(q_top, tl.max(q, 0))
        p_drop, q_drop = _fall(p_top, p_most), _fall(q_top, q_most)
        gap = tl.exp(p_drop) * (gap + p_sum * (p_drop - q_drop))
        p_sum *= tl.exp(p_drop)
        q_sum *= tl.exp(q_drop)
        p_drops, q_drops = _fall(p, p_most), _fall(q, q_most)
        factor = tl.exp(p_drops)
        gap += tl.sum(factor * (gap_part + p_part * (p_drops - q_drops)), 0)
        p_sum += tl.sum(factor * p_part, 0)
        q_sum += tl.sum(tl.exp(q_drops) * q_part, 0)
        p_top, q_top = p_most, q_most
    tl.store(state + row, p_top)
    tl.store(state + rows + row, q_top)
    tl.store(state + 2 * rows + row, p_sum)
    tl.store(state + 3 * rows + row, q_sum)
    tl.store(state + 4 * rows + row, gap)
    p_lse, q_lse = _logsumexp(p_top, p_sum), _logsumexp(q_top, q_sum)
    lawful = (p_lse > NONE) & (q_lse > NONE)
    p_sum, q_sum = tl.where(lawful, p_sum, 1.0), tl.where(lawful, q_sum, 1.0)
    divergence = gap / p_sum - tl.log(p_sum) + tl.log(q_sum)
    tl.store(numbers + row, tl.where(lawful, divergence, float("nan")))
    tl.store(numbers + rows + row, p_lse)
    tl.store(numbers + 2 * rows + row, q_lse)


@triton.jit
def _log_probability(x, logsumexp, scale):
    wide = scale.to(tl.float64)
    reference = (logsumexp / wide).to(tl.float32)
    rest = (reference.to(tl.float64) * wide - logsumexp).to(tl.float32)
    return tl.fma(x - reference, scale, rest)


@triton.jit(do_not_specialize=["parts", "rows"])
def kl_backward_kernel(
    p_logits,
    p_inner,
    p_outer_stride,
    p_inner_stride,
    q_logits,
    q_inner,
    q_outer_stride,
    q_inner_stride,
    columns,
    temperature,
    temperature_step,
    grad,
    numbers,
    rows,
    p_out,
    p_stride,
    q_out,
    q_stride,
    parts,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    rows = rows.to(tl.int64)
    scale = inverse_temperature(row, temperature, temperature_step)
    column = program % parts * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    p_data = p_logits + row_offset(row, p_inner, p_outer_stride, p_inner_stride)
    q_data = q_logits + row_offset(row, q_inner, q_outer_stride, q_inner_stride)
    x = tl.load(p_data + column, inside, 0.0).to(tl.float32)
    y = tl.load(q_data + column, inside, 0.0).to(tl.float32)
    log_p = _log_probability(x, tl.load(numbers + rows + row), scale)
    log_q = _log_probability(y, tl.load(numbers + 2 * rows + row), scale)
    p, q = power(log_p * LOG2E), power(log_q * LOG2E)
    weight = (tl.load(grad + row) * scale).to(tl.float32)
    divergence = tl.load(numbers + row).to(tl.float32)
    pull = tl.where(x == NONE, 0.0, p * (log_p - log_q - divergence))
    tl.store(p_out + row * p_stride + column, (pull * weight).to(p_out.dtype.element_ty), inside)
    tl.store(q_out + row * q_stride + column, ((q - p) * weight).to(q_out.dtype.element_ty), inside)


def log_probs(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> Tensor:
    """(3, ...): log p[target], log p[index], logsumexp, under a shift at `index`; 0 where target < 0."""
    lead, target = logits.shape[:-1], target.contiguous()
    softmax = Softmax(lead, index, shift, None, softcap, exclude)
    state = scan((logits, weight, bias), softmax, target=target)
    numbers = empty((3, *lead), torch.float64, logits.device)
    rows = target.numel()
    launch(
        finish_log_probs_kernel,
        ceil_div(rows, _ROWS),
        numbers,
        *(state.numbers, target, rows, numbers),
        WITH_INDEX=index is not None,
        BLOCK=_ROWS,
    )
    return numbers


def log_probs_backward(
    grad: Tensor,
    numbers: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    target: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the head, tile by tile from the logsumexp."""
    target, grad, numbers = target.contiguous(), grad.contiguous(), numbers.contiguous()
    head, rows = (logits, weight, bias), target.numel()
    softmax = Softmax(logits.shape[:-1], index, shift, None, softcap, exclude)
    result = HeadGradient(head)
    for first, columns, tile in tiles(head):
        out = result.tile(first, columns)
        block, parts = split(columns)
        read = (*tile, first, columns, *softmax.entry, target, grad, numbers, rows, out, out.stride(0), parts)
        launch(log_probs_backward_kernel, rows * parts, out, *read, BLOCK=block)
        result.add(first, out)
    return result.result()


def split(columns: int) -> tuple[int, int]:
    """Columns a program takes, and how many programs that makes a row."""
    block = power_of_two(columns, GROUP, _BLOCK)
    return block, ceil_div(columns, block)


def _pairs(p: Head, q: Head) -> Iterator[tuple[int, int, tuple[object, ...]]]:
    """(first token, how many, both views) of tiles of two heads side by side."""
    width = None if p[1] is None and q[1] is None else tile_width(q if p[1] is None else p)
    for (first, columns, left), (_, _, right) in zip(tiles(p, width), tiles(q, width), strict=True):
        yield first, columns, (*left, *right)


def kl(
    p_logits: Tensor,
    p_weight: Tensor | None,
    p_bias: Tensor | None,
    q_logits: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    temperature: Tensor | None,
) -> Tensor:
    """(3, ...): KL(p || q), and the two logsumexps."""
    lead, device = p_logits.shape[:-1], p_logits.device
    rows, scale = lead.numel(), per_row(temperature, lead)
    numbers = empty((3, *lead), torch.float64, device)
    state = empty((5, rows), torch.float64, device)
    for first, columns, views in _pairs((p_logits, p_weight, p_bias), (q_logits, q_weight, q_bias)):
        groups = ceil_div(columns, GROUP)
        summaries = empty((5, rows, groups), torch.float32, device)
        parts = ceil_div(groups, _BLOCK // GROUP)
        read = (*views, columns, *scale, summaries, rows, groups, parts)
        launch(kl_scan_kernel, rows * parts, numbers, *read, GROUPS=_BLOCK // GROUP, SIZE=GROUP)
        merged = (summaries, rows, groups, first, *scale, state, numbers)
        launch(kl_reduce_kernel, rows, numbers, *merged, BLOCK=power_of_two(groups, 16, 512))
    return numbers


def kl_backward(
    grad: Tensor,
    numbers: Tensor,
    p_logits: Tensor,
    p_weight: Tensor | None,
    p_bias: Tensor | None,
    q_logits: Tensor,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    temperature: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of both heads, tile by tile from the logsumexps."""
    p_head, q_head = (p_logits, p_weight, p_bias), (q_logits, q_weight, q_bias)
    lead, grad, numbers = p_logits.shape[:-1], grad.contiguous(), numbers.contiguous()
    rows, scale = lead.numel(), per_row(temperature, lead)
    p_result, q_result = HeadGradient(p_head), HeadGradient(q_head)
    for first, columns, views in _pairs(p_head, q_head):
        p, q = p_result.tile(first, columns), q_result.tile(first, columns)
        block, parts = split(columns)
        read = (*views, columns, *scale, grad, numbers, rows, p, p.stride(0), q, q.stride(0), parts)
        launch(kl_backward_kernel, rows * parts, grad, *read, BLOCK=block)
        p_result.add(first, p)
        q_result.add(first, q)
    return (*p_result.result(), *q_result.result())


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""
    # A tile of a head is as narrow as with thousands of rows.
    lead, vocab, narrow = (4, 8), 126_464, 768
    target = torch.empty(lead, dtype=torch.int64, device=device)
    number, row = torch.empty((), device=device), torch.empty(lead, device=device)
    three = torch.empty(3, *lead, dtype=torch.float64, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.empty(*lead, vocab, dtype=dtype, device=device)
        hidden = torch.empty(*lead, 64, dtype=dtype, device=device)
        weight = torch.empty(narrow, 64, dtype=dtype, device=device)
        dense, linear = (logits, None, None), (hidden, weight, None)
        for head in (dense, linear):
            yield from _examples(head, target, number, row, three)


def _examples(
    head: Head, target: Tensor, number: Tensor, row: Tensor, three: Tensor
) -> Iterator[Callable[[], object]]:
    for shift, softcap, exclude in ((None, None, None), (row, 30.0, 5)):
        options: tuple[Any, ...] = (target, None if shift is None else target, shift, softcap, exclude)
        yield partial(log_probs, *head, *options)
        yield partial(log_probs_backward, three, three, *head, *options)
    for temperature in (None, number):
        yield partial(kl, *head, *head, temperature)
        yield partial(kl_backward, three, three, *head, *head, temperature)
