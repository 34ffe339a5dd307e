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
from dlcore.triton.softmax import FLOOR, LOG2E, NONE, entries

#: Groups of each stream that a warp of the scan reads at once, a quarter of its lanes each.
_GROUPS = 2
#: So many programs of the scan, and of the draw, fill a device.
_ENOUGH, _ENOUGH_DRAWS = 32768, 4096
#: Groups that a program draws from, at least, where there are so many, and at most.
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


@triton.jit
def _plain(begin, end, columns, z, exclude):
    """Whether there are all tokens [begin, end), and they are taken as they are stored: most are."""
    plain = (end <= columns) & ((z < begin) | (z >= end))
    if exclude is not None:
        plain = plain & ((exclude < begin) | (exclude >= end))
    return plain


@triton.jit
def _read(data, token, plain, columns, z, shift, exclude):
    """Entries of tokens, as the softmax takes them before the temperature."""
    if plain:
        x = tl.load(data + token).to(tl.float32)
    else:
        x = entries(data, token, columns, 0, z, shift, None, exclude)
    return x


@triton.jit
def _sum_groups(x, scale):
    """Of groups (groups, 4, 64) the largest entry, and Σ 2^d, where d is an entry's distance to it times
    scale."""
    top = tl.max(tl.max(x, 1), 1)
    e = tl.exp2((x - tl.where(top > NONE, top, 0.0)[:, None, None]) * scale)
    return top, tl.sum(tl.sum(e, 1), 1)


