"""Linear heads for the CUDA kernels: products tile by tile, by cuBLAS, as Triton's kernels get them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from dlcore.cpu.linear_logits import Head
from dlcore.cpu.tensors import rows_contiguous

if TYPE_CHECKING:
    from dlcore.triton.linear_logits import HeadGradient


def tiles(head: Head, width: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """(first token, logits of the tokens from there on): a head's tile by tile, dense ones whole."""
    logits, weight, _ = head
    if weight is None:
        dense, width = rows_contiguous(logits), width or logits.shape[-1]
        for first in range(0, dense.shape[-1], width):
            yield first, dense[..., first : first + width]
        return
    from dlcore.triton import linear_logits  # imports Triton, which dense logits do without

    for first, _, tile in linear_logits.tiles(head, width):
        yield first, tile.data


def pairs(p: Head, q: Head) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Tiles of two heads side by side, of one dtype."""
    width = None
    if p[1] is not None or q[1] is not None:
        from dlcore.triton.linear_logits import tile_width

        width = tile_width(q if p[1] is None else p)
    for (first, left), (_, right) in zip(tiles(p, width), tiles(q, width), strict=True):
        if left.dtype != right.dtype:
            left, right = left.float(), right.float()
        yield first, left, right


def fused(head: Head) -> bool:
    """Whether Triton, which draws the same, reads a head of few rows without writing logits."""
    hidden, weight, _ = head
    if weight is None or not hidden.is_cuda:
        return False
    from dlcore.triton.linear_logits_scan import fuses

    return fuses(head)


def gradient_of(head: Head) -> HeadGradient:
    """Collects the gradient of a head from gradients of its tiles of logits."""
    from dlcore.triton.linear_logits import HeadGradient

    return HeadGradient(head)
