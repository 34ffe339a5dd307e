"""Cosines between fresh and cached rows."""

from __future__ import annotations

from typing import Any

import torch

from dlcore import _checks as checks
from dlcore._ops.declare import define, result_dtype


def _check_cosine(new: Any, cached: Any, rows: Any, page_table: Any) -> None:
    """What a kernel relies on, whoever calls it."""
    op = "similarity.cosine"
    if new.dim() != 4 or cached.dim() != 4 or new.shape[2:] != cached.shape[2:]:
        got = f"{tuple(new.shape)} and {tuple(cached.shape)}"
        raise ValueError(f"{op}: new and cached must be (B, n, H, D) and (B, S, H, D), got {got}")
    if new.dtype != cached.dtype:
        raise TypeError(f"{op}: cached must have new's dtype {new.dtype}, got {cached.dtype}")
    batch, count = new.shape[:2]
    held, size = cached.shape[:2]
    if page_table is not None:
        if page_table.dtype != torch.int32 or page_table.dim() != 2:
            got = checks.describe(page_table)
            raise ValueError(f"{op}: page_table must be int32 ({batch}, pages), got {got}")
        held, size = page_table.shape[0], page_table.shape[1] * size
    if held != batch:
        raise ValueError(f"{op}: cached must hold {batch} sequences, got {held}")
    if rows is None and count > size:
        raise ValueError(f"{op}: cached must hold new's {count} rows, got {size}")
    if rows is not None and (rows.dtype != torch.int64 or rows.shape != (batch, count)):
        raise ValueError(f"{op}: rows must be int64 ({batch}, {count}), got {checks.describe(rows)}")
    checks.token_range(op, "rows", rows, size)
    checks.token_range(op, "page_table", page_table, cached.shape[0])


define(
    "similarity.cosine",
    "(Tensor new, Tensor cached, Tensor? rows, Tensor? page_table) -> Tensor",
    lambda new, *_: new.new_empty(new.shape[:2], dtype=result_dtype(new)),
    _check_cosine,
)
