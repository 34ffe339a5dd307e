"""Triton's draws and statistics: the numbers of the reference, the tokens of the CPU kernels."""

from __future__ import annotations

import pytest
import summaries
import torch
from triton_calls import assert_same, call, quiet
from triton_variants import missed

from dlcore import _checks as checks
from dlcore import rng
from dlcore.triton import categorical_scan, linear_logits, linear_logits_scan

pytestmark = quiet

KEY = rng.key(3)
LEAD = (3, 2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(vocab: int, dtype: torch.dtype = torch.float32, scale: float = 4.0) -> torch.Tensor:
    """Rows of which one has a NaN, one a +inf, one nothing but -inf."""
    x = scale * torch.randn(*LEAD, vocab, generator=torch.Generator().manual_seed(vocab))
    x[0, 1, 2], x[1, 0, 3], x[2, 0] = float("nan"), float("inf"), float("-inf")
    return x.to(dtype)


def row(vocab: int) -> tuple[torch.Tensor, ...]:
    """index, shift, temperature (one row greedy)."""
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(vocab, LEAD, generator=generator)
    temperature = torch.tensor([[0.7, 1.3], [1.0, 0.5], [2.0, 0.0]])
    return index, torch.tensor(0.5), temperature


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 300, 5000])
def test_stats(vocab, dtype):
    x, (index, shift, temperature) = logits(vocab, dtype), row(vocab)
    positive = temperature.clamp(min=0.1)
    for options in ((None,) * 5, (index, shift, positive, None, 2), (index, shift, positive, 5.0, 2)):
        args = (x, None, None, *options)
        expected = call("categorical.stats", "reference", *args, wide=True)
        assert_same(call("categorical.stats", "triton", *args), expected, 3e-6, 3e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [5, 300, 5000])
def test_sample_draws_the_tokens_of_the_cpu(vocab, dtype):
    x, options = logits(vocab, dtype), row(vocab)
    for args in (
        (x, None, None, *(None,) * 8, KEY),
        (x, None, None, *options, 5.0, 2, None, None, None, rng.split(KEY, LEAD)),
    ):
        expected = call("categorical.sample", "cpu", *args)
        assert_same(call("categorical.sample", "triton", *args), expected, 3e-6, 3e-6)


