"""Tensors as the compiled CUDA module takes them, and why it can't take some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlcore import _cuda
from dlcore._tensors import too_wide
from dlcore.cpu.tensors import DTYPES


def reasons(*args: Any) -> list[str]:
    """Why the CUDA kernels can't take these arguments; the first one is logits or a key."""
    found = []
    elsewhere = next((x for x in args if isinstance(x, Tensor) and x.device.type != _cuda.DEVICE), None)
    if elsewhere is not None:
        found.append(f"takes CUDA tensors, got {elsewhere.device}")
    if not args and _cuda.DEVICE == "cuda" and not torch.cuda.is_available():
        found.append("needs a CUDA device")
    if args and args[0].dtype not in DTYPES and args[0].dtype != torch.int64:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        found.append(f"takes {accepted}, got {str(args[0].dtype).removeprefix('torch.')}")
    wide = too_wide(args[0]) if args else None
    if wide is not None:
        found.append(wide)
    return found


def call(function: Callable[..., Any], like: Tensor, *args: Any) -> None:
    """Queue kernels behind what torch's current stream of the device of `like` has been given."""
    if not like.is_cuda:
        function(*args, 0)
        return
    device = like.get_device()
    # torch.cuda.current_stream would make a Stream first.
    stream = torch._C._cuda_getCurrentRawStream(device)
    if device == torch.cuda.current_device():
        function(*args, stream)
        return
    with torch.cuda.device(device):
        function(*args, stream)


def scratch(size: int, like: Tensor) -> Tensor:
    """So many bytes, of torch's allocator: its order of streams holds for them, and graph capture."""
    return torch.empty(size, dtype=torch.uint8, device=like.device)
