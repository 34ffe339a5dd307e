"""Tensors by the quickest of torch's ways, where the next best takes as long as a launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Columns of a row that kernels for GPUs take: they count in 32 bits, and tiles may reach past the end.
MOST_COLUMNS = 2**31 - 2**20


def too_wide(x: Tensor) -> str | None:
    """Why kernels for GPUs can't take a tensor's rows, if they are too long."""
    if x.dim() == 0 or x.shape[-1] <= MOST_COLUMNS:
        return None
    return f"takes at most {MOST_COLUMNS} columns, got {x.shape[-1]}"


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """torch.empty: it parses numbers faster than a tuple of them."""
    if not shape:
        return torch.empty((), dtype=dtype, device=device)
    return torch.empty(*shape, dtype=dtype, device=device)


def expanded(x: Tensor, shape: torch.Size) -> Tensor:
    """x expanded to a shape; itself if it has that."""
    return x if x.shape == shape else x.expand(shape)


def broadcast(*shapes: torch.Size) -> torch.Size:
    """torch.broadcast_shapes, at once if all are one; RuntimeError if they don't fit."""
    if shapes and all(s == shapes[0] for s in shapes):
        return shapes[0]
    shape: torch.Size = torch.broadcast_shapes(*shapes)
    return shape


def constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers (n,) of the host as a tensor, without a wait for the device."""
    if device.type != "cuda":
        return _of_host(values, dtype).to(device)
    if torch.cuda.is_current_stream_capturing():  # a graph takes no copy from the host, but its numbers
        return filled(values, dtype, device)
    return _of_host(values, dtype).to(device, non_blocking=True)


def _of_host(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def filled(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers (n,) that kernels write, one each."""
    return torch.stack([torch.full((), v, dtype=dtype, device=device) for v in values])
