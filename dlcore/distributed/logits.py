"""Logits whose vocabulary lies over the ranks of a group, in their order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from dlcore import _checks as checks
from dlcore.distributed import groups
from dlcore.distributed.groups import Group


@dataclass(frozen=True)
class ShardedLogits:
    """Logits (..., V) of which every rank of `group` holds some columns; taken by all of dlcore.categorical.

    Results are plain tensors of the leading shape, equal on all ranks: tokens those of the unsharded call
    under the same key, whatever the number of ranks and their sizes. top_k, top_p and min_p take no float64
    logits over ranks (NotImplementedError).

    Args:
        logits: (..., V_r), this rank's columns; V_r may be 0.
        group: a ProcessGroup or a DeviceMesh of one dimension.
        sizes: every rank's V_r, in the order of ranks. None says that all are equal; `shard_sizes` asks.

    Raises:
        ValueError: shapes, sizes that do not belong to the group, a group that this rank is not in.
        TypeError: dtypes and types.

    Example:
        >>> import torch, dlcore.distributed  # doctest: +SKIP
        >>> logits = dlcore.distributed.ShardedLogits(columns, group)  # doctest: +SKIP
        >>> dlcore.categorical.sample(logits, key=dlcore.rng.key(7)).tokens  # doctest: +SKIP
    """

    logits: Tensor
    group: Group
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        op, x = "ShardedLogits", self.logits
        if not isinstance(x, Tensor) or x.dtype not in checks.FLOATING:
            raise TypeError(f"{op}: logits must be a floating Tensor, got {checks.describe(x)}")
        if isinstance(x, DTensor):
            raise TypeError(f"{op}: logits must be this rank's tensor; a DTensor needs no ShardedLogits")
        if x.dim() < 1 or x.layout != torch.strided:
            raise ValueError(f"{op}: logits must be dense and (..., V_r), got {x.layout} {tuple(x.shape)}")
        group = groups.process_group(op, self.group)
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "sizes", known_sizes(op, self.sizes, x.shape[-1], group))

    @property
    def shape(self) -> torch.Size:
        """(..., V)."""
        assert self.sizes is not None
        return torch.Size((*self.logits.shape[:-1], sum(self.sizes)))

    @property
    def device(self) -> torch.device:
        """The device of this rank's logits."""
        return self.logits.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.logits.dtype


def shard_sizes(n: int, group: Group) -> tuple[int, ...]:
    """Every rank's n, by one collective: the `sizes` of uneven shards. Every rank of the group calls it.

    Example:
        >>> sizes = dlcore.distributed.shard_sizes(weight.shape[0], group)  # doctest: +SKIP
    """
    op = "distributed.shard_sizes"
    known = groups.process_group(op, group)
    with groups.agreement(op, known):
        checks.integer(op, "n", n)
        if n < 0:
            raise ValueError(f"{op}: n must not be negative, got {n}")
    own = torch.tensor(n, device=groups.device(known))
    return tuple(int(size) for size in groups.gather(own, known))


def known_sizes(op: str, sizes: object, own: int, group: dist.ProcessGroup) -> tuple[int, ...]:
    """Every rank's number of tokens; that this rank's is `own` is for each call to check, by agreement."""
    ranks = dist.get_world_size(group)
    known = (own,) * ranks if sizes is None else sizes
    if not isinstance(known, (tuple, list, torch.Size)):
        raise TypeError(f"{op}: sizes must be a tuple of ints or None, got {checks.describe(known)}")
    for n in known:
        checks.integer(op, "sizes", n)
    if len(known) != ranks or min(known) < 0:
        raise ValueError(f"{op}: sizes must be {ranks} numbers of tokens, one per rank, got {tuple(known)}")
    return tuple(known)


def is_sharded(x: Tensor, dim: int) -> bool:
    """Whether x is a DTensor with its dimension `dim` over ranks."""
    return isinstance(x, DTensor) and any(p.is_shard(dim % x.dim()) for p in x.placements)


def take_shard(op: str, name: str, x: Tensor, dim: int) -> tuple[Tensor, dist.ProcessGroup, tuple[int, ...]]:
    """This rank's part, the group and all sizes of a DTensor sharded on `dim` alone. Differentiable."""
    dim %= x.dim()
    if not isinstance(x, DTensor) or x.device_mesh.ndim != 1 or x.placements[0] != Shard(dim):
        raise NotImplementedError(
            f"{op}: {name} must be sharded on dimension {dim} over a mesh of one dimension, "
            f"got {_layout(x)}; redistribute it, or give its to_local() and a group"
        )
    whole, ranks = x.shape[dim], x.device_mesh.size()
    chunk = -(-whole // ranks)
    sizes = tuple(min(chunk, max(0, whole - r * chunk)) for r in range(ranks))
    return x.to_local(), x.device_mesh.get_group(), sizes


def replicated(op: str, name: str, x: Tensor) -> Tensor:
    """x, or of a DTensor that is whole on every rank this rank's tensor. Differentiable."""
    if not isinstance(x, DTensor):
        return x
    if any(p != Replicate() for p in x.placements):
        raise NotImplementedError(
            f"{op}: {name} must be replicated where logits lie over ranks, got {_layout(x)}; redistribute it"
        )
    return x.to_local()


def _layout(x: Tensor) -> str:
    if not isinstance(x, DTensor):
        return f"a plain Tensor {checks.describe(x)}"
    return f"{checks.describe(x)} of {list(x.placements)} over a mesh of {tuple(x.device_mesh.shape)}"


def head_shards(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, group: Group | None, sizes: object
) -> tuple[Tensor, Tensor, Tensor | None, dist.ProcessGroup | None, tuple[int, ...] | None]:
    """The fields of a LinearLogits whose weight, bias or hidden are DTensors, or that was given a group."""
    op = "LinearLogits"
    if is_sharded(weight, 0):
        if group is not None or sizes is not None:
            raise ValueError(f"{op}: group and sizes are those of weight, a DTensor: give neither")
        weight, known, sizes = take_shard(op, "weight", weight, 0)
        bias = None if bias is None else take_shard(op, "bias", bias, 0)[0]
        return replicated(op, "hidden", hidden), weight, bias, known, sizes
    if group is None:
        if sizes is not None:
            raise ValueError(f"{op}: sizes needs group, whose ranks have so many tokens")
        return hidden, weight, bias, None, None
    for name, x in (("weight", weight), ("bias", bias)):
        if isinstance(x, DTensor):
            raise TypeError(f"{op}: {name} must be this rank's tensor where group is given, got {_layout(x)}")
    known = groups.process_group(op, group)
    return (
        replicated(op, "hidden", hidden),
        weight,
        bias,
        known,
        known_sizes(op, sizes, weight.shape[0], known),
    )
