"""Means of a table under softmax on the GPU, and their gradients: nothing of size V is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton.categorical import finish_sample
from dlcore.triton.categorical_losses import probability, slope, split
from dlcore.triton.categorical_scan import (
    SUM,
    TOP,
    State,
    load_state,
    log_prob,
    new_state,
    scan,
    scan_tile,
)
from dlcore.triton.launch import launch, power_of_two
from dlcore.triton.linear_logits import Head, HeadGradient, matmul, tile_width, tiles, vocab_size
from dlcore.triton.rows import Rows, row_offset
from dlcore.triton.softmax import NONE, Softmax, entries, inverse_temperature, row_shift


@triton.jit(do_not_specialize=["first", "exclude", "parts"])
def softmax_tile_kernel(
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
    temperature,
    temperature_step,
    logsumexp,
    out,
    out_stride,
    parts,
    BLOCK: tl.constexpr,
):
    """out (rows, columns) = exp(x / temperature - logsumexp)."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    at, bonus = row_shift(row, index, shift, shift_step)
    scale = inverse_temperature(row, temperature, temperature_step)
    data = logits + row_offset(row, inner, outer_stride, inner_stride)
    column = program % parts * BLOCK + tl.arange(0, BLOCK)
    x = entries(data, column, columns, first, at, bonus, softcap, exclude)
    p = probability(x, tl.load(logsumexp + row), scale)
    tl.store(out + row * out_stride + column, p.to(out.dtype.element_ty), column < columns)


