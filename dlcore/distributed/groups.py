"""What ranks tell one another: small collectives of torch.distributed, and checks that they ask for the same.

Under DLCORE_CHECK=1 every sharded call first compares, through the job's own store, what its ranks were
asked; a rank that asks for something else, fails its own checks or does not come within CHECK_SECONDS is
named in an error on every rank that did come, where a collective would hang.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dlcore import _checks as checks

Group = dist.ProcessGroup | DeviceMesh

#: How long a rank waits for the others' answers under DLCORE_CHECK=1.
CHECK_SECONDS = 30.0

_calls: dict[str, int] = {}


def process_group(op: str, group: object) -> dist.ProcessGroup:
    """A ProcessGroup, or that of a DeviceMesh of one dimension."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"{op}: group must be a mesh of one dimension, got one of {group.ndim}")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a ProcessGroup or a DeviceMesh, got {checks.describe(group)}")
    return group


def gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's x, all of one shape, as (ranks, *x.shape). No gradient."""
    parts = funcol.all_gather_tensor(x.detach().contiguous().unsqueeze(0), 0, group)
    return _wait(parts)


def total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Σ over the ranks of x. No gradient."""
    return _wait(funcol.all_reduce(x.detach().contiguous(), "sum", group))


def own_total(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's row of Σ over the ranks of x (ranks, ...). No gradient."""
    parts = list(x.detach().unbind(0))
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, parts, group=group)
    return own


def _wait(x: Tensor) -> Tensor:
    return x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x


@contextmanager
def agreement(op: str, group: dist.ProcessGroup, **facts: object) -> Iterator[None]:
    """Around a call's own checks: under DLCORE_CHECK=1 all ranks pass theirs and give equal facts, or all raise.

    Facts are what must be equal everywhere: plain values, and tensors, which are compared by their contents.
    """
    if os.environ.get("DLCORE_CHECK") != "1" or torch.compiler.is_compiling():
        yield
        return
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        _compare(op, group, {"failed": f"{type(error).__name__}: {error}"}, own=error)
        raise
    _compare(op, group, {name: _fact(value) for name, value in facts.items()}, own=None)


def _fact(value: object) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), str(value.device.type), _digest(value)]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _digest(x: Tensor) -> str:
    import hashlib

    data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _compare(op: str, group: dist.ProcessGroup, facts: dict[str, Any], own: Exception | None) -> None:
    """Raises ValueError where the ranks' facts differ."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    call = _calls[group.group_name] = _calls.get(group.group_name, -1) + 1
    store = dist.distributed_c10d._get_default_store()
    place = [f"dlcore/{group.group_name}/{call}/{r}" for r in range(size)]
    store.set(place[rank], json.dumps({"op": op, **facts}))
    if own is not None:
        return
    given = []
    for r in range(size):
        try:
            store.wait([place[r]], timedelta(seconds=CHECK_SECONDS))
        except RuntimeError as error:
            raise ValueError(
                f"{op}: rank {r} did not come within {CHECK_SECONDS:g} s: a group's ranks must all make the "
                "same calls"
            ) from error
        given.append(json.loads(store.get(place[r])))
    for r, other in enumerate(given):
        if "failed" in other:
            raise ValueError(f"{op}: rank {r} was refused, {other['failed']}")
        for name in {**given[rank], **other}:
            mine, theirs = given[rank].get(name), other.get(name)
            if mine != theirs:
                raise ValueError(
                    f"{op}: {name} must be the same on all ranks, got {mine} on rank {rank} and {theirs} on {r}"
                )
