"""dlcore.categorical over a vocabulary that lies over ranks: what each rank's tokens say of a row, merged.

A call sends one small message a rank and row, of numbers that `categorical.summary` gives; every rank merges
all of them alike. Noise belongs to token ids of the whole vocabulary, so the tokens are those of the unsharded
call, but where two scores differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlcore import _checks as checks
from dlcore._ops.categorical import GROUP, check_temperature
from dlcore._ops.declare import result_dtype
from dlcore.distributed import groups
from dlcore.distributed.logits import ShardedLogits, is_sharded, replicated, take_shard
from dlcore.linear_logits import LinearLogits
from dlcore.reference import categorical as reference
from dlcore.reference import rng
from dlcore.reference.rng import Domain

Part = tuple[int, int]


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
            f"{self.op}: takes no logits over ranks: its op reads whole rows. These do: dlcore.categorical, and "
            "processes made of it"
        )

    @property
    def lead(self) -> torch.Size:
        return self.logits.shape[:-1]

    @property
    def vocab(self) -> int:
        return sum(self.sizes)

    @property
    def held(self) -> int:
        """How many tokens this rank holds."""
        return self.logits.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def first(self) -> int:
        """The first of this rank's tokens."""
        return sum(self.sizes[: dist.get_rank(self.group)])

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The head of tokens [start, stop) of this rank's, by their ids in the whole vocabulary."""
        tokens = slice(start - self.first, stop - self.first)
        if self.weight is None:
            return self.logits[..., tokens], None, None
        return self.logits, self.weight[tokens], None if self.bias is None else self.bias[tokens]


def head(op: str, logits: object, name: str) -> ShardedHead | Tensor:
    """The head of logits over ranks; of a DTensor whose rows are whole itself: the ops have rules for it."""
    if isinstance(logits, LinearLogits):
        parts = (logits.hidden, logits.weight, logits.bias)
        group, sizes = logits.group, logits.sizes
    elif isinstance(logits, ShardedLogits):
        parts, group, sizes = (logits.logits, None, None), logits.group, logits.sizes
    else:
        assert isinstance(logits, Tensor)
        if logits.dim() < 1 or not is_sharded(logits, -1):
            return logits
        local, group, sizes = take_shard(op, name, logits, -1)
        parts = (local, None, None)
        if local.dtype not in checks.FLOATING:
            raise TypeError(f"{op}: {name} must be floating, got {local.dtype}")
    assert isinstance(group, dist.ProcessGroup)
    assert sizes is not None
    if sum(sizes) < 1:
        raise ValueError(f"{op}: {name} must have a vocabulary of at least 1, got sizes {sizes}")
    return ShardedHead(op, *parts, group, sizes)


def fresh_key(op: str, generator: torch.Generator | None, h: ShardedHead) -> Tensor:
    """A fresh key: rank 0's, which the others are told."""
    return groups.gather(checks.key(op, None, generator, h.lead, h.logits.device), h.group)[0]


def agree(h: ShardedHead, vocabulary: Tensor | None = None, *, greedy: bool = False, **asked: object) -> None:
    """The checks of a call that read values; under DLCORE_CHECK=1 also that all ranks ask for the same."""
    facts = {"rows": tuple(h.lead), "dtype": h.logits.dtype, "sizes": h.sizes, **asked}
    with groups.agreement(h.op, h.group, **facts):
        rank = dist.get_rank(h.group)
        if h.sizes[rank] != h.held:
            raise ValueError(f"{h.op}: sizes[{rank}] must be the {h.held} tokens of rank {rank}, got {h.sizes}")
        for name, low in (("index", 0), ("z", 0), ("target", -1)):
            ids = asked.get(name)
            if isinstance(ids, Tensor):
                checks.token_range(h.op, name, ids, h.vocab, low=low)
        temperature = asked.get("temperature")
        if isinstance(temperature, Tensor):
            check_temperature(h.op, temperature, greedy=greedy)


# What a part of the vocabulary says, and how parts merge.


