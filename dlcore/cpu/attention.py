"""The attention family on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _C
from dlcore.cpu.tensors import rows_contiguous, view

#: Fewer products than this are not worth waking another thread.
_SERIAL = 1 << 18


def _threads(q: Tensor, keys: int) -> int:
    return 1 if q.numel() * keys < _SERIAL else torch.get_num_threads()


class _Arguments:
    """The parameters of a call as the compiled module takes them; holds the tensors that they point to."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        page_table: Tensor | None,
        scale: float,
        softcap: float,
    ) -> None:
        q, k, v, out = (rows_contiguous(x) for x in (q, k, v, out))
        lse = lse.contiguous()
        table = None if page_table is None else page_table.contiguous()
        self.held = (q, k, v, out, lse, table)
        self.packed: _C.Attention = (
            view(q),
            view(k),
            view(v),
            view(out),
            lse.data_ptr(),
            None if table is None else (table.data_ptr(), table.shape[1]),
            scale,
            softcap,
        )
        self.threads = _threads(q, k.shape[1] * (1 if table is None else table.shape[1]))


def _empty(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Room for out (B, S, Hq, Dv) and lse (B, Hq, S)."""
    batch, rows, heads, _ = q.shape
    out = torch.empty((batch, rows, heads, v.shape[3]), dtype=q.dtype)
    return out, torch.empty((batch, heads, rows), dtype=torch.float32)


def _bounds(starts: Tensor, stops: Tensor) -> _C.Bounds:
    return starts.data_ptr(), stops.data_ptr(), starts.shape[0] == 1


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
    out, lse = _empty(q, v)
    arguments = _Arguments(q, k, v, out, lse, page_table, scale, softcap)
    starts, stops = starts.contiguous(), stops.contiguous()
    _C.attention(arguments.packed, _bounds(starts, stops), arguments.threads)
    return out, lse


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    page_table: Tensor | None,
    max_len: int,
    num_commit: int,
    causal: Tensor | None,
    window: int | None,
    window_by_row: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out (B, S, Hq, Dv) and lse (B, Hq, S), with k and v written into keys and values."""
    out, lse = _empty(q, v)
    arguments = _Arguments(q, keys, values, out, lse, page_table, scale, softcap)
    k, v, lengths = rows_contiguous(k), rows_contiguous(v), lengths.contiguous()
    causal = None if causal is None else causal.contiguous()
    _C.attention_decode(
        arguments.packed,
        view(k),
        view(v),
        lengths.data_ptr(),
        num_commit,
        None if causal is None else (causal.data_ptr(), causal.shape[0] == 1),
        window or 0,
        window_by_row,
        arguments.threads,
    )
    # For autograd to see that what it may have saved has changed.
    torch.autograd.graph.increment_version((keys, values))
    return out, lse


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
    arguments = _Arguments(q, k, v, out, lse, None, scale, softcap)
    bounds = _bounds(starts := starts.contiguous(), stops := stops.contiguous())
    grad, grad_lse = rows_contiguous(grad), grad_lse.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grads = (view(dq), view(dk), view(dv))
    _C.attention_backward(arguments.packed, bounds, view(grad), grad_lse.data_ptr(), grads, arguments.threads)
    return dq, dk, dv
