"""A head whose vocabulary lies over ranks, and the checks that its calls share."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dlcore import _checks as checks
from dlcore._ops.categorical import check_temperature, vocab_size
from dlcore.distributed import groups
from dlcore.distributed.logits import ShardedLogits, is_sharded, take_shard
from dlcore.linear_logits import LinearLogits

#: What the values of arguments lie in.
RANGES = {
    "top_k": (1, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "coefficients": (-sys.float_info.max, sys.float_info.max),
}

Tensors = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class ShardedHead:
    """What `dlcore.categorical.head` makes of logits over ranks: this rank's tensors, the whole's shape."""

    op: str
    logits: Tensor
    weight: Tensor | None
    bias: Tensor | None
    group: dist.ProcessGroup
    sizes: tuple[int, ...]

    def __iter__(self) -> Iterator[Tensor | None]:
        """For ops that read whole rows: there is no such thing."""
        raise NotImplementedError(
            f"{self.op}: takes no logits over ranks, since its op reads whole rows; the functions of "
            "dlcore.categorical do, and the processes that are made of them"
        )

    @property
    def lead(self) -> torch.Size:
        return self.logits.shape[:-1]

    @property
    def vocab(self) -> int:
        return sum(self.sizes)

    @property
    def tensors(self) -> Tensors:
        """This rank's part as ops take it."""
        return self.logits, self.weight, self.bias

    @property
    def held(self) -> int:
        """How many tokens this rank holds."""
        return vocab_size(self.logits, self.weight)

    @property
    def first(self) -> int:
        """The first of this rank's tokens."""
        return sum(self.sizes[: dist.get_rank(self.group)])

    def part(self, start: int, stop: int) -> Tensors:
        """The head of tokens [start, stop) of this rank's, by their ids in the whole vocabulary."""
        tokens = slice(start - self.first, stop - self.first)
        if self.weight is None:
            return self.logits[..., tokens], None, None
        return self.logits, self.weight[tokens], None if self.bias is None else self.bias[tokens]


def head(op: str, logits: object, name: str) -> ShardedHead | None:
    """The head of logits whose vocabulary lies over ranks; of any others None."""
    if isinstance(logits, LinearLogits):
        parts: Tensors = (logits.hidden, logits.weight, logits.bias)
        group, sizes = logits.group, logits.sizes
    elif isinstance(logits, ShardedLogits):
        parts, group, sizes = (logits.logits, None, None), logits.group, logits.sizes
    else:
        if not isinstance(logits, DTensor) or not is_sharded(logits, -1):
            return None
        local, group, sizes = take_shard(op, name, logits, -1)
        parts = (local, None, None)
        if local.dtype not in checks.FLOATING:
            raise TypeError(f"{op}: {name} must be floating, got {local.dtype}")
    if group is None or sizes is None:
        return None
    if sum(sizes) < 1:
        raise ValueError(f"{op}: {name} must have a vocabulary of at least 1, got sizes {sizes}")
    return ShardedHead(op, *parts, groups.process_group(op, group), sizes)


def table(op: str, x: Tensor, h: ShardedHead) -> Tensor:
    """This rank's rows of a table (V, E) that lies over ranks as the vocabulary does."""
    if not isinstance(x, DTensor):
        return x
    local, _, sizes = take_shard(op, "table", x, 0)
    if sizes != h.sizes:
        raise ValueError(f"{op}: table must be sharded as logits are, by {h.sizes}, got {sizes}")
    return local


def fresh_key(op: str, generator: torch.Generator | None, h: ShardedHead) -> Tensor:
    """A fresh key: rank 0's, which the others are told."""
    return groups.gather(checks.key(op, None, generator, h.lead, h.logits.device), h.group)[0]


def agree(h: ShardedHead, asked: dict[str, Any], *, index: str = "index", greedy: bool = False) -> None:
    """The checks of a call that read values; under DLCORE_CHECK=1 also that all ranks ask for the same.

    `index` is what the call's user knows the tokens at "index" as.
    """
    facts = {"rows": tuple(h.lead), "dtype": h.logits.dtype, "sizes": h.sizes, **asked}
    with groups.agreement(h.op, h.group, **facts):
        rank, sizes = dist.get_rank(h.group), h.sizes
        if sizes[rank] != h.held:
            raise ValueError(f"{h.op}: sizes[{rank}] must be the {h.held} tokens of rank {rank}, got {sizes}")
        for what, name, low in (("index", index, 0), ("target", "target", -1)):
            ids = asked.get(what)
            if isinstance(ids, Tensor):
                checks.token_range(h.op, name, ids, h.vocab, low=low)
        for name, (least, most) in RANGES.items():
            checks.value_range(h.op, name, asked.get(name), least, most)
        temperature = asked.get("temperature")
        if isinstance(temperature, Tensor):
            check_temperature(h.op, temperature, greedy=greedy)
