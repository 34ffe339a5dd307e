"""The gradients of k and v: for a key tile, over the query tiles that a plan lists."""

from __future__ import annotations

import triton
import triton.language as tl

from dlcore.triton.attention_tiles import (
    described_rows,
    finite,
    intervals_of,
    is_nan_anywhere,
    load_rows,
    sees,
    store_rows,
    weights_and_slopes,
)
from dlcore.triton.products import product


@triton.jit(do_not_specialize=["queries", "keys", "bounds_stride"])
def plan_kernel(
    starts,
    stops,
    lists,
    counts,
    queries,
    keys,
    bounds_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """For a key tile, the query tiles whose rows all see it whole, from the front of its list, and those of
    which some row sees some of it, from the back; and how many there are of both."""
    key_tile, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = (queries + BLOCK_M - 1) // BLOCK_M
    low = key_tile * BLOCK_N
    lists += (sequence * tl.num_programs(0) + key_tile) * tiles
    counts += (sequence * tl.num_programs(0) + key_tile) * 2
    starts += sequence * bounds_stride
    stops += sequence * bounds_stride
    whole, partly = 0, 0
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        query = tl.minimum(tile[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :], queries - 1)
        high = tl.minimum(low + BLOCK_N, keys)
        start_a, stop_a, start_b, stop_b = intervals_of(starts, stops, query, low, high)
        all_seen = (stop_a - start_a == BLOCK_N) | (stop_b - start_b == BLOCK_N)
        some = (tl.max(tl.maximum(stop_a, stop_b), 1) > 0) & (tile < tiles)
        complete = (some & (tl.min(all_seen.to(tl.int32), 1) > 0)).to(tl.int32)
        ragged = some.to(tl.int32) - complete
        tl.store(lists + whole + tl.cumsum(complete, 0) - 1, tile, mask=complete > 0)
        tl.store(lists + tiles - partly - tl.cumsum(ragged, 0), tile, mask=ragged > 0)
        whole += tl.sum(complete, 0)
        partly += tl.sum(ragged, 0)
    tl.store(counts, whole)
    tl.store(counts + 1, partly)


@triton.jit
def _add_rows(
    grad_k,
    grad_v,
    k,
    v,
    key,
    tile,
    member,
    source,
    bounds,
    scale,
    softcap,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """What a query tile adds to the gradients of a key tile; keys are down, rows across.

    GUARDED rows are 0 where not finite, and their gradients NaN for the keys that they see.
    """
    q_ptr, q_row, q_head, grad_ptr, grad_row, grad_head, level_ptr, delta_ptr, sequence, head = source
    starts, stops, queries, padded, keys = bounds
    member = member.to(tl.int64)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    before = member * padded
    level, delta = tl.load(level_ptr + before + query), tl.load(delta_ptr + before + query)
    inside = query < queries
    query = tl.minimum(query, queries - 1)
    if DESCRIBED:
        q = described_rows(q_ptr, sequence, head + member, tile * BLOCK_M, BLOCK_M, BLOCK_D)
        grad = described_rows(grad_ptr, sequence, head + member, tile * BLOCK_M, BLOCK_M, BLOCK_V)
    else:
        row = query.to(tl.int64)
        q = load_rows(q_ptr + member * q_head, row * q_row, inside, DIM, BLOCK_D, True)
        grad = load_rows(grad_ptr + member * grad_head, row * grad_row, inside, VALUE_DIM, BLOCK_V, True)
    blank = tl.zeros([k.shape[0], BLOCK_M], tl.float32)
    products, pull = product(k, tl.trans(q), blank), product(v, tl.trans(grad), blank)
    weights, slopes = weights_and_slopes(
        products, pull, level[None, :], delta[None, :], scale, softcap, SOFTCAP
    )
    if MASKED:
        visible = sees(key, intervals_of(starts, stops, query, 0, keys), 1) & inside[None, :]
        weights, slopes = tl.where(visible, weights, 0.0), tl.where(visible, slopes, 0.0)
    if GUARDED:
        broken = tl.max(1 - finite(grad).to(tl.int32), 1) > 0
        hurt = tl.max((visible & broken[None, :]).to(tl.int32), 1) > 0
        grad_v += tl.where(hurt, float("nan"), 0.0)[:, None]
        grad = tl.where(finite(grad), grad, 0.0).to(grad.dtype)
        q = tl.where(finite(q), q, 0.0).to(q.dtype)
    return product(slopes.to(q.dtype), q, grad_k), product(weights.to(grad.dtype), grad, grad_v)


@triton.jit(do_not_specialize=["queries", "keys", "bounds_stride", "lists_stride"])
def grad_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    level_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    starts,
    stops,
    lists,
    counts,
    scale,
    softcap,
    queries,
    padded,
    keys,
    bounds_stride,
    lists_stride,
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
    """A program has a key tile of one head and visits the query tiles on its list, for every head of a group.

    Scores stand with keys down and rows across. `lists_stride` is 1 where each sequence has lists, else 0. If
    DESCRIBED, q_ptr and grad_ptr are descriptors; level and delta are (B, Hq, padded).
    """
    tiles = (queries + BLOCK_M - 1) // BLOCK_M
    key_tiles = (keys + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    key_tile = program % key_tiles
    program //= key_tiles
    head, sequence = (program % HEADS).to(tl.int64), (program // HEADS).to(tl.int64)
    plan = sequence * lists_stride * key_tiles + key_tile
    lists += plan * tiles
    whole, partly = tl.load(counts + plan * 2), tl.load(counts + plan * 2 + 1)

    key = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    known, key_row = key < keys, key.to(tl.int64)
    k = load_rows(k_ptr + sequence * k_batch + head * k_head, key_row * k_row, known, DIM, BLOCK_D, True)
    v = load_rows(
        v_ptr + sequence * v_batch + head * v_head, key_row * v_row, known, VALUE_DIM, BLOCK_V, True
    )
    if not DESCRIBED:
        q_ptr += sequence * q_batch + head * GROUP * q_head
        grad_ptr += sequence * grad_batch + head * GROUP * grad_head
    rows_before = (sequence * HEADS + head) * GROUP * padded
    source = (
        q_ptr,
        q_row,
        q_head,
        grad_ptr,
        grad_row,
        grad_head,
        level_ptr + rows_before,
        delta_ptr + rows_before,
        sequence,
        head * GROUP,
    )
    bounds = (starts + sequence * bounds_stride, stops + sequence * bounds_stride, queries, padded, keys)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    for i in range(0, whole * GROUP):
        tile, member = tl.load(lists + i % whole), i // whole
        grad_k, grad_v = _add_rows(
            grad_k,
            grad_v,
            k,
            v,
            key,
            tile,
            member,
            source,
            bounds,
            scale,
            softcap,
            DIM,
            VALUE_DIM,
            BLOCK_M,
            BLOCK_D,
            BLOCK_V,
            SOFTCAP,
            False,
            False,
            DESCRIBED,
        )

    # A second `for` here is more than Triton 3.7 can compile for sm_100.
    i = 0
    while i < partly * GROUP:
        tile, member = tl.load(lists + tiles - 1 - i % partly), i // partly
        grad_k, grad_v = _add_rows(
            grad_k,
            grad_v,
            k,
            v,
            key,
            tile,
            member,
            source,
            bounds,
            scale,
            softcap,
            DIM,
            VALUE_DIM,
            BLOCK_M,
            BLOCK_D,
            BLOCK_V,
            SOFTCAP,
            True,
            False,
            DESCRIBED,
        )
        i += 1

    if is_nan_anywhere(grad_k) | is_nan_anywhere(grad_v):
        # A row that is not finite, times the weight 0 of a key that it does not see.
        grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for j in range(0, (whole + partly) * GROUP):
            i, member = j % (whole + partly), j // (whole + partly)
            tile = tl.load(lists + tl.where(i < whole, i, tiles - 1 - (i - whole)))
            grad_k, grad_v = _add_rows(
                grad_k,
                grad_v,
                k,
                v,
                key,
                tile,
                member,
                source,
                bounds,
                scale,
                softcap,
                DIM,
                VALUE_DIM,
                BLOCK_M,
                BLOCK_D,
                BLOCK_V,
                SOFTCAP,
                True,
                True,
                DESCRIBED,
            )

    place = (sequence * keys + key_row) * HEADS + head
    store_rows(grad_k_ptr, place * DIM, grad_k * scale, known, DIM, BLOCK_D)
    store_rows(grad_v_ptr, place * VALUE_DIM, grad_v, known, VALUE_DIM, BLOCK_V)
