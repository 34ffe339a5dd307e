"""Parts of a vocabulary for tests: rows of every kind, options, and how summaries merge."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dlcore import rng
from dlcore.reference.rng import Domain, gumbel_noise, row_keys

GROUP = 256
LEAD = torch.Size((4, 2))
#: A first token of the third group.
FIRST = 2 * GROUP


def head(
    vocab: int, dtype: torch.dtype = torch.float32, linear: bool = False, seed: int = 0
) -> tuple[Any, ...]:
    """Rows of which one has a NaN, one a +inf, one nothing but -inf, one many and one few of them."""
    generator = torch.Generator().manual_seed(1000 * seed + vocab)
    if linear:
        shapes = ((*LEAD, 8), (vocab, 8), (vocab,))
        hidden, weight, bias = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
        hidden[0, 1, 2] = torch.nan
        return hidden, weight, bias
    x = 4 * torch.randn(*LEAD, vocab, generator=generator)
    x[0, 1, vocab // 2], x[1, 0, vocab - 1], x[2, 0] = torch.nan, torch.inf, -torch.inf
    x[2, 1, : vocab // 2], x[3, 0, ::2] = -torch.inf, -torch.inf
    return x.to(dtype), None, None


def key_of(seed: int) -> Tensor:
    return rng.split(rng.key(seed), LEAD) if seed % 2 else rng.key(seed)


def options(vocab: int, first: int, seed: int) -> tuple[Any, ...]:
    """index, shift, target, temperature, softcap, exclude, skip, key: ids in this part and beside it."""
    generator = torch.Generator().manual_seed(seed)
    index, target = (torch.randint(first - 9, first + vocab + 9, LEAD, generator=generator) for _ in range(2))
    # Negative ids are ids of no token; a row with a negative target is not read.
    target[0, 0] = -1
    shift = torch.randn(LEAD, generator=generator)
    temperature = 0.3 + torch.rand(LEAD, generator=generator)
    temperature[3, 1] = 0
    skip = torch.zeros(LEAD, dtype=torch.uint8)
    skip[1, 1] = skip[2, 1] = seed % 2
    exclude = first + seed * 7 % (vocab + 1)
    softcap = (None, 5.0)[seed % 2]
    return index, shift, target, temperature, softcap, exclude, skip, key_of(seed)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    """Tokens equal and numbers close; of broken rows, that they are."""
    (tokens, numbers), (wanted_tokens, wanted) = found, expected
    assert tokens.dtype == torch.int64
    assert numbers.dtype == torch.float64
    assert numbers.shape == wanted.shape
    broken = wanted[2].isnan()
    assert torch.equal(numbers[2].isnan(), broken)
    assert torch.equal(tokens, wanted_tokens)
    close = {"rtol": tolerance, "atol": tolerance, "equal_nan": True}
    torch.testing.assert_close(numbers[:, ~broken], wanted[:, ~broken], **close)


def partition(vocab: int, seed: int, shards: tuple[int, ...] = (2, 3, 40)) -> Iterator[list[tuple[int, int]]]:
    """Random cuts into shards; of each the tokens up to a group, whole groups, and the rest."""
    generator = torch.Generator().manual_seed(seed)
    for count in shards:
        cuts = torch.randint(0, vocab, (count - 1,), generator=generator).sort().values.tolist()
        parts = []
        for begin, end in zip([0, *cuts], [*cuts, vocab], strict=True):
            body = min(-(-begin // GROUP) * GROUP, end)
            tail = max(end // GROUP * GROUP, body) if body % GROUP == 0 else end
            parts += [(a, b) for a, b in ((begin, body), (body, tail), (tail, end)) if a < b]
        yield parts


def cut(
    x: tuple[Any, ...], parts: list[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], tuple[Any, ...]]]:
    """Parts of logits or of a head."""
    logits, weight, bias = x
    for first, last in parts:
        dense = weight is None
        part = (
            (logits[..., first:last], None, None) if dense else (logits, weight[first:last], bias[first:last])
        )
        yield (first, last), part


def _drawn(parts: list[tuple[tuple[int, int], Tensor, Tensor]], key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score, logit and token of the draw: parts of one group are one before groups compete."""
    lead = parts[0][1].shape[1:]
    keys = row_keys(key, lead)
    best = (
        torch.full(lead, -torch.inf).double(),
        torch.full(lead, -torch.inf).double(),
        torch.full(lead, -1),
    )
    groups: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for (first, _), tokens, numbers in parts:
        groups.setdefault(first // GROUP, []).append((numbers[4], numbers[5], tokens[1]))
    for group, pieces in groups.items():
        score, logit, token = (torch.stack(x) for x in zip(*pieces, strict=True))
        if len(pieces) > 1:
            inner = logit + gumbel_noise(keys, Domain.TOKEN, token.movedim(0, -1)).movedim(-1, 0)
            place = inner.argmax(0, keepdim=True)
            noise = gumbel_noise(keys, Domain.GROUP, torch.tensor([group]).expand(*lead, 1)).squeeze(-1)
            score = (torch.logsumexp(score - noise, 0) + noise).unsqueeze(0)
            logit, token = logit.gather(0, place), token.gather(0, place)
        wins = score[0] > best[0]
        best = tuple(  # type: ignore[assignment]
            torch.where(wins, a[0], b) for a, b in zip((score, logit, token), best, strict=True)
        )
    return best


def merged(
    parts: list[tuple[tuple[int, int], Tensor, Tensor]], temperature: Tensor | None, key: Tensor
) -> tuple[Tensor, Tensor]:
    """The summary of all tokens from those of parts in order, by the formulas."""
    numbers, tokens = torch.stack([p[2] for p in parts]), torch.stack([p[1] for p in parts])
    tops, seconds, sums, weights = numbers[:, 0], numbers[:, 1], numbers[:, 2], numbers[:, 3]
    top, place = tops.max(0)
    place = (tops == top).int().argmax(0)
    drop = torch.where(tops > -torch.inf, tops - top, 0)
    total = (drop.exp() * sums).sum(0)
    weighted = (drop.exp() * (weights + drop * sums)).sum(0)
    others = tops.scatter(0, place.unsqueeze(0), -torch.inf).amax(0)
    second = torch.maximum(others, seconds.gather(0, place.unsqueeze(0))[0])
    argmax = tokens[:, 0].gather(0, place.unsqueeze(0))[0]
    score, logit, token = _drawn(parts, key)
    if temperature is not None:
        greedy = temperature == 0
        score, logit = torch.where(greedy, top, score), torch.where(greedy, top, logit)
        token = torch.where(greedy, argmax, token)
    found = [
        torch.where(x.isnan().all(0), torch.nan, x.masked_fill(x.isnan(), -torch.inf).amax(0))
        for x in (numbers[:, 6], numbers[:, 7])
    ]
    tokens = torch.stack([argmax, token]).masked_fill(total.isnan(), -1)
    return tokens, torch.stack([top, second, total, weighted, score, logit, *found])