CUTS = [(5, None, None), (1, None, None), (None, 0.9, None), (None, 0.0, None), (None, None, 0.05)]
CUTS += [(20, 0.7, 0.01), (9999, 1.0, 0.0), (None, None, 1.0), (7, 0.99, None)]


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
    for seed in range(2):
        args = (x, None, None, index, shift, temperature, None, 2, *limits, rng.key(seed))
        expected = call("categorical.sample", "reference", *args)
        assert_same(call("categorical.sample", "triton", *args), expected, 3e-6, 3e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_truncation_with_every_option(dtype):
    """Of short numbers, whose many equals are kept by their order; with a key per row."""
    limits = torch.tensor(20), torch.tensor(0.7), torch.tensor(0.01)
    args = (logits(2600, dtype), None, None, *row(2600), 5.0, 2, *limits, rng.split(KEY, LEAD))
    expected = call("categorical.sample", "reference", *args)
    assert_same(call("categorical.sample", "triton", *args), expected, 3e-6, 3e-6)


@pytest.mark.parametrize(
    ("limit", "kept"), [((None, 0.45), {0, 1}), ((3, None), {0, 1, 2}), ((3, 0.5), {0, 1})]
)
def test_of_equals_the_first_are_kept(limit, kept):
    """Four equals: as many as top_k allows, and the one that crosses top_p."""
    x = torch.full((20, 300), float("-inf"))
    x[:, :4] = 0
    k, p = (None if v is None else torch.tensor(v) for v in limit)
    tokens, _ = call("categorical.sample", "triton", x, *(None,) * 7, k, p, None, KEY)
    assert set(tokens[0].tolist()) == kept


@pytest.mark.usefixtures("poisoned")
def test_a_draw_that_keeps_nothing_is_no_token(monkeypatch):
    """A count below 1, which no check sees on a GPU: every token is -1 or one of the vocabulary."""
    monkeypatch.setattr(checks, "reads_data", lambda x: False)
    limit = torch.tensor([[0, -5], [0, 1], [2, 0]])
    tokens, _ = call("categorical.sample", "triton", logits(300), *(None,) * 7, limit, None, None, KEY)
    assert ((tokens >= -1) & (tokens < 300)).all()
    assert tokens[0][limit < 1].eq(-1).all()


@pytest.mark.parametrize("prior", [-1, 4])
@pytest.mark.parametrize(("softcap", "exclude"), [(None, None), (None, 2), (5.0, 2)])
def test_sample_mixture(prior, softcap, exclude):
    x, (z, shift, temperature) = logits(300), row(300)
    for coefficients in ([1.0, 1, 0.2, 1, 0.5, 0], [1.0, 0, 0.5, 0, 0.3, 0], [0.0, 1, 0, 0, 0, 0.5]):
        numbers = torch.tensor(coefficients, dtype=torch.float64)
        for key in (KEY, rng.split(KEY, LEAD)):
            args = (x, None, None, z, numbers, prior, shift, temperature, softcap, exclude, key)
            expected = call("categorical.sample_mixture", "cpu", *args)
            assert_same(call("categorical.sample_mixture", "triton", *args), expected, 0, 0)


def test_rows_that_surely_stay_are_not_read():
    """Their logits are NaN, and their z stays."""
    keep = torch.tensor([1.0, 0, 1, 0, 0, 0], dtype=torch.float64).expand(*LEAD, 6).clone()
    keep[2] = torch.tensor([1.0, 0, 0, 0, 1, 0])
    x, z = torch.full((*LEAD, 300), float("nan")), torch.arange(6).view(LEAD)
    x[2, 1] = 0
    args = (x, None, None, z, keep, -1, None, None, None, None, KEY)
    tokens = call("categorical.sample_mixture", "triton", *args)[0]
    assert torch.equal(tokens[:2], z[:2])
    assert tokens[2, 0] == -1
    assert 0 <= tokens[2, 1] < 300


@pytest.mark.parametrize("offset", [0.0, -3e4, 1e5])
def test_what_is_past_the_end_never_wins(offset):
    """All logits far below 0: a lane past the ragged end would win. A common offset changes no token."""
    x = torch.randn(*LEAD, 5001, generator=torch.Generator().manual_seed(0)).mul(64).round() / 64 + offset
    args = (x, None, None, *(None,) * 8, KEY)
    expected = call("categorical.sample", "cpu", *args)
    assert_same(call("categorical.sample", "triton", *args), expected, 3e-6, 3e-6)


@pytest.mark.parametrize("enough", [1, 1 << 20])
def test_any_number_of_programs_a_row(enough, monkeypatch):
    """One program reads all of a row, or each a tile of it; there are groups enough for two blocks."""
    monkeypatch.setattr(categorical_scan, "_ENOUGH", enough)
    x = torch.randn(2, 270_000, generator=torch.Generator().manual_seed(5))
    args = (x, None, None, *(None,) * 8, KEY)
    expected = call("categorical.sample", "cpu", *args)
    assert_same(call("categorical.sample", "triton", *args), expected, 3e-6, 3e-6)


def test_strides(caplog):
    """Any leading strides; only a last dimension with gaps, or three strides, cost a copy."""
    whole = torch.randn(4, 3, 2, 600, generator=torch.Generator().manual_seed(2))
    views = {
        0: [whole, whole[:, 1], whole[::2, :, 1], whole[:, :1, :, :300], whole.transpose(0, 1)[:, :, 0]],
        1: [whole[..., ::2], whole.transpose(0, 2)],
    }
    for copies, cases in views.items():
        for x in cases:
            caplog.clear()
            args = (x, None, None, *(None,) * 8, KEY)
            with caplog.at_level("INFO", logger="dlcore"):
                drawn = call("categorical.sample", "triton", *args)
            assert caplog.text.count("copied a") == copies
            assert_same(drawn, call("categorical.sample", "cpu", *args), 3e-6, 3e-6)


@pytest.mark.parametrize("shape", [(0, 300), (2, 0, 300), (300,)])
@pytest.mark.parametrize(("op", "first"), [("categorical.sample", None), ("categorical.summary", 0)])
def test_no_rows_and_one(shape, op, first):
    args = (torch.zeros(shape), None, None, first, *(None,) * 7, KEY)
    assert_same(call(op, "triton", *args), call(op, "cpu", *args), 1e-6, 1e-30)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cut", [(None, None, None), (5, 0.9, 0.01)])
def test_a_head_is_read_tile_by_tile(cut, monkeypatch):
    """The state carries over from tile to tile: the tokens of whole rows."""
    monkeypatch.setattr(linear_logits, "_TILE", 6 * 512)
    monkeypatch.setattr(linear_logits_scan, "FEW_ROWS", 0)
    generator = torch.Generator().manual_seed(4)
    head = [torch.randn(s, generator=generator) for s in ((*LEAD, 8), (1800, 8), (1800,))]
    limits = tuple(
        None if c is None else torch.tensor(c, dtype=d)
        for c, d in zip(cut, (torch.int64, torch.float32, torch.float32), strict=True)
    )
    args = (*head, *row(1800), 30.0, 2, *limits, KEY)
    expected = call("categorical.sample", "reference", *args)
    assert_same(call("categorical.sample", "triton", *args), expected, 1e-5, 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 300, 5000])
