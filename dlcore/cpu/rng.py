"""Noise stream v1 from the compiled module."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dlcore import _C
from dlcore._tensors import empty
from dlcore.cpu.tensors import threads

_UNIFORM, _GUMBEL = range(2)


def _fill(fill: Callable[..., None], key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    key = key.contiguous()
    out = empty((*key.shape[:-1], *shape), dtype)
    keys, wide = key.numel() // 2, dtype == torch.float64
    # One draw costs about as much as reading sixteen floats.
    fill(key.data_ptr(), keys, math.prod(shape), wide, out.data_ptr(), threads(16 * out.numel()))
    return out


def uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) in [0, 1)."""
    return _fill(partial(_C.fill_noise, _UNIFORM), key, shape, dtype)


def normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) standard normal."""
    return _fill(_C.fill_normal, key, shape, dtype)


def gumbel(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) standard Gumbel."""
    return _fill(partial(_C.fill_noise, _GUMBEL), key, shape, dtype)


def fold_in(key: Tensor, data: Tensor) -> Tensor:
    """Keys (..., 2) with data (...) hashed into their offsets."""
    key, data = key.contiguous(), data.contiguous()
    out = empty((*data.shape, 2), torch.int64)
    _C.fold_in(key.data_ptr(), 2, data.data_ptr(), 1, data.numel(), out.data_ptr())
    return out
