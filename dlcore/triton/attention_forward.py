"""The forward kernel: online softmax in base 2 over the key tiles that a query tile sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton.attention_shapes import (
    EXAMPLES,
    bounds_stride,
    described,
    dims,
    forward_tiles,
    rows_contiguous,
    width,
)
from dlcore.triton.attention_tiles import (
    LN2,
    LOG2E,
    NEVER,
    base_2_scores,
    count_whole,
    described_rows,
    finite,
    hull,
    intervals_of,
    is_nan_anywhere,
    load_rows,
    next_tile,
    packed_rows,
    places,
    sees,
    store_rows,
    whole_tile,
    whole_tiles,
)
from dlcore.triton.launch import ceil_div, launch, power_of_two
from dlcore.triton.products import product


@triton.jit
def _load(
    at,
    low,
    high,
    source,
    row_stride,
    page_stride,
    paging,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The tile of keys or values from `at` on; if MASKED, 0 outside of [low, high), whatever is there."""
    keys, pages, num_pages = paging
    key = at + tl.arange(0, BLOCK_N)
    place = places(key, keys, row_stride, page_stride, pages, num_pages, PAGE_SIZE, MASKED)
    return load_rows(source, place, (key >= low) & (key < high), COLUMNS, BLOCK, MASKED)


@triton.jit
def _absorb(
    state,
    q,
    k,
    v,
    at,
    seen,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """One more key tile: its scores, the new maxima, the sums rescaled to them.

    GUARDED values are 0 where they are not finite, and NaN for the rows that see them.
    """
    total, top, out = state
    products = product(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK_N], tl.float32))
    if MASKED or SOFTCAP or NEGATIVE:
        scores = base_2_scores(products, scale, softcap, SOFTCAP)
        if MASKED:
            visible = sees(at + tl.arange(0, BLOCK_N), seen, 0)
            scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
    else:
        # With a scale that is not negative one multiply-add per score is enough.
        scores = products * (scale * LOG2E)
        higher = tl.maximum(top, tl.max(products, 1) * (scale * LOG2E))
    # Nothing seen so far, -inf minus -inf, is no NaN.
    level = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - level[:, None])
    fade = tl.exp2(top - level)
    total = total * fade + tl.sum(weights, 1)
    out = out * fade[:, None]
    if GUARDED:
        broken = tl.max(1 - finite(v).to(tl.int32), 1) > 0
        hurt = tl.max((visible & broken[None, :]).to(tl.int32), 1) > 0
        out += tl.where(hurt, float("nan"), 0.0)[:, None]
        v = tl.where(finite(v), v, 0.0).to(v.dtype)
    return total, higher, product(weights.to(v.dtype), v, out)