def test_summary(vocab, dtype):
    """All of a vocabulary and a part; with all options, without a target, and with none."""
    for first in (0, summaries.FIRST):
        index, shift, target, *rest = summaries.options(vocab, first, 1)
        fewer = (index, shift, None, *rest[:-1], KEY)
        for given in ((None,) * 8, (index, shift, target, *rest), fewer):
            args = (*summaries.head(vocab, dtype), first, *given)
            wanted = call("categorical.summary", "reference", *args)
            summaries.assert_same(call("categorical.summary", "triton", *args), wanted, 1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("few", [0, 64])
@pytest.mark.parametrize("vocab", [300, 1800])
def test_summary_of_a_head(vocab, few, monkeypatch):
    """Few rows and many, tile by tile."""
    monkeypatch.setattr(linear_logits, "_TILE", summaries.LEAD.numel() * 512)
    monkeypatch.setattr(linear_logits_scan, "FEW_ROWS", few)
    for seed in (1, 2):
        given = summaries.options(vocab, summaries.FIRST, seed)
        for target in (given[2], None):
            args = (*summaries.head(vocab, linear=True), summaries.FIRST, *given[:2], target, *given[3:])
            wanted = call("categorical.summary", "reference", *args)
            summaries.assert_same(call("categorical.summary", "triton", *args), wanted, 3e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("first", "vocab"), [(1, 255), (300, 100), (511, 1), (summaries.FIRST + 77, 178)])
def test_summary_of_tokens_of_one_group(first, vocab, linear):
    for seed in range(3):
        args = (*summaries.head(vocab, linear=linear), first, *summaries.options(vocab, first, seed))
        wanted = call("categorical.summary", "reference", *args)
        summaries.assert_same(call("categorical.summary", "triton", *args), wanted, 3e-5)


@pytest.mark.usefixtures("poisoned")
def test_summary_of_ids_far_outside():
    """Nothing is read there, whatever they are, and the row's other numbers do not change."""
    far = torch.tensor([2**63 - 1, -(2**63), summaries.FIRST - 1, summaries.FIRST + 300])
    for inputs in ((torch.randn(4, 300), None, None), (torch.randn(4, 8), torch.randn(300, 8), None)):
        plain = call("categorical.summary", "triton", *inputs, summaries.FIRST, *(None,) * 7, KEY)
        for target, exclude in ((far.clamp(min=0), 2**40), (None, -1), (None, summaries.FIRST + 300)):
            args = (*inputs, summaries.FIRST, far, torch.tensor(5.0), target, None, None, exclude, None, KEY)
            tokens, numbers = call("categorical.summary", "triton", *args)
            assert torch.equal(tokens, plain[0])
            torch.testing.assert_close(numbers[:6], plain[1][:6], rtol=1e-6, atol=1e-6)
            assert numbers[6:].isnan().all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("linear", [False, True])
def test_summaries_merge(linear):
    vocab = 1500
    x, given, key = (
        summaries.head(vocab, linear=linear, seed=2),
        summaries.options(vocab, 0, 3),
        summaries.key_of(3),
    )
    whole = call("categorical.summary", "triton", *x, 0, *given[:7], key)
    for cuts in summaries.partition(vocab, 3, shards=(2, 5)):
        parts = [
            (part, *call("categorical.summary", "triton", *tensors, part[0], *given[:7], key))
            for part, tensors in summaries.cut(x, cuts)
        ]
        summaries.assert_same(summaries.merged(parts, given[3], key), whole, 3e-5)


def test_every_variant_was_launched():
    assert missed("categorical") == []
