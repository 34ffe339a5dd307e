"""What torch does with shapes, where its own way takes as long as a launch: a few microseconds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    if len(set(shapes)) == 1:
        return shapes[0]
    return torch.broadcast_shapes(*shapes)
