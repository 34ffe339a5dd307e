"""One read of the logits: a summary per group of 256 tokens, then, per row, statistics and an exact draw.

Groups know nothing of each other, so any number of programs may share a row, or a row a program. What a draw
reads again is one group. States carry over from tile to tile, as those of vocabulary shards would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton import noise
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.linear_logits import GROUP, Head, tiles
from dlcore.triton.rows import Rows, row_offset
from dlcore.triton.softmax import (
    FLOOR,
    LN2,
    LOG2E,
    NONE,
    Softmax,
    entries,
    inverse_temperature,
    row_shift,
    transformed,
)

#: Groups that a program, which is a warp, reads at once: a quarter of its lanes each.
_GROUPS = 4
#: Registers that leave room for nearly as many programs as a multiprocessor takes; more where every entry
#: is other than it is stored.
_REGISTERS, _MORE_REGISTERS = 72, 128
#: So many programs fill a device, and keep all of it busy to the end.
_ENOUGH = 131072
#: A tile of so many groups a row, or so many rows, is reduced by one warp a row, so that more run side by
#: side.
_FEW_GROUPS, _MANY_ROWS = 32, 1024
#: Groups that a warp, or four, take at a time then, and registers for it.
_WARP_BLOCK, _BLOCK = 256, 1024
_WARP_REGISTERS, _BLOCK_REGISTERS = 104, 128

_SIZE = tl.constexpr(GROUP)

# Rows of a state: logits are scaled by 1 / temperature, sums relative to the largest.
TOP = tl.constexpr(0)
SECOND = tl.constexpr(1)
SUM = tl.constexpr(2)
WEIGHTED = tl.constexpr(3)
SCORE = tl.constexpr(4)
TOKEN_LOGIT = tl.constexpr(5)
INDEX_LOGIT = tl.constexpr(6)
TARGET_LOGIT = tl.constexpr(7)
_NUMBERS = 8


class State(NamedTuple):
    """What the tokens read so far say of each row: numbers (8, rows) float64, argmax and draw (2, rows)."""

    numbers: Tensor
    tokens: Tensor


@triton.jit
def unread(row, skip, target):
    """Whether a row is not to be read."""
    no = tl.full((), 0, tl.int32)
    if skip is not None:
        no = tl.load(skip + row).to(tl.int32)
    if target is not None:
        no = no | (tl.load(target + row) < 0).to(tl.int32)
    return no != 0


@triton.jit
def cut_off(x, token, row, thresholds, last):
    """-inf outside what a truncated draw keeps: above a threshold, or at it up to a last token."""
    if thresholds is not None:
        threshold = tl.load(thresholds + row)
        keep = (x > threshold) | ((x == threshold) & (token <= tl.load(last + row)))
        x = tl.where(keep, x, NONE)
    return x


@triton.jit
def _column(token, first, columns):
    """A token's column in a tile, int32; -1 outside."""
    return tl.where((token >= first) & (token < first + columns), token - first, -1).to(tl.int32)


@triton.jit
def group_sums(x, scale):
    """Of groups (groups, 4, 64) the largest entry, and Σ 2^d and Σ 2^d·d: d is the distance to it, scaled."""
    top = tl.max(tl.max(x, 1), 1)
    d = (x - tl.where(top > NONE, top, 0.0)[:, None, None]) * scale
    e = tl.exp2(d)
    return top, tl.sum(tl.sum(e, 1), 1), tl.sum(tl.sum(e * tl.maximum(d, FLOOR), 1), 1)


