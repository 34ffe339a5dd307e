"""The gradient of q: for a query tile, over the key tiles that it sees."""

from __future__ import annotations

import triton
import triton.language as tl

from dlcore.triton.attention_tiles import (
    NEVER,
    count_whole,
    described_rows,
    finite,
    hull,
    intervals_of,
    is_nan_anywhere,
    load_rows,
    next_tile,
    packed_rows,
    sees,
    store_rows,
    weights_and_slopes,
    whole_tile,
    whole_tiles,
)
from dlcore.triton.products import product


@triton.jit
def _add_keys(
    grad_q,
    rows,
    source,
    at,
    low,
    high,
    seen,
    scale,
    softcap,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """What the key tile at `at` adds to the gradient of a query tile; GUARDED keys are 0 where not finite."""
    q, grad, level, delta = rows
    k_ptr, k_row, v_ptr, v_row, keys, sequence, head = source
    key = at + tl.arange(0, BLOCK_N)
    if DESCRIBED:
        k = described_rows(k_ptr, sequence, head, at, BLOCK_N, BLOCK_D)
        v = described_rows(v_ptr, sequence, head, at, BLOCK_N, BLOCK_V)
    else:
        used, key_row = (key >= low) & (key < high), tl.minimum(key, keys - 1).to(tl.int64)
        k = load_rows(k_ptr, key_row * k_row, used, DIM, BLOCK_D, MASKED)
        v = load_rows(v_ptr, key_row * v_row, used, VALUE_DIM, BLOCK_V, MASKED)
    blank = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    products, pull = product(q, tl.trans(k), blank), product(grad, tl.trans(v), blank)
    _, slopes = weights_and_slopes(products, pull, level[:, None], delta[:, None], scale, softcap, SOFTCAP)
    if MASKED:
        slopes = tl.where(sees(key, seen, 0), slopes, 0.0)
    if GUARDED:
        k = tl.where(finite(k), k, 0.0).to(k.dtype)
    return product(slopes.to(k.dtype), k, grad_q)


@triton.jit(do_not_specialize=["queries", "keys", "bounds_stride"])
def grad_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    level_ptr,
    delta_ptr,
    grad_q_ptr,
    starts,
    stops,
    scale,
    softcap,
    queries,
    padded,
    keys,
    bounds_stride,
    q_batch,
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    grad_batch,
    grad_row,
    grad_head,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """A program has a query tile of one key head and visits the key tiles that it sees.

    If DESCRIBED, k_ptr and v_ptr are descriptors; level and delta are (B, Hq, padded).
    """
    rows = queries * GROUP
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    program //= tiles
    head, sequence = (program % HEADS).to(tl.int64), (program // HEADS).to(tl.int64)

    query, member, inside = packed_rows(tile, rows, GROUP, BLOCK_M)
    seen = intervals_of(starts + sequence * bounds_stride, stops + sequence * bounds_stride, query, 0, keys)
    low, high = hull(seen)
    whole = whole_tiles(seen, BLOCK_N)

    row, query_head = query.to(tl.int64), head * GROUP + member
    place = row * q_row + query_head * q_head
    q = load_rows(q_ptr + sequence * q_batch, place, inside, DIM, BLOCK_D, False)
    place = row * grad_row + query_head * grad_head
    grad = load_rows(grad_ptr + sequence * grad_batch, place, inside, VALUE_DIM, BLOCK_V, False)
    place = (sequence * (HEADS * GROUP) + query_head) * padded + row
    own = (q, grad, tl.load(level_ptr + place), tl.load(delta_ptr + place))
    if not DESCRIBED:
        k_ptr += sequence * k_batch + head * k_head
        v_ptr += sequence * v_batch + head * v_head
    source = (k_ptr, k_row, v_ptr, v_row, keys, sequence, head)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for i in range(0, count_whole(whole, BLOCK_N)):
        at = whole_tile(whole, i, BLOCK_N)
        grad_q = _add_keys(
            grad_q,
            own,
            source,
            at,
            low,
            high,
            seen,
            scale,
            softcap,
            DIM,
            VALUE_DIM,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
            SOFTCAP,
            False,
            False,
            DESCRIBED,
        )

    at = next_tile(0, seen, whole, BLOCK_N)
    while at < NEVER:
        grad_q = _add_keys(
            grad_q,
            own,
            source,
            at,
            low,
            high,
            seen,
            scale,
            softcap,
            DIM,
            VALUE_DIM,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
            SOFTCAP,
            True,
            False,
            DESCRIBED,
        )
        at = next_tile(at + BLOCK_N, seen, whole, BLOCK_N)

    if is_nan_anywhere(grad_q):
        # As forward: a key that is not finite, times the slope 0 of a row that does not see it.
        grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        nothing = (0, 0, 0, 0)
        at = next_tile(0, seen, nothing, BLOCK_N)
        while at < NEVER:
            grad_q = _add_keys(
                grad_q,
                own,
                source,
                at,
                low,
                high,
                seen,
                scale,
                softcap,
                DIM,
                VALUE_DIM,
                BLOCK_N,
                BLOCK_D,
                BLOCK_V,
                SOFTCAP,
                True,
                True,
                DESCRIBED,
            )
            at = next_tile(at + BLOCK_N, seen, nothing, BLOCK_N)

    place = ((sequence * queries + row) * (HEADS * GROUP) + query_head) * DIM
    store_rows(grad_q_ptr, place, grad_q * scale, inside, DIM, BLOCK_D)
