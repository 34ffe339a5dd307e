"""Attention over key intervals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._beside import beside
from dlcore._ops.declare import autograd, define, result_dtype

_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor starts, Tensor stops, "
    "Tensor? page_table, float scale, float softcap"
)


MAX_HEAD_DIM = 512


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, batch: int) -> None:
    """Shapes that a kernel relies on, whoever calls it; `batch` sequences, or pages, of k and v."""

    def refused(rule: str) -> ValueError:
        got = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        return ValueError(f"{op}: {rule}, {got}")

    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise refused("q, k and v must be (B, S, H, D)")
    heads, size, (*lead, kv_heads, kv_size) = q.shape[2], q.shape[3], k.shape
    if v.shape[:3] != (*lead, kv_heads) or lead[0] != batch or kv_size != size:
        raise refused("k and v must have the same (B, T, H), q's batch and head dimension")
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise refused("q must have a multiple of k's heads")
    if not 1 <= size <= MAX_HEAD_DIM or not 1 <= v.shape[3] <= MAX_HEAD_DIM:
        raise refused(f"head dimensions must lie in [1, {MAX_HEAD_DIM}]")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"{op}: k and v must have q's dtype {q.dtype}, got {k.dtype} and {v.dtype}")


def _check_attention(*args: Any) -> None:
    q, k, v, starts, stops, page_table, *_ = args
    op = "attention.intervals"
    batch, rows = q.shape[0], q.shape[1]
    _check_heads(op, q, k, v, batch if page_table is None else k.shape[0])
    if page_table is not None and (page_table.dim() != 2 or page_table.shape[0] != batch):
        raise ValueError(f"{op}: page_table must be ({batch}, pages), got {tuple(page_table.shape)}")
    if starts.dim() != 3 or starts.shape[0] not in (1, batch) or starts.shape[1:] != (rows, 2):
        raise ValueError(f"{op}: starts must be ({batch} or 1, {rows}, 2), got {tuple(starts.shape)}")
    keys = k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
    for name, x in (("starts", starts), ("stops", stops), ("page_table", page_table)):
        if x is not None and x.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be int32, got {x.dtype}")
    if starts.shape != stops.shape:
        wanted = tuple(starts.shape)
        raise ValueError(f"{op}: stops must have starts' shape {wanted}, got {tuple(stops.shape)}")
    checks.token_range(op, "starts", starts, keys + 1)
    checks.token_range(op, "stops", stops, keys + 1)
    checks.token_range(op, "page_table", page_table, k.shape[0])


def _check_attention_backward(*args: Any) -> None:
    grad, grad_lse, out, lse, q, k, v, starts, stops, *_ = args
    op = "attention.intervals_backward"
    _check_attention(q, k, v, starts, stops, None)
    shape, lse_shape = (*q.shape[:3], v.shape[3]), (q.shape[0], q.shape[2], q.shape[1])
    for name, x, wanted in (("grad", grad, shape), ("out", out, shape)):
        if x.shape != wanted or x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must be {q.dtype} {wanted}, got {x.dtype} {tuple(x.shape)}")
    for name, x in (("grad_lse", grad_lse), ("lse", lse)):
        if x.shape != lse_shape or x.dtype != result_dtype(q):
            wanted_dtype = result_dtype(q)
            raise ValueError(
                f"{op}: {name} must be {wanted_dtype} {lse_shape}, got {x.dtype} {tuple(x.shape)}"
            )


def _check_decode(*args: Any) -> None:
    q, k, v, keys, values, lengths, page_table, max_len, num_commit, causal, window, *_ = args
    op = "attention.decode"
    for name, x in (("q", q), ("keys", keys), ("values", values)):
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be (B, S, H, D), got {tuple(x.shape)}")
    _check_heads(op, q, k, v, q.shape[0])
    batch, rows = q.shape[:2]
    if k.shape[1] != rows:
        raise ValueError(f"{op}: k must have q's {rows} rows, got {k.shape[1]}")
    sequences, size = keys.shape[:2]
    if page_table is not None:
        if page_table.dtype != torch.int32:
            raise TypeError(f"{op}: page_table must be int32, got {page_table.dtype}")
        if page_table.dim() != 2 or page_table.shape[0] != batch:
            raise ValueError(f"{op}: page_table must be ({batch}, pages), got {tuple(page_table.shape)}")
        sequences, size = batch, page_table.shape[1] * size
    for name, store, x in (("keys", keys, k), ("values", values, v)):
        if store.shape[:2] != keys.shape[:2] or store.shape[2:] != x.shape[2:]:
            wanted = f"(B, T, {', '.join(map(str, x.shape[2:]))})"
            raise ValueError(f"{op}: {name} must be {wanted}, got {tuple(store.shape)}")
        if store.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {x.dtype}, got {store.dtype}")
        if not store.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {store.stride()}")
    if sequences != batch or size < max_len:
        raise ValueError(f"{op}: keys must hold {batch} times {max_len} rows, got {sequences} times {size}")
    if lengths.shape != (batch,) or lengths.dtype != torch.int32:
        raise ValueError(f"{op}: lengths must be int32 ({batch},), got {checks.describe(lengths)}")
    if causal is not None and (causal.dtype != torch.bool or causal.shape not in ((1,), (batch,))):
        raise ValueError(f"{op}: causal must be bool ({batch} or 1,), got {checks.describe(causal)}")
    if not 0 <= num_commit <= rows:
        raise ValueError(f"{op}: num_commit must lie in [0, {rows}], got {num_commit}")
    if window is not None and not 1 <= window < 2**31:
        raise ValueError(f"{op}: window must lie in [1, 2^31), got {window}")
    checks.token_range(op, "page_table", page_table, keys.shape[0])
    if checks.reads_data(lengths):
        least, most = (int(n) for n in torch.aminmax(lengths))
        if least < 0:
            raise ValueError(f"{op}: lengths must be at least 0, got {least}")
        checks.room(op, max_len, most + rows)


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _d = q.shape
    return (
        q.new_empty((batch, rows, heads, v.shape[3])),
        q.new_empty((batch, heads, rows), dtype=result_dtype(q)),
    )


define(
    "attention.intervals",
    f"({_ATTENTION}) -> (Tensor, Tensor)",
    _attention_fake,
    _check_attention,
    differentiable=True,
)
define(
    "attention.intervals_backward",
    "(Tensor grad, Tensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    "Tensor starts, Tensor stops, float scale, float softcap) -> (Tensor, Tensor, Tensor)",
    lambda grad, grad_lse, out, lse, q, k, v, *_: tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    ),
    _check_attention_backward,
)


define(
    "attention.decode",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor lengths, Tensor? page_table, "
    "SymInt max_len, SymInt num_commit, Tensor? causal, SymInt? window, bool window_by_row, "
    "float scale, float softcap) -> (Tensor, Tensor)",
    _attention_fake,
    _check_decode,
)


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, stops, page_table, ctx.scale, ctx.softcap = inputs
    ctx.paged = page_table is not None
    ctx.save_for_backward(*output, q, k, v, starts, stops)


def _backward_attention(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    if ctx.paged:
        raise NotImplementedError("attention.intervals: a paged cache has no gradient")
    # Of an output that has no gradient autograd makes plain zeros.
    grad, grad_lse = beside(saved[2], grad), beside(saved[2], grad_lse)
    grads = torch.ops.dlcore.attention_intervals_backward(grad, grad_lse, *saved, ctx.scale, ctx.softcap)
    return (*grads, None, None, None, None, None)


autograd("attention.intervals", _setup_attention, _backward_attention)
