"""Tokens to bits and back: orders, Gray, rankings, wrap-around, widths."""

from __future__ import annotations

import pytest
import torch

import dlcore
from dlcore import bits

ALL = torch.arange(2**16)
WAYS = [
    {"order": order, "gray": gray, "coding": coding}
    for order in ("msb", "lsb")
    for gray in (False, True)
    for coding in ("01", "pm1")
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_round_trip_of_all_codes(backend, way):
    coded = bits.encode(ALL, 16, **way)
    assert coded.dtype == torch.float32
    assert torch.equal(bits.decode(coded, **way), ALL)
    assert dlcore.last_backend("bits.encode") == dlcore.last_backend("bits.decode") == backend


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 33, 48, 61, 62])
def test_every_bit_stands_where_it_should(level, width, way):
    """Against Python's own arithmetic, at widths around whole lanes."""
    generator = torch.Generator().manual_seed(width)
    tokens = torch.randint(2**width, (3, 7), generator=generator)
    tokens.view(-1)[:2] = torch.tensor([0, 2**width - 1])
    coded = bits.encode(tokens, width, **way)
    assert coded.shape == (3, 7, width)
    for token, row in zip(tokens.flatten().tolist(), coded.view(-1, width).tolist(), strict=True):
        code = token ^ token >> 1 if way["gray"] else token
        digits = [code >> i & 1 for i in range(width)]
        digits = digits[::-1] if way["order"] == "msb" else digits
        assert row == [2 * d - 1 if way["coding"] == "pm1" else d for d in digits]
    assert torch.equal(bits.decode(coded, **way), tokens)


def test_known_codes():
    assert bits.encode(torch.tensor(6), 4).tolist() == [0, 1, 1, 0]
    assert bits.encode(torch.tensor(1), 4, order="lsb", coding="pm1").tolist() == [1, -1, -1, -1]
    assert bits.encode(torch.tensor(6), 4, gray=True).tolist() == [0, 1, 0, 1]


def test_gray_neighbours_differ_in_one_bit():
    coded = bits.encode(ALL, 16, gray=True)
    assert torch.equal((coded[1:] != coded[:-1]).sum(-1), torch.ones(2**16 - 1, dtype=torch.int64))


def test_codes_without_a_token_wrap_around(backend):
    """CoBit's raw_binary: n mod V."""
    vocab = 30522
    tokens = bits.decode(bits.encode(ALL[: 2**15], 15), vocab_size=vocab)
    assert torch.equal(tokens, ALL[: 2**15] % vocab)
    assert torch.equal(bits.decode(bits.encode(ALL[: 2**15], 15)), ALL[: 2**15])


def test_ranking_gives_the_code_of_the_rank(backend):
    generator = torch.Generator().manual_seed(3)
    ranking = torch.randperm(1000, generator=generator)
    tokens = torch.randint(1000, (50,), generator=generator)
    coded = bits.encode(tokens, 10, gray=True, ranking=ranking)
    assert torch.equal(coded, bits.encode(ranking[tokens], 10, gray=True))
    assert torch.equal(bits.decode(coded, gray=True, ranking=ranking), tokens)
    # The 24 unused codes wrap around in rank.
    unused = bits.encode(torch.arange(1000, 1024), 10)
    assert torch.equal(ranking[bits.decode(unused, ranking=ranking)], torch.arange(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [3, 16, 21])
def test_decode_reads_probabilities_of_any_dtype_and_strides(level, dtype, width):
    tokens = torch.randint(2**width, (5, 4), generator=torch.Generator().manual_seed(1))
    coded = bits.encode(tokens, width)
    probs = (0.5 + 0.3 * (coded - 0.5)).to(dtype)
    assert torch.equal(bits.decode(probs), tokens)
    wide = torch.full((4, 5, width + 3), torch.nan, dtype=dtype)
    wide[..., 2:-1] = probs.transpose(0, 1)
    assert torch.equal(bits.decode(wide[..., 2:-1].transpose(0, 1)), tokens)
    assert torch.equal(bits.decode(probs.flip(-1).contiguous().flip(-1)), tokens)


def test_a_tie_is_a_clear_bit_and_nan_breaks_its_token_alone(level):
    with dlcore.use_backend("cpu"):
        mine = bits.decode(torch.tensor([[0.5, 0.5, 0.500001], [1, torch.nan, 1], [1, 1, 0]]))
    with dlcore.use_backend("reference"):
        meant = bits.decode(torch.tensor([[0.5, 0.5, 0.500001], [1, torch.nan, 1], [1, 1, 0]]))
    assert mine.tolist() == meant.tolist() == [1, -1, 6]
    ranking = torch.tensor([2, 0, 1])
    assert bits.decode(torch.tensor([[torch.nan, 0.0], [1.0, 0.0]]), ranking=ranking).tolist() == [-1, 0]
    assert bits.decode(torch.tensor([[0.0, -1.0, 1e-30]]), coding="pm1").tolist() == [1]


def test_patch_is_a_view_and_unpatch_its_inverse():
    x = torch.arange(24.0).view(2, 12)
    rows = bits.patch(x, 3)
    assert rows.shape == (2, 4, 3)
    assert rows.data_ptr() == x.data_ptr()
    assert torch.equal(bits.unpatch(rows), x)
    assert bits.patch(torch.zeros(2, 0), 3).shape == (2, 0, 3)
    tokens = torch.randint(2**6, (2, 5), generator=torch.Generator().manual_seed(0))
    stream = bits.unpatch(bits.encode(tokens, 6))
    assert torch.equal(bits.decode(bits.patch(stream, 6)), tokens)


def test_empty_and_scalar():
    assert bits.encode(torch.zeros(0, 3, dtype=torch.int64), 4).shape == (0, 3, 4)
    assert bits.decode(torch.zeros(0, 4)).shape == (0,)
    assert bits.decode(torch.ones(4)).item() == 15
