"""A head whose vocabulary lies over ranks, and the checks that its calls share."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
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


def shared_key(op: str, key: Tensor | None, generator: torch.Generator | None, h: ShardedHead) -> Tensor:
    """The key as given, or a fresh one: rank 0's, which the others are told."""
    with groups.agreement(op, h.group, key="fresh" if key is None else "given"):
        own = checks.key(op, key, generator, h.lead, h.logits.device)
    return own if key is not None else groups.gather(own, h.group)[0]


def refused(op: str, error: Exception, arguments: Iterable[object]) -> None:
    """Under DLCORE_CHECK=1: tell the ranks over which the first of such arguments lies."""
    for x in arguments:
        group = getattr(x, "group", None)
        if isinstance(x, DTensor) and is_sharded(x, -1) and x.device_mesh.ndim == 1:
            group = x.device_mesh.get_group()
        if isinstance(group, dist.ProcessGroup):
            return groups.tell(op, group, error)


def agree(
    h: ShardedHead,
    asked: dict[str, Any],
    *others: ShardedHead,
    index: str = "index",
    greedy: bool = False,
    refuses: str | None = None,
) -> None:
    """The checks of a call that read values; under DLCORE_CHECK=1 also that all ranks ask for the same.

    `others` are the call's other heads, `index` is what its user knows the tokens at "index" as, `refuses`
    why there is no such call.
    """
    facts = {"rows": tuple(h.lead), "dtype": h.logits.dtype, "sizes": h.sizes, **asked}
    gradient = torch.is_grad_enabled()
    for i, each in enumerate((h, *others)):
        if each.weight is not None:
            # All ranks share hidden, and sum its gradient.
            which = f"_{i}" if i else ""
            facts[f"hidden{which}"] = each.logits
            facts[f"hidden{which}_requires_grad"] = gradient and each.logits.requires_grad
    with groups.agreement(h.op, h.group, **facts):
        if refuses is not None:
            raise NotImplementedError(refuses)
        rank = dist.get_rank(h.group)
        for each in (h, *others):
            if each.sizes[rank] != each.held:
                raise ValueError(
                    f"{h.op}: sizes[{rank}] must be the {each.held} tokens of rank {rank}, got {each.sizes}"
                )
        for what, name, low in (("index", index, 0), ("target", "target", -1)):
            ids = asked.get(what)
            if isinstance(ids, Tensor):
                checks.token_range(h.op, name, ids, h.vocab, low=low)
        for name, (least, most) in RANGES.items():
            checks.value_range(h.op, name, asked.get(name), least, most)
        temperature = asked.get("temperature")
        if isinstance(temperature, Tensor):
            check_temperature(h.op, temperature, greedy=greedy)
