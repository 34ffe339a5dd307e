"""Losses, divergences and expectations over ranks' tokens: what the whole vocabulary gives, gradients too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from vocabulary_shards import (
    ALONE,
    KINDS,
    VOCAB,
    both,
    close,
    columns,
    equal_gradients,
    every_split,
    inputs,
    leaves,
    sharded,
    tokens_of,
    whole,
)

import dlcore
from dlcore import categorical
from dlcore.distributed import ShardedLogits


def equal_losses(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str) -> None:
    target, z = tokens_of(seed=3), tokens_of(seed=4)
    target[0, 0] = -100
    target[1, 1] = z[1, 1]
    shift = torch.linspace(-2, 3, z.numel()).view(z.shape)
    for dtype in (torch.float32, torch.float64):
        parts = inputs(kind, dtype)
        for options in ({}, {"softcap": 4.0, "exclude": 20}):
            equal_gradients(
                *(group, sizes, dtype, lambda x, o=options: categorical.cross_entropy(x, target, **o)), parts
            )
        equal_gradients(
            *(group, sizes, dtype),
            lambda x: categorical.log_probs(
                "test", x, target.clamp(min=-1), index=z, shift=shift, softcap=6.0, exclude=20
            ),
            parts,
        )


@every_split()
@KINDS
def test_losses_and_their_gradients_equal_those_of_the_whole(ranks4: Ranks, sizes: Any, kind: str) -> None:
    ranks4.run(len(sizes), equal_losses, sizes, kind)


def equal_divergences(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str) -> None:
    temperature = torch.tensor([0.5, 1.0, 2.0])
    for dtype in (torch.float32, torch.float64):
        p, q = inputs(kind, dtype), inputs("dense", dtype, seed=9)
        for t in (1.0, temperature):
            equal_gradients(
                *(group, sizes, dtype, lambda a, b, t=t: categorical.kl(a, b, temperature=t), p, q)
            )


@every_split()
@KINDS
def test_divergences_and_their_gradients_equal_those_of_the_whole(
    ranks4: Ranks, sizes: Any, kind: str
) -> None:
    ranks4.run(len(sizes), equal_divergences, sizes, kind)


def equal_expectations(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str) -> None:
    here = columns(group, sizes)
    for dtype in (torch.float32, torch.float64):
        table = torch.randn(VOCAB, 5, dtype=dtype, generator=torch.Generator().manual_seed(8))
        for options in ({}, {"temperature": 0.6, "softcap": 4.0, "exclude": 20}):
            one, mine = leaves((table,))[0], leaves((table[here],))[0]

            def mean(x: Any, o: Any = options, a: Any = mine, b: Any = one) -> torch.Tensor:
                spread = not isinstance(x, torch.Tensor) and x.group is not None
                return categorical.expectation(x, a if spread else b, **o)

            equal_gradients(group, sizes, dtype, mean, inputs(kind, dtype))
            close(mine.grad, one.grad[here], dtype)
        key = dlcore.rng.key(3)
        parts = inputs(kind, dtype)
        got, soft = categorical.sample_expectation(sharded(parts, group, sizes), table[here], key=key)
        wanted, other = categorical.sample_expectation(whole(parts), table, key=key)
        assert torch.equal(got.tokens, wanted.tokens)
        close((got.logprob, soft), (wanted.logprob, other), dtype)


@every_split()
@KINDS
def test_expectations_and_their_gradients_equal_those_of_the_whole(
    ranks4: Ranks, sizes: Any, kind: str
) -> None:
    ranks4.run(len(sizes), equal_expectations, sizes, kind)


def excluded_alone(group: dist.ProcessGroup, backend: str) -> None:
    """Rank 0 holds the excluded token alone, in some rows -inf besides."""
    sizes, key, target = (1, 599), dlcore.rng.key(5), torch.arange(8) + 5
    logits = torch.randn(8, 600, generator=torch.Generator().manual_seed(4))
    logits[3:6, 0] = -torch.inf
    table = torch.randn(600, 3, generator=torch.Generator().manual_seed(3))
    with dlcore.use_backend(backend):
        for exclude in (0, None):
            equal_gradients(
                *(group, sizes, torch.float32),
                lambda x, e=exclude: categorical.cross_entropy(x, target, exclude=e),
                (logits,),
            )
            there, one = both((logits,), group, sizes)
            own = table[columns(group, sizes)]
            close(
                categorical.expectation(there, own, exclude=exclude),
                categorical.expectation(one, table, exclude=exclude),
                torch.float32,
            )
            got, wanted = (categorical.sample(x, exclude=exclude, key=key) for x in (there, one))
            assert torch.equal(got.tokens, wanted.tokens)
        equal_gradients(group, sizes, torch.float32, categorical.kl, (logits,), (logits.roll(1, 0),))


@ALONE
def test_a_shard_of_the_excluded_token_alone(ranks4: Ranks, named: str) -> None:
    ranks4.run(2, excluded_alone, named)


def short_columns(group: dist.ProcessGroup) -> None:
    p = ShardedLogits(torch.zeros(4, 300), group)
    q = ShardedLogits(torch.zeros(4, 250), group, (300, 300))
    with pytest.raises(ValueError, match=r"kl: sizes\[\d\] must be the 250 tokens"):
        categorical.kl(p, q)
    far = [torch.full((1, 300), -800.0 if dist.get_rank(group) else 0.0), torch.zeros(1, 300)]
    if dist.get_rank(group):
        far[1] -= torch.inf
    # Of what p's mass underflows nothing is left, though q has none there.
    numbers = categorical.kl(*(ShardedLogits(x, group) for x in far))
    assert numbers.tolist() == [0.0]


def test_divergences_of_short_and_far_columns(ranks4: Ranks) -> None:
    ranks4.run(2, short_columns)


def first_derivatives_only(group: dist.ProcessGroup) -> None:
    logits = torch.randn(3, 10, requires_grad=True)
    loss = categorical.cross_entropy(ShardedLogits(logits, group), torch.tensor([1, 2, 3]))
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"cross_entropy: has a first derivative only"):
        grad.sum().backward()


def test_a_second_derivative_raises(ranks4: Ranks) -> None:
    ranks4.run(2, first_derivatives_only)