@triton.jit(do_not_specialize=["batch", "queries", "keys", "bounds_stride", "pages", "num_pages", "splits"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_tiles,
    v_tiles,
    out_ptr,
    lse_ptr,
    starts,
    stops,
    page_table,
    scale,
    softcap,
    batch,
    queries,
    keys,
    bounds_stride,
    pages,
    num_pages,
    splits,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
):
    """A program has a query tile of one key head and, if SPLIT, one of `splits` parts of what it sees.

    out and lse are (splits, B, S, Hq, Dv) and (splits, B, Hq, S); a part's are float32. k_tiles and v_tiles,
    if any, are descriptors by which whole tiles are read. NEGATIVE: the scale is.
    """
    rows = queries * GROUP
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    # The last rows see most where later rows see more: they start first.
    tile = tiles - 1 - program % tiles
    program //= tiles
    part = program % splits
    program //= splits
    head, sequence = program % HEADS, (program // HEADS).to(tl.int64)

    query, member, inside = packed_rows(tile, rows, GROUP, BLOCK_M)
    starts += sequence * bounds_stride
    stops += sequence * bounds_stride
    seen = intervals_of(starts, stops, query, 0, keys)
    low, high = hull(seen)
    if SPLIT:
        low = tl.minimum(low // BLOCK_N * BLOCK_N, high)
        share = ((high - low + BLOCK_N - 1) // BLOCK_N + splits - 1) // splits * BLOCK_N
        low += part * share
        high = tl.minimum(high, low + share)
        seen = intervals_of(starts, stops, query, low, high)
    whole = whole_tiles(seen, BLOCK_N)

    place = query.to(tl.int64) * q_row + (head * GROUP + member).to(tl.int64) * q_head
    q = load_rows(q_ptr + sequence * q_batch, place, inside, DIM, BLOCK_D, False)
    k_ptr += head.to(tl.int64) * k_head
    v_ptr += head.to(tl.int64) * v_head
    if PAGE_SIZE:
        page_table += sequence * pages
    else:
        k_ptr += sequence * k_batch
        v_ptr += sequence * v_batch
    paging = (keys, page_table, num_pages)

    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for i in range(0, count_whole(whole, BLOCK_N)):
        at = whole_tile(whole, i, BLOCK_N)
        if k_tiles is None:
            k = _load(at, low, high, k_ptr, k_row, k_batch, paging, DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, False)
        else:
            k = described_rows(k_tiles, sequence, head, at, BLOCK_N, BLOCK_D)
        if v_tiles is None:
            v = _load(
                at, low, high, v_ptr, v_row, v_batch, paging, VALUE_DIM, BLOCK_V, BLOCK_N, PAGE_SIZE, False
            )
        else:
            v = described_rows(v_tiles, sequence, head, at, BLOCK_N, BLOCK_V)
        total, top, out = _absorb(
            (total, top, out), q, k, v, at, seen, scale, softcap, SOFTCAP, NEGATIVE, BLOCK_N, False, False
        )

    # A second `for` here is more than Triton 3.7 can compile for sm_100.
    at = next_tile(0, seen, whole, BLOCK_N)
    while at < NEVER:
        k = _load(at, low, high, k_ptr, k_row, k_batch, paging, DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, True)
        v = _load(at, low, high, v_ptr, v_row, v_batch, paging, VALUE_DIM, BLOCK_V, BLOCK_N, PAGE_SIZE, True)
        total, top, out = _absorb(
            (total, top, out), q, k, v, at, seen, scale, softcap, SOFTCAP, NEGATIVE, BLOCK_N, True, False
        )
        at = next_tile(at + BLOCK_N, seen, whole, BLOCK_N)

    if is_nan_anywhere(out):
        # A value that is not finite, times the weight 0 of a row that does not see it, is NaN: once more.
        total = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        whole = (0, 0, 0, 0)
        at = next_tile(0, seen, whole, BLOCK_N)
        while at < NEVER:
            k = _load(at, low, high, k_ptr, k_row, k_batch, paging, DIM, BLOCK_D, BLOCK_N, PAGE_SIZE, True)
            v = _load(
                at, low, high, v_ptr, v_row, v_batch, paging, VALUE_DIM, BLOCK_V, BLOCK_N, PAGE_SIZE, True
            )
            total, top, out = _absorb(
                (total, top, out), q, k, v, at, seen, scale, softcap, SOFTCAP, NEGATIVE, BLOCK_N, True, True
            )
            at = next_tile(at + BLOCK_N, seen, whole, BLOCK_N)

    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), (top + tl.log2(total)) * LN2)
    out = out / total[:, None]
    sequence += part * batch
    heads = HEADS * GROUP
    place = (sequence * queries + query) * heads + head * GROUP + member
    store_rows(out_ptr, place * VALUE_DIM, out, inside, VALUE_DIM, BLOCK_V)
    tl.store(lse_ptr + (sequence * heads + head * GROUP + member) * queries + query, lse, mask=inside)


@triton.jit(do_not_specialize=["rows", "queries", "heads", "splits"])
def merge_kernel(
    parts_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    rows,
    queries,
    heads,
    splits,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PARTS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """`splits` parts of attention, over keys apart, as one; a program has a row of (B, S, Hq)."""
    row = tl.program_id(0).to(tl.int64)
    sequence, query, head = row // heads // queries, row // heads % queries, row % heads
    lse_at = (sequence * heads + head) * queries + query
    part = tl.arange(0, PARTS)
    lse = tl.load(part_lse_ptr + part.to(tl.int64) * rows + lse_at, mask=part < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    level = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(lse - level), 0)
    out = tl.zeros([BLOCK_V], tl.float32)
    for first in range(0, splits, TOGETHER):
        some = first + tl.arange(0, TOGETHER)
        place = some.to(tl.int64) * rows
        some_lse = tl.load(part_lse_ptr + place + lse_at, mask=some < splits, other=float("-inf"))
        weight = tl.exp(some_lse - level)
        piece = load_rows(parts_ptr, (place + row) * VALUE_DIM, weight != 0, VALUE_DIM, BLOCK_V, True)
        out += tl.sum(piece * weight[:, None], 0)
    nothing = total == 0
    total = tl.where(nothing, 1.0, total)
    column = tl.arange(0, BLOCK_V)
    to = out_ptr + row * VALUE_DIM + column
    tl.store(to, (out / total).to(out_ptr.dtype.element_ty), mask=column < VALUE_DIM)
    tl.store(lse_ptr + lse_at, tl.where(nothing, float("-inf"), top + tl.log(total)))


#: Programs per multiprocessor that keys are split for (with two, merging costs an H200 more than they gain),
#: and key tiles that are worth a program.
_PROGRAMS, _TILES_EACH = 1, 4
_MOST_PARTS = 128


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    """Of an H200 where there is none to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _splits(programs: int, key_tiles: int, device: torch.device) -> int:
    """Parts of the keys, by shapes alone, so that few rows over many keys keep the device busy."""
    wanted = _PROGRAMS * _multiprocessors(device) // programs
    return max(1, min(wanted, ceil_div(key_tiles, _TILES_EACH), _MOST_PARTS))


def intervals(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    stops: Tensor,
    page_table: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out (B, S, Hq, Dv) and lse (B, Hq, S)."""
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    starts, stops = starts.contiguous(), stops.contiguous()
    page_table = None if page_table is None else page_table.contiguous()
    batch, queries, heads, _ = q.shape
    pages = 1 if page_table is None else page_table.shape[1]
    keys = pages * k.shape[1]
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    rows = queries * heads // k.shape[2]
    tiles = forward_tiles(q, v, rows)
    if page_table is not None:
        # A load by way of another one runs two stages later, where there is more than one.
        tiles = tiles._replace(stages=tiles.stages + 2 if tiles.stages > 1 else 1)
    programs = ceil_div(rows, tiles.rows) * k.shape[2] * batch
    if programs == 0:
        return out, lse
    splits = _splits(programs, ceil_div(keys, tiles.keys), q.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    by_tiles = described(tiles.keys, k, v) if page_table is None else None
    launch(
        forward_kernel,
        programs * splits,
        q,
        *(q, k, v, *(by_tiles or (None, None)), parts, part_lse, starts, stops, page_table),
        *(float(scale), float(softcap), batch, queries, keys, bounds_stride(starts)),
        *(pages, k.shape[0], splits),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        PAGE_SIZE=0 if page_table is None else k.shape[1],
        SPLIT=splits > 1,
        SOFTCAP=softcap > 0,
        NEGATIVE=scale < 0,
        **dims(q, k, v),
        **tiles.meta(),
    )
    if splits > 1:
        launch(
            merge_kernel,
            lse.numel(),
            q,
            *(parts, part_lse, out, lse, lse.numel(), queries, heads, splits),
            VALUE_DIM=v.shape[3],
            BLOCK_V=width(v.shape[3]),
            PARTS=power_of_two(splits, 2, _MOST_PARTS),
            TOGETHER=power_of_two(splits, 2, 8192 // width(v.shape[3])),
        )
    return out, lse


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""

    def call(rows, keys, dim, value_dim, dtype, group=4, softcap=0.0, page_size=None):
        shape = (1, keys, 2) if page_size is None else (keys // page_size, page_size, 2)
        q = torch.empty(1, rows, 2 * group, dim, dtype=dtype, device=device)
        k, v = (torch.empty(*shape, n, dtype=dtype, device=device) for n in (dim, value_dim))
        bounds = torch.zeros(1, rows, 2, dtype=torch.int32, device=device)
        table = None if page_size is None else torch.zeros(1, shape[0], dtype=torch.int32, device=device)
        intervals(q, k, v, bounds, bounds, table, 1.0, softcap)

    for dtype, sizes in EXAMPLES:
        for dim in sizes:
            yield partial(call, 8192, 8192, dim, dim, dtype)
            yield partial(call, 16, 8192, dim, dim, dtype)
    yield partial(call, 8192, 8192, 192, 128, torch.bfloat16, 1, 30.0)
    for rows in (1, 8):
        yield partial(call, rows, 8192, 128, 128, torch.bfloat16, 4, 0.0, 16)
    # So few rows that every target splits the keys.
    for dim, dtype in ((512, torch.bfloat16), (256, torch.float32), (512, torch.float32)):
        yield partial(call, 32, 8192, dim, dim, dtype, 8, 0.0, 64)
