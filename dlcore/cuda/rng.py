"""Noise stream v1 on the CUDA kernels; in float64, as everywhere, and rounded once."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from dlcore import _cuda
from dlcore._tensors import empty
from dlcore.cuda.tensors import call

_UNIFORM, _GUMBEL, _NORMAL = range(3)


def _fill(kind: int, key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape), made by a thread a pair."""
    key = key.contiguous()
    out = empty((*key.shape[:-1], *shape), dtype, key.device)
    keys = (key.data_ptr(), key.numel() // 2)
    call(_cuda.fill_noise, key, kind, *keys, math.prod(shape), dtype == torch.float64, out.data_ptr())
    return out


uniform, gumbel, normal = partial(_fill, _UNIFORM), partial(_fill, _GUMBEL), partial(_fill, _NORMAL)


def fold_in(key: Tensor, data: Tensor) -> Tensor:
    """Keys (..., 2) with data (...) hashed into their offsets."""
    shared = key.stride(-1) == 1 and not any(key.stride()[:-1])
    key, data = key if shared else key.contiguous(), data.contiguous()
    out = empty((*data.shape, 2), torch.int64, key.device)
    keys = (key.data_ptr(), 0 if shared else 2)
    call(_cuda.fold_in, key, *keys, data.data_ptr(), 1, data.numel(), out.data_ptr())
    return out