@triton.jit(do_not_specialize=["first", "groups", "tiles", "parts", "rows", "exclude"])
def scan_kernel(
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
    skip,
    target,
    thresholds,
    last,
    summaries,
    rows,
    groups,
    tiles,
    parts,
    GROUPS: tl.constexpr,
):
    """summaries (3, rows, groups): of each group the largest logit, and Σ 2^d and Σ 2^d·d relative to it."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    if unread(row, skip, target):
        return
    at, bonus = row_shift(row, index, shift, shift_step)
    scale = inverse_temperature(row, temperature, temperature_step) * LOG2E
    data = logits + row_offset(row, inner, outer_stride, inner_stride)
    out = summaries + row * groups
    size = rows.to(tl.int64) * groups
    at = _column(at, first, columns)
    if exclude is not None:
        exclude = _column(exclude, first, columns)
    # A quarter of a group for each of a lane's registers: few lanes share it.
    quarter = tl.arange(0, 4)[None, :, None] * (_SIZE // 4) + tl.arange(0, _SIZE // 4)[None, None, :]
    for i in range(tiles):
        begin = ((program % parts).to(tl.int32) * tiles + i) * GROUPS
        group = begin + tl.arange(0, GROUPS)
        column = group[:, None, None] * _SIZE + quarter
        # Most tiles are whole, and their entries taken as they are.
        plain = begin + GROUPS <= columns // _SIZE
        if index is not None:
            plain = plain & ((at < begin * _SIZE) | (at >= (begin + GROUPS) * _SIZE))
        if exclude is not None:
            plain = plain & ((exclude < begin * _SIZE) | (exclude >= (begin + GROUPS) * _SIZE))
        if softcap is not None or thresholds is not None:
            x = entries(data, column, columns, 0, at, bonus, softcap, exclude)
            x = cut_off(x, first + column, row, thresholds, last)
        else:
            if plain:
                x = tl.load(data + column).to(tl.float32)
            else:
                x = entries(data, column, columns, 0, at, bonus, softcap, exclude)
        top, total, weighted = group_sums(x, scale)
        inside = group < groups
        tl.store(out + group, top, inside)
        tl.store(out + size + group, total, inside)
        tl.store(out + 2 * size + group, weighted, inside)


@triton.jit
def _logit(data, token, columns, first, at, bonus, softcap, exclude, scale, before):
    """A token's scaled logit if this tile has it, else what was known before."""
    inside = (token >= first) & (token < first + columns)
    column = tl.where(inside, token - first, columns)
    x = entries(data, column, columns, first, at, bonus, softcap, exclude)
    return tl.where(inside, x.to(tl.float64) * scale, before)


@triton.jit
def _group(data, group, columns, first, at, bonus, softcap, exclude, row, thresholds, last):
    """The entries of a group, -inf if there is none."""
    column = group * _SIZE + tl.arange(0, _SIZE)
    inside = (column >= 0) & (column < columns)
    x = tl.load(data + column, inside, NONE)
    x = cut_off(
        transformed(x, first + column, at, bonus, softcap, exclude), first + column, row, thresholds, last
    )
    return tl.where(inside, x, NONE)


