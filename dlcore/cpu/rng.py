"""Noise stream v1 from the compiled module."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore import _C
from dlcore.cpu.tensors import threads

_UNIFORM, _NORMAL, _GUMBEL = range(3)


def _fill(noise: int, key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    key = key.contiguous()
    out = torch.empty((*key.shape[:-1], *shape), dtype=dtype)
    keys, wide = key.numel() // 2, dtype == torch.float64
    # One draw costs about as much as reading sixteen floats.
    used = threads(16 * out.numel())
    _C.fill_noise(noise, key.data_ptr(), keys, math.prod(shape), wide, out.data_ptr(), used)
    return out


def uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) in [0, 1)."""
    return _fill(_UNIFORM, key, shape, dtype)


def normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) standard normal."""
    return _fill(_NORMAL, key, shape, dtype)


def gumbel(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) standard Gumbel."""
    return _fill(_GUMBEL, key, shape, dtype)


def fold_in(key: Tensor, data: Tensor) -> Tensor:
    """Keys (..., 2) with data (...) hashed into their offsets."""
    key, data = key.contiguous(), data.contiguous()
    out = torch.empty((*data.shape, 2), dtype=torch.int64)
    _C.fold_in(key.data_ptr(), 2, data.data_ptr(), 1, data.numel(), out.data_ptr())
    return out
