"""Where a truncated draw ends: top_k, top_p and min_p as a threshold and a last token, without a sort.

The last kept entry is found digit by digit of the logits' ordered bits, the largest first. Masses are
integers, so that sums do not depend on their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton.categorical_scan import SUM, TOP, State
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.linear_logits import GROUP, Head, tiles, vocab_size
from dlcore.triton.rows import per_row, row_offset
from dlcore.triton.softmax import LOG2E, NONE, Softmax, entries, inverse_temperature, power, row_shift

_BLOCK = 2048
_DIGITS = 4
_MOST_GROUPS = 4096
_BINS = tl.constexpr(256)
#: What a mass of 1, that of the largest entry, counts.
_ONE = tl.constexpr(float(1 << 40))
_ALL = tl.constexpr(1 << 62)


class Selection(NamedTuple):
    """Of each row: at most so many, while the mass before is at most so much; what was found, its digits."""

    max_count: Tensor
    max_mass: Tensor
    found: Tensor
    found_mass: Tensor
    prefix: Tensor
    floor: Tensor


@triton.jit
def _ordered(x):
    """The bits of a float32 as an int64 that grows with it."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits < 0, -1 - bits - 2147483648, bits) + 2147483648


@triton.jit
def _unordered(bits):
    raw = bits - 2147483648
    return tl.where(raw < 0, -1 - raw - 2147483648, raw).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows", "vocab"])
def start_kernel(
    numbers,
    rows,
    vocab,
    top_k,
    top_k_step,
    top_p,
    top_p_step,
    within_mass,
    temperature,
    temperature_step,
    max_count,
    max_mass,
    count,
    mass,
    prefix,
    floor,
    BLOCK: tl.constexpr,
):
    """A selection of everything, to be narrowed by top_k and by top_p of what an earlier one keeps."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    rows = rows.to(tl.int64)
    row = tl.where(inside, row, 0)
    most = tl.full(row.shape, _ALL, tl.int64)
    if top_k is not None:
        most = tl.load(top_k + row * top_k_step)
    limit = tl.full(row.shape, _ALL, tl.int64)
    lowest = tl.full(row.shape, NONE, tl.float32)
    if top_p is not None:
        total = tl.load(numbers + SUM * rows + row)
        # A row without a law has any selection.
        total = tl.where((total > 0.0) & (total < float("inf")), total, 1.0)
        kept = total * _ONE
        if within_mass is not None:
            kept = tl.minimum(kept, tl.load(within_mass + row).to(tl.float64))
        share = tl.load(top_p + row * top_p_step).to(tl.float64)
        limit = tl.where(share < 1.0, (share * kept).to(tl.int64), _ALL)
        # Entries of probability below 1/V-th of what may be dropped are dropped: together they fit.
        rest = (total - share * kept / _ONE) / vocab
        slope = inverse_temperature(row, temperature, temperature_step).to(tl.float64)
        bound = (tl.load(numbers + TOP * rows + row) + tl.log(tl.where(rest > 0.0, rest, 1.0)) - 1e-3) / slope
        lowest = tl.where((rest > 0.0) & (share < 1.0), bound, NONE).to(tl.float32)
    tl.store(max_count + row, most, inside)
    tl.store(max_mass + row, limit, inside)
    zero = tl.full(row.shape, 0, tl.int64)
    tl.store(count + row, zero, inside)
    tl.store(mass + row, zero, inside)
    tl.store(prefix + row, zero, inside)
    tl.store(floor + row, lowest, inside)


@triton.jit(do_not_specialize=["groups"])
def floor_kernel(tops, groups, top_k, top_k_step, floor, BLOCK: tl.constexpr):
    """The k-th largest entry is not below the k-th largest of the groups' largest: found bit by bit."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK)
    key = _ordered(tl.load(tops + row * groups + group, group < groups, NONE))
    k = tl.load(top_k + row * top_k_step)
    found = tl.full((), 0, tl.int64)
    for i in range(32):
        candidate = found | (tl.full((), 1, tl.int64) << (31 - i))
        found = tl.where(tl.sum((key >= candidate).to(tl.int32), 0) >= k, candidate, found)
    bound = tl.where(found > 0, _unordered(found), NONE)
    tl.store(floor + row, tl.maximum(tl.load(floor + row), bound))


