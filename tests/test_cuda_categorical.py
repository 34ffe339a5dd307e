"""The CUDA kernels' draws and statistics: the numbers of the reference, the tokens of the CPU kernels."""

from __future__ import annotations

import pytest
import summaries
import torch
from conftest import DEVICE
from test_triton_categorical import CUTS
from triton_calls import assert_same, call, quiet

import dlcore
from dlcore import categorical, rng

pytestmark = [quiet, pytest.mark.usefixtures("cuda_kernels", "guarded")]

KEY = rng.key(3)
LEAD = (3, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Below a group, several chunks with a ragged end, and every width of a load: 5000 is a multiple of 8, 1028
#: of 4 alone.
VOCABS = [5, 1028, 5000, 5003]


def logits(vocab: int, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> torch.Tensor:
    """Rows of which one has a NaN, one a +inf, one nothing but -inf."""
    x = scale * torch.randn(*LEAD, vocab, generator=torch.Generator().manual_seed(vocab))
    x[0, 1, 2], x[1, 0, 3], x[2, 0] = float("nan"), float("inf"), float("-inf")
    return x.to(dtype)


def row(vocab: int) -> tuple[torch.Tensor, ...]:
    """index, shift, temperature (one row greedy)."""
    index = torch.randint(vocab, LEAD, generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor([[0.7, 1.3], [1.0, 0.5], [2.0, 0.0]])
    return index, torch.tensor(0.5), temperature


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_stats(vocab, dtype):
    x, (index, shift, temperature) = logits(vocab, dtype), row(vocab)
    positive = temperature.clamp(min=0.1)
    for options in ((None,) * 5, (index, shift, positive, None, 2), (index, shift, positive, 5.0, 2)):
        args = (x, None, None, *options)
        expected = call("categorical.stats", "reference", *args, wide=True)
        assert_same(call("categorical.stats", "cuda", *args), expected, 3e-6, 3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABS)
def test_sample_draws_the_tokens_of_the_cpu(vocab, dtype):
    x, options = logits(vocab, dtype), row(vocab)
    for args in (
        (x, None, None, *(None,) * 8, KEY),
        (x, None, None, *options, 5.0, 2, None, None, None, rng.split(KEY, LEAD)),
    ):
        expected = call("categorical.sample", "cpu", *args)
        assert_same(call("categorical.sample", "cuda", *args), expected, 3e-6, 3e-6)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("coarse", [False, True])
def test_truncation(cut, coarse):
    """With coarse logits, most entries have equals, of which the first are kept."""
    x, (index, shift, temperature) = logits(2600), row(2600)
    x = x.round() if coarse else x
    limits = tuple(
        None if c is None else torch.tensor(c, dtype=d)
        for c, d in zip(cut, (torch.int64, torch.float32, torch.float32), strict=True)
    )
    args = (x, None, None, index, shift, temperature, None, 2, *limits, KEY)
    expected = call("categorical.sample", "cpu", *args)
    assert_same(call("categorical.sample", "cuda", *args), expected, 3e-6, 3e-6)


def test_truncation_of_a_head(monkeypatch):
    """Digits, and equals of the threshold, are counted across tiles."""
    from dlcore.triton import linear_logits

    monkeypatch.setattr(linear_logits, "_TILE", 2048)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randint(-2, 3, (*LEAD, 4), generator=generator).float()
    weight = torch.randint(-2, 3, (1500, 4), generator=generator).float()
    limits = (torch.tensor(70), torch.tensor(0.8), None)
    expected = call("categorical.sample", "cpu", hidden @ weight.mT, None, None, *(None,) * 5, *limits, KEY)
    found = call("categorical.sample", "cuda", hidden, weight, None, *(None,) * 5, *limits, KEY)
    assert_same(found, expected, 3e-6, 3e-6)


@pytest.mark.parametrize("prior", [-1, 4])
@pytest.mark.parametrize("exclude", [None, 2])
def test_sample_mixture(prior, exclude):
    x, (z, shift, temperature) = logits(300), row(300)
    for coefficients in ([1.0, 1, 0.2, 1, 0.5, 0], [1.0, 0, 0.5, 0, 0.3, 0], [0.0, 1, 0, 0, 0, 0.5]):
        numbers = torch.tensor(coefficients, dtype=torch.float64)
        for key in (KEY, rng.split(KEY, LEAD)):
            args = (x, None, None, z, numbers, prior, shift, temperature, None, exclude, key)
            expected = call("categorical.sample_mixture", "cpu", *args)
            assert_same(call("categorical.sample_mixture", "cuda", *args), expected, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_probs(dtype):
    x, (index, shift, _) = logits(1300, dtype), row(1300)
    target = torch.tensor([[7, 5], [1299, -1], [3, 0]])
    for options in ((None, None, None, None), (index, shift, 5.0, 2)):
        args = (x, None, None, target, *options)
        expected = call("categorical.log_probs", "cpu", *args)
        assert_same(call("categorical.log_probs", "cuda", *args), expected, 3e-6, 3e-6)


def test_a_head_is_read_tile_by_tile(monkeypatch):
    """States merge over tiles: a head's draws are those of its logits."""
    from dlcore.triton import linear_logits

    monkeypatch.setattr(linear_logits, "_TILE", 2048)
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(*LEAD, 8, generator=generator), torch.randn(1500, 8, generator=generator)
    bias = torch.randn(1500, generator=generator)
    options = (*row(1500), None, 2, None, None, None, KEY)
    expected = call("categorical.sample", "cpu", hidden @ weight.mT + bias, None, None, *options)
    found = call("categorical.sample", "cuda", hidden, weight, bias, *options)
    assert_same(found, expected, 2e-5, 2e-5)


@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_strided_rows(offset):
    """Rows with gaps between them, at addresses that allow loads of every width."""
    vocab = 2000
    room = torch.full((2, 3, vocab + offset), float("inf"), dtype=torch.bfloat16)
    x = room[:, 1:, offset:]
    x.copy_(3 * torch.randn(2, 2, vocab, generator=torch.Generator().manual_seed(0)))
    args = (None, None, *(None,) * 8, KEY)
    expected = call("categorical.sample", "cpu", x.contiguous(), *args)
    assert_same(call("categorical.sample", "cuda", x, *args), expected, 3e-6, 3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [None, 0.004])
def test_entries_far_from_the_others(temperature, dtype):
    """-inf or the lowest number among others, alone in a lane's share or in a group; large numbers."""
    x = 4 * torch.randn(6, 2048, generator=torch.Generator().manual_seed(0))
    lowest = torch.finfo(dtype).min
    x[0, ::3], x[1, :700], x[2, ::3], x[3, 5:] = float("-inf"), float("-inf"), lowest, lowest
    x[4], x[5] = lowest, (1e4 * x[5]).clamp(-6e4, 6e4)
    scale = None if temperature is None else torch.tensor(temperature)
    args = (x.to(dtype), None, None, None, None, scale, None, None, None, None, None, KEY)
    expected = call("categorical.sample", "cpu", *args)
    assert_same(call("categorical.sample", "cuda", *args), expected, 3e-6, 3e-6)


def test_far_and_low_logits():
    """All below -1e4: a lane past the end that were not masked would win."""
    x = -1e4 - torch.rand(4, 259, generator=torch.Generator().manual_seed(0))
    args = (x, None, None, *(None,) * 8, KEY)
    expected = call("categorical.sample", "cpu", *args)
    assert_same(call("categorical.sample", "cuda", *args), expected, 3e-6, 3e-6)


def test_the_backend_can_be_asked_for():
    x = torch.randn(2, 9, device=DEVICE)
    with dlcore.use_backend("cuda"):
        categorical.sample(x, key=KEY.to(DEVICE))
    assert dlcore.last_backend("categorical.sample") == "cuda"
    with dlcore.use_backend("cuda"), pytest.raises(NotImplementedError, match=r"cuda: takes .*float64"):
        categorical.stats(x.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, *VOCABS])
def test_summary(vocab, dtype):
    for first in (0, summaries.FIRST):
        for given in ((None,) * 8, summaries.options(vocab, first, 0), summaries.options(vocab, first, 1)):
            args = (*summaries.head(vocab, dtype), first, *given)
            wanted = call("categorical.summary", "reference", *args)
            summaries.assert_same(call("categorical.summary", "cuda", *args), wanted, 1e-5)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("first", "vocab"), [(1, 255), (300, 100), (511, 1), (summaries.FIRST + 77, 178)])
def test_summary_of_tokens_of_one_group(first, vocab, linear):
    for seed in range(3):
        args = (*summaries.head(vocab, linear=linear), first, *summaries.options(vocab, first, seed))
        wanted = call("categorical.summary", "reference", *args)
        summaries.assert_same(call("categorical.summary", "cuda", *args), wanted, 3e-5)


def test_summary_of_ids_far_outside():
    """Nothing is read there, whatever they are, and the row's other numbers do not change."""
    x, far = (
        torch.randn(4, 300),
        torch.tensor([2**63 - 1, -(2**63), summaries.FIRST - 1, summaries.FIRST + 300]),
    )
    plain = call("categorical.summary", "cuda", x, None, None, summaries.FIRST, *(None,) * 7, KEY)
    for exclude in (2**63 - 1, -(2**63), -1, summaries.FIRST - 1, summaries.FIRST + 300):
        args = (summaries.FIRST, far, torch.tensor(5.0), far.clamp(min=0), None, None, exclude, None, KEY)
        tokens, numbers = call("categorical.summary", "cuda", x, None, None, *args)
        assert torch.equal(tokens, plain[0])
        assert torch.equal(numbers[:6], plain[1][:6])
        assert numbers[6:].isnan().all()


@pytest.mark.parametrize("linear", [False, True])
def test_summaries_merge(linear, monkeypatch):
    from dlcore.triton import linear_logits

    monkeypatch.setattr(linear_logits, "_TILE", 2048)
    vocab = 2900
    x, given, key = (
        summaries.head(vocab, linear=linear, seed=2),
        summaries.options(vocab, 0, 3),
        summaries.key_of(3),
    )
    whole = call("categorical.summary", "cuda", *x, 0, *given[:7], key)
    for cuts in summaries.partition(vocab, 3):
        parts = [
            (part, *call("categorical.summary", "cuda", *tensors, part[0], *given[:7], key))
            for part, tensors in summaries.cut(x, cuts)
        ]
        summaries.assert_same(summaries.merged(parts, given[3], key), whole, 3e-5)
