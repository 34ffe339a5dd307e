"""What attention's kernels share: which rows a program has, what they see, where their keys lie.

A query tile is BLOCK_M packed rows: the GROUP query heads of a key head stand side by side, so row r is
query r // GROUP and head r % GROUP of the group. Past the last row a tile repeats it.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Beyond all keys.
NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def packed_rows(tile, rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query and head in the group of each row of a tile, and whether the row is its own."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    row = tl.minimum(row, rows - 1)
    return row // GROUP, row % GROUP, inside


@triton.jit
def intervals_of(starts, stops, query, first, last):
    """start, stop, start, stop: both intervals of each row, cut to [first, last); an empty one stops at 0."""
    at = query.to(tl.int64) * 2
    start_a = tl.minimum(tl.maximum(tl.load(starts + at), first), last)
    stop_a = tl.minimum(tl.load(stops + at), last)
    start_b = tl.minimum(tl.maximum(tl.load(starts + at + 1), first), last)
    stop_b = tl.minimum(tl.load(stops + at + 1), last)
    stop_a = tl.where(start_a < stop_a, stop_a, 0)
    stop_b = tl.where(start_b < stop_b, stop_b, 0)
    return start_a, stop_a, start_b, stop_b


@triton.jit
def hull(seen):
    """The first key that any row sees, and the one after the last; (NEVER, 0) if there is none."""
    start_a, stop_a, start_b, stop_b = seen
    start = tl.minimum(tl.where(stop_a > 0, start_a, NEVER), tl.where(stop_b > 0, start_b, NEVER))
    return tl.min(start, 0), tl.max(tl.maximum(stop_a, stop_b), 0)


@triton.jit
def _whole(start, stop, BLOCK_N: tl.constexpr):
    """The keys of the tiles that lie in this interval of every row."""
    first = (tl.max(start, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    return first, tl.maximum(tl.min(stop, 0) // BLOCK_N * BLOCK_N, first)


@triton.jit
def whole_tiles(seen, BLOCK_N: tl.constexpr):
    """Two ranges of keys (start, stop, start, stop), in order and apart, whose tiles every row sees whole."""
    first_a, last_a = _whole(seen[0], seen[1], BLOCK_N)
    first_b, last_b = _whole(seen[2], seen[3], BLOCK_N)
    swap = first_b < first_a
    first, last = tl.where(swap, first_b, first_a), tl.where(swap, last_b, last_a)
    other, end = tl.where(swap, first_a, first_b), tl.where(swap, last_a, last_b)
    other = tl.maximum(other, last)
    return first, last, other, tl.maximum(end, other)


@triton.jit
def count_whole(whole, BLOCK_N: tl.constexpr):
    return (whole[1] - whole[0] + whole[3] - whole[2]) // BLOCK_N


@triton.jit
def whole_tile(whole, i, BLOCK_N: tl.constexpr):
    """The first key of the i-th whole tile."""
    key = whole[0] + i * BLOCK_N
    return tl.where(key < whole[1], key, key - whole[1] + whole[2])


@triton.jit
def _seen_from(key, start, stop, whole):
    key = tl.maximum(start, key)
    key = tl.where((key >= whole[0]) & (key < whole[1]), whole[1], key)
    key = tl.where((key >= whole[2]) & (key < whole[3]), whole[3], key)
    return tl.where(key < stop, key, NEVER)


@triton.jit
def next_tile(key, seen, whole, BLOCK_N: tl.constexpr):
    """The first key of the first tile from `key` on that a row sees outside of the whole tiles, or NEVER."""
    a = _seen_from(key, seen[0], seen[1], whole)
    b = _seen_from(key, seen[2], seen[3], whole)
    key = tl.min(tl.minimum(a, b), 0)
    return tl.where(key == NEVER, NEVER, key // BLOCK_N * BLOCK_N)


@triton.jit
def sees(key, seen, ROW_AXIS: tl.constexpr):
    """Whether rows see keys: (rows, keys), or with rows along axis 1, (keys, rows)."""
    key = tl.expand_dims(key, ROW_AXIS)
    start_a, stop_a = tl.expand_dims(seen[0], 1 - ROW_AXIS), tl.expand_dims(seen[1], 1 - ROW_AXIS)
    start_b, stop_b = tl.expand_dims(seen[2], 1 - ROW_AXIS), tl.expand_dims(seen[3], 1 - ROW_AXIS)
    return ((key >= start_a) & (key < stop_a)) | ((key >= start_b) & (key < stop_b))


@triton.jit
def places(
    key,
    keys,
    row_stride,
    page_stride,
    pages,
    num_pages,
    PAGE_SIZE: tl.constexpr,
    BEYOND: tl.constexpr,
):
    """Where the rows of these keys lie, in pages if these have a size; if some may lie BEYOND the last, they
    lie there."""
    if BEYOND:
        key = tl.minimum(key, keys - 1)
    if PAGE_SIZE:
        page = tl.load(pages + key // PAGE_SIZE)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
        return page.to(tl.int64) * page_stride + (key % PAGE_SIZE).to(tl.int64) * row_stride
    else:
        return key.to(tl.int64) * row_stride


@triton.jit
def described_rows(tiles, sequence, head, first, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile (ROWS, BLOCK) of a described tensor (B, H, S, D) from row `first` on, 0 outside of it."""
    return tiles.load([sequence.to(tl.int32), head.to(tl.int32), first, 0]).reshape(ROWS, BLOCK)


@triton.jit
def load_rows(base, place, inside, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a tensor as a tile (rows, BLOCK), 0 outside."""
    column = tl.arange(0, BLOCK)
    at = base + place[:, None] + column[None, :]
    if MASKED and COLUMNS < BLOCK:
        return tl.load(at, mask=inside[:, None] & (column[None, :] < COLUMNS), other=0.0)
    elif MASKED:
        return tl.load(at, mask=inside[:, None], other=0.0)
    elif COLUMNS < BLOCK:
        return tl.load(at, mask=column[None, :] < COLUMNS, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(base, place, tile, inside, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = inside[:, None] & (column[None, :] < COLUMNS)
    tl.store(base + place[:, None] + column[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def finite(x):
    x = x.to(tl.float32)
    return x - x == 0


@triton.jit
def is_nan_anywhere(x):
    return tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0


@triton.jit
def tanh(x):
    """Relative error below 1e-6, also near 0."""
    square = x * x
    small = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    large = tl.where(x < 0, -1.0, 1.0) * (1 - decay) / (1 + decay)
    return tl.where(tl.abs(x) < 0.25, small, large)


@triton.jit
def base_2_scores(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores times log2(e), of which the softmax takes powers of 2."""
    if SOFTCAP:
        return tanh(products * (scale / softcap)) * (softcap * LOG2E)
    else:
        return products * (scale * LOG2E)


@triton.jit
def weights_and_slopes(products, pull, level, delta, scale, softcap, SOFTCAP: tl.constexpr):
    """Probabilities, and the gradients of q · k / scale; `level` is lse in base 2, `pull` is grad · v."""
    if SOFTCAP:
        bent = tanh(products * (scale / softcap))
        weights = tl.exp2(bent * (softcap * LOG2E) - level)
        return weights, weights * (pull - delta) * (1 - bent * bent)
    else:
        weights = tl.exp2(products * (scale * LOG2E) - level)
        return weights, weights * (pull - delta)
