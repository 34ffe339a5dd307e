"""Heads of few rows on Triton: the tokens of the CPU, the numbers of the reference, and no logits kept."""

from __future__ import annotations

import pytest
import torch
from triton_calls import assert_same, call, quiet
from triton_variants import missed

from dlcore import rng
from dlcore.triton import categorical_scan, linear_logits_scan

pytestmark = [quiet, pytest.mark.usefixtures("poisoned")]

KEY = rng.key(3)
NOTHING = (None,) * 8
#: (rows, vocabulary, depth): less than a group and several, depths around blocks, two tiles of rows.
SHAPES = [(1, 5, 3), (6, 300, 70), (3, 1800, 130), (35, 300, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _no_tiles(monkeypatch):
    """Nothing falls back to a workspace of logits."""
    monkeypatch.setattr(categorical_scan, "scan_tile", None)


def head(rows, vocab, depth, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(vocab)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return 4 * normal(rows, depth) / depth**0.5, normal(vocab, depth), normal(vocab) if bias else None


def row(rows, vocab):
    """index, shift, temperature (one row greedy)."""
    generator = torch.Generator().manual_seed(1)
    temperature = 0.5 + torch.rand(rows, generator=generator)
    temperature[-1] = 0
    return torch.randint(vocab, (rows,), generator=generator), torch.tensor(0.5), temperature


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sample(shape, dtype):
    rows, vocab, _ = shape
    options = (*row(rows, vocab), 5.0, 2)
    for bias, rest in (
        (False, (*NOTHING, KEY)),
        (True, (*options, None, None, None, rng.split(KEY, [rows]))),
    ):
        args = (*head(*shape, dtype, bias), *rest)
        tokens, numbers = call("categorical.sample", "triton", *args)
        assert torch.equal(tokens, call("categorical.sample", "cpu", *args)[0])
        expected = call("categorical.sample", "reference", *args, wide=True)[1]
        assert_same((numbers,), (expected,), 1e-5, 1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_stats(shape):
    index, shift, temperature = row(*shape[:2])
    for options in ((None,) * 5, (index, shift, temperature.clamp(min=0.3), None, 2)):
        args = (*head(*shape, bias=options[0] is not None), *options)
        expected = call("categorical.stats", "reference", *args, wide=True)
        assert_same(call("categorical.stats", "triton", *args), expected, 1e-5, 1e-5)


@pytest.mark.parametrize("prior", [-1, 4])
def test_sample_mixture(prior):
    """Of 35 rows in two tiles, those of the first and one of the second surely stay."""
    h, (z, shift, temperature) = head(35, 600, 20), row(35, 600)
    h[0][2], h[0][33] = float("nan"), float("nan")
    numbers = torch.tensor([1.0, 1, 0.2, 1, 0.5, 0]).double().expand(35, 6).clone()
    numbers[[*range(32), 34]] = torch.tensor([1.0, 0, 1, 0, 0, 0]).double()
    for coefficients, softcap, key in ((numbers, 5.0, rng.split(KEY, [35])), (numbers[32], None, KEY)):
        args = (*h, z, coefficients, prior, shift, temperature, softcap, 3, key)
        tokens = call("categorical.sample_mixture", "triton", *args)
        assert_same(tokens, call("categorical.sample_mixture", "cpu", *args), 0, 0)
        assert tokens[0][33] == -1
    few = slice(30, 35)
    rows = (z[few], numbers[few], prior, shift, temperature[few], 5.0, 3, rng.split(KEY, [5]))
    args = (h[0][few], *h[1:], *rows)
    tokens = call("categorical.sample_mixture", "triton", *args)
    assert_same(tokens, call("categorical.sample_mixture", "cpu", *args), 0, 0)


def test_rows_without_a_law():
    """A NaN, a +inf, nothing but -inf: no token, and the other rows are untouched."""
    hidden, weight, bias = head(6, 300, 8)
    bias[7] = float("-inf")
    hidden[1], hidden[3, 0], weight[:, 0] = float("nan"), float("inf"), weight[:, 0].abs()
    hidden[4, 0] = float("-inf")
    args = (hidden, weight, bias, *NOTHING, KEY)
    tokens, numbers = call("categorical.sample", "triton", *args)
    expected = call("categorical.sample", "cpu", *args)
    assert_same((tokens, numbers), expected, 1e-5, 1e-5)
    assert tokens[0][[1, 3, 4]].tolist() == [-1, -1, -1]


def test_what_is_past_the_end_never_wins():
    """All logits far below 0: a column past the ragged end would win."""
    hidden, weight, bias = head(4, 301, 8)
    args = (hidden, weight, bias - 3e4, *NOTHING, KEY)
    assert_same(
        call("categorical.sample", "triton", *args), call("categorical.sample", "cpu", *args), 1e-5, 5e-3
    )


def test_equals_go_to_the_lowest_token():
    args = (torch.ones(2, 4), torch.ones(600, 4), None, *(None,) * 5)
    argmax, numbers = call("categorical.stats", "triton", *args)
    assert argmax.tolist() == [0, 0]
    assert numbers[2].tolist() == [0.0, 0.0]


def test_strides_and_mixed_dtypes(caplog):
    """Rows with gaps, weights stored by depth, or narrower than the hidden state: they stay in place. A bias
    may have any stride."""
    hidden, weight, bias = head(8, 300, 24)
    rows = torch.stack([hidden, hidden], 1).view(4, 2, 2, 24)[:, :, 0]
    apart, one = torch.stack([bias, -bias], 1)[:, 0], torch.ones(1).expand(300)
    cases = [(rows, weight, bias), (hidden, weight.T.contiguous().T, apart), (hidden, weight.bfloat16(), one)]
    with caplog.at_level("INFO", logger="dlcore"):
        for x, w, b in cases:
            args = (x, w, b, *NOTHING, KEY)
            expected = call("categorical.sample", "cpu", *args)
            assert_same(call("categorical.sample", "triton", *args), expected, 1e-5, 1e-5)
    assert "copied a" not in caplog.text


def test_no_rows_and_many(monkeypatch):
    """An empty head, and one of more rows than are few, which is read tile by tile."""
    _, weight, bias = head(1, 300, 8)
    args = (torch.zeros(0, 8), weight, bias, *NOTHING, KEY)
    assert call("categorical.sample", "triton", *args)[0].shape == (2, 0)
    many = torch.zeros(linear_logits_scan.FEW_ROWS + 1, 8)
    with pytest.raises(TypeError, match="not callable"):
        call("categorical.sample", "triton", many, weight, bias, *NOTHING, KEY)


def test_every_variant_was_launched():
    assert missed("linear_logits_scan") == []
