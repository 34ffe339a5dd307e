"""The one read of a head of few rows: logits are made in registers, and what a draw needs of them is kept.

A program makes the logits of a group of 256 tokens, and says of it what the scan of dense logits says. As
nothing can be read again, it draws a token inside of every group, too: to make the logits of the winner's
group anew, of 2 MiB of weights a row at depth 4096, would take longer than so much noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton import noise
from dlcore.triton.categorical_scan import INDEX_LOGIT, State, new_state, reduce, scan
from dlcore.triton.launch import ceil_div, launch, multiplies_from_shared, power_of_two
from dlcore.triton.linear_logits import GROUP, Head, vocab_size
from dlcore.triton.products import product
from dlcore.triton.rows import row_offset, rows_of
from dlcore.triton.softmax import LOG2E, NONE, Softmax, inverse_temperature, row_shift, sums, transformed

#: Up to so many rows. On an H200 a draw from 126,464 tokens of depth 4096 in bfloat16 takes 267 µs of 8 rows,
#: 288 of 32, 403 of 64, and would 714 of 128, where noise costs more than tiles whose product takes 362.
#: A program has at most 32 rows, for registers; the second-level cache serves what the others read again.
FEW_ROWS = 64

_SIZE = tl.constexpr(GROUP)


@triton.jit
def _halves(x):
    """Left and right columns; these stay in their threads."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _slices(x, COUNT: tl.constexpr):
    """x in one, two or four slices of columns, so that what is made of one is gone when the next begins."""
    if COUNT == 1:
        return (x,)
    else:
        left, right = _halves(x)
        if COUNT == 2:
            return left, right
        else:
            a, b = _halves(left)
            c, d = _halves(right)
            return a, b, c, d


