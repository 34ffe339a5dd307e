"""Rows of a tensor (..., n) whose leading dimensions have any strides."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

logger = logging.getLogger("dlcore")


class Rows(NamedTuple):
    """Row r of `data` starts at r // inner · outer_stride + r % inner · inner_stride; see `row_offset`."""

    data: Tensor
    inner: int
    outer_stride: int
    inner_stride: int


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Where a row of `Rows` starts, in int64."""
    row = row.to(tl.int64)
    return row // inner * outer_stride + row % inner * inner_stride


def rows_of(x: Tensor) -> Rows:
    """`x` (..., n) as rows; copied, with a line in the log, if its last dimension has gaps or its leading
    ones need more than two strides."""
    if x.is_contiguous():
        return Rows(x, max(x.numel() // max(x.shape[-1], 1), 1), 0, x.shape[-1])
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        dims: list[tuple[int, int]] = []
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            if size == 1:
                continue
            if dims and dims[-1][1] == size * stride:
                dims[-1] = (dims[-1][0] * size, stride)
            else:
                dims.append((size, stride))
        if len(dims) <= 2:
            outer, inner = [(1, 0), (1, 0), *dims][-2:]
            return Rows(x, inner[0], outer[1], inner[1])
    logger.info("copied a %s tensor of strides %s to read its rows", tuple(x.shape), x.stride())
    return Rows(x.contiguous(), max(x.shape[:-1].numel(), 1), 0, x.shape[-1])


def per_row(x: Tensor | None, lead: torch.Size) -> tuple[Tensor | None, int]:
    """One element for all rows, expanded or not, with step 0, or a contiguous one per row with step 1."""
    if x is None or all(size == 1 or step == 0 for size, step in zip(x.shape, x.stride(), strict=True)):
        return x, 0
    return x.expand(lead).contiguous(), 1
