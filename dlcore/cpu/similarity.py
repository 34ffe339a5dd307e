"""Cosines between fresh and cached rows on the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _C
from dlcore._tensors import empty
from dlcore.cpu.tensors import rows_contiguous, threads, view


def cosine(new: Tensor, cached: Tensor, rows: Tensor | None, page_table: Tensor | None) -> Tensor:
    """(B, n) float32."""
    new, cached = rows_contiguous(new), rows_contiguous(cached)
    rows = None if rows is None else rows.contiguous()
    table = None if page_table is None else page_table.contiguous()
    out = empty(new.shape[:2], torch.float32)
    _C.row_cosine(
        view(new),
        view(cached),
        cached.shape[1] * (1 if table is None else table.shape[1]),
        0 if rows is None else rows.data_ptr(),
        None if table is None else (table.data_ptr(), table.shape[1]),
        out.data_ptr(),
        threads(new.numel()),
    )
    return out
