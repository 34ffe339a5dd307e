"""What each rank's tokens say of a row, and how that merges into what the whole vocabulary says."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlcore.distributed import groups
from dlcore.distributed.heads import ShardedHead
from dlcore.reference import categorical as reference
from dlcore.reference import rng
from dlcore.reference.categorical import GROUP
from dlcore.reference.rng import Domain

Part = tuple[int, int]

#: An id that no vocabulary has.
_ELSEWHERE = 2**62


def parts(first: int, count: int, vocab: int) -> list[Part]:
    """Tokens [first, first + count) cut where a group of 256 begins that goes on, or came, elsewhere."""
    last = first + count
    up = -(-first // GROUP) * GROUP
    down = last if last == vocab else last // GROUP * GROUP
    edges = (first, up, down, last) if up <= down else (first, last)
    return [(a, b) for a, b in pairwise(edges) if a < b]


class Layout(NamedTuple):
    """Where the parts of all ranks stand, rank by rank, in as many places each; the same everywhere."""

    own: list[Part]
    places: int
    #: Of parts of groups that are cut: their place, and which of `groups` each is of.
    cut: list[int]
    member: list[int]
    groups: list[int]


def layout(sizes: tuple[int, ...], rank: int, *, by_group: bool) -> Layout:
    """The parts of every rank; one each where no draw asks for groups."""
    firsts = [sum(sizes[:r]) for r in range(len(sizes))]
    vocab = sum(sizes)
    if by_group:
        split = [parts(first, n, vocab) for first, n in zip(firsts, sizes, strict=True)]
    else:
        split = [[(first, first + n)] if n else [] for first, n in zip(firsts, sizes, strict=True)]
    places = max(len(p) for p in split)
    made = Layout(split[rank], places, [], [], [])
    for r, found in enumerate(split if by_group else []):
        for place, (start, stop) in enumerate(found):
            if start % GROUP == 0 and (stop % GROUP == 0 or stop == vocab):
                continue
            if not made.groups or made.groups[-1] != start // GROUP:
                made.groups.append(start // GROUP)
            made.cut.append(r * places + place)
            made.member.append(len(made.groups) - 1)
    return made


@dataclass(frozen=True)
class Row:
    """What a call asks of each row, as ops take it."""

    index: Tensor | None
    shift: Tensor | None
    temperature: Tensor | None
    softcap: float | None
    exclude: int | None


class Merged(NamedTuple):
    """What all parts say of each row (...), float64; draw and its logit only where a key was given."""

    argmax: Tensor
    largest: Tensor
    second: Tensor
    #: Σ exp(x - largest), Σ exp(x - largest)·(x - largest).
    sum: Tensor
    weighted: Tensor
    at_index: Tensor
    at_target: Tensor
    draw: Tensor
    draw_logit: Tensor
    invalid: Tensor

    @property
    def logsumexp(self) -> Tensor:
        return self.largest + self.sum.log()


def merged(
    h: ShardedHead,
    row: Row,
    *,
    target: Tensor | None = None,
    skip: Tensor | None = None,
    key: Tensor | None = None,
) -> Merged:
    """This rank's parts summarised, everybody's gathered and merged."""
    plan = layout(h.sizes, dist.get_rank(h.group), by_group=key is not None)
    own = [nothing(h.lead, h.logits.device)] * (plan.places - len(plan.own))
    for start, stop in reversed(plan.own):
        # Without a draw ids count from this part on, which need not begin where a group does.
        base = 0 if key is not None else start
        # One before this part is elsewhere too, and not negative, which would say not to read the row.
        index, at_target = (
            None if ids is None else torch.where(ids < base, _ELSEWHERE, ids - base)
            for ids in (row.index, target)
        )
        exclude = None if row.exclude is None or row.exclude < base else row.exclude - base
        ids, numbers = torch.ops.dlcore.categorical_summary(
            *(*h.part(start, stop), start - base, index, row.shift, at_target),
            *(row.temperature, row.softcap, exclude, skip, key),
        )
        ids = torch.where(ids < 0, ids, ids + base)
        own.insert(0, torch.cat([numbers, ids.double()]))
    return merge(torch.stack(own), plan, key, h.group)


def merge(own: Tensor, plan: Layout, key: Tensor | None, group: dist.ProcessGroup) -> Merged:
    """What all ranks' parts say; `own` are this rank's, (places, 10, ...): numbers, then tokens."""
    everybody = groups.gather(own, group).flatten(0, 1).movedim(0, -1)
    return _merge(*everybody.unbind(0), plan=plan, key=key)


def nothing(lead: torch.Size, device: torch.device) -> Tensor:
    """The numbers and tokens of no token at all."""
    none, nowhere = -torch.inf, torch.nan
    numbers = [none, none, 0, 0, none, none, nowhere, nowhere, -1, -1]
    column = torch.tensor(numbers, dtype=torch.float64, device=device)
    return column.view(-1, *[1] * len(lead)).expand(-1, *lead)


def _merge(
    top: Tensor,
    second: Tensor,
    total: Tensor,
    weighted: Tensor,
    score: Tensor,
    draw_logit: Tensor,
    at_index: Tensor,
    at_target: Tensor,
    argmax: Tensor,
    draw: Tensor,
    *,
    plan: Layout,
    key: Tensor | None,
) -> Merged:
    """Parts stand in the last dimension, in the order of their tokens."""
    largest = top.amax(-1)
    best = reference.first_largest(top)
    others = torch.where(torch.arange(top.shape[-1], device=top.device) == best.unsqueeze(-1), second, top)
    # What is empty, or of no weight, has sums of 0, and NaN stays NaN.
    drop = torch.where(top > -torch.inf, top - largest.unsqueeze(-1), 0)
    mass = drop.exp() * total
    whole = mass.sum(-1)
    place = best
    if key is not None:
        draw_logit = draw_logit.masked_fill(draw < 0, -torch.inf)
        place = _drawn_from(top, total, score, draw_logit, draw.long(), plan, key)
    return Merged(
        argmax=reference.gather(argmax, best).long(),
        largest=largest,
        second=others.amax(-1),
        sum=whole,
        weighted=(drop.exp() * weighted + mass * drop).sum(-1),
        at_index=_found(at_index),
        at_target=_found(at_target),
        draw=reference.gather(draw, place).long(),
        draw_logit=reference.gather(draw_logit, place),
        invalid=torch.isnan(whole) | torch.isneginf(largest),
    )


def _found(x: Tensor) -> Tensor:
    """The one entry that is not NaN."""
    return x.masked_fill(torch.isnan(x), -torch.inf).amax(-1)


def _drawn_from(
    top: Tensor, total: Tensor, score: Tensor, logit: Tensor, draw: Tensor, plan: Layout, key: Tensor
) -> Tensor:
    """The part (...) that holds the draw: groups that are cut are put together, then all groups compete."""
    score = score.masked_fill(torch.isnan(score), -torch.inf)
    if not plan.cut:
        return score.argmax(-1)
    device, lead = top.device, top.shape[:-1]
    cut, member = (torch.tensor(x, device=device) for x in (plan.cut, plan.member))
    ids = torch.tensor(plan.groups, device=device).expand(*lead, -1)
    keys, spread = rng.row_keys(key, lead), member.expand(*lead, -1)
    lse = top[..., cut] + total[..., cut].log()
    lse = lse.masked_fill(torch.isnan(lse), -torch.inf)
    peak = torch.full_like(ids, -torch.inf, dtype=lse.dtype).scatter_reduce(-1, spread, lse, "amax")
    inside = torch.exp(lse - peak.masked_fill(torch.isneginf(peak), 0)[..., member])
    together = peak + torch.zeros_like(peak).scatter_add(-1, spread, inside).log()
    rivals = torch.cat(
        [score.index_fill(-1, cut, -torch.inf), together + rng.gumbel_noise(keys, Domain.GROUP, ids)], -1
    )
    winner = rivals.argmax(-1, keepdim=True)
    tokens = draw[..., cut]
    inner = logit[..., cut] + rng.gumbel_noise(keys, Domain.TOKEN, tokens.clamp(min=0))
    here = member == winner - top.shape[-1]
    token_of = cut[inner.masked_fill(~here, -torch.inf).argmax(-1)]
    return torch.where(here.any(-1), token_of, winner.squeeze(-1))
