"""Guided draws in Triton: one read of both streams sums their groups of 256 tokens up, which gives the
normalisers. The same sums bound what a group can score in the draw, and only groups that may win are read
again and blended. The formulas are those of csrc/common/guidance.h."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._ops.guidance import COEFFICIENTS
from dlcore.triton import noise
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.linear_logits import GROUP
from dlcore.triton.rows import row_offset, rows_of
from dlcore.triton.softmax import FLOOR, LOG2E, NONE, entries, power, summary

#: Groups that a program of the scan reads at once, of each stream.
_GROUPS = 8
#: So many programs of the scan, and of the draw, fill a device.
_ENOUGH, _ENOUGH_DRAWS = 2048, 2048
#: Groups that a program draws from: at least, where there are so many, and at a time.
_LEAST, _MOST = 16, 256
#: Rows of a program that merges draws.
_ROWS = 128

_SIZE = tl.constexpr(GROUP)
_COUNT = len(COEFFICIENTS)
_GAMMA, _TEMPERATURE, _SHIFT, _ALPHA, _BONUS, _KEEP = (tl.constexpr(i) for i in range(_COUNT))
#: Below any logarithm of a mass, to calculate with in place of -inf, and a bound between the two.
_NEVER, _HARDLY = tl.constexpr(-1e30), tl.constexpr(-1e29)
#: Rounding of scores and bounds can't reach this, and this part of them.
_SLACK, _SLACK_PART = tl.constexpr(1e-3), tl.constexpr(1e-5)


@triton.jit
def _limited(x, low, high):
    """Of NaN the lower limit."""
    return tl.where(x > low, tl.where(x < high, x, high), low)


@triton.jit
def _softmax(k):
    """A row's shift and inverse temperature."""
    inverse = _limited(1.0 / tl.load(k + _TEMPERATURE), 1e-37, 1e37)
    return tl.load(k + _SHIFT).to(tl.float32), inverse.to(tl.float32)


@triton.jit(do_not_specialize=["groups", "tiles", "parts", "rows", "exclude"])
def guided_scan_kernel(
    cond, cond_inner, cond_outer_stride, cond_inner_stride,
    uncond, uncond_inner, uncond_outer_stride, uncond_inner_stride,
    columns, index, exclude, coefficients, step, summaries, rows, groups, tiles, parts,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """summaries (4, rows, groups): the largest logit of each group and Σ 2^d relative to it, of both streams."""
    program = tl.program_id(0).to(tl.int64)
    row = program // parts
    k = coefficients + row * step
    if tl.load(k + _KEEP) != 0.0:
        return
    z = tl.load(index + row)
    shift, inverse = _softmax(k)
    scale = inverse * LOG2E
    c = cond + row_offset(row, cond_inner, cond_outer_stride, cond_inner_stride)
    u = uncond + row_offset(row, uncond_inner, uncond_outer_stride, uncond_inner_stride)
    out = summaries + row * groups
    size = rows.to(tl.int64) * groups
    for i in range(tiles):
        group = (program % parts * tiles + i) * GROUPS + tl.arange(0, GROUPS)
        column = group[:, None] * _SIZE + tl.arange(0, _SIZE)[None, :]
        x = entries(c, column, columns, 0, z, shift, None, exclude)
        y = entries(u, column, columns, 0, z, shift, None, exclude)
        top_c, total_c, _ = summary(x, scale)
        top_u, total_u, _ = summary(y, scale)
        inside = group < groups
        tl.store(out + group, top_c, inside)
        tl.store(out + size + group, total_c, inside)
        tl.store(out + 2 * size + group, top_u, inside)
        tl.store(out + 3 * size + group, total_u, inside)


@triton.jit
def _normaliser(tops, sums, groups, scale, BLOCK: tl.constexpr):
    """A stream's largest logit, and Σ 2^d relative to it: -inf or NaN where it is broken."""
    top = tl.full((), NONE, tl.float32)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, groups, BLOCK):
        group = start + tl.arange(0, BLOCK)
        m = tl.load(tops + group, group < groups, NONE)
        s = tl.load(sums + group, group < groups, 0.0)
        most = tl.maximum(top, tl.max(m, 0))
        known = tl.where(most > NONE, most, 0.0)
        factor = tl.where(m > NONE, tl.exp2(tl.maximum((m - known) * scale, FLOOR)), 0.0)
        # A NaN among the sums reaches the row's.
        part = tl.sum(tl.where(s == s, factor * s, s), 0).to(tl.float64)
        total = total * tl.exp2(tl.maximum((top - known) * scale, FLOOR)) + part
        top = most
    return top, total


