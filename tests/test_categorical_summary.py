"""categorical.summary, what a part of a vocabulary says of each row: kernels, edges, and that parts merge."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from summaries import FIRST, LEAD, assert_same, cut, head, key_of, merged, options, partition
from torch import Tensor

import dlcore
from dlcore import rng
from dlcore.cpu import linear_logits

KEY = rng.key(7, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def summary(*args: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.dlcore.categorical_summary(*args)


def reference(*args: Any) -> tuple[Tensor, Tensor]:
    with dlcore.use_backend("reference"):
        return summary(*args)


def check(*args: Any, tolerance: float = 3e-6) -> None:
    """The compiled kernels against the reference."""
    assert_same(summary(*args), reference(*args), tolerance)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 300, 5003])
def test_numbers_are_those_of_the_reference(vocab, dtype, linear):
    logits = head(vocab, dtype, linear)
    for first in (0, FIRST):
        check(*logits, first, *(None,) * 8, tolerance=1e-5)
        for seed in range(4):
            check(*logits, first, *options(vocab, first, seed), tolerance=1e-5)


@pytest.mark.usefixtures("poisoned")
def test_every_combination_of_arguments():
    """Ids here and elsewhere, rows not read as bool and uint8, one key and one per row."""
    vocab, z = 300, FIRST + torch.arange(LEAD.numel()).view(LEAD) * 29
    index, shift, target, temperature, softcap, _, skip, _ = options(vocab, FIRST, 0)
    for given in product(
        ((None, None), (z, None), (index, shift), (index, torch.tensor(1.5))),
        (None, target),
        (None, temperature, torch.tensor(0.6)),
        (None, softcap),
        (None, FIRST + 3, FIRST + vocab),
        (None, skip.bool(), skip),
        (None, KEY, rng.split(KEY, LEAD)),
    ):
        (at, bonus), *rest = given
        check(*head(vocab), FIRST, at, bonus, *rest)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(
    ("first", "vocab"), [(3, 1), (1, 255), (255, 1), (300, 100), (FIRST + 77, 178), (2, 5)]
)
def test_tokens_of_one_group(first, vocab, linear):
    """They may begin anywhere in it; an odd token's noise is the second of a pair."""
    for dtype in DTYPES:
        for seed in range(4):
            check(*head(vocab, dtype, linear), first, *options(vocab, first, seed), tolerance=1e-5)


def test_several_segments_and_an_odd_first_group():
    x, first = head(150_001), 256 * 1023
    check(*x, first, *options(150_001, first, 1), tolerance=1e-5)


def test_two_threads_are_one(restored_threads):
    for rows in (1, 2, 40):
        x = 4 * torch.randn(rows, 140_003, generator=torch.Generator().manual_seed(rows))
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(summary(x, None, None, FIRST, *(None,) * 7, KEY))
        for a, b in zip(*found, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_levels_draw_the_same(level):
    x = 4 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(1))
    for first, part in ((FIRST, x), (FIRST + 1, x[:, :255])):
        args = (part, None, None, first, *(None,) * 7, KEY)
        assert_same(summary(*args), reference(*args), 3e-6)


def test_strides():
    whole = torch.full((4, 3, 2, 700), torch.nan)
    whole[..., :600] = torch.randn(4, 3, 2, 600, generator=torch.Generator().manual_seed(2))
    for x in (whole[:, 1, :, :600], whole[::2, :, 1, :600], whole.transpose(0, 2)[..., 40:600]):
        rest = (FIRST, *(None,) * 7, KEY)
        for a, b in zip(
            summary(x, None, None, *rest), summary(x.contiguous(), None, None, *rest), strict=True
        ):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.usefixtures("backend")