@triton.jit(do_not_specialize=["first", "parts", "rows", "exclude", "bit"])
def histogram_kernel(
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
    numbers,
    rows,
    parts,
    prefix,
    floor,
    bit,
    bins,
    BLOCK: tl.constexpr,
):
    """bins (2, rows, 256): of each value of the digit at `bit`, under the digits found, mass and count."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    at, bonus = row_shift(row, index, shift, shift_step)
    scale = inverse_temperature(row, temperature, temperature_step)
    data = logits + row_offset(row, inner, outer_stride, inner_stride)
    column = program % parts * BLOCK + tl.arange(0, BLOCK)
    x = entries(data, column, columns, first, at, bonus, softcap, exclude)
    top = (tl.load(numbers + TOP * rows.to(tl.int64) + row) / scale.to(tl.float64)).to(tl.float32)
    key = _ordered(x)
    counted = (
        (x > NONE) & (x >= tl.load(floor + row)) & (key >> (bit + 8) == tl.load(prefix + row) >> (bit + 8))
    )
    units = (power((x - top) * (scale * LOG2E)).to(tl.float64) * _ONE).to(tl.int64)
    to = bins + row * _BINS + ((key >> bit) & 255)
    tl.atomic_add(to, units, counted, sem="relaxed")
    tl.atomic_add(to + rows.to(tl.int64) * _BINS, tl.full((BLOCK,), 1, tl.int64), counted, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "bit"])
def narrow_kernel(bins, rows, bit, max_count, max_mass, count, mass, prefix):
    """Find the digit of the last kept entry; at the last one, how many of its equals are kept."""
    row = tl.program_id(0).to(tl.int64)
    rows = rows.to(tl.int64)
    digit = 255 - tl.arange(0, 256)
    masses = tl.load(bins + row * _BINS + digit)
    counts = tl.load(bins + (rows + row) * _BINS + digit)
    before = tl.load(count + row) + tl.cumsum(counts, 0) - counts
    before_mass = tl.load(mass + row) + tl.cumsum(masses, 0) - masses
    most, limit = tl.load(max_count + row), tl.load(max_mass + row)
    stops = (before + counts >= most) | (before_mass + masses > limit)
    place = tl.min(tl.where(stops, tl.arange(0, 256), 256), 0)
    # Nothing stops it: everything that was counted is kept.
    everything = place == 256
    here = tl.arange(0, 256) == tl.where(everything, 255, place)
    found = tl.sum(tl.where(here, before, 0), 0)
    found_mass = tl.sum(tl.where(here, before_mass, 0), 0)
    equals = tl.sum(tl.where(here, counts, 0), 0)
    equals_mass = tl.sum(tl.where(here, masses, 0), 0)
    known = tl.load(prefix + row) | (255 - tl.where(everything, 255, place)).to(tl.int64) << bit
    if bit == 0:
        each = equals_mass // tl.maximum(equals, 1)
        by_mass = tl.where(each > 0, (limit - found_mass) // tl.maximum(each, 1) + 1, _ALL)
        ties = tl.where(everything, equals, tl.minimum(tl.minimum(equals, most - found), by_mass))
        found_mass = found_mass + ties * each
        # From here on max_count is how many equals are kept.
        tl.store(max_count + row, ties)
    tl.store(count + row, found)
    tl.store(mass + row, found_mass)
    tl.store(prefix + row, known)


@triton.jit(do_not_specialize=["first", "exclude", "rows"])
def cut_kernel(
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
    prefix,
    ties,
    rows,
    thresholds,
    last,
    BLOCK: tl.constexpr,
):
    """The token of the last kept equal of the threshold, equals counted in order."""
    row = tl.program_id(0).to(tl.int64)
    at, bonus = row_shift(row, index, shift, shift_step)
    data = logits + row_offset(row, inner, outer_stride, inner_stride)
    # No entry has prefix 0: it stands for everything.
    bits = tl.load(prefix + row)
    threshold = tl.where(bits > 0, _unordered(bits), NONE)
    left = tl.load(ties + row)
    found = tl.full((), -1, tl.int64)
    if first > 0:
        found = tl.load(last + row)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK).to(tl.int64)
        x = entries(data, column, columns, first, at, bonus, softcap, exclude)
        equal = (x == threshold) & (column < columns)
        rank = tl.cumsum(equal.to(tl.int64), 0)
        found = tl.maximum(found, tl.max(tl.where(equal & (rank <= left), first + column, -1), 0))
        left = left - tl.max(rank, 0)
    tl.store(ties + row, left)
    tl.store(thresholds + row, threshold)
    tl.store(last + row, found)


@triton.jit(do_not_specialize=["rows"])
def min_p_kernel(
    numbers, rows, min_p, min_p_step, temperature, temperature_step, thresholds, last, BLOCK: tl.constexpr
):
    """Raise the threshold to what has at least min_p times the largest probability."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    row = tl.where(inside, row, 0)
    share = tl.load(min_p + row * min_p_step).to(tl.float64)
    # The state is scaled by the rounded 1/temperature; undone with the same number, the largest is exact.
    scale = inverse_temperature(row, temperature, temperature_step).to(tl.float64)
    top = tl.load(numbers + TOP * rows.to(tl.int64) + row)
    bound = ((top + tl.log(tl.where(share > 0.0, share, 1.0))) / scale).to(tl.float32)
    raised = inside & (share > 0.0) & (bound > tl.load(thresholds + row))
    tl.store(thresholds + row, bound, raised)
    tl.store(last + row, tl.full(row.shape, _ALL, tl.int64), raised)