@triton.jit
def _group_masses(tops, sums, group, inside, top, scale, odds):
    """Over the noise: the logarithms of the mass of groups' largest entries, and of all."""
    m = tl.load(tops + group, inside, NONE)
    s = tl.load(sums + group, inside, 0.0)
    largest = tl.exp2(tl.maximum((m - top) * scale, FLOOR)) * odds
    return noise.log(largest + 1.0), noise.log(tl.fma(largest, s, 256.0))


@triton.jit
def _log_mass(data, column, columns, z, exclude, shift, inverse, top, odds, noisy):
    """Logarithms of a stream's masses: over the noise, or over the largest one where there is none."""
    drop = entries(data, column, columns, 0, z, shift, None, exclude) - top
    over = noise.log(tl.fma(tl.exp2(tl.maximum(drop * (inverse * LOG2E), FLOOR)), odds, 1.0))
    return tl.where(noisy, over, tl.maximum(drop * inverse, _NEVER))


@triton.jit
def _blend(k, c, u, noisy, token, columns, z, exclude):
    """The guided logarithms, reckoned from the stream of the greater weight, so that γ = 0 and γ = 1 are
    exact; -inf where a token is impossible, and past the end."""
    gamma = _limited(tl.load(k + _GAMMA), -1e30, 1e30)
    bonus = _limited(tl.load(k + _BONUS), -1e30, 1e30).to(tl.float32)
    near = gamma >= 0.5
    guided = tl.fma(c - u, tl.where(near, gamma - 1.0, gamma).to(tl.float32), tl.where(near, c, u))
    least_c = tl.where(noisy | (gamma == 0.0), NONE, _HARDLY)
    least_u = tl.where(noisy | (gamma == 1.0), NONE, _HARDLY)
    possible = (c >= least_c) & (u >= least_u) & (token < columns)
    if exclude is not None:
        possible = possible & (token != exclude)
    return tl.where(possible, tl.where(token == z, guided + bonus, guided), NONE)


@triton.jit
def _bound(k, largest_c, largest_u, total_c, total_u, holds_z):
    """At least the logarithm of Σ m_c^γ·m_u^(1-γ) over groups: for γ in [0, 1] Hölder's inequality; beyond,
    since no mass is below the noise's, Σ m^γ <= (max m)^(γ-1)·Σ m of one stream."""
    gamma = _limited(tl.load(k + _GAMMA), -1e30, 1e30)
    excess = tl.maximum(tl.maximum(gamma - 1.0, -gamma), 0.0).to(tl.float32)
    share = _limited(gamma, 0.0, 1.0).to(tl.float32)
    bound = tl.fma(tl.where(gamma >= 0.5, largest_c, largest_u), excess, tl.fma(total_c - total_u, share, total_u))
    bonus = _limited(tl.load(k + _BONUS), 0.0, 1e30).to(tl.float32)
    return (bound + tl.where(holds_z, bonus, 0.0)) * (1.0 + _SLACK_PART) + _SLACK


