"""Backward: probabilities recomputed from lse, key tiles and query tiles skipped as forward.

Each gradient has one program that sums it in a fixed order: the numbers of a call never vary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore.triton.attention_grad_kv import grad_kv_kernel, plan_kernel
from dlcore.triton.attention_grad_q import grad_q_kernel
from dlcore.triton.attention_shapes import (
    EXAMPLES,
    GRAD_KV,
    GRAD_Q,
    bounds_stride,
    described,
    dims,
    rows_contiguous,
    tiles,
    width,
)
from dlcore.triton.attention_tiles import LOG2E, load_rows
from dlcore.triton.launch import ceil_div, launch


@triton.jit(do_not_specialize=["queries", "heads"])
def delta_kernel(
    out_ptr,
    grad_ptr,
    lse_ptr,
    grad_lse_ptr,
    level_ptr,
    delta_ptr,
    queries,
    padded,
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
    """lse in base 2 and out · grad - grad_lse, from which the gradients of scores are measured.

    Both (B, Hq, padded); rows past the last, and rows that see nothing, have the level inf: no weight.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    of_head = first // padded
    sequence, head = of_head // heads, of_head % heads
    row = first % padded + tl.arange(0, BLOCK_R)
    inside = row < queries
    place = sequence * out_batch + row * out_row + head * out_head
    out = load_rows(out_ptr, place, inside, VALUE_DIM, BLOCK_V, True).to(tl.float32)
    place = sequence * grad_batch + row * grad_row + head * grad_head
    grad = load_rows(grad_ptr, place, inside, VALUE_DIM, BLOCK_V, True).to(tl.float32)
    place = of_head * queries + row
    delta = tl.sum(out * grad, 1) - tl.load(grad_lse_ptr + place, mask=inside, other=0.0)
    lse = tl.load(lse_ptr + place, mask=inside, other=float("-inf"))
    place = of_head * padded + row
    tl.store(level_ptr + place, tl.where(lse == float("-inf"), float("inf"), lse * LOG2E))
    tl.store(delta_ptr + place, delta)


_DELTA_ROWS = 32
#: Of levels and deltas, so that query tiles read them unmasked.
_PADDING = 128
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
    padded = ceil_div(queries, _PADDING) * _PADDING
    level, delta = torch.empty((2, batch, heads, padded), dtype=torch.float32, device=q.device).unbind(0)
    launch(
        delta_kernel,
        delta.numel() // _DELTA_ROWS,
        q,
        *(out, grad, lse, grad_lse, level, delta, queries, padded, heads),
        *(*out.stride()[:3], *grad.stride()[:3]),
        VALUE_DIM=v.shape[3],
        BLOCK_R=_DELTA_ROWS,
        BLOCK_V=width(v.shape[3]),
    )
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
    sizes = (queries, padded, keys, bounds_stride(starts))
    shared = dims(q, k, v) | {"SOFTCAP": softcap > 0}
    rows = queries * heads // kv_heads

    shape = tiles(GRAD_Q, q, v)
    by_tiles = described(shape.keys, k, v)
    launch(
        grad_q_kernel,
        ceil_div(rows, shape.rows) * kv_heads * batch,
        q,
        *(q, *(by_tiles or (k, v)), grad, level, delta, dq),
        *(starts, stops, float(scale), float(softcap), *sizes, *strides),
        DESCRIBED=by_tiles is not None,
        **shared,
        **shape.meta(),
    )

    shape = tiles(GRAD_KV, q, v)
    by_tiles = described(shape.rows, q, grad)
    q_rows, grad_rows = by_tiles or (q, grad)
    row_tiles, key_tiles = ceil_div(queries, shape.rows), ceil_div(keys, shape.keys)
    plans = starts.shape[0]
    lists = torch.empty((plans, key_tiles, row_tiles), dtype=torch.int32, device=q.device)
    counts = torch.empty((plans, key_tiles, 2), dtype=torch.int32, device=q.device)
    launch(
        plan_kernel,
        (key_tiles, plans),
        q,
        *(starts, stops, lists, counts, queries, keys, bounds_stride(starts)),
        BLOCK_M=shape.rows,
        BLOCK_N=shape.keys,
        TILES=_PLANNED,
    )
    launch(
        grad_kv_kernel,
        key_tiles * kv_heads * batch,
        q,
        *(q_rows, k, v, grad_rows, level, delta, dk, dv),
        *(starts, stops, lists, counts, float(scale), float(softcap)),
        *(*sizes, int(plans > 1), *strides),
        DESCRIBED=by_tiles is not None,
        **shared,
        **shape.meta(),
    )
    return dq, dk, dv


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""

    def call(dim, value_dim, dtype, group=4, softcap=0.0):
        q, grad, out = (
            torch.empty(1, 4096, 2 * group, n, dtype=dtype, device=device)
            for n in (dim, value_dim, value_dim)
        )
        k, v = (torch.empty(1, 4096, 2, n, dtype=dtype, device=device) for n in (dim, value_dim))
        lse = torch.empty(1, 2 * group, 4096, device=device)
        bounds = torch.zeros(1, 4096, 2, dtype=torch.int32, device=device)
        intervals_backward(grad, lse, out, lse, q, k, v, bounds, bounds, 1.0, softcap)

    for dtype, sizes in EXAMPLES:
        for dim in sizes:
            yield partial(call, dim, dim, dtype)
    yield partial(call, 192, 128, torch.bfloat16, 1, 30.0)