def parts(first: int, count: int, vocab: int) -> list[Part]:
    """Tokens [first, first + count) cut where a group of 256 begins that goes on, or came, elsewhere."""
    last = first + count
    up = -(-first // GROUP) * GROUP
    down = last if last == vocab else last // GROUP * GROUP
    edges = (first, up, down, last) if up <= down else (first, last)
    return [(a, b) for a, b in zip(edges, edges[1:], strict=False) if a < b]


class Layout(NamedTuple):
    """Where the parts of all ranks stand, rank by rank, in as many places each; static, the same everywhere."""

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
    *,
    index: Tensor | None = None,
    shift: Tensor | None = None,
    target: Tensor | None = None,
    temperature: Tensor | None = None,
    softcap: float | None = None,
    exclude: int | None = None,
    skip: Tensor | None = None,
    key: Tensor | None = None,
) -> Merged:
    """This rank's parts summarised, everybody's gathered and merged."""
    plan = layout(h.sizes, dist.get_rank(h.group), by_group=key is not None)
    own = [_nothing(h)] * (plan.places - len(plan.own))
    for start, stop in reversed(plan.own):
        # Without a draw ids count from this part on, which need not begin where a group does.
        base = 0 if key is not None else start
        move = [None if ids is None else ids - base for ids in (index, target, exclude)]
        ids, numbers = torch.ops.dlcore.categorical_summary(
            *h.part(start, stop),
            *(start - base, move[0], shift, move[1], temperature, softcap),
            *(move[2] if move[2] is None or move[2] >= 0 else None, skip, key),
        )
        ids = torch.where(ids < 0, ids, ids + base)
        own.insert(0, torch.cat([numbers, ids.double()]))
    everybody = groups.gather(torch.stack(own), h.group).flatten(0, 1).movedim(0, -1)
    return _merge(*everybody.unbind(0), plan=plan, key=key)


def _nothing(h: ShardedHead) -> Tensor:
    """The numbers and tokens of no token at all."""
    none, nowhere = -torch.inf, torch.nan
    numbers = [none, none, 0, 0, none, none, nowhere, nowhere, -1, -1]
    column = torch.tensor(numbers, dtype=torch.float64, device=h.logits.device)
    return column.view(-1, *[1] * len(h.lead)).expand(-1, *h.lead)


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
    rivals = torch.cat([score.index_fill(-1, cut, -torch.inf), together + rng.gumbel_noise(keys, Domain.GROUP, ids)], -1)
    winner = rivals.argmax(-1, keepdim=True)
    tokens = draw[..., cut]
    inner = logit[..., cut] + rng.gumbel_noise(keys, Domain.TOKEN, tokens.clamp(min=0))
    here = member == winner - top.shape[-1]
    token_of = cut[inner.masked_fill(~here, -torch.inf).argmax(-1)]
    return torch.where(here.any(-1), token_of, winner.squeeze(-1))


# What stands for each op where the vocabulary lies over ranks: its arguments, a ShardedHead for the head.


def _numbers(m: Merged, has_index: bool, dtype: torch.dtype) -> Tensor:
    """The six numbers of `stats`."""
    lse = m.logsumexp
    rest = m.second - lse
    margin = -torch.expm1(m.second - m.largest) / m.sum
    entropy = m.sum.log() - m.weighted / m.sum
    at = m.at_index - lse if has_index else torch.full_like(lse, torch.nan)
    numbers = torch.stack([lse, m.largest - lse, margin, entropy, at, rest])
    return numbers.masked_fill(m.invalid, torch.nan).to(dtype)


def stats(
    h: ShardedHead,
    index: Tensor | None,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """argmax (...) and its six numbers (6, ...)."""
    asked = {"index": index, "shift": shift, "temperature": temperature, "softcap": softcap, "exclude": exclude}
    agree(h, **asked)
    m = merged(h, **asked)  # type: ignore[arg-type]
    return m.argmax.masked_fill(m.invalid, -1), _numbers(m, index is not None, result_dtype(h.logits))


def sample(
    h: ShardedHead,
    index: Tensor | None,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    key: Tensor,
) -> tuple[Tensor, Tensor]:
    """tokens (2, ...): drawn, argmax; numbers (7, ...)."""
    asked = {"index": index, "shift": shift, "temperature": temperature, "softcap": softcap, "exclude": exclude}
    agree(h, greedy=True, **asked, top_k=top_k, top_p=top_p, min_p=min_p, key=key)
    m = merged(h, **asked, key=key)  # type: ignore[arg-type]
    tokens, logit = m.draw, m.draw_logit
    if temperature is not None:
        tokens = torch.where(temperature == 0, m.argmax, tokens)
        logit = torch.where(temperature == 0, m.largest, logit)
    dtype = result_dtype(h.logits)
    numbers = _numbers(m, index is not None, dtype)
    logprob = (logit - m.logsumexp).masked_fill(m.invalid, torch.nan).to(dtype)
    return (
        torch.stack([tokens, m.argmax]).masked_fill(m.invalid, -1),
        torch.cat([numbers, logprob.unsqueeze(0)]),
    )
