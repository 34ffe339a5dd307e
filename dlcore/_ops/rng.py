"""The noise."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore._ops.declare import define


def _noise_fake(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return key.new_empty((*key.shape[:-1], *shape), dtype=dtype)


define(
    "rng.fold_in", "(Tensor key, Tensor data) -> Tensor", lambda key, data: data.new_empty((*data.shape, 2))
)
for _name in ("uniform", "normal", "gumbel"):
    define(f"rng.{_name}", "(Tensor key, SymInt[] shape, ScalarType dtype) -> Tensor", _noise_fake)
