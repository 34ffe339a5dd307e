"""Truncated draws over a vocabulary that lies over ranks: top_k, top_p and min_p as the reference has them.

Tokens are ordered by descending logit, then ascending id. Every rank sends its first few of a row, so all
know how the vocabulary begins; where that tells the cut, as it mostly does, all draw alike from what is kept.
Where a row keeps more, a radix search over the logits' bits finds its cut: eight rounds of 16 bins, summed
over ranks, for each of top_k and top_p, whatever the row. Reads how many rows do, and the largest top_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dlcore.distributed import groups
from dlcore.distributed.heads import ShardedHead
from dlcore.distributed.summaries import Layout, Merged, Row, layout, merge, nothing
from dlcore.reference import categorical as reference
from dlcore.reference import rng
from dlcore.reference.categorical import GROUP
from dlcore.reference.rng import Domain

#: Candidates that a rank sends of a row, where top_k does not say how many; and at most.
CANDIDATES, MOST = 256, 1024
#: Entries of a tile of logits: 4 MiB of float32.
_TILE = 1 << 20
_SIGN, _LOW = 0x7FFFFFFF, 0xFFFFFFFF
_NO_CODE = -(2**63)


class Limits(NamedTuple):
    """What a draw keeps."""

    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None


@dataclass(frozen=True)
class Rows:
    """Rows (n,) of a call, and this rank's logits of them."""

    head: ShardedHead
    row: Row
    limits: Limits
    invalid: Tensor
    keys: Tensor
    #: Of all ranks' logits.
    logsumexp: Tensor
    plan: Layout

    def pick(self, which: Tensor) -> Rows:
        """Some of the rows."""
        row = self.row
        index, shift, temperature = (
            None if x is None else x[which] for x in (row.index, row.shift, row.temperature)
        )
        return Rows(
            replace(self.head, logits=self.head.logits[which]),
            Row(index, shift, temperature, row.softcap, row.exclude),
            Limits(*(None if x is None else x[which] for x in self.limits)),
            *(self.invalid[which], self.keys[which], self.logsumexp[which]),
            plan=self.plan,
        )

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """(first token, their transformed logits (n, w) float32) of this rank's tokens [start, stop)."""
        width = max(GROUP, _TILE // max(self.invalid.numel(), 1) // GROUP * GROUP)
        for first in range(start, stop, width):
            dense = reference.materialize(*self.head.part(first, min(first + width, stop)))
            x, _ = reference.part(dense, first, **vars(self.row))
            # 0 for -0, which is no less.
            yield first, x.masked_fill(self.invalid.unsqueeze(-1), 0) + 0.0

    def own(self) -> Iterator[tuple[int, Tensor]]:
        """Tiles of all this rank's tokens, cut as the draw's are: a product's rounding may hang on it."""
        for start, stop in self.plan.own:
            yield from self.tiles(start, stop)


def refuses(h: ShardedHead, limits: Limits) -> str | None:
    """Why these logits can't be truncated."""
    if h.logits.dtype != torch.float64 or all(limit is None for limit in limits):
        return None
    return f"{h.op}: top_k, top_p and min_p take no float64 logits over ranks, only narrower ones"


def limiting(limits: Limits) -> Limits:
    """The limits but a top_p that keeps all of every row."""
    top_p = limits.top_p
    return limits if top_p is None or not bool((top_p >= 1).all()) else limits._replace(top_p=None)


def draw(h: ShardedHead, row: Row, limits: Limits, m: Merged, key: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (...) and their logits, float64."""
    n = h.lead.numel()

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(h.lead).reshape(n)

    rows = Rows(
        replace(h, logits=h.logits.reshape(n, h.logits.shape[-1])),
        Row(flat(row.index), flat(row.shift), flat(row.temperature), row.softcap, row.exclude),
        Limits(*(flat(x) for x in limits)),
        m.invalid.reshape(n),
        rng.row_keys(key, h.lead).reshape(n, 2),
        m.logsumexp.reshape(n),
        layout(h.sizes, dist.get_rank(h.group), by_group=True),
    )
    tokens, logits, certain = _from_candidates(rows)
    more = ~certain & ~rows.invalid
    if limits.top_p is not None or limits.min_p is not None:
        # Where probabilities decide, rounding may on one rank alone.
        more = groups.total(more.int(), h.group) > 0
    wide = torch.nonzero(more).squeeze(-1)
    if wide.numel():
        found, their = _from_all(rows.pick(wide))
        tokens, logits = tokens.index_copy(0, wide, found), logits.index_copy(0, wide, their)
    return tokens.view(h.lead), logits.view(h.lead)


def _ordered(x: Tensor) -> Tensor:
    """Integers in [-2^31, 2^31) in the order of float32 numbers."""
    bits = x.view(torch.int32)
    return torch.where(bits < 0, bits ^ _SIGN, bits).long()


def _number(ordered: Tensor) -> Tensor:
    """The float32 numbers of such integers, in float64."""
    bits = ordered.to(torch.int32)
    return torch.where(bits < 0, bits ^ _SIGN, bits).view(torch.float32).double()


def _largest(rows: Rows, count: int) -> Tensor:
    """Codes (n, count) of this rank's first tokens: logit and id in one integer that has their order."""
    best = torch.full((rows.invalid.numel(), count), _NO_CODE, device=rows.invalid.device)
    for first, x in rows.own():
        ids = torch.arange(first, first + x.shape[-1], device=x.device)
        codes = _ordered(x) << 32 | (_LOW - ids)
        best = torch.cat([best, codes], -1).topk(count, -1).values
    return best


def _from_candidates(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and their logits (n,), and which rows keep nothing but candidates; others mean nothing."""
    h, (top_k, top_p, min_p) = rows.head, rows.limits
    count = CANDIDATES if top_k is None else min(int(top_k.max()) if top_k.numel() else 1, MOST)
    gathered = groups.gather(_largest(rows, min(count, max(h.sizes))), h.group)
    codes = gathered.movedim(0, -2).flatten(-2).sort(-1, descending=True).values
    x = _number(codes >> 32).masked_fill(codes == _NO_CODE, -torch.inf)
    # No rank holds back what comes before the last of any that has more.
    more = torch.tensor([n > gathered.shape[-1] for n in h.sizes], device=codes.device)
    last = gathered[..., -1].masked_fill(~more.unsqueeze(-1), _NO_CODE + 1).amax(0).unsqueeze(-1)
    known = (codes >= last).sum(-1)
    place = torch.arange(codes.shape[-1], device=codes.device)
    among = place < known.unsqueeze(-1)
    mass = (x - x[..., :1]).exp()
    upto = mass.cumsum(-1)
    whole = (rows.logsumexp - x[..., 0]).exp()
    kept = torch.full_like(known, h.vocab)
    certain = torch.ones_like(rows.invalid)
    if top_k is not None:
        kept = top_k.clamp(max=h.vocab)
        certain = kept <= known if top_p is not None else certain
        whole = reference.gather(upto, (kept - 1).clamp(max=place.numel() - 1))
    if top_p is not None:
        limit = top_p.double() * whole
        inside = (among & (upto - mass <= limit.unsqueeze(-1))).sum(-1)
        open_end = (inside == known) & (reference.gather(upto, known - 1) <= limit)
        kept = torch.minimum(kept, inside.masked_fill(open_end, h.vocab))
    if min_p is not None:
        inside = (among & (mass >= min_p.double().unsqueeze(-1))).sum(-1)
        kept = torch.minimum(kept, inside.masked_fill(inside == known, h.vocab))
    kept = kept.clamp(min=1)
    x = x.masked_fill(place >= kept.unsqueeze(-1), -torch.inf)
    chosen = _draw(x, _LOW - (codes & _LOW), rows.keys, h.vocab)
    tokens, logits = reference.gather(_LOW - (codes & _LOW), chosen), reference.gather(x, chosen)
    return tokens, logits, certain & (kept <= known)


def _draw(x: Tensor, tokens: Tensor, keys: Tensor, vocab: int) -> Tensor:
    """The column (n,) of the draw from softmax(x) over `tokens` (n, c), in any order."""
    x, tokens = x.double(), tokens.clamp(max=vocab - 1)
    count = -(-vocab // GROUP)
    group = tokens // GROUP
    none = torch.zeros(x.shape[0], count, dtype=x.dtype, device=x.device)
    peak = torch.full_like(none, -torch.inf).scatter_reduce(-1, group, x, "amax")
    drop = (x - peak.gather(-1, group)).masked_fill(torch.isneginf(x), -torch.inf)
    together = peak + none.scatter_add(-1, group, drop.exp()).log()
    ids = torch.arange(count, device=x.device).expand_as(together)
    best = (together + rng.gumbel_noise(keys, Domain.GROUP, ids)).argmax(-1, keepdim=True)
    inner = x + rng.gumbel_noise(keys, Domain.TOKEN, tokens)
    return inner.masked_fill(group != best, -torch.inf).argmax(-1)


class Cut(NamedTuple):
    """The last kept entry: all before it in order of logits are kept, and so many of those that equal it."""

    ordered: Tensor
    ties: Tensor
    #: Σ exp(x - largest) of what is kept.
    mass: Tensor


def _from_all(rows: Rows) -> tuple[Tensor, Tensor]:
    """Tokens and their logits (n,) of rows that keep more than was sent."""
    h, (top_k, top_p, min_p) = rows.head, rows.limits
    own = torch.full_like(rows.logsumexp, -torch.inf)
    for _, x in rows.own():
        own = torch.maximum(own, x.amax(-1).double())
    top = groups.gather(own, h.group).amax(0)
    every = torch.full_like(top, h.vocab, dtype=torch.int64)
    cut = Cut(torch.full_like(every, -(2**31)), every, (rows.logsumexp - top).exp())
    if top_k is not None:
        wanted = top_k.clamp(max=h.vocab)
        cut = _search(rows, top, lambda count, _: count >= wanted.unsqueeze(-1), lambda _: wanted)
    if top_p is not None:
        limit = top_p.double() * cut.mass
        inner = _search(
            *(rows, top, lambda _, mass: mass > limit.unsqueeze(-1)),
            lambda at: at.before + _times(limit - at.mass, at.each, h.vocab) + 1,
        )
        before = (inner.ordered > cut.ordered) | ((inner.ordered == cut.ordered) & (inner.ties < cut.ties))
        cut = Cut(*(torch.where(before, a, b) for a, b in zip(inner, cut, strict=True)))
    return _masked_draw(rows, top, cut, min_p)


def _times(x: Tensor, each: Tensor, most: int) -> Tensor:
    """How many times `each` goes into x, at most so many."""
    return torch.where(each > 0, x / each, most).clamp(0, most).long()


class At(NamedTuple):
    """Where a search has come to: number and mass of what is before, exp(x - largest) of what is there."""

    before: Tensor
    mass: Tensor
    each: Tensor


def _search(
    rows: Rows, top: Tensor, reached: Callable[[Tensor, Tensor], Tensor], keeps: Callable[[At], Tensor]
) -> Cut:
    """The cut at the first entry with which count and mass have `reached` their end.

    `keeps` says how many entries are kept in all, if only as many are equal as it takes.
    """
    n, device = top.numel(), top.device
    prefix = torch.zeros(n, dtype=torch.int64, device=device)
    above = torch.zeros(2, n, dtype=torch.float64, device=device)
    for shift in range(28, -1, -4):
        bins = torch.zeros(2, n, 16, dtype=torch.float64, device=device)
        for _, x in rows.own():
            key = _ordered(x) + 2**31
            here = key >> (shift + 4) == prefix.unsqueeze(-1)
            # From the largest down.
            column = 15 - (key >> shift & 15)
            mass = (x.double() - top.unsqueeze(-1)).exp()
            bins[0].scatter_add_(-1, column, here.double())
            bins[1].scatter_add_(-1, column, torch.where(here, mass, 0))
        upto = above.unsqueeze(-1) + groups.total(bins, rows.head.group).cumsum(-1)
        end = reached(*upto)
        column = torch.where(end.any(-1), end.int().argmax(-1), 15)
        previous = (column - 1).clamp(min=0).expand(2, n).unsqueeze(-1)
        above = torch.where(column == 0, above, upto.gather(-1, previous).squeeze(-1))
        prefix = prefix << 4 | (15 - column)
    ordered = prefix - 2**31
    each = (_number(ordered) - top).exp()
    count = above[0].long()
    ties = (keeps(At(count, above[1], each)) - count).clamp(min=1)
    return Cut(ordered, ties, above[1] + ties * each)


def _masked_draw(rows: Rows, top: Tensor, cut: Cut, min_p: Tensor | None) -> tuple[Tensor, Tensor]:
    """The draw of what is kept, merged as an untruncated one is."""
    h = rows.head
    rank, device = dist.get_rank(h.group), top.device
    last, least = cut.ordered.unsqueeze(-1), 0 if min_p is None else min_p.double().unsqueeze(-1)
    equal = torch.zeros_like(cut.ties)
    for _, x in rows.own():
        equal = equal + (_ordered(x) == last).sum(-1)
    # Of equal entries the first are kept: those of the ranks before come first.
    left = cut.ties - groups.gather(equal, h.group)[:rank].sum(0)
    own = [nothing(top.shape, device)] * rows.plan.places
    for place, (start, stop) in enumerate(rows.plan.own):
        for first, x in rows.tiles(start, stop):
            key = _ordered(x)
            tie = key == last
            keep = (key > last) | (tie & (tie.cumsum(-1) <= left.unsqueeze(-1)))
            left = left - tie.sum(-1)
            keep &= (x.double() - top.unsqueeze(-1)).exp() >= least
            tokens, numbers = torch.ops.dlcore.categorical_summary(
                *(x.masked_fill(~keep, -torch.inf), None, None, first, None, None, None),
                *(None, None, None, None, rows.keys),
            )
            found = torch.cat([numbers, tokens.double()])
            # Of a part only its draw is asked, or it is one tile.
            own[place] = torch.where(found[4] > own[place][4], found, own[place])
    m = merge(torch.stack(own), rows.plan, rows.keys, h.group)
    return m.draw, m.draw_logit
