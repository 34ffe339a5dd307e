"""What ranks tell one another: small collectives of torch.distributed, and checks that they ask for the same.

Under DLCORE_CHECK=1 every sharded call first compares, through the job's own store, what its ranks were
asked; a rank that asks for something else, fails its own checks or does not come within CHECK_SECONDS is
named in an error on every rank that did come, where a collective would hang. Ranks that missed a call which
the others gave up are back in step with the next one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the ops
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dlcore import _checks as checks

Group = dist.ProcessGroup | DeviceMesh

#: How long a rank waits for the others' answers under DLCORE_CHECK=1.
CHECK_SECONDS = 30.0

# As ops: they trace, and what they return is a plain tensor.
_collectives = torch.ops._c10d_functional

#: What a call's own checks raise.
REFUSALS = (TypeError, ValueError, NotImplementedError)
#: On an error: that the other ranks know of it.
_TOLD = "told_to_all_ranks"

#: The calls that were compared so far, of each group.
_calls: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()
#: Which group of its name on its store each is: one may have been destroyed, and left its keys.
_lives: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


def process_group(op: str, group: object) -> dist.ProcessGroup:
    """A ProcessGroup, or that of a DeviceMesh of one dimension."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{op}: group must be a mesh of one dimension, got one of {group.ndim}")
        if group.get_coordinate() is None:
            raise ValueError(f"{op}: group must have this process among its ranks")
        group = group.get_group()
    if isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: group must have this process among its ranks")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a ProcessGroup or a DeviceMesh, got {checks.describe(group)}")
    return group


def checking() -> bool:
    """Whether ranks compare what they are asked."""
    return os.environ.get("DLCORE_CHECK") == "1" and not torch.compiler.is_compiling()


def device(group: dist.ProcessGroup) -> torch.device:
    """Where the group's collectives take tensors; the CPU if there too."""
    kinds = {kind.type for kind in group._device_types}
    return torch.device("cpu" if "cpu" in kinds or not kinds else kinds.pop())


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x, all of one shape, as (ranks, *x.shape). No gradient."""
    ranks = dist.get_world_size(group)
    parts = _collectives.all_gather_into_tensor(x.detach().contiguous().unsqueeze(0), ranks, group.group_name)
    done: Tensor = _collectives.wait_tensor(parts)
    return done


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Σ over the ranks of x. No gradient."""
    done: Tensor = _collectives.wait_tensor(
        _collectives.all_reduce(x.detach().contiguous(), "sum", group.group_name)
    )
    return done


def own_total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's row of Σ over the ranks of x (ranks, ...). No gradient."""
    part: Tensor = _collectives.wait_tensor(
        _collectives.reduce_scatter_tensor(x.detach().contiguous(), "sum", len(x), group.group_name)
    )
    return part.squeeze(0)


@contextmanager
def agreement(op: str, group: dist.ProcessGroup, **facts: object) -> Iterator[None]:
    """Around a call's own checks: under DLCORE_CHECK=1 all ranks pass and give equal facts, or all raise.

    Facts are what must be equal everywhere: plain values, and tensors, which are compared by their contents.
    """
    if not checking():
        yield
        return
    try:
        yield
    except REFUSALS as error:
        tell(op, group, error)
        raise
    try:
        _compare(op, group, {name: _fact(value) for name, value in facts.items()})
    except ValueError as error:
        setattr(error, _TOLD, True)
        raise


def tell(op: str, group: dist.ProcessGroup, error: Exception) -> None:
    """Under DLCORE_CHECK=1: that this rank's call was refused, unless the others know already."""
    if checking() and not getattr(error, _TOLD, False):
        setattr(error, _TOLD, True)
        _exchange(op, group, {"op": op, "failed": f"{type(error).__name__}: {error}"}, wait=False)


def _fact(value: object) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), str(value.device.type), _digest(value)]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _digest(x: Tensor) -> str:
    data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _compare(op: str, group: dist.ProcessGroup, facts: dict[str, Any]) -> None:
    """Raises ValueError where the ranks' facts differ."""
    rank = dist.get_rank(group)
    given = _exchange(op, group, {"op": op, **facts}, wait=True)
    for r, other in enumerate(given):
        if "failed" in other:
            raise ValueError(f"{op}: rank {r} was refused, {other['failed']}")
    for r, other in enumerate(given):
        for name in {**given[rank], **other}:
            mine, theirs = given[rank].get(name), other.get(name)
            if mine != theirs:
                got = f"{mine} on rank {rank} and {theirs} on {r}"
                raise ValueError(f"{op}: {name} must be the same on all ranks, got {got}")


def _exchange(
    op: str, group: dist.ProcessGroup, facts: dict[str, Any], *, wait: bool
) -> list[dict[str, Any]]:
    """Every rank's facts of this call, or nothing for a rank that only says its own and does not wait.

    A call is made by all ranks or by none: whoever first finds that all have come, or that some have not in
    time, writes the verdict, and the others abide by it.
    """
    store = dist.distributed_c10d._get_default_store()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if group not in _lives:
        # So many ranks of each came before.
        _lives[group] = (store.add(f"dlcore/{group.group_name}/ranks of {size}", 1) - 1) // size
    call = _calls.get(group, -1) + 1
    while store.check([_place(group, call, "given up")]):
        call += 1
    _calls[group] = call
    places = [_place(group, call, str(r)) for r in range(size)]
    store.set(places[rank], json.dumps(facts))
    if not wait:
        return []
    try:
        store.wait(places, timedelta(seconds=CHECK_SECONDS))
        came = True
    except dist.DistNetworkError:
        raise
    except RuntimeError:  # each kind of store has its own
        came = False
    verdict = store.compare_set(_place(group, call, "verdict"), "", "made" if came else "given up")
    if verdict == b"made":
        # Whoever makes this call has read what the last one left.
        store.delete_key(_place(group, call - 1, str(rank)))
        if rank == 0:
            store.delete_key(_place(group, call - 1, "verdict"))
        return [json.loads(store.get(place)) for place in places]
    store.set(_place(group, call, "given up"), "1")
    missing = [str(r) for r, place in enumerate(places) if not store.check([place])]
    raise ValueError(
        f"{op}: {'rank ' + ', '.join(missing) if missing else 'a rank'} did not come within "
        f"{CHECK_SECONDS:g} s: a group's ranks must all make the same calls"
    )


def _place(group: dist.ProcessGroup, call: int, what: str) -> str:
    return f"dlcore/{group.group_name}/{_lives[group]}/{call}/{what}"
