"""A vocabulary over ranks says what the whole one says: tokens, numbers, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks

import dlcore
from dlcore import LinearLogits, categorical
from dlcore.distributed import ShardedLogits

ROWS, WIDTH, VOCAB = 6, 8, 1000
#: Tokens per rank: groups whole and cut, several ranks in one group, ranks without any.
SIZES = (
    (1000,),
    (512, 488),
    (100, 900),
    (600, 0, 400),
    (300, 300, 400),
    (250, 250, 250, 250),
    (20, 30, 50, 900),
    (0, 900, 100, 0),
)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-11}


def every_split(*values: Any) -> Any:
    return pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "+".join(map(str, s)))


def columns(group: dist.ProcessGroup, sizes: tuple[int, ...]) -> slice:
    first = sum(sizes[: dist.get_rank(group)])
    return slice(first, first + sizes[dist.get_rank(group)])


def inputs(
    kind: str, dtype: torch.dtype, *, rows: int = ROWS, vocab: int = VOCAB, seed: int = 0
) -> tuple[Any, ...]:
    """Logits, or hidden, weight and bias."""
    made = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return ((3 * torch.randn(2, rows // 2, vocab, generator=made)).to(dtype),)
    hidden = torch.randn(2, rows // 2, WIDTH, generator=made)
    weight, bias = torch.randn(vocab, WIDTH, generator=made), torch.randn(vocab, generator=made)
    return tuple(x.to(dtype) for x in (hidden, weight, bias))


def whole(parts: tuple[Any, ...]) -> Any:
    return parts[0] if len(parts) == 1 else LinearLogits(*parts)


def sharded(parts: tuple[Any, ...], group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Any:
    here = columns(group, sizes)
    if len(parts) == 1:
        return ShardedLogits(parts[0][..., here], group, sizes)
    return LinearLogits(parts[0], *(x[here] for x in parts[1:]), group=group, sizes=sizes)


def close(got: Any, wanted: Any, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got, wanted, rtol=limit, atol=limit, equal_nan=True)


def row_options(z: torch.Tensor) -> list[dict[str, Any]]:
    shift = torch.linspace(-2, 3, z.numel()).view(z.shape)
    return [
        {},
        {"index": z, "shift": shift, "temperature": 0.7},
        {"index": z, "softcap": 4.0, "exclude": 20, "temperature": torch.tensor([0.5, 1.0, 2.0])},
    ]


def tokens_of(vocab: int = VOCAB, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, (2, ROWS // 2), generator=torch.Generator().manual_seed(seed))


def equal_statistics(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str, dtype: torch.dtype) -> Any:
    parts = inputs(kind, dtype)
    found = []
    for options in row_options(tokens_of()):
        got, wanted = (categorical.stats(x, **options) for x in (sharded(parts, group, sizes), whole(parts)))
        assert torch.equal(got.argmax, wanted.argmax)
        close(got, wanted, dtype)
        found.append([None if x is None else x.tolist() for x in got])
    return found


@every_split()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "head"])
def test_statistics_equal_those_of_the_whole(
    ranks4: Ranks, sizes: Any, kind: str, dtype: torch.dtype
) -> None:
    everywhere = ranks4.run(len(sizes), equal_statistics, sizes, kind, dtype)
    assert all(str(found) == str(everywhere[0]) for found in everywhere)


def equal_draws(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    parts, z = inputs(kind, dtype), tokens_of()
    temperatures = [*row_options(z), {"temperature": torch.tensor([0.0, 1.0, 0.3])}, {"temperature": 0.0}]
    for options in temperatures:
        shared = dlcore.rng.key(5)
        for seed in range(8):
            per_row = dlcore.rng.split(dlcore.rng.key(seed), z.shape)
            for key in (dlcore.rng.fold_in(shared, seed), per_row):
                got, wanted = (
                    categorical.sample(x, **options, key=key)
                    for x in (sharded(parts, group, sizes), whole(parts))
                )
                assert torch.equal(got.tokens, wanted.tokens)
                close(got.logprob, wanted.logprob, dtype)
                close(got.stats, wanted.stats, dtype)


@every_split()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["dense", "head"])
def test_draws_equal_those_of_the_whole(ranks4: Ranks, sizes: Any, kind: str, dtype: torch.dtype) -> None:
    ranks4.run(len(sizes), equal_draws, sizes, kind, dtype)
