"""What attention's kernels are called with: tile shapes by head dimension, dtype and device, views, strides.

`make gpu-check` holds each shape to the shared memory that a program may have.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dlcore.triton.launch import multiplies_from_shared, power_of_two

logger = logging.getLogger("dlcore")


class Tiles(NamedTuple):
    """Packed query rows and keys of a tile, and Triton's options."""

    rows: int
    keys: int
    warps: int
    stages: int

    def meta(self) -> dict[str, Any]:
        # Without the bound the assembler halves the registers of large tiles and spills the rest.
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.keys,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": 255,
        }


class Shapes(NamedTuple):
    """Tile shapes by the larger head dimension, rounded up to a power of two.

    half: of 16-bit numbers where products take operands from shared memory; of 64 and 128 the fastest tried
    on an H200. other: of the same elsewhere, where operands pass through registers; never timed, the ones
    that spill least of those compiled for 8.0, in 99 KiB. single: of float32.
    """

    half: dict[int, Tiles]
    other: dict[int, Tiles]
    single: dict[int, Tiles]


_SINGLE = {
    64: Tiles(64, 32, 8, 2),
    128: Tiles(32, 32, 8, 2),
    256: Tiles(32, 32, 8, 1),
    512: Tiles(16, 16, 8, 1),
}
_SINGLE_GRAD = {
    64: Tiles(32, 32, 8, 1),
    128: Tiles(32, 32, 8, 1),
    256: Tiles(16, 16, 8, 1),
    512: Tiles(16, 16, 8, 1),
}
FORWARD = Shapes(
    half={
        64: Tiles(128, 64, 4, 3),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(128, 64, 8, 2),
        512: Tiles(64, 32, 8, 2),
    },
    other={
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 32, 8, 3),
        256: Tiles(32, 32, 4, 2),
        512: Tiles(16, 32, 8, 2),
    },
    single=_SINGLE,
)
#: The same for few rows, where keys are read as fast as memory gives them.
DECODE = Shapes(
    half={
        64: Tiles(64, 128, 4, 3),
        128: Tiles(64, 64, 4, 3),
        256: Tiles(64, 32, 4, 3),
        512: Tiles(64, 32, 8, 2),
    },
    other={
        64: Tiles(64, 64, 4, 3),
        128: Tiles(32, 64, 4, 3),
        256: Tiles(32, 64, 8, 2),
        512: Tiles(16, 32, 8, 2),
    },
    single=_SINGLE,
)
GRAD_Q = Shapes(
    half={
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(64, 32, 8, 2),
        512: Tiles(32, 32, 8, 1),
    },
    other={
        64: Tiles(128, 64, 8, 3),
        128: Tiles(128, 32, 8, 2),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(16, 16, 8, 1),
    },
    single=_SINGLE_GRAD,
)
GRAD_KV = Shapes(
    half={
        64: Tiles(64, 128, 8, 3),
        128: Tiles(64, 64, 4, 2),
        256: Tiles(32, 64, 8, 2),
        512: Tiles(32, 32, 8, 1),
    },
    other={
        64: Tiles(32, 128, 8, 2),
        128: Tiles(16, 128, 8, 2),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(16, 16, 8, 1),
    },
    single=_SINGLE_GRAD,
)
#: Up to so many rows a tile is a tile of decoding.
FEW_ROWS = 64
#: Head dimensions that `make gpu-check` compiles for: every tile shape, and one that does not fill its tile.
EXAMPLES = (
    (torch.bfloat16, (64, 96, 128, 256, 512)),
    (torch.float16, (128,)),
    (torch.float32, (64, 128, 256, 512)),
)


def width(size: int) -> int:
    """Columns of a tile: products need 16."""
    return power_of_two(size, 16, 512)


def tiles(shapes: Shapes, q: Tensor, v: Tensor) -> Tiles:
    """The tile shape for these tensors."""
    half = shapes.half if multiplies_from_shared(q.device) else shapes.other
    table = shapes.single if q.dtype == torch.float32 else half
    return table[max(64, width(max(q.shape[3], v.shape[3])))]


def forward_tiles(q: Tensor, v: Tensor, rows: int) -> Tiles:
    """The forward kernel's, no higher than so many packed rows need."""
    few = rows <= FEW_ROWS
    chosen = tiles(DECODE if few else FORWARD, q, v)
    return chosen._replace(rows=power_of_two(rows, 16, chosen.rows))


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, whatever the other strides; else a copy, logged."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    logger.info("copied a %s tensor: its last dimension has stride %d", tuple(x.shape), x.stride(-1))
    return x.contiguous()


def described(rows: int, *tensors: Tensor) -> tuple[TensorDescriptor, ...] | None:
    """Descriptors of tensors (B, S, H, D) as (B, H, S, D), in tiles of so many rows of a head; None where the
    device, the dtype or the layout of one does not allow for it."""
    for x in tensors:
        strided = all(n > 0 and n * x.element_size() % 16 == 0 for n in x.stride()[:3])
        aligned = strided and x.stride(3) == 1 and x.data_ptr() % 16 == 0
        if x.element_size() != 2 or x.numel() == 0 or not aligned or not multiplies_from_shared(x.device):
            return None
    of_heads = [x.transpose(1, 2) for x in tensors]
    return tuple(
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, width(x.shape[3])])
        for x in of_heads
    )


def dims(q: Tensor, k: Tensor, v: Tensor) -> dict[str, int]:
    """The constants that all kernels over heads share."""
    return {
        "HEADS": k.shape[2],
        "GROUP": q.shape[2] // k.shape[2],
        "DIM": q.shape[3],
        "VALUE_DIM": v.shape[3],
        "BLOCK_D": width(q.shape[3]),
        "BLOCK_V": width(v.shape[3]),
    }


def bounds_stride(starts: Tensor) -> int:
    """From one sequence's intervals to the next one's; 0 if all share them."""
    return 0 if starts.shape[0] == 1 else 2 * starts.shape[1]