def test_rows_that_are_not_read():
    """NaN inside, and yet they are as rows with nothing but -inf."""
    x, unread = torch.full((4, 300), torch.nan), torch.tensor([1, 0, 1, 0], dtype=torch.uint8)
    target = torch.tensor([1, -1, -(2**63), 5])
    x[3] = 0.0
    tokens, numbers = summary(
        x, None, None, 0, target.clamp(min=0), None, target, None, None, None, unread, KEY
    )
    assert (tokens[:, :3] == -1).all()
    nothing = torch.tensor([-torch.inf, -torch.inf, 0, 0, -torch.inf, -torch.inf, torch.nan, torch.nan])
    assert torch.equal(numbers[:, :3].nan_to_num(), nothing.double().nan_to_num().unsqueeze(-1).expand(8, 3))
    assert numbers[2, 3] == 300
    assert (tokens[:, 3] >= 0).all()


@pytest.mark.usefixtures("backend")
def test_nothing_but_minus_infinity():
    x = torch.full((2, 700), -torch.inf)
    x[1, 600] = 2.0
    index = torch.tensor([3, 4])
    args = (x, None, None, FIRST, FIRST + index, None, index, None, None, None, None, KEY)
    tokens, numbers = summary(*args)
    assert tokens.tolist() == [[-1, FIRST + 600]] * 2
    assert numbers[[0, 1, 4, 5, 6], 0].tolist() == [-torch.inf] * 5
    assert numbers[[2, 3], 0].tolist() == [0, 0]
    assert numbers[[0, 1, 2, 5, 6], 1].tolist() == [2, -torch.inf, 1, 2, -torch.inf]
    assert -1e-30 < numbers[3, 1] <= 0
    assert numbers[7].isnan().all()


@pytest.mark.usefixtures("backend")
def test_ids_far_outside():
    """Of every row's index and target, and of what is excluded, none is in this part, whatever its value."""
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    far = torch.tensor([2**63 - 1, -(2**63), FIRST - 1, FIRST + 300])
    plain = summary(x, None, None, FIRST, *(None,) * 7, KEY)
    for exclude in (2**63 - 1, -(2**63), -1, FIRST - 1, FIRST + 300):
        args = (far, torch.tensor(5.0), far.clamp(min=0), None, None, exclude, None, KEY)
        tokens, numbers = summary(x, None, None, FIRST, *args)
        assert torch.equal(tokens, plain[0])
        assert torch.equal(numbers[:6], plain[1][:6])
        assert numbers[6:].isnan().all()


@pytest.mark.usefixtures("backend")
def test_a_temperature_of_0_draws_the_argmax():
    x = torch.randn(6, 900, generator=torch.Generator().manual_seed(3))
    args = (None, None, None, torch.zeros(()), None, None, None, KEY)
    tokens, numbers = summary(x, None, None, FIRST, *args)
    assert torch.equal(tokens[0], FIRST + x.argmax(-1))
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(numbers[0], x.amax(-1).double())
    assert torch.equal(numbers[[4, 5]], numbers[[0, 0]])


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("seed", range(6))
def test_parts_of_a_vocabulary_merge(seed, linear, monkeypatch):
    """The summary of all tokens is that of the parts of any partition, the draws included."""
    monkeypatch.setattr(linear_logits, "_TILE", 512 * LEAD.numel())
    vocab = 2900
    x = head(vocab, linear=linear, seed=seed)
    given = options(vocab, 0, seed)
    key = key_of(seed)
    whole = summary(*x, 0, *given[:7], key)
    for cuts in partition(vocab, seed):
        parts = [(part, *summary(*tensors, part[0], *given[:7], key)) for part, tensors in cut(x, cuts)]
        assert_same(merged(parts, given[3], key), whole, 1e-5)


def test_a_first_token_inside_of_a_group_is_refused():
    x = torch.zeros(2, 300)
    for first in (1, 255, -256):
        with pytest.raises(ValueError, match=r"categorical.summary: first must be a multiple of 256, or all"):
            summary(x, None, None, first, *(None,) * 8)
    with pytest.raises(ValueError, match=r"got tokens 200 to 256"):
        summary(x[:, :57], None, None, 200, *(None,) * 8)
