"""Keyed noise: stream v1, a pure function of (seed, offset, index), the same on every backend.

Float32 numbers are the same on every CPU level and in the reference; float64 normals agree to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore._beside import beside
from dlcore._tensors import broadcast, expanded

__all__ = ["fold_in", "gumbel", "key", "normal", "split", "uniform"]


def key(seed: int, offset: int = 0, *, device: torch.device | str = "cpu") -> Tensor:
    """The key (seed, offset) as an int64 tensor (2,).

    Example:
        >>> import dlcore
        >>> dlcore.rng.key(7)
        tensor([7, 0])
    """
    for name, value in (("seed", seed), ("offset", offset)):
        checks.integer("rng.key", name, value)
    return torch.tensor([seed, offset], dtype=torch.int64, device=device)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key (2,) or (*lead, 2) and `data`, an int or int64 tensor that broadcasts with lead.

    (seed, offset, data) are hashed into the new offset, so keys with neighbouring offsets share nothing.
    Returns (*broadcast, 2). Raises TypeError for other dtypes, ValueError for shapes that do not broadcast.

    Example:
        >>> import torch, dlcore
        >>> dlcore.rng.fold_in(dlcore.rng.key(7), torch.arange(3)).shape
        torch.Size([3, 2])
    """
    op = "rng.fold_in"
    key = checks.key(op, key, None, None)
    if not isinstance(data, Tensor):
        checks.integer(op, "data", data)
        data = torch.full((), data, dtype=torch.int64, device=key.device)
    if data.dtype != torch.int64:
        raise TypeError(f"{op}: data must be an int or an int64 Tensor, got {checks.describe(data)}")
    checks.on_device(op, "data", data, key.device)
    try:
        lead = broadcast(key.shape[:-1], data.shape)
    except RuntimeError as error:
        got = f"{tuple(data.shape)}"
        raise ValueError(f"{op}: data must broadcast with {tuple(key.shape[:-1])}, got {got}") from error
    folded: Tensor = torch.ops.dlcore.rng_fold_in(key.expand(*lead, 2), beside(key, expanded(data, lead)))
    return folded


def split(key: Tensor, shape: int | Sequence[int]) -> Tensor:
    """shape-many independent keys (*shape, 2) from one key (2,).

    Example:
        >>> import dlcore
        >>> dlcore.rng.split(dlcore.rng.key(7), (2, 3)).shape
        torch.Size([2, 3, 2])
    """
    size = torch.Size(sizes("rng.split", shape))
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        raise TypeError(f"rng.split: key must be an int64 Tensor, got {checks.describe(key)}")
    if key.shape != (2,):
        raise ValueError(f"rng.split: key must have shape (2,), got {tuple(key.shape)}")
    return fold_in(key, torch.arange(size.numel(), device=key.device).view(size))


def row_keys(key: Tensor, lead: torch.Size) -> Tensor:
    """One key per row (*lead, 2): a shared key is folded with the flattened row, so chunked calls agree."""
    if key.dim() > 1:
        return key
    return fold_in(key, torch.arange(lead.numel(), device=key.device).view(lead))


def sizes(op: str, shape: int | Sequence[int]) -> list[int]:
    """One int or several as a list."""
    size = list(shape) if isinstance(shape, Sequence) else [shape]
    if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in size):
        raise TypeError(f"{op}: shape must be an int or ints, got {checks.describe(shape)}")
    if any(n < 0 for n in size):
        raise ValueError(f"{op}: shape must not be negative, got {tuple(size)}")
    return size


def _draw(op: str, key: Tensor, shape: int | Sequence[int], dtype: torch.dtype) -> Tensor:
    key = checks.key(op, key, None, None)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: dtype must be float32 or float64, got {dtype}")
    drawn: Tensor = getattr(torch.ops.dlcore, op.replace(".", "_"))(key, sizes(op, shape), dtype)
    return drawn


def uniform(key: Tensor, shape: int | Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1), 53 random bits each. key (*lead, 2) -> (*lead, *shape).

    Example:
        >>> import dlcore
        >>> dlcore.rng.uniform(dlcore.rng.key(7), (2, 3)).shape
        torch.Size([2, 3])
    """
    return _draw("rng.uniform", key, shape, dtype)


def normal(key: Tensor, shape: int | Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers (Box-Muller); float32 ones are those of float64, rounded.

    key (*lead, 2) -> (*lead, *shape).

    Example:
        >>> import dlcore
        >>> dlcore.rng.normal(dlcore.rng.key(7), (2, 3)).shape
        torch.Size([2, 3])
    """
    return _draw("rng.normal", key, shape, dtype)


def gumbel(key: Tensor, shape: int | Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel numbers, -log(-log1p(-u)) from 64 random bits: the upper tail is exact to 44.

    key (*lead, 2) -> (*lead, *shape).

    Example:
        >>> import dlcore
        >>> dlcore.rng.gumbel(dlcore.rng.key(7), (2, 3)).shape
        torch.Size([2, 3])
    """
    return _draw("rng.gumbel", key, shape, dtype)