def cuts(
    head: Head,
    softmax: Softmax,
    state: State,
    tops: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Per row a threshold, which only entries above it pass, and the last token that passes with it.

    `tops` (rows, groups) are the groups' largest logits.
    """
    lead, rows = head[0].shape[:-1], head[0].shape[:-1].numel()
    selection = None
    if top_k is not None:
        selection = _select(head, softmax, state, tops, per_row(top_k, lead), (None, 0), None)
    if top_p is not None:
        within = None if selection is None else selection.found_mass
        selection = _select(head, softmax, state, tops, per_row(top_k, lead), per_row(top_p, lead), within)
    thresholds = torch.full((rows,), float("-inf"), device=head[0].device)
    last = torch.full((rows,), _ALL.value, dtype=torch.int64, device=head[0].device)
    if selection is not None:
        for first, columns, logits in tiles(head):
            launch(
                cut_kernel,
                rows,
                last,
                *(*logits, first, columns, *softmax.entry),
                *(selection.prefix, selection.max_count, rows, thresholds, last),
                BLOCK=_BLOCK,
            )
    if min_p is not None:
        grid = ceil_div(rows, GROUP)
        at_least = per_row(min_p, lead)
        args = (state.numbers, rows, *at_least, *softmax.temperature, thresholds, last)
        launch(min_p_kernel, grid, last, *args, BLOCK=GROUP)
    return thresholds, last


def _select(
    head: Head,
    softmax: Softmax,
    state: State,
    tops: Tensor,
    top_k: tuple[Tensor | None, int],
    top_p: tuple[Tensor | None, int],
    within: Tensor | None,
) -> Selection:
    rows, vocab, device = head[0].shape[:-1].numel(), vocab_size(head), head[0].device
    whole = torch.empty((5, rows), dtype=torch.int64, device=device)
    selection = Selection(whole[0], whole[1], whole[2], whole[3], whole[4], torch.empty(rows, device=device))
    limits = (state.numbers, rows, vocab, *top_k, *top_p, within, *softmax.temperature)
    launch(start_kernel, ceil_div(rows, GROUP), whole, *limits, *selection, BLOCK=GROUP)
    groups = tops.shape[1]
    if top_k[0] is not None and groups <= _MOST_GROUPS:
        block = power_of_two(groups, 16, _MOST_GROUPS)
        launch(floor_kernel, rows, tops, tops, groups, *top_k, selection.floor, BLOCK=block)
    bins = torch.empty((2, rows, _BINS.value), dtype=torch.int64, device=device)
    for bit in range(8 * (_DIGITS - 1), -1, -8):
        _count(head, softmax, state, selection, bit, bins)
        launch(narrow_kernel, rows, bins, bins, rows, bit, *selection[:5])
    return selection


def _count(head: Head, softmax: Softmax, state: State, selection: Selection, bit: int, bins: Tensor) -> None:
    rows, block = bins.shape[1], power_of_two(vocab_size(head), GROUP, 1024)
    bins.zero_()
    for first, columns, logits in tiles(head):
        parts = ceil_div(columns, block)
        read = (*logits, first, columns, *softmax.args, state.numbers, rows, parts)
        found = (selection.prefix, selection.floor, bit, bins)
        launch(histogram_kernel, rows * parts, bins, *read, *found, BLOCK=block)