@triton.jit(do_not_specialize=["groups", "tiles", "parts", "rows", "exclude"])
def guided_scan_kernel(
    cond, cond_inner, cond_outer_stride, cond_inner_stride,
    uncond, uncond_inner, uncond_outer_stride, uncond_inner_stride,
    columns, index, exclude, coefficients, step, summaries, rows, groups, tiles, parts,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """summaries (4, rows, groups): of each stream the groups' largest logits, and Σ 2^d relative to them."""
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
    # A quarter of a group for each of a lane's registers: few lanes share it.
    quarter = tl.arange(0, 4)[None, :, None] * (_SIZE // 4) + tl.arange(0, _SIZE // 4)[None, None, :]
    for i in range(tiles):
        first = ((program % parts).to(tl.int32) * tiles + i) * GROUPS
        group = first + tl.arange(0, GROUPS)
        token = group[:, None, None] * _SIZE + quarter
        plain = _plain(first * _SIZE, (first + GROUPS) * _SIZE, columns, z, exclude)
        top_c, total_c = _sum_groups(_read(c, token, plain, columns, z, shift, exclude), scale)
        top_u, total_u = _sum_groups(_read(u, token, plain, columns, z, shift, exclude), scale)
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
    largest = tl.exp2(tl.maximum((m - top) * scale, FLOOR))
    # The first as an entry's is reckoned, to the bit.
    return noise.log(tl.fma(largest, odds, 1.0)), noise.log(tl.fma(largest * odds, s, 256.0))


@triton.jit
def _log_mass(x, top, scale, odds):
    """Logarithms of a stream's masses, over the noise."""
    return noise.log(tl.fma(tl.exp2(tl.maximum((x - top) * scale, FLOOR)), odds, 1.0))


@triton.jit
def _guided(c, u, group, columns, k, z, exclude, top_c, top_u, odds_c, odds_u, noisy):
    """The guided logarithms of a group, reckoned from the stream of the greater weight, so that γ = 0 and
    γ = 1 are exact; -inf where a token is impossible, and past the end."""
    gamma = _limited(tl.load(k + _GAMMA), -1e30, 1e30)
    near = gamma >= 0.5
    weight = tl.where(near, gamma - 1.0, gamma).to(tl.float32)
    shift, inverse = _softmax(k)
    token = group * _SIZE + tl.arange(0, _SIZE)
    plain = _plain(group * _SIZE, (group + 1) * _SIZE, columns, z, exclude)
    x = _read(c, token, plain, columns, z, shift, exclude)
    y = _read(u, token, plain, columns, z, shift, exclude)
    if noisy:
        x = _log_mass(x, top_c, inverse * LOG2E, odds_c)
        y = _log_mass(y, top_u, inverse * LOG2E, odds_u)
        guided = tl.fma(x - y, weight, tl.where(near, x, y))
    else:
        # Over the largest mass.
        x = tl.maximum((x - top_c) * inverse, _NEVER)
        y = tl.maximum((y - top_u) * inverse, _NEVER)
        guided = tl.fma(x - y, weight, tl.where(near, x, y))
        least_x = tl.where(gamma == 0.0, NONE, _HARDLY)
        least_y = tl.where(gamma == 1.0, NONE, _HARDLY)
        guided = tl.where((x >= least_x) & (y >= least_y), guided, NONE)
    if ~plain:
        bonus = _limited(tl.load(k + _BONUS), -1e30, 1e30).to(tl.float32)
        inside = token < columns
        if exclude is not None:
            inside = inside & (token != exclude)
        guided = tl.where(inside, tl.where(token == z, guided + bonus, guided), NONE)
    return guided


@triton.jit
def _bound(k, largest_c, largest_u, total_c, total_u, holds_z):
    """At least the logarithm of Σ m_c^γ·m_u^(1-γ) over groups: for γ in [0, 1] Hölder's inequality; beyond,
    since no mass is below the noise's, Σ m^γ <= (max m)^(γ-1)·Σ m of one stream."""
    gamma = _limited(tl.load(k + _GAMMA), -1e30, 1e30)
    excess = tl.maximum(tl.maximum(gamma - 1.0, -gamma), 0.0).to(tl.float32)
    share = _limited(gamma, 0.0, 1.0).to(tl.float32)
    bound = tl.fma(
        tl.where(gamma >= 0.5, largest_c, largest_u), excess, tl.fma(total_c - total_u, share, total_u)
    )
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
    scale = _softmax(k)[1] * LOG2E
    tops_c = summaries + row * groups
    sums_c = tops_c + rows * groups
    tops_u = sums_c + rows * groups
    sums_u = tops_u + rows * groups
    top_c, total_c = _normaliser(tops_c, sums_c, groups, scale, BLOCK)
    top_u, total_u = _normaliser(tops_u, sums_u, groups, scale, BLOCK)
    lawful = (top_c > NONE) & (total_c == total_c) & (top_u > NONE) & (total_u == total_u)
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

    group = part.to(tl.int32) * size + tl.arange(0, BLOCK)
    inside = (tl.arange(0, BLOCK) < size) & (group < groups)
    largest_c, all_c = _group_masses(tops_c, sums_c, group, inside, top_c, scale, odds_c)
    largest_u, all_u = _group_masses(tops_u, sums_u, group, inside, top_u, scale, odds_u)
    bound = _bound(k, largest_c, largest_u, all_c, all_u, group == z // _SIZE)
    drawn = noise.gumbel_of(keys, row, KEY_PER_ROW, noise.GROUP, group.to(tl.int64))
    bound = tl.where(inside, tl.where(noisy, bound + drawn, float("inf")), NONE)
    bound = tl.where(lawful, bound, NONE)

    # Group by group, the likeliest first, as long as one may still win.
    best = tl.full((), NONE, tl.float64)
    winner = tl.full((), -1, tl.int32)
    most, place = tl.max(bound, 0, return_indices=True)
    while (most > NONE) & (most.to(tl.float64) >= best):
        here = part.to(tl.int32) * size + place
        guided = _guided(c, u, here, columns, k, z, exclude, top_c, top_u, odds_c, odds_u, noisy)
        top = tl.max(guided, 0)
        total = tl.sum(tl.exp2((guided - tl.where(top > NONE, top, 0.0)) * LOG2E), 0)
        score = top.to(tl.float64) + noise.log(tl.maximum(total, 1.0))
        score += tl.sum(tl.where(group == here, drawn, 0.0), 0)
        wins = (score > best) | ((score == best) & (here < winner))
        best = tl.where(wins, score, best)
        winner = tl.where(wins, here, winner)
        bound = tl.where(group == here, NONE, bound)
        most, place = tl.max(bound, 0, return_indices=True)
    found = tl.full((), -1, tl.int64)
    if winner >= 0:
        guided = _guided(c, u, winner, columns, k, z, exclude, top_c, top_u, odds_c, odds_u, noisy)
        token = winner.to(tl.int64) * _SIZE + tl.arange(0, _SIZE)
        noises = noise.gumbel_of(keys, row, KEY_PER_ROW, noise.TOKEN, token)
        _, place = tl.max(guided + noises, 0, return_indices=True)
        found = winner.to(tl.int64) * _SIZE + place
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
    tiles = ceil_div(steps, parts)
    scan = (*read, tiles, parts)
    launch(guided_scan_kernel, rows * parts, z, *scan, GROUPS=_GROUPS, num_warps=1, maxnreg=168)

    size = min(groups, max(_LEAST, ceil_div(rows * groups, _ENOUGH_DRAWS)), _MOST)
    parts = ceil_div(groups, size)
    tokens = torch.empty(lead, dtype=torch.int64, device=device)
    drawn, scores = tokens, None
    if parts > 1:
        drawn = torch.empty((parts, rows), dtype=torch.int64, device=device)
        scores = torch.empty((parts, rows), dtype=torch.float64, device=device)
    draw = (*read, size, parts, key.contiguous(), scores, drawn)
    launch(
        guided_draw_kernel,
        rows * parts,
        z,
        *draw,
        KEY_PER_ROW=key.dim() > 1,
        BLOCK=power_of_two(size, 16, _MOST),
        num_warps=1,
        maxnreg=128,  # left alone, the assembler aims for more programs a unit, and spills
    )
    if scores is not None:
        merge = (scores, drawn, rows, parts, tokens)
        launch(guided_merge_kernel, ceil_div(rows, _ROWS), z, *merge, BLOCK=_ROWS)
    return tokens


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that between them launch every variant of every kernel."""
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    key = torch.empty(2, dtype=torch.int64, device=device)
    row = torch.empty(_COUNT, dtype=torch.float64, device=device)
    # Of a vocabulary that one program draws from, and that several do.
    for vocab, (c, u) in product(
        (50_257, 126_464),
        ((float32, float32), (bfloat16, bfloat16), (float16, float16), (float32, bfloat16)),
    ):
        rows = 2048
        z = torch.empty(rows, dtype=torch.int64, device=device)
        cond, uncond = (torch.empty(rows, vocab, dtype=x, device=device) for x in (c, u))
        yield partial(cfg_uniform_step, cond, uncond, z, row, None, key)
        yield partial(cfg_uniform_step, cond, uncond, z, row.expand(rows, -1), 5, key.expand(rows, 2))