@triton.jit(do_not_specialize=["first", "groups", "anew", "rows", "exclude"])
def reduce_kernel(
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
    skip,
    target,
    thresholds,
    last,
    summaries,
    rows,
    groups,
    anew,
    keys,
    numbers,
    tokens,
    places,
    KEY_PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge a tile's groups into the state of a row, or start it anew.

    With `places` (2, rows, groups), where a group's largest entry and its draw are, no logit is read again:
    `summaries` has two numbers more, the group's second entry and the draw's, and the state the logits at
    `index`.
    """
    row = tl.program_id(0).to(tl.int64)
    if unread(row, skip, target):
        return
    at, bonus = row_shift(row, index, shift, shift_step)
    inverse = inverse_temperature(row, temperature, temperature_step)
    scale = inverse.to(tl.float64)
    if places is None:
        data = logits + row_offset(row, inner, outer_stride, inner_stride)
    groups_of_row = summaries + row * groups
    size = rows.to(tl.int64) * groups
    state = numbers + row
    rows = rows.to(tl.int64)
    old = anew == 0
    top = tl.load(state + TOP * rows, old, NONE)
    second = tl.load(state + SECOND * rows, old, NONE)
    total = tl.load(state + SUM * rows, old, 0.0)
    weighted = tl.load(state + WEIGHTED * rows, old, 0.0)
    score = tl.load(state + SCORE * rows, old, NONE)
    best = tl.full((), -1, tl.int64)
    winner = tl.full((), -1, tl.int64)
    if keys is not None:
        seed, offset = noise.row_key(keys, row, KEY_PER_ROW)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < groups
        m = tl.load(groups_of_row + group, inside, NONE)
        s = tl.load(groups_of_row + size + group, inside, 0.0)
        w = tl.load(groups_of_row + 2 * size + group, inside, 0.0)
        largest, leader = tl.max(m, 0, return_indices=True)
        reference = tl.where(largest > NONE, largest, 0.0)
        drop = tl.maximum((m - reference) * (inverse * LOG2E), -126.0)
        factor = tl.where(m > NONE, tl.exp2(drop), 0.0)
        # A NaN among the sums reaches the row's.
        part = tl.sum(tl.where(s == s, factor * s, s), 0).to(tl.float64)
        part_weighted = tl.sum(factor * (w + drop * s), 0).to(tl.float64) * LN2
        part_top = largest.to(tl.float64) * scale
        others = tl.max(tl.where(tl.arange(0, BLOCK) == leader, NONE, m), 0).to(tl.float64) * scale
        if keys is not None:
            drawn = noise.gumbel_at(seed, offset, noise.GROUP, first // _SIZE + group.to(tl.int64))
            logs = (m - reference) * inverse + noise.log(tl.maximum(s, 1.0)) + drawn
            value, place = tl.max(tl.where(s > 0.0, logs, NONE), 0, return_indices=True)
            part_score = part_top + value.to(tl.float64)
            wins = part_score > score
            score = tl.where(wins, part_score, score)
            winner = tl.where(wins, (start + place).to(tl.int64), winner)
        leads = part_top > top
        second = tl.where(leads, tl.maximum(top, others), tl.maximum(second, part_top))
        best = tl.where(leads, (start + leader).to(tl.int64), best)
        most = tl.maximum(top, part_top)
        known = tl.where(most > NONE, most, 0.0)
        fall = tl.where(top > NONE, top - known, 0.0)
        part_fall = tl.where(part_top > NONE, part_top - known, 0.0)
        kept, taken = tl.exp(fall), tl.exp(part_fall)
        weighted = kept * (weighted + fall * total) + taken * (part_weighted + part_fall * part)
        total = kept * total + taken * part
        top = most
    ids = tl.arange(0, _SIZE)
    if places is None:
        # Both groups are read before either is looked at.
        leading = _group(data, best, columns, first, at, bonus, softcap, exclude, row, thresholds, last)
        if keys is not None:
            drawn_from = _group(
                data, winner, columns, first, at, bonus, softcap, exclude, row, thresholds, last
            )
        _, place = tl.max(leading, 0, return_indices=True)
        others = tl.max(tl.where(ids == place, NONE, leading), 0)
    else:
        place = tl.load(places + row * groups + best, best >= 0, 0)
        others = tl.load(groups_of_row + 3 * size + best, best >= 0, NONE)
    # Set even if there is no law or nothing is kept: the state was not.
    found = best >= 0
    second = tl.where(found, tl.maximum(second, others.to(tl.float64) * scale), second)
    tl.store(tokens + row, tl.where(found, first + best * _SIZE + place, -1), found | (anew != 0))
    if keys is not None:
        if places is None:
            drawn = noise.gumbel_at(seed, offset, noise.TOKEN, first + winner * _SIZE + ids)
            scores = tl.fma(drawn_from - tl.max(drawn_from, 0), inverse, drawn)
            _, place = tl.max(tl.where(winner >= 0, scores, 0.0), 0, return_indices=True)
            entry = tl.max(tl.where(ids == place, drawn_from, NONE), 0)
        else:
            place = tl.load(places + size + row * groups + winner, winner >= 0, 0)
            entry = tl.load(groups_of_row + 4 * size + winner, winner >= 0, NONE)
        found = winner >= 0
        drew = found | (anew != 0)
        tl.store(tokens + rows + row, tl.where(found, first + winner * _SIZE + place, -1), drew)
        tl.store(state + TOKEN_LOGIT * rows, tl.where(found, entry.to(tl.float64) * scale, NONE), drew)
        tl.store(state + SCORE * rows, score)
    tl.store(state + TOP * rows, top)
    tl.store(state + SECOND * rows, second)
    tl.store(state + SUM * rows, total)
    tl.store(state + WEIGHTED * rows, weighted)
    if index is not None and places is None:
        before = tl.load(state + INDEX_LOGIT * rows, old, float("nan"))
        x = _logit(data, at, columns, first, at, bonus, softcap, exclude, scale, before)
        tl.store(state + INDEX_LOGIT * rows, x)
    if target is not None:
        before = tl.load(state + TARGET_LOGIT * rows, old, float("nan"))
        x = _logit(data, tl.load(target + row), columns, first, at, bonus, softcap, exclude, scale, before)
        tl.store(state + TARGET_LOGIT * rows, x)


@triton.jit
def load_state(numbers, row, rows, inside, NUMBER: tl.constexpr):
    """One number of some rows' states."""
    return tl.load(numbers + NUMBER * rows + row, inside, 0.0)


@triton.jit
def log_prob(numbers, logit, row, rows, inside):
    """Of a logit; differences first, so that a common offset costs no digits. NaN for a row without a law."""
    total = load_state(numbers, row, rows, inside, SUM)
    lawful = (total > 0.0) & (total < float("inf"))
    log_total = tl.log(tl.where(lawful, total, 1.0))
    return tl.where(lawful, logit - load_state(numbers, row, rows, inside, TOP) - log_total, float("nan"))


def new_state(head: Head) -> State:
    """Room for the rows of a head."""
    rows, device = head[0].shape[:-1].numel(), head[0].device
    numbers = torch.empty((_NUMBERS, rows), dtype=torch.float64, device=device)
    return State(numbers, torch.empty((2, rows), dtype=torch.int64, device=device))


def reduce(
    read: tuple[object, ...],
    rows: int,
    groups: int,
    key: Tensor | None,
    state: State,
    anew: bool,
    places: Tensor | None = None,
) -> None:
    """Merge what a kernel that took `read` says of the groups into the state, or start it anew."""
    warp = groups <= _FEW_GROUPS or rows >= _MANY_ROWS
    launch(
        reduce_kernel,
        rows,
        state.numbers,
        *(*read, groups, int(anew), key, *state, places),
        KEY_PER_ROW=key is not None and key.dim() > 1,
        BLOCK=power_of_two(groups, 16, _WARP_BLOCK if warp else _BLOCK),
        num_warps=1 if warp else 4,
        # Left alone, the assembler aims for more programs a unit, and spills.
        maxnreg=_WARP_REGISTERS if warp else _BLOCK_REGISTERS,
    )


def scan_tile(
    tile: tuple[int, int, Rows],
    rows: int,
    softmax: Softmax,
    state: State,
    anew: bool,
    target: Tensor | None = None,
    key: Tensor | None = None,
    skip: Tensor | None = None,
    cuts: tuple[Tensor, Tensor] | None = None,
    tops: Tensor | None = None,
) -> None:
    """Merge one tile into the state, or start it anew."""
    first, columns, logits = tile
    groups = ceil_div(columns, GROUP)
    summaries = torch.empty((3, rows, groups), dtype=torch.float32, device=state.numbers.device)
    # A program takes several tiles of a row where there are rows enough to keep the device busy.
    steps = ceil_div(groups, _GROUPS)
    parts = ceil_div(steps, min(steps, max(1, rows * steps // _ENOUGH)))
    read = (*logits, first, columns, *softmax.args, skip, target, *(cuts or (None, None)), summaries, rows)
    shape = (groups, ceil_div(steps, parts), parts)
    plain = softmax.entry[3] is None and cuts is None
    meta = {"GROUPS": _GROUPS, "num_warps": 1, "maxnreg": _REGISTERS if plain else _MORE_REGISTERS}
    launch(scan_kernel, rows * parts, summaries, *read, *shape, **meta)
    reduce(read, rows, groups, key, state, anew)
    if tops is not None:
        tops[:, first // GROUP :][:, :groups] = summaries[0]


def scan(
    head: Head,
    softmax: Softmax,
    target: Tensor | None = None,
    key: Tensor | None = None,
    skip: Tensor | None = None,
    cuts: tuple[Tensor, Tensor] | None = None,
    tops: Tensor | None = None,
    begin: int = 0,
) -> State:
    """One read of the logits, of tokens from `begin` on.

    Rows that `skip` marks or whose target is negative are not read, nor set. The largest logit of
    every group goes to `tops` (rows, groups), if given.
    """
    state, rows = new_state(head), head[0].shape[:-1].numel()
    for first, columns, tile in tiles(head):
        here = (begin + first, columns, tile)
        scan_tile(here, rows, softmax, state, first == 0, target, key, skip, cuts, tops)
    return state
