"""A batch split over ranks: the keys with which each draws what one process would.

Nothing is exchanged. A draw is a function of its row's key, so a rank that holds some rows of a batch and
their keys draws those rows of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dlcore import _checks as checks
from dlcore import rng
from dlcore.distributed.groups import Group, process_group


def rows(batch: int, group: Group) -> slice:
    """This rank's rows of a batch: equal parts in the order of ranks, the last ones short or empty.

    The rule of `torch.chunk`, and so of a DTensor with Shard(0).

    Args:
        batch: rows in all, at least 0.
        group: a ProcessGroup or a DeviceMesh of one dimension.

    Raises:
        TypeError, ValueError: what is no such number or group.

    Example:
        >>> import torch
        >>> from dlcore import distributed
        >>> def part(x, group):
        ...     return x[distributed.rows(len(x), group)]
    """
    op = "distributed.rows"
    group = process_group(op, group)
    checks.integer(op, "batch", batch)
    if batch < 0:
        raise ValueError(f"{op}: batch must be at least 0, got {batch}")
    each = -(-batch // dist.get_world_size(group))
    start = min(each * dist.get_rank(group), batch)
    return slice(start, min(start + each, batch))


def row_keys(key: Tensor, lead: int | Sequence[int], part: slice | Group) -> Tensor:
    """The keys of some rows of a batch: `dlcore.rng.split(key, lead)[part]`, of which only these are made.

    A draw from these rows with these keys is, to the bit, that part of a draw from the whole batch with
    `dlcore.rng.split(key, lead)`, and for the functions of `dlcore.categorical`, `bits` and `sphere` also of
    one with `key` itself.

    Args:
        key: int64 (2,), the same on all ranks, or one per row of the whole batch (*lead, 2).
        lead: the leading shape of the whole batch: its rows, and what follows, say (B, L).
        part: a slice of the first dimension, or a group for this rank's `rows`.

    Returns:
        (rows, *lead[1:], 2).

    Raises:
        TypeError, ValueError: a key, lead or part that is no such thing; a slice with a step.

    Example:
        >>> import torch, dlcore
        >>> from dlcore import distributed
        >>> key, logits = dlcore.rng.key(7), torch.randn(4, 3, 1000)
        >>> here = slice(1, 3)  # or a group
        >>> keys = distributed.row_keys(key, (4, 3), here)
        >>> part = dlcore.categorical.sample(logits[here], key=keys)
        >>> torch.equal(part.tokens, dlcore.categorical.sample(logits, key=key).tokens[here])
        True
    """
    op = "distributed.row_keys"
    shape = torch.Size(rng.sizes(op, lead))
    if not shape:
        raise ValueError(f"{op}: lead must have a first dimension to split, got ()")
    key = checks.key(op, key, None, shape)
    if not isinstance(part, slice):
        part = rows(shape[0], part)
    if part.step not in (None, 1):
        raise ValueError(f"{op}: part must be a slice without a step, got {part}")
    if key.dim() > 1:
        return key[part]
    start, stop, _ = part.indices(shape[0])
    inner, stop = shape[1:].numel(), max(start, stop)
    ids = torch.arange(start * inner, stop * inner, device=key.device)
    return rng.fold_in(key, ids.view(stop - start, *shape[1:]))
