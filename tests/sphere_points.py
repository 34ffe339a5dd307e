"""Points for tests of the sphere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unit vectors, as exact as the dtype allows."""
    return F.normalize(normal(*shape, seed=seed, dtype=torch.float64), dim=-1).to(dtype)


def turned(x: Tensor, angle: float, seed: int = 101) -> Tensor:
    """Points of x's dtype at `angle` from x."""
    wide = F.normalize(x.double(), dim=-1)
    v = normal(*x.shape, seed=seed, dtype=torch.float64)
    v = F.normalize(v - (v * wide).sum(-1, keepdim=True) * wide, dim=-1)
    near = angle < 2
    rest = torch.tensor(angle if near else torch.pi - angle, dtype=torch.float64)
    return ((torch.cos(rest) * (1 if near else -1)) * wide + torch.sin(rest) * v).to(x.dtype)
