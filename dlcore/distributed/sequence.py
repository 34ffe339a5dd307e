"""A sequence cut over ranks so that block-causal attention is the same work for each.

What a row of block-causal attention costs grows with its position. So a sequence is cut at block boundaries
into twice as many chunks as there are ranks, and rank r holds the r-th from the front and the r-th from the
back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dlcore import _checks as checks
from dlcore.distributed import groups


@dataclass(frozen=True)
class SequenceShards:
    """Which of `length` positions each of `ranks` ranks holds.

    The sequence is cut between blocks of `block_size` into 2·ranks chunks, as equal as whole blocks allow;
    the last block may be short, a chunk empty. Rank r holds chunks r and 2·ranks - 1 - r, in this order. Of
    the (row, key) pairs of block-causal attention no rank has more than its share by over block_size·length,
    or, from 8·ranks blocks on, by over an eighth. Raises TypeError for what is no int, ValueError for a
    length below 0, a block_size or ranks below 1.

    Example:
        >>> from dlcore.distributed.attention import SequenceShards
        >>> shards = SequenceShards(22, block_size=4, ranks=2)
        >>> shards.chunks(0), shards.chunks(1)
        (((0, 4), (16, 22)), ((4, 8), (8, 16)))
        >>> shards.positions(0).tolist()
        [0, 1, 2, 3, 16, 17, 18, 19, 20, 21]
    """

    length: int
    block_size: int
    ranks: int

    def __post_init__(self) -> None:
        op = "SequenceShards"
        for name, least in (("length", 0), ("block_size", 1), ("ranks", 1)):
            value = getattr(self, name)
            checks.integer(op, name, value)
            if value < least:
                raise ValueError(f"{op}: {name} must be at least {least}, got {value}")

    def chunk(self, index: int) -> tuple[int, int]:
        """The first position of a chunk, and the one past its last."""
        return self._cut(index), self._cut(index + 1)

    def _cut(self, index: int) -> int:
        """Blocks over go to all late chunks at once, else to the first, which see the least."""
        each, over = divmod(-(-self.length // self.block_size), 2 * self.ranks)
        late = max(index - self.ranks, 0) if over >= self.ranks else 0
        blocks = index * each + min(index, over % self.ranks) + late
        return min(blocks * self.block_size, self.length)

    def chunks(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The two chunks of a rank."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"SequenceShards: rank must lie in [0, {self.ranks}), got {rank}")
        return self.chunk(rank), self.chunk(2 * self.ranks - 1 - rank)

    def size(self, rank: int) -> int:
        """How many positions a rank holds."""
        return sum(last - first for first, last in self.chunks(rank))

    @property
    def largest(self) -> int:
        """The most positions that a rank holds."""
        return max(self.size(rank) for rank in range(self.ranks))

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """The positions of a rank's rows, ascending, (size,) int64; what RoPE needs to know."""
        return torch.cat([torch.arange(*chunk, device=device) for chunk in self.chunks(rank)])


def shard_sequence(x: Tensor, dim: int, group: groups.Group, block_size: int) -> Tensor:
    """This rank's part of x along `dim`, by SequenceShards. Nothing is exchanged; differentiable.

    A training pass [x_t; x_0] is cut half by half: torch.cat of the parts of x_t and of x_0.
    """
    op = "shard_sequence"
    made = groups.process_group(op, group)
    dim = _dimension(op, x, dim)
    shards = SequenceShards(x.shape[dim], block_size, dist.get_world_size(made))
    chunks = shards.chunks(dist.get_rank(made))
    return torch.cat([x.narrow(dim, first, last - first) for first, last in chunks], dim)


def unshard_sequence(x: Tensor, dim: int, group: groups.Group, block_size: int, length: int) -> Tensor:
    """A sequence of `length` along `dim`, whole on every rank, of shard_sequence's parts. No gradient."""
    op = "unshard_sequence"
    made = groups.process_group(op, group)
    rest = checks.describe(x)
    if isinstance(x, Tensor) and isinstance(dim, int) and -x.dim() <= dim < x.dim():
        shape = list(x.shape)
        del shape[dim]
        rest = f"{x.dtype} {shape} beside dim"
    with groups.agreement(op, made, dim=dim, block_size=block_size, length=length, x=rest):
        dim = _dimension(op, x, dim)
        checks.no_gradient(op, "x", x)
        shards = SequenceShards(length, block_size, dist.get_world_size(made))
        size = shards.size(dist.get_rank(made))
        if x.shape[dim] != size:
            raise ValueError(f"{op}: x must have {size} rows of {length} on this rank, got {x.shape[dim]}")
    parts = groups.gather(padded(x, shards.largest, dim), made)
    return torch.cat(in_order(parts, shards, dim), dim)


def padded(x: Tensor, rows: int, dim: int) -> Tensor:
    """x with zeros behind it, up to `rows` along `dim`."""
    missing = list(x.shape)
    missing[dim] = rows - missing[dim]
    return torch.cat([x, x.new_zeros(missing)], dim)


def in_order(parts: Tensor, shards: SequenceShards, dim: int) -> list[Tensor]:
    """The chunks of the sequence, from every rank's padded rows (ranks, *x.shape); `dim` is x's."""
    chunks = []
    for index in range(2 * shards.ranks):
        rank = min(index, 2 * shards.ranks - 1 - index)
        first, last = shards.chunk(index)
        before = 0 if index == rank else shards.chunk(rank)[1] - shards.chunk(rank)[0]
        chunks.append(parts[rank].narrow(dim, before, last - first))
    return chunks


def _dimension(op: str, x: object, dim: int) -> int:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a Tensor, got {checks.describe(x)}")
    checks.integer(op, "dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim must be one of x's {x.dim()}, got {dim}")
    return dim % x.dim()