@triton.jit(do_not_specialize=["rows", "first", "width"])
def follow_kernel(
    numbers, rows, first, reference, mean, width, logsumexp, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """Scale a row's sums down as its largest logit grew; at last, to be a mean."""
    row = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    before = tl.load(reference + row, (first > 0) | LAST, 0.0)
    if LAST:
        zero = tl.full(row.shape, 0.0, tl.float64)
        lse = -log_prob(numbers, zero, row, rows, row < rows)
        lse = tl.where(load_state(numbers, row, rows, row < rows, SUM) == 0.0, NONE, lse)
        tl.store(logsumexp + row, lse)
        factor = tl.exp(before - lse).to(tl.float32)
    else:
        top = load_state(numbers, row, rows, row < rows, TOP)
        now = tl.where((top > NONE) & (top < float("inf")), top, before)
        # Nothing was summed before the first finite logit, so that a factor of 0 is as good as any.
        factor = tl.minimum(tl.exp(before - now), 1.0).to(tl.float32)
        tl.debug_barrier()  # every warp has read what one of them writes now
        tl.store(reference + row, now)
    if factor != 1.0:
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = mean + row * width + column
            tl.store(at, tl.load(at, column < width, 0.0) * factor, column < width)


@triton.jit(do_not_specialize=["first", "exclude", "parts", "rows"])
def expectation_backward_kernel(
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
    temperature,
    temperature_step,
    logsumexp,
    pull,
    mean,
    out,
    out_stride,
    parts,
    BLOCK: tl.constexpr,
):
    """out = p·(pull - mean) / temperature, through the softcap; pull (rows, columns) is g · table_k."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    at, bonus = row_shift(row, index, shift, shift_step)
    scale = inverse_temperature(row, temperature, temperature_step)
    data = logits + row_offset(row, inner, outer_stride, inner_stride)
    column = program % parts * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    x = entries(data, column, columns, first, at, bonus, softcap, exclude)
    p = probability(x, tl.load(logsumexp + row), scale)
    g = p * (tl.load(pull + row * columns + column, inside, 0.0) - tl.load(mean + row)) * scale
    if softcap is not None:
        g *= slope(tl.load(data + column, inside, 0.0).to(tl.float32), softcap)
    if exclude is not None:
        g = tl.where(first + column == exclude, 0.0, g)
    tl.store(out + row * out_stride + column, g.to(out.dtype.element_ty), inside)


def _weigh(
    head: Head, softmax: Softmax, table: Tensor, key: Tensor | None = None
) -> tuple[State, Tensor, Tensor]:
    """State, Σ_k softmax_k table[k] (rows, E) and the logsumexp (...).

    What is summed refers to the largest logit, as half precision holds no 1/V of a large V. Dense logits are
    read twice; a head's are computed once, and sums are scaled down when a larger one appears.
    """
    lead, device = head[0].shape[:-1], head[0].device
    rows, width, dense = lead.numel(), tile_width(head), head[1] is None
    mean = torch.zeros((rows, table.shape[1]), dtype=torch.float32, device=device)
    lse = torch.empty(lead, dtype=torch.float64, device=device)
    room = torch.empty(rows * min(width, len(table)), dtype=table.dtype, device=device)
    state, reference = scan(head, softmax, key=key) if dense else new_state(head), torch.empty_like(lse)
    for tile in tiles(head, width):
        first, columns, _ = tile
        if not dense:
            scan_tile(tile, rows, softmax, state, first == 0, key=key)
        if first == 0 or not dense:
            _follow(state, first, reference, mean, lse, False)
        p = _probabilities(tile, softmax, reference, room)
        matmul(p, table[first : first + columns], mean, add=True)
    _follow(state, 0, reference, mean, lse, True)
    return state, mean.view(*lead, table.shape[1]), lse


def _follow(state: State, first: int, reference: Tensor, mean: Tensor, lse: Tensor, last: bool) -> None:
    rows, width = mean.shape
    args = (state.numbers, rows, first, reference, mean, width, lse)
    launch(follow_kernel, rows, mean, *args, LAST=last, BLOCK=power_of_two(width, 16, 1024))


def _probabilities(tile: tuple[int, int, Rows], softmax: Softmax, reference: Tensor, room: Tensor) -> Tensor:
    """exp(logits / temperature - reference) of a tile (rows, columns), in `room`."""
    first, columns, logits = tile
    rows = reference.numel()
    p = room[: rows * columns].view(rows, columns)
    block, parts = split(columns)
    read = (*logits, first, columns, *softmax.args, reference, p, columns, parts)
    launch(softmax_tile_kernel, rows * parts, p, *read, BLOCK=block)
    return p


def expectation(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """Σ_k softmax_k table[k] (..., E) and the logsumexp (...)."""
    softmax = Softmax(logits.shape[:-1], None, None, temperature, softcap, exclude)
    return _weigh((logits, weight, bias), softmax, table)[1:]


def sample_expectation(
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    index: Tensor | None,
    key: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`expectation`'s mean and logsumexp, `sample`'s tokens and numbers."""
    lead = logits.shape[:-1]
    softmax = Softmax(lead, index, None, temperature, softcap, exclude)
    state, mean, lse = _weigh((logits, weight, bias), softmax, table, key.contiguous())
    return mean, lse, *finish_sample(state, state, softmax, lead)


def expectation_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    logits: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the head and of the table, tile by tile from the logsumexp."""
    lead, head = logits.shape[:-1], (logits, weight, bias)
    rows, lse = lead.numel(), lse.contiguous()
    softmax = Softmax(lead, None, None, temperature, softcap, exclude)
    flat = grad.reshape(rows, table.shape[1]).float()
    # d/da_k = p_k (g · table_k - g · output) / temperature.
    mean = (flat * output.reshape(flat.shape)).sum(-1)
    narrow = flat.to(torch.promote_types(logits.dtype, table.dtype)).contiguous()
    result = HeadGradient(head)
    table_grad = torch.empty(table.shape, dtype=torch.float32, device=table.device)
    width = tile_width(head)
    size = rows * min(width, len(table))
    room = torch.empty(size, dtype=narrow.dtype, device=table.device)
    pulls = torch.empty(size, dtype=torch.float32, device=table.device)
    for tile in tiles(head, width):
        first, columns, view = tile
        tokens = slice(first, first + columns)
        p = _probabilities(tile, softmax, lse, room)
        matmul(p.mT, narrow, table_grad[tokens])
        pull = pulls[: rows * columns].view(rows, columns)
        matmul(narrow, table[tokens].mT, pull)
        out = result.tile(first, columns)
        block, parts = split(columns)
        read = (*view, first, columns, *softmax.args, lse, pull, mean, out, out.stride(0), parts)
        launch(expectation_backward_kernel, rows * parts, out, *read, BLOCK=block)
        result.add(first, out)
    return (*result.result(), table_grad.to(table.dtype))


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""
    # A tile of a head is as narrow as with thousands of rows.
    lead, vocab, narrow = (4, 8), 126_464, 768
    row, mean = torch.empty(lead, device=device), torch.empty(*lead, 64, device=device)
    lse = torch.empty(lead, dtype=torch.float64, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.empty(*lead, vocab, dtype=dtype, device=device)
        hidden = torch.empty(*lead, 64, dtype=dtype, device=device)
        whole = torch.empty(vocab, 64, dtype=dtype, device=device)
        heads: tuple[Head, ...] = ((logits, None, None), (hidden, whole[:narrow], None))
        for head in heads:
            table = whole[: vocab_size(head)]
            for t, softcap, exclude in ((None, None, None), (row, 30.0, 5)):
                yield partial(expectation, *head, table, t, softcap, exclude)
                yield partial(expectation_backward, mean, mean, lse, *head, table, t, softcap, exclude)
