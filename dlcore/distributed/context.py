"""Attention to keys that other ranks hold: gathered, or passed around a ring.

Every row sees an interval of the sequence's clean keys, which all ranks hold together, and one of the noisy
keys beside it. Gathered, that is one call of the op, over [the sequence; this rank's noisy keys]. In a ring
each rank's shard comes by in turn, while the next one is under way; in a shard, two chunks of the sequence, a
row sees at most two intervals, and what it gets from each shard is merged by lse.

Backward each shard's part is exact by itself where out and lse are those over all keys, as for the tiles of
one pass: with p = exp(score - lse), ∂v = Σ p·∂out and ∂score = p·(∂out·v - ∂out·out + ∂lse).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlcore import _dispatch
from dlcore._ops.declare import as_asked
from dlcore.attention import _pair
from dlcore.distributed import groups
from dlcore.distributed.sequence import SequenceShards, in_order, padded
from dlcore.reference import attention as reference

#: Tags of what goes around.
_KEYS, _GRADIENTS = 0, 1


@dataclass(frozen=True)
class Plan:
    """What each of this rank's rows sees, and how it gets there.

    `prefix`: from and up to which position of the sequence, `block`: from and up to which noisy key of this
    rank, (rows,) int64 each.
    """

    op: str
    group: dist.ProcessGroup
    shards: SequenceShards
    prefix: tuple[Tensor, Tensor]
    block: tuple[Tensor, Tensor]
    gathers: bool
    scale: float
    softcap: float

    def of_sequence(self) -> tuple[Tensor, Tensor]:
        """Starts and stops among [the sequence's keys; noisy keys]."""
        first, last = self.block
        return _pair(self.prefix, (first + self.shards.length, last + self.shards.length))

    def of_shard(self, rank: int) -> tuple[Tensor, Tensor]:
        """Starts and stops among the keys of a rank."""
        (first, middle), (begin, end) = self.shards.chunks(rank)
        start, stop = self.prefix
        early = (start.clamp(first, middle) - first, stop.clamp(first, middle) - first)
        shift = middle - first - begin
        return _pair(early, (start.clamp(begin, end) + shift, stop.clamp(begin, end) + shift))

    def of_noisy(self) -> tuple[Tensor, Tensor]:
        """Starts and stops among the noisy keys."""
        nothing = torch.zeros_like(self.block[0])
        return _pair(self.block, (nothing, nothing))


@torch.compiler.disable
def attend(
    q: Tensor, clean: tuple[Tensor, Tensor], noisy: tuple[Tensor, Tensor], plan: Plan
) -> tuple[Tensor, Tensor]:
    """out (B, S, Hq, Dv) and lse (B, Hq, S) of this rank's rows, over all ranks' (keys, values)."""
    result: tuple[Tensor, Tensor] = _Attend.apply(q, *clean, *noisy, plan)
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, clean_k: Tensor, clean_v: Tensor, noisy_k: Tensor, noisy_v: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor]:
        way = _gathered if plan.gathers else _around
        out, lse = way(q, _packed(clean_k, clean_v), _packed(noisy_k, noisy_v), plan)
        ctx.save_for_backward(out, lse, q, clean_k, clean_v, noisy_k, noisy_v)
        ctx.plan, ctx.backend = plan, _dispatch.asked_for()
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out, lse, q, clean_k, clean_v, noisy_k, noisy_v = ctx.saved_tensors
        plan = ctx.plan
        with groups.agreement(f"{plan.op} backward", plan.group):
            pass

        def part(keys: Tensor, bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            """Gradients of q and of packed keys and values, wide."""
            grad_q, *others = torch.ops.dlcore.attention_intervals_backward(
                *grads, out, lse, q, *_unpacked(keys, q), *bounds, plan.scale, plan.softcap
            )
            return grad_q.to(lse.dtype), _packed(*others).to(lse.dtype)

        way = _gathered_backward if plan.gathers else _around_backward
        with as_asked(ctx.backend):
            grad_q, *pairs = way(part, _packed(clean_k, clean_v), _packed(noisy_k, noisy_v), plan)
        others = [x for packed in pairs for x in _unpacked(packed, q)]
        return (*(x.to(q.dtype) for x in (grad_q, *others)), None)


def _packed(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one tensor (B, T, Hkv, D + Dv), so that they travel at once."""
    return torch.cat([k, v], -1)


def _unpacked(packed: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    return packed[..., : q.shape[3]], packed[..., q.shape[3] :]


def _intervals(q: Tensor, keys: Tensor, bounds: tuple[Tensor, Tensor], plan: Plan) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.dlcore.attention_intervals(
        q, *_unpacked(keys, q), *bounds, None, plan.scale, plan.softcap
    )
    return found


#: (packed keys and values, starts and stops) to the gradients of q and of the packed, wide.
_Part = Callable[[Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]


# --- gathered ----------------------------------------------------------------------------------------------


def _sequence(clean: Tensor, noisy: Tensor, plan: Plan) -> Tensor:
    """[all ranks' clean keys in the sequence's order; this rank's noisy keys]."""
    shards = groups.gather(padded(clean, plan.shards.largest, 1), plan.group)
    return torch.cat([*in_order(shards, plan.shards, 1), noisy], 1)


def _gathered(q: Tensor, clean: Tensor, noisy: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    return _intervals(q, _sequence(clean, noisy, plan), plan.of_sequence(), plan)


def _gathered_backward(
    part: _Part, clean: Tensor, noisy: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad = part(_sequence(clean, noisy, plan), plan.of_sequence())
    shards = plan.shards
    of_ranks = [
        padded(torch.cat([grad[:, first:last] for first, last in shards.chunks(rank)], 1), shards.largest, 1)
        for rank in range(shards.ranks)
    ]
    grad_clean = groups.own_total(torch.stack(of_ranks), plan.group)
    return grad_q, grad_clean[:, : clean.shape[1]], grad[:, shards.length :]


# --- around the ring ---------------------------------------------------------------------------------------


class _Passing:
    """A shard of rank `owner` under way to the next rank, and the shard that comes from the one before."""

    def __init__(self, shard: Tensor, owner: int, plan: Plan, tag: int) -> None:
        ranks, rank = plan.shards.ranks, dist.get_rank(plan.group)
        self._sent, self._works = shard, []
        if ranks == 1:
            self._received = shard
            return
        rows = plan.shards.size((owner - 1) % ranks)
        self._received = shard.new_empty((shard.shape[0], rows, *shard.shape[2:]))
        moves = ((dist.isend, shard, rank + 1), (dist.irecv, self._received, rank - 1))
        self._works = dist.batch_isend_irecv(
            [dist.P2POp(f, x, group=plan.group, tag=tag, group_peer=peer % ranks) for f, x, peer in moves]
        )

    def arrived(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._received


def _visits(clean: Tensor, plan: Plan) -> Iterator[tuple[int, Tensor]]:
    """Every rank's shard, this rank's first, as (rank, shard); the next one is under way meanwhile."""
    ranks, owner, shard = plan.shards.ranks, dist.get_rank(plan.group), clean
    for _ in range(ranks - 1):
        passing = _Passing(shard, owner, plan, _KEYS)
        yield owner, shard
        owner, shard = (owner - 1) % ranks, passing.arrived()
    yield owner, shard


def _around(q: Tensor, clean: Tensor, noisy: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    out, lse = _intervals(q, noisy, plan.of_noisy(), plan)
    out = out.to(lse.dtype)
    for owner, shard in _visits(clean, plan):
        out, lse = reference.merge(out, lse, *_intervals(q, shard, plan.of_shard(owner), plan))
    return out.to(q.dtype), lse


def _around_backward(part: _Part, clean: Tensor, noisy: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of a shard goes around behind it, every rank adds its part; the last step is home."""
    grad_q, grad_noisy = part(noisy, plan.of_noisy())
    passing = None
    for owner, shard in _visits(clean, plan):
        more, grad = part(shard, plan.of_shard(owner))
        grad_q += more
        if passing is not None:
            grad += passing.arrived()
        passing = _Passing(grad, owner, plan, _GRADIENTS)
    assert passing is not None
    return grad_q, passing.arrived(), grad_noisy
