"""Truncated draws over ranks' tokens keep and draw what those of the whole vocabulary do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from vocabulary_shards import (
    KINDS,
    VOCAB,
    Payload,
    both,
    close,
    every_split,
    inputs,
    keys_of,
    row_options,
    tokens_of,
)

import dlcore
from dlcore import categorical
from dlcore.distributed import truncation

LIMITS: tuple[dict[str, Any], ...] = (
    {"top_k": 5},
    {"top_k": torch.tensor([1, 3, 2000])},
    {"top_p": 0.9},
    {"top_p": torch.tensor([0.0, 0.5, 1.0])},
    {"min_p": 0.1},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.01},
    {"top_k": torch.tensor([3, 40, 900]), "top_p": 0.95},
    {"top_p": 0.99, "min_p": torch.tensor([0.0, 0.001, 1.0])},
)


def equal_truncated_draws(
    group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str, candidates: int | None, coarse: bool
) -> None:
    z = tokens_of()
    before = truncation.CANDIDATES, truncation.MOST
    if candidates is not None:
        truncation.CANDIDATES = truncation.MOST = candidates
    try:
        for dtype in (torch.float32, torch.bfloat16):
            parts = inputs(kind, dtype)
            if coarse:
                # Halves, so that many tokens are equal and ids decide.
                parts = tuple((2 * x).round() / 2 for x in parts)
            for seed, limits in enumerate(LIMITS):
                options, key = row_options(z)[seed % 3], keys_of(z, seed)[seed % 2]
                got, wanted = (
                    categorical.sample(x, **options, **limits, key=key) for x in both(parts, group, sizes)
                )
                assert torch.equal(got.tokens, wanted.tokens), (limits, got.tokens, wanted.tokens)
                close((got.logprob, *got.stats[:5]), (wanted.logprob, *wanted.stats[:5]), dtype)
    finally:
        truncation.CANDIDATES, truncation.MOST = before


@every_split()
@pytest.mark.parametrize(
    ("candidates", "coarse"),
    [(None, False), (4, False), (4, True)],
    ids=["all tell", "few tell", "many are equal"],
)
@KINDS
def test_truncated_draws_equal_those_of_the_whole(
    ranks4: Ranks, sizes: Any, kind: str, candidates: int | None, coarse: bool
) -> None:
    ranks4.run(len(sizes), equal_truncated_draws, sizes, kind, candidates, coarse)


def draws_of_equal_logits(group: dist.ProcessGroup, sizes: tuple[int, ...]) -> None:
    """Flat logits: ids alone say which tokens are kept, and the last of them is drawn as often as any."""
    before = truncation.CANDIDATES, truncation.MOST
    truncation.CANDIDATES = truncation.MOST = 1
    try:
        logits, key = torch.zeros(100, VOCAB), dlcore.rng.key(6)
        for limits in ({"top_k": 3}, {"top_k": 60, "exclude": 30}, {"top_p": 0.0305}, {"min_p": 0.5}):
            got, wanted = (categorical.sample(x, **limits, key=key) for x in both((logits,), group, sizes))
            assert torch.equal(got.tokens, wanted.tokens), limits
    finally:
        truncation.CANDIDATES, truncation.MOST = before


@every_split()
def test_ids_order_equal_logits(ranks4: Ranks, sizes: Any) -> None:
    ranks4.run(len(sizes), draws_of_equal_logits, sizes)


def unlimited(group: dist.ProcessGroup) -> None:
    logits = torch.randn(8, 5000, generator=torch.Generator().manual_seed(4))
    there, one = both((logits,), group, (2500, 2500))
    key = dlcore.rng.key(3)
    with Payload() as payload:
        got = categorical.sample(there, top_p=1.0, key=key).tokens
    assert torch.equal(got, categorical.sample(one, key=key).tokens)
    assert payload.sent <= 8 * 3 * 80
    # Where one rank alone finds that a row keeps more than was sent, all look for it.
    plain = truncation._from_candidates

    def unsure(rows: truncation.Rows) -> Any:
        tokens, numbers, certain = plain(rows)
        return tokens, numbers, certain & (dist.get_rank(group) == 0)

    wanted = categorical.sample(there, top_p=0.3, key=key).tokens
    truncation._from_candidates = unsure
    try:
        assert torch.equal(categorical.sample(there, top_p=0.3, key=key).tokens, wanted)
    finally:
        truncation._from_candidates = plain


def test_top_p_of_one_is_no_limit_and_ranks_search_together(ranks4: Ranks) -> None:
    ranks4.run(2, unlimited)