@triton.jit(do_not_specialize=["vocab", "exclude", "rows", "groups"])
def product_kernel(
    hidden,
    inner,
    outer_stride,
    inner_stride,
    weight,
    token_stride,
    depth_stride,
    bias,
    depth,
    vocab,
    index,
    shift,
    shift_step,
    softcap,
    exclude,
    temperature,
    temperature_step,
    skip,
    summaries,
    rows,
    groups,
    keys,
    index_logits,
    places,
    KEY_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLICES: tl.constexpr,
):
    """`summaries` and `places` of a group as `reduce_kernel` takes them, and the logits at `index`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    group = tl.program_id(1)
    inside = row < rows
    last_row = rows.to(tl.int64) - 1
    row = tl.minimum(row, last_row)
    unread = tl.full((), 0, tl.int32)
    if skip is not None:
        unread = tl.min(tl.load(skip + row).to(tl.int32), 0)
    if unread != 0:
        return
    ids = tl.arange(0, _SIZE)
    token = group.to(tl.int64) * _SIZE + ids
    known = (token < vocab)[None, :]
    a_at = hidden + row_offset(row, inner, outer_stride, inner_stride)[:, None]
    b_at = weight + (token * token_stride)[None, :]
    x = tl.full((ROWS, _SIZE), 0.0, tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = tl.load(a_at + k[None, :], (k < depth)[None, :], 0.0)
        b = tl.load(b_at + k.to(tl.int64)[:, None] * depth_stride, (k < depth)[:, None] & known, 0.0)
        x = product(a, b.to(a.dtype), x)
    if bias is not None:
        x += tl.load(bias + token, token < vocab, 0.0).to(tl.float32)[None, :]
    at, bonus = row_shift(row, index, shift, shift_step)
    x = transformed(x, token[None, :], at[:, None], bonus[:, None], softcap, exclude)
    x = tl.where(known, x, NONE)
    inverse = inverse_temperature(row, temperature, temperature_step)
    top = tl.max(x, 1)
    _, place = tl.max(x, 1, return_indices=True)
    size = rows.to(tl.int64) * groups
    out = summaries + row * groups + group
    to = places + row * groups + group
    if index is not None:
        # Of an index outside of the vocabulary the first group says something, lest nothing be set.
        lawful = (at >= 0) & (at < vocab)
        mine = tl.where(lawful, at // _SIZE == group, group == 0)
        entry = tl.max(tl.where(token[None, :] == at[:, None], x, NONE), 1)
        tl.store(index_logits + row, entry.to(tl.float64) * inverse.to(tl.float64), inside & mine)
    scale, parts = (inverse * LOG2E)[:, None], _slices(x, SLICES)
    width: tl.constexpr = _SIZE // SLICES
    total = tl.full((ROWS,), 0.0, tl.float32)
    weighted, second = total, total + NONE
    for i in tl.static_range(SLICES):
        local = i * width + tl.arange(0, width)[None, :]
        part_total, part_weighted = sums(parts[i], top, scale)
        total += part_total
        weighted += part_weighted
        second = tl.maximum(second, tl.max(tl.where(local == place[:, None], NONE, parts[i]), 1))
    tl.store(out, top, inside)
    tl.store(out + size, total, inside)
    tl.store(out + 2 * size, weighted, inside)
    tl.store(out + 3 * size, second, inside)
    tl.store(to, place.to(tl.uint8), inside)
    if keys is not None:
        seed, offset = noise.row_key(keys, row[:, None], KEY_PER_ROW)
        best, place, logit = tl.full((ROWS,), NONE, tl.float32), place * 0, tl.full((ROWS,), NONE, tl.float32)
        for i in tl.static_range(SLICES):
            pair = group.to(tl.int64) * (_SIZE // 2) + i * (width // 2) + tl.arange(0, width // 2)
            even_low, even_high, odd_low, odd_high = noise.block(seed, offset, noise.TOKEN, pair[None, :])
            drawn = tl.interleave(noise.gumbel(even_low, even_high), noise.gumbel(odd_low, odd_high))
            scores = tl.fma(parts[i] - top[:, None], inverse[:, None], drawn)
            value, at_part = tl.max(scores, 1, return_indices=True)
            chosen = tl.arange(0, width)[None, :] == at_part[:, None]
            entry = tl.max(tl.where(chosen, parts[i], NONE), 1)
            wins = value > best
            best = tl.where(wins, value, best)
            place = tl.where(wins, i * width + at_part, place)
            logit = tl.where(wins, entry, logit)
        tl.store(out + 4 * size, logit, inside)
        tl.store(to + size, place.to(tl.uint8), inside)


def fuses(head: Head) -> bool:
    """Whether `scan_head` reads a head, if there is neither target nor offset, without writing logits."""
    hidden, weight, _ = head
    return weight is not None and hidden.shape[:-1].numel() <= FEW_ROWS


def scan_head(
    head: Head,
    softmax: Softmax,
    key: Tensor | None = None,
    skip: Tensor | None = None,
    target: Tensor | None = None,
    begin: int = 0,
) -> State:
    """As `scan`, and no logits of a head of few rows are written, unless there is a target or an offset:
    for these the product has no registers left."""
    hidden, weight, bias = head
    rows = hidden.shape[:-1].numel()
    if weight is None or not fuses(head) or target is not None or begin > 0:
        return scan(head, softmax, target, key, skip, begin=begin)
    hidden = hidden.detach().to(torch.promote_types(hidden.dtype, weight.dtype))
    single = hidden.dtype == torch.float32
    depth, vocab = weight.shape[1], vocab_size(head)
    state, groups = new_state(head), ceil_div(vocab, GROUP)
    summaries = torch.empty((5, rows, groups), dtype=torch.float32, device=hidden.device)
    places = torch.empty((2, rows, groups), dtype=torch.uint8, device=hidden.device)
    block = 16 if single else power_of_two(rows, 16, 32)
    bias = None if bias is None else bias.detach().contiguous()
    operands = (*rows_of(hidden), weight.detach(), *weight.stride(), bias, depth, vocab)
    results = (summaries, rows, groups, key, state.numbers[INDEX_LOGIT.value], places)
    launch(
        product_kernel,
        (ceil_div(rows, block), groups),
        summaries,
        *(*operands, *softmax.args, skip, *results),
        KEY_PER_ROW=key is not None and key.dim() > 1,
        ROWS=block,
        DEPTH=32 if single else 64,
        SLICES=2,
        num_warps=16 if single else 8,
        # Of 32 rows four take 108 KiB.
        num_stages=4 if block == 32 and not single and multiplies_from_shared(hidden.device) else 3,
        # Of up to 16 rows two programs a unit: one waits, the other draws.
        maxnreg=None if block == 32 else 128,
    )
    nothing = (None, 1, 0, 0)
    read = (*nothing, 0, vocab, *softmax.args, skip, None, None, None, summaries, rows)
    reduce(read, rows, groups, key, state, True, places)
    return state


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""
    key = torch.empty(2, dtype=torch.int64, device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for rows in (8, 64):
            hidden, weight = (torch.empty(n, 4096, dtype=dtype, device=device) for n in (rows, 126_464))
            row, z = torch.empty(rows, device=device), torch.empty(rows, dtype=torch.int64, device=device)
            skip, plain = z.to(torch.uint8), Softmax(row.shape)
            full = Softmax(row.shape, z, row, row, 30.0, 5)
            yield partial(scan_head, (hidden, weight, None), plain)
            yield partial(scan_head, (hidden, weight, None), plain, key)
            yield partial(scan_head, (hidden, weight, weight[:, 0]), full, key.expand(rows, 2), skip)
