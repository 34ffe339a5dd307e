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
        starts: Tensor,
        stops: Tensor,
        page_table: Tensor | None,
        scale: float,
        softcap: float,
    ) -> None:
        q, k, v, out = (rows_contiguous(x) for x in (q, k, v, out))
        starts, stops, lse = starts.contiguous(), stops.contiguous(), lse.contiguous()
        table = None if page_table is None else page_table.contiguous()
        self.held = (q, k, v, out, lse, starts, stops, table)
        self.packed: _C.Attention = (
            view(q),
            view(k),
            view(v),
            view(out),
            lse.data_ptr(),
            (starts.data_ptr(), starts.shape[0] == 1),
            stops.data_ptr(),
            None if table is None else (table.data_ptr(), table.shape[1]),
            scale,
            softcap,
        )
        self.threads = _threads(q, k.shape[1] * (1 if table is None else table.shape[1]))


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
    batch, rows, heads, _ = q.shape
    out = torch.empty((batch, rows, heads, v.shape[3]), dtype=q.dtype)
    lse = torch.empty((batch, heads, rows), dtype=torch.float32)
    arguments = _Arguments(q, k, v, out, lse, starts, stops, page_table, scale, softcap)
    _C.attention(arguments.packed, arguments.threads)
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
    arguments = _Arguments(q, k, v, out, lse, starts, stops, None, scale, softcap)
    grad, grad_lse = rows_contiguous(grad), grad_lse.contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grads = (view(dq), view(dk), view(dv))
    _C.attention_backward(arguments.packed, view(grad), grad_lse.data_ptr(), grads, arguments.threads)
    return dq, dk, dv
