"""Tensors as the compiled module takes them."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("dlcore")

View = tuple[int, int, tuple[int, ...], tuple[int, ...]]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: Fewer elements than this are not worth waking another thread.
_SERIAL = 1 << 15

_workspaces = threading.local()


def view(x: Tensor) -> View:
    """(address, dtype, shape, stride) of a tensor whose last dimension is contiguous."""
    return x.data_ptr(), DTYPES[x.dtype], x.shape, x.stride()


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` itself if its last dimension is contiguous, whatever the other strides; else a copy, logged."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    logger.info("copied a %s tensor: its last dimension has stride %d", tuple(x.shape), x.stride(-1))
    return x.contiguous()


def per_row(x: Tensor | None, lead: torch.Size) -> Tensor | None:
    """One element for all rows, or a contiguous one per row. The caller keeps it alive during the call."""
    if x is None or x.numel() == 1:
        return x
    return x.expand(lead).contiguous()


def strided(x: Tensor | None, step: int = 1) -> tuple[int, int] | None:
    """(address, stride) of what `per_row` gave, with `step` elements a row."""
    return None if x is None else (x.data_ptr(), 0 if x.numel() == step else step)


def keyed(key: Tensor) -> tuple[int, bool]:
    """(address, per_row) of a contiguous key."""
    return key.data_ptr(), key.dim() > 1


def threads(elements: int) -> int:
    """How many threads to use for so many elements."""
    return 1 if elements < _SERIAL else torch.get_num_threads()


def workspace(name: str, elements: int) -> Tensor:
    """A float32 buffer of this thread that is kept: fresh memory costs more than the pass that fills it."""
    return _kept(name, elements)[:elements]


def scratch(name: str, size: int) -> int:
    """The address of so many kept bytes."""
    return _kept(name, (size + 3) // 4).data_ptr()


def _kept(name: str, elements: int) -> Tensor:
    kept: dict[str, Tensor] = _workspaces.__dict__
    buffer = kept.get(name)
    if buffer is None or buffer.numel() < elements:
        buffer = kept[name] = torch.empty(elements, dtype=torch.float32)
    return buffer


def reasons(*args: Any) -> list[str]:
    """Why the compiled kernels can't take these arguments; the first one is logits or a key."""
    found = []
    for x in args:
        if x is not None and isinstance(x, Tensor) and not x.is_cpu:
            found.append(f"takes CPU tensors, got {x.device}")
            break
    if args and args[0].dtype not in DTYPES and args[0].dtype != torch.int64:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        found.append(f"takes {accepted}, got {str(args[0].dtype).removeprefix('torch.')}")
    return found
