"""The backward kernels: probabilities recomputed from lse, key tiles and query tiles skipped as forward.

Each gradient has one program that sums it in a fixed order: the numbers of a call never vary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton.attention_shapes import (
    EXAMPLES,
    GRAD_KV,
    GRAD_Q,
    SINGLE_GRAD,
    bounds_stride,
    dims,
    rows_contiguous,
    tiles,
    width,
)
from dlcore.triton.attention_tiles import (
    LOG2E,
    NEVER,
    count_whole,
    finite,
    hull,
    intervals_of,
    is_nan_anywhere,
    load_rows,
    next_tile,
    packed_rows,
    product,
    sees,
    store_rows,
    tanh,
    whole_tile,
    whole_tiles,
)
from dlcore.triton.launch import ceil_div, launch


@triton.jit(do_not_specialize=["total", "queries", "heads"])
def delta_kernel(
    out_ptr,
    grad_ptr,
    grad_lse_ptr,
    delta_ptr,
    total,
    queries,
    heads,
    out_batch,
    out_row,
    out_head,
    grad_batch,
    grad_row,
    grad_head,
    VALUE_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out · grad - grad_lse of each row (B, Hq, S): what the gradient of its scores is measured from."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < total
    query, head, sequence = row % queries, row // queries % heads, row // queries // heads
    place = sequence * out_batch + query * out_row + head * out_head
    out = load_rows(out_ptr, place, inside, VALUE_DIM, BLOCK_V, True).to(tl.float32)
    place = sequence * grad_batch + query * grad_row + head * grad_head
    grad = load_rows(grad_ptr, place, inside, VALUE_DIM, BLOCK_V, True).to(tl.float32)
    delta = tl.sum(out * grad, 1) - tl.load(grad_lse_ptr + row, mask=inside, other=0.0)
    tl.store(delta_ptr + row, delta, mask=inside)


@triton.jit(do_not_specialize=["queries", "keys", "bounds_stride"])
def plan_kernel(
    starts,
    stops,
    lists,
    counts,
    queries,
    keys,
    bounds_stride,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """For a key tile, the query tiles whose rows all see it whole, from the front of its list, and those of
    which some row sees some of it, from the back; and how many there are of both."""
    key_tile, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = queries * GROUP
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    low = key_tile * BLOCK_N
    lists += (sequence * tl.num_programs(0) + key_tile) * tiles
    counts += (sequence * tl.num_programs(0) + key_tile) * 2
    starts += sequence * bounds_stride
    stops += sequence * bounds_stride
    whole, partly = 0, 0
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        row = tl.minimum(tile[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :], rows - 1)
        high = tl.minimum(low + BLOCK_N, keys)
        start_a, stop_a, start_b, stop_b = intervals_of(starts, stops, row // GROUP, low, high)
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
def _weights_and_slopes(products, pull, level, delta, scale, softcap, SOFTCAP: tl.constexpr):
    """Probabilities, and the gradients of q · k / scale; `level` is lse in base 2, `pull` is grad · v."""
    if SOFTCAP:
        bent = tanh(products * (scale / softcap))
        weights = tl.exp2(bent * (softcap * LOG2E) - level)
        return weights, weights * (pull - delta) * (1 - bent * bent)
    else:
        weights = tl.exp2(products * (scale * LOG2E) - level)
        return weights, weights * (pull - delta)


@triton.jit
def _base_2(lse):
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)


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
):
    """What the key tile at `at` adds to the gradient of a query tile; GUARDED keys are 0 where not finite."""
    q, grad, level, delta = rows
    k_ptr, k_row, v_ptr, v_row, keys = source
    key = at + tl.arange(0, BLOCK_N)
    used, key_row = (key >= low) & (key < high), tl.minimum(key, keys - 1).to(tl.int64)
    k = load_rows(k_ptr, key_row * k_row, used, DIM, BLOCK_D, MASKED)
    v = load_rows(v_ptr, key_row * v_row, used, VALUE_DIM, BLOCK_V, MASKED)
    blank = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
    products, pull = product(q, tl.trans(k), blank), product(grad, tl.trans(v), blank)
    _, slopes = _weights_and_slopes(products, pull, level[:, None], delta[:, None], scale, softcap, SOFTCAP)
    if MASKED:
        slopes = tl.where(sees(key, seen, 0), slopes, 0.0)
    if GUARDED:
        k = tl.where(finite(k), k, 0.0).to(k.dtype)
    return product(slopes.to(k.dtype), k, grad_q)


@triton.jit
def _add_rows(
    grad_k,
    grad_v,
    k,
    v,
    key,
    tile,
    source,
    bounds,
    scale,
    softcap,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,
):
    """What a query tile adds to the gradients of a key tile; keys are down, rows across.

    GUARDED rows are 0 where not finite, and their gradients NaN for the keys that they see.
    """
    q_ptr, q_row, q_head, grad_ptr, grad_row, grad_head, lse_ptr, delta_ptr = source
    starts, stops, queries, keys = bounds
    query, member, inside = packed_rows(tile, queries * GROUP, GROUP, BLOCK_M)
    row = query.to(tl.int64)
    q = load_rows(q_ptr, row * q_row + member * q_head, inside, DIM, BLOCK_D, True)
    grad = load_rows(grad_ptr, row * grad_row + member * grad_head, inside, VALUE_DIM, BLOCK_V, True)
    place = member.to(tl.int64) * queries + row
    level, delta = _base_2(tl.load(lse_ptr + place)), tl.load(delta_ptr + place)
    blank = tl.zeros([k.shape[0], BLOCK_M], tl.float32)
    products, pull = product(k, tl.trans(q), blank), product(v, tl.trans(grad), blank)
    weights, slopes = _weights_and_slopes(
        products, pull, level[None, :], delta[None, :], scale, softcap, SOFTCAP
    )
    if MASKED:
        visible = sees(key, intervals_of(starts, stops, query, 0, keys), 1) & inside[None, :]
        weights, slopes = tl.where(visible, weights, 0.0), tl.where(visible, slopes, 0.0)
    if GUARDED:
        broken = tl.max(1 - finite(grad).to(tl.int32), 1) > 0
        hurt = tl.max((visible & broken[None, :]).to(tl.int32), 1) > 0
        grad_v = tl.where(hurt[:, None], float("nan"), grad_v)
        grad = tl.where(finite(grad), grad, 0.0).to(grad.dtype)
        q = tl.where(finite(q), q, 0.0).to(q.dtype)
    return product(slopes.to(q.dtype), q, grad_k), product(weights.to(grad.dtype), grad, grad_v)


@triton.jit(do_not_specialize=["queries", "keys", "bounds_stride"])
def grad_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    starts,
    stops,
    scale,
    softcap,
    queries,
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
):
    """A program has a query tile of one key head and visits the key tiles that it sees."""
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
    place = (sequence * (HEADS * GROUP) + query_head) * queries + row
    own = (q, grad, _base_2(tl.load(lse_ptr + place)), tl.load(delta_ptr + place))
    k_ptr += sequence * k_batch + head * k_head
    v_ptr += sequence * v_batch + head * v_head
    source = (k_ptr, k_row, v_ptr, v_row, keys)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for i in range(0, count_whole(whole, BLOCK_N)):
        at = whole_tile(whole, i, BLOCK_N)
        grad_q = _add_keys(grad_q, own, source, at, low, high, seen, scale, softcap, DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, SOFTCAP, False, False)  # fmt: skip

    at = next_tile(0, seen, whole, BLOCK_N)
    while at < NEVER:
        grad_q = _add_keys(grad_q, own, source, at, low, high, seen, scale, softcap, DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, SOFTCAP, True, False)
        at = next_tile(at + BLOCK_N, seen, whole, BLOCK_N)

    if is_nan_anywhere(grad_q):
        # As forward: a key that is not finite, times the slope 0 of a row that does not see it.
        grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        nothing = (0, 0, 0, 0)
        at = next_tile(0, seen, nothing, BLOCK_N)
        while at < NEVER:
            grad_q = _add_keys(grad_q, own, source, at, low, high, seen, scale, softcap, DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, SOFTCAP, True, True)
            at = next_tile(at + BLOCK_N, seen, nothing, BLOCK_N)

    place = ((sequence * queries + row) * (HEADS * GROUP) + query_head) * DIM
    store_rows(grad_q_ptr, place, grad_q * scale, inside, DIM, BLOCK_D)


@triton.jit(do_not_specialize=["queries", "keys", "bounds_stride", "lists_stride"])
def grad_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse_ptr,
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
):
    """A program has a key tile of one head and visits the query tiles, of all heads of the group, on its list.

    Scores stand with keys down and rows across. `lists_stride` is 1 where each sequence has lists, else 0.
    """
    rows = queries * GROUP
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
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
    v = load_rows(v_ptr + sequence * v_batch + head * v_head, key_row * v_row, known, VALUE_DIM, BLOCK_V, True)
    q_ptr += sequence * q_batch + head * GROUP * q_head
    grad_ptr += sequence * grad_batch + head * GROUP * grad_head
    rows_before = (sequence * HEADS + head) * GROUP * queries
    source = (q_ptr, q_row, q_head, grad_ptr, grad_row, grad_head, lse_ptr + rows_before, delta_ptr + rows_before)
    bounds = (starts + sequence * bounds_stride, stops + sequence * bounds_stride, queries, keys)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    for i in range(0, whole):
        tile = tl.load(lists + i)
        grad_k, grad_v = _add_rows(grad_k, grad_v, k, v, key, tile, source, bounds, scale, softcap, GROUP, DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V, SOFTCAP, False, False)

    for i in range(0, partly):
        tile = tl.load(lists + tiles - 1 - i)
        grad_k, grad_v = _add_rows(grad_k, grad_v, k, v, key, tile, source, bounds, scale, softcap, GROUP, DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V, SOFTCAP, True, False)

    if is_nan_anywhere(grad_k) | is_nan_anywhere(grad_v):
        # A row that is not finite, times the weight 0 of a key that it does not see.
        grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for i in range(0, whole + partly):
            tile = tl.load(lists + tl.where(i < whole, i, tiles - 1 - (i - whole)))
            grad_k, grad_v = _add_rows(grad_k, grad_v, k, v, key, tile, source, bounds, scale, softcap, GROUP, DIM, VALUE_DIM, BLOCK_M, BLOCK_D, BLOCK_V, SOFTCAP, True, True)

    place = (sequence * keys + key_row) * HEADS + head
    store_rows(grad_k_ptr, place * DIM, grad_k * scale, known, DIM, BLOCK_D)
    store_rows(grad_v_ptr, place * VALUE_DIM, grad_v, known, VALUE_DIM, BLOCK_V)


_DELTA_ROWS = 32
#: Query tiles that the plan looks at together.
_PLANNED = 32


def intervals_backward(
    grad: Tensor,
    grad_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    stops: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    q, k, v, out, grad = (rows_contiguous(x) for x in (q, k, v, out, grad))
    starts, stops, lse, grad_lse = (x.contiguous() for x in (starts, stops, lse, grad_lse))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    delta = torch.empty_like(lse)
    launch(
        delta_kernel,
        ceil_div(lse.numel(), _DELTA_ROWS),
        q,
        *(out, grad, grad_lse, delta, lse.numel(), queries, heads),
        *(*out.stride()[:3], *grad.stride()[:3]),
        VALUE_DIM=v.shape[3],
        BLOCK_R=_DELTA_ROWS,
        BLOCK_V=width(v.shape[3]),
    )
    inputs = (q, k, v, grad, lse, delta)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    sizes = (queries, keys, bounds_stride(starts))
    shared = dims(q, k, v) | {"SOFTCAP": softcap > 0}
    rows = queries * heads // kv_heads

    shape = tiles(GRAD_Q, SINGLE_GRAD, q, v)
    launch(
        grad_q_kernel,
        ceil_div(rows, shape.rows) * kv_heads * batch,
        q,
        *(*inputs, dq, starts, stops, float(scale), float(softcap), *sizes, *strides),
        **shared,
        **shape.meta(),
    )

    shape = tiles(GRAD_KV, SINGLE_GRAD, q, v)
    row_tiles, key_tiles = ceil_div(rows, shape.rows), ceil_div(keys, shape.keys)
    plans = starts.shape[0]
    lists = torch.empty((plans, key_tiles, row_tiles), dtype=torch.int32, device=q.device)
    counts = torch.empty((plans, key_tiles, 2), dtype=torch.int32, device=q.device)
    launch(
        plan_kernel,
        (key_tiles, plans),
        q,
        *(starts, stops, lists, counts, *sizes),
        GROUP=shared["GROUP"],
        BLOCK_M=shape.rows,
        BLOCK_N=shape.keys,
        TILES=_PLANNED,
    )
    launch(
        grad_kv_kernel,
        key_tiles * kv_heads * batch,
        q,
        *(*inputs, dk, dv, starts, stops, lists, counts, float(scale), float(softcap)),
        *(*sizes, int(plans > 1), *strides),
        **shared,
        **shape.meta(),
    )
    return dq, dk, dv


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""
    def call(dim, value_dim, dtype, group=4, softcap=0.0):
        q, grad, out = (torch.empty(1, 4096, 2 * group, n, dtype=dtype, device=device) for n in (dim, value_dim, value_dim))
        k, v = (torch.empty(1, 4096, 2, n, dtype=dtype, device=device) for n in (dim, value_dim))
        lse = torch.empty(1, 2 * group, 4096, device=device)
        bounds = torch.zeros(1, 4096, 2, dtype=torch.int32, device=device)
        intervals_backward(grad, lse, out, lse, q, k, v, bounds, bounds, 1.0, softcap)

    for dtype, sizes in EXAMPLES:
        for dim in sizes:
            yield lambda dim=dim, dtype=dtype: call(dim, dim, dtype)
    yield lambda: call(192, 128, torch.bfloat16, 1, 30.0)