@triton.jit(do_not_specialize=["groups", "size", "parts", "rows", "exclude"])
def guided_draw_kernel(
    cond, cond_inner, cond_outer_stride, cond_inner_stride,
    uncond, uncond_inner, uncond_outer_stride, uncond_inner_stride,
    columns, index, exclude, coefficients, step, summaries, rows, groups, size, parts,
    keys, scores, tokens, KEY_PER_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tokens (parts, rows): what each of a row's parts of `size` groups draws, and its score if there are
    several; z where it stays, -1 where the row is broken or nothing is possible."""
    program = tl.program_id(0).to(tl.int64)
    row, part = program // parts, program % parts
    rows = rows.to(tl.int64)
    out = part * rows + row
    k = coefficients + row * step
    z = tl.load(index + row)
    if tl.load(k + _KEEP) != 0.0:
        tl.store(tokens + out, z)
        if scores is not None:
            tl.store(scores + out, 0.0)
        return
    shift, inverse = _softmax(k)
    scale = inverse * LOG2E
    tops_c = summaries + row * groups
    sums_c = tops_c + rows * groups
    tops_u = sums_c + rows * groups
    sums_u = tops_u + rows * groups
    top_c, total_c = _normaliser(tops_c, sums_c, groups, scale, BLOCK)
    top_u, total_u = _normaliser(tops_u, sums_u, groups, scale, BLOCK)
    broken = ~((top_c > NONE) & (total_c == total_c) & (top_u > NONE) & (total_u == total_u))
    alpha = _limited(tl.load(k + _ALPHA), 0.0, 1.0)
    count = columns
    if exclude is not None:
        count = columns - 1
    level = (1.0 - alpha) / count
    noisy = level > 0.0
    # The part of a stream's largest token, over its noise.
    odds_c = (alpha / (level * total_c)).to(tl.float32)
    odds_u = (alpha / (level * total_u)).to(tl.float32)
    c = cond + row_offset(row, cond_inner, cond_outer_stride, cond_inner_stride)
    u = uncond + row_offset(row, uncond_inner, uncond_outer_stride, uncond_inner_stride)

    # Group by group, the likeliest first, as long as one may still win.
    best = tl.full((), NONE, tl.float64)
    winner = tl.full((), -1, tl.int64)
    end = tl.minimum((part + 1) * size, groups)
    for start in range(part * size, tl.where(broken, 0, end), BLOCK):
        group = start + tl.arange(0, BLOCK)
        inside = group < end
        largest_c, all_c = _group_masses(tops_c, sums_c, group, inside, top_c, scale, odds_c)
        largest_u, all_u = _group_masses(tops_u, sums_u, group, inside, top_u, scale, odds_u)
        bound = _bound(k, largest_c, largest_u, all_c, all_u, group == z // _SIZE)
        drawn = noise.gumbel_of(keys, row, KEY_PER_ROW, noise.GROUP, group)
        bound = tl.where(inside, tl.where(noisy, bound + drawn, float("inf")), NONE)
        most, place = tl.max(bound, 0, return_indices=True)
        while (most > NONE) & (most.to(tl.float64) >= best):
            token = (start + place) * _SIZE + tl.arange(0, _SIZE)
            log_c = _log_mass(c, token, columns, z, exclude, shift, inverse, top_c, odds_c, noisy)
            log_u = _log_mass(u, token, columns, z, exclude, shift, inverse, top_u, odds_u, noisy)
            guided = _blend(k, log_c, log_u, noisy, token, columns, z, exclude)
            top = tl.max(guided, 0)
            total = tl.sum(power((guided - tl.where(top > NONE, top, 0.0)) * LOG2E), 0)
            here = tl.arange(0, BLOCK) == place
            score = top.to(tl.float64) + noise.log(tl.maximum(total, 1.0))
            score += tl.sum(tl.where(here, drawn, 0.0), 0)
            wins = (score > best) | ((score == best) & (start + place < winner))
            best = tl.where(wins, score, best)
            winner = tl.where(wins, start + place, winner)
            bound = tl.where(here, NONE, bound)
            most, place = tl.max(bound, 0, return_indices=True)
    found = tl.full((), -1, tl.int64)
    if winner >= 0:
        token = winner * _SIZE + tl.arange(0, _SIZE)
        log_c = _log_mass(c, token, columns, z, exclude, shift, inverse, top_c, odds_c, noisy)
        log_u = _log_mass(u, token, columns, z, exclude, shift, inverse, top_u, odds_u, noisy)
        guided = _blend(k, log_c, log_u, noisy, token, columns, z, exclude)
        drawn = noise.gumbel_of(keys, row, KEY_PER_ROW, noise.TOKEN, token)
        _, place = tl.max(guided + drawn, 0, return_indices=True)
        found = winner * _SIZE + place
    tl.store(tokens + out, found)
    if scores is not None:
        tl.store(scores + out, best)


@triton.jit(do_not_specialize=["rows", "parts"])
def guided_merge_kernel(scores, drawn, rows, parts, tokens, BLOCK: tl.constexpr):
    """tokens (rows): of each row the draw of the best part, the first of several."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    best = tl.load(scores + row, inside, 0.0)
    token = tl.load(drawn + row, inside, 0)
    at = row
    for _ in range(1, parts):
        at += rows
        score = tl.load(scores + at, inside, 0.0)
        token = tl.where(score > best, tl.load(drawn + at, inside, 0), token)
        best = tl.maximum(best, score)
    tl.store(tokens + row, token, inside)


def cfg_uniform_step(
    cond: Tensor, uncond: Tensor, z: Tensor, coefficients: Tensor, exclude: int | None, key: Tensor
) -> Tensor:
    """Tokens (...), by one read of both streams and of few groups again; rows that keep z are not read."""
    lead, columns, device = z.shape, cond.shape[-1], z.device
    rows, groups = z.numel(), ceil_div(columns, GROUP)
    step = 0 if coefficients.dim() == 1 else _COUNT
    summaries = torch.empty((4, rows, groups), dtype=torch.float32, device=device)
    streams = (*rows_of(cond), *rows_of(uncond), columns, z.contiguous(), exclude)
    read = (*streams, coefficients.contiguous(), step, summaries, rows, groups)
    steps = ceil_div(groups, _GROUPS)
    tiles = min(steps, max(1, rows * steps // _ENOUGH))
    parts = ceil_div(steps, tiles)
    launch(guided_scan_kernel, rows * parts, z, *read, tiles, parts, GROUPS=_GROUPS, num_warps=8)

    size = min(groups, max(_LEAST, ceil_div(rows * groups, _ENOUGH_DRAWS)))
    parts = ceil_div(groups, size)
    tokens = torch.empty(lead, dtype=torch.int64, device=device)
    drawn, scores = tokens, None
    if parts > 1:
        drawn = torch.empty((parts, rows), dtype=torch.int64, device=device)
        scores = torch.empty((parts, rows), dtype=torch.float64, device=device)
    options = {"KEY_PER_ROW": key.dim() > 1, "BLOCK": power_of_two(groups, 16, _MOST), "num_warps": 1}
    draw = (*read, size, parts, key.contiguous(), scores, drawn)
    launch(guided_draw_kernel, rows * parts, z, *draw, **options)
    if scores is not None:
        merge = (scores, drawn, rows, parts, tokens)
        launch(guided_merge_kernel, ceil_div(rows, _ROWS), z, *merge, BLOCK=_ROWS)
    return tokens


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""
    key = torch.empty(2, dtype=torch.int64, device=device)
    row = torch.empty(_COUNT, dtype=torch.float64, device=device)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for rows, (c, u), exclude in product((4, 4096), product(dtypes, dtypes), (None, 5)):
        z = torch.empty(rows, dtype=torch.int64, device=device)
        cond, uncond = (torch.empty(rows, 126_464, dtype=x, device=device) for x in (c, u))
        yield partial(cfg_uniform_step, cond, uncond, z, row, exclude, key)
        yield partial(cfg_uniform_step, cond, uncond, z, row.expand(rows, -1), exclude, key.expand(rows, 2))
