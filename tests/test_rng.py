"""Noise stream v1: known answers, agreement of backends, independence, distributions."""

from __future__ import annotations

import math
import random

import pytest
import torch
from scipy import stats

import dlcore
from dlcore import _C, rng
from dlcore.reference import rng as reference

# Random123's published answers for philox4x32-10: counter, key, result.
KNOWN = [
    ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter, key, answer):
    assert tuple(_C.philox(counter, key)) == answer
    words = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in words) == answer


FROZEN = {
    "fold_in": -1874779377919916822,
    "gumbel": [2.023882908644399, 0.08801801922147866, 0.4845894714137472],
    "normal": [-0.4163176450328285, -0.30159968161119155, -1.0991332748234017],
    "sample": [999, 702, 844, 936, 961, 299],
    "uniform": [0.1237828886584798, 0.5997813977679967, 0.459872475030691],
}


def test_stream_v1_is_frozen(backend):
    """A change of any of these numbers is a new stream version."""
    key = rng.key(7, 3)
    assert rng.fold_in(key, 5).tolist() == [7, FROZEN["fold_in"]]
    for name in ("uniform", "normal", "gumbel"):
        drawn = getattr(rng, name)(key, 3, dtype=torch.float64)
        torch.testing.assert_close(drawn, torch.tensor(FROZEN[name], dtype=torch.float64), rtol=1e-14, atol=0)
    logits = torch.linspace(-2, 2, 1000).expand(6, -1)
    assert dlcore.categorical.sample(logits, key=key).tokens.tolist() == FROZEN["sample"]


@pytest.mark.parametrize("name", ["uniform", "normal", "gumbel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backends_agree(name, dtype):
    keys = rng.split(rng.key(-3, 2**62), (2, 3))
    with dlcore.use_backend("reference"):
        expected = getattr(rng, name)(keys, (5, 7), dtype=dtype)
    drawn = getattr(rng, name)(keys, (5, 7), dtype=dtype)
    assert dlcore.last_backend(f"rng.{name}") == "cpu"
    torch.testing.assert_close(drawn, expected, rtol=2e-15 if dtype == torch.float64 else 6e-8, atol=1e-12)
    torch.testing.assert_close(drawn[1, 2], getattr(rng, name)(keys[1, 2], (5, 7), dtype=dtype))


def test_normal_is_the_double_rounded_once(level):
    """On every ISA level, for odd lengths too; the tail and both signs of small ones are there."""
    key = rng.split(rng.key(5), 3)
    wide = rng.normal(key, 40_001, dtype=torch.float64)
    with dlcore.use_backend("reference"):
        expected = rng.normal(key, 40_001, dtype=torch.float64)
    # Near its zeros a sine of a rounded angle is off by the angle's rounding, in the reference.
    torch.testing.assert_close(wide, expected, rtol=1e-15, atol=8e-15)
    assert torch.equal(rng.normal(key, 40_001), expected.float())
    assert wide.abs().max() > 4
    assert wide.abs().min() < 1e-4


LAWS = {"uniform": stats.uniform.cdf, "normal": stats.norm.cdf, "gumbel": stats.gumbel_r.cdf}


@pytest.mark.parametrize("name", LAWS)
def test_distribution(name):
    drawn = getattr(rng, name)(rng.key(11), 200_001, dtype=torch.float64).numpy()
    assert stats.kstest(drawn, LAWS[name]).pvalue > 1e-4
    assert stats.kstest(1.02 * drawn + 0.01, LAWS[name]).pvalue < 1e-4
    # Neighbours come from one Philox block and must not know of each other.
    assert abs(stats.spearmanr(drawn[:-1], drawn[1:]).statistic) < 4 / math.sqrt(len(drawn))


def test_gumbel_reaches_its_exact_tail():
    zero, ones = torch.tensor([0]), torch.tensor([0xFFFFFFFF])
    largest = -torch.log(reference.exponential(zero, zero))
    smallest = -torch.log(reference.exponential(ones, ones))
    assert largest.item() == pytest.approx(65 * math.log(2))
    assert smallest.item() == pytest.approx(-math.log(65 * math.log(2)))


def test_kernel_gumbel_of_given_bits(level):
    """The draw's own noise of given bits: both ends, every power of two, its neighbours, random ones.

    Statistics can't see this: a draw of two levels hides a tail cut at 2^-24. Here such a cut is off by 28.
    """
    powers = [1 << k for k in range(64)]
    patterns = [0, 2**64 - 1, *powers, *(p - 1 for p in powers), *(2**64 - 1 - p for p in powers)]
    patterns += [random.Random(1).getrandbits(64) for _ in range(4096)]
    patterns += [0] * (-len(patterns) % 16)
    high, low = [p >> 32 for p in patterns], [p & 0xFFFFFFFF for p in patterns]
    drawn = torch.tensor(_C.gumbel_of_bits(high, low), dtype=torch.float64)
    expected = -torch.log(reference.exponential(torch.tensor(high), torch.tensor(low)))
    assert expected.max() > 45
    assert expected.min() < -3.8
    torch.testing.assert_close(drawn, expected, rtol=2.4e-7, atol=2.4e-7)


def test_uniform_never_returns_one():
    almost = torch.tensor([1 - 2.0**-54], dtype=torch.float64)
    assert almost.float().item() == 1
    below_one = 1 - torch.finfo(torch.float32).eps / 2
    assert rng.uniform(rng.key(0), 100_000).max() <= below_one < 1


def test_neighbouring_keys_share_no_row():
    """Offsets next to each other, seeds next to each other, and shifted rows: all different."""
    rows = torch.arange(64)
    keys = [rng.fold_in(rng.key(s, o), rows) for s in range(4) for o in range(4)]
    drawn = torch.cat([rng.uniform(k, 1, dtype=torch.float64).flatten() for k in keys])
    assert drawn.unique().numel() == drawn.numel()


def test_manual_seed_governs_and_generators_are_used():
    logits = torch.zeros(4, 100)
    torch.manual_seed(5)
    first = dlcore.categorical.sample(logits).tokens
    second = dlcore.categorical.sample(logits).tokens
    torch.manual_seed(5)
    assert torch.equal(first, dlcore.categorical.sample(logits).tokens)
    assert not torch.equal(first, second)
    one, two = torch.Generator().manual_seed(9), torch.Generator().manual_seed(9)
    draw = [dlcore.categorical.sample(logits, generator=g).tokens for g in (one, two)]
    assert torch.equal(*draw)


def test_split_and_fold_in_broadcast():
    key = rng.key(1)
    assert torch.equal(rng.split(key, (2, 3)).view(-1, 2), rng.fold_in(key, torch.arange(6)))
    grid = rng.fold_in(rng.split(key, 2).unsqueeze(1), torch.arange(3))
    assert grid.shape == (2, 3, 2)
    assert torch.equal(grid[1, 2], rng.fold_in(rng.fold_in(key, 1), 2))
    assert rng.uniform(key, (0, 3)).shape == (0, 3)


BAD = [
    (lambda: rng.key(2**63), ValueError, r"rng.key: seed must fit in 64 bits"),
    (lambda: rng.key(1.5), TypeError, r"rng.key: seed must be an int, got float 1.5"),
    (lambda: rng.fold_in(rng.key(0), 1.7), TypeError, r"rng.fold_in: data must be an int"),
    (lambda: rng.split(3, 2), TypeError, r"rng.split: key must be an int64 Tensor, got int 3"),
    (lambda: rng.split(rng.key(0), -2), ValueError, r"rng.split: shape must not be negative"),
    (
        lambda: rng.fold_in(torch.zeros(3, dtype=torch.int64), 1),
        ValueError,
        r"rng.fold_in: key must have shape",
    ),
    (
        lambda: rng.fold_in(torch.zeros(2), 1),
        TypeError,
        r"rng.fold_in: key must be an int64 Tensor, got float32",
    ),
    (lambda: rng.fold_in(rng.key(0), torch.zeros(3)), TypeError, r"rng.fold_in: data must be"),
    (
        lambda: rng.fold_in(rng.split(rng.key(0), 2), torch.arange(3)),
        ValueError,
        r"rng.fold_in: data must broadcast with \(2,\), got \(3,\)",
    ),
    (lambda: rng.split(rng.split(rng.key(0), 2), 2), ValueError, r"rng.split: key must have shape \(2,\)"),
    (lambda: rng.uniform(rng.key(0), -1), ValueError, r"rng.uniform: shape must not be negative"),
    (lambda: rng.normal(rng.key(0), 2, dtype=torch.int64), TypeError, r"rng.normal: dtype must be"),
    (lambda: rng.gumbel(torch.zeros(2), 2), TypeError, r"rng.gumbel: key must be an int64"),
    (lambda: rng.fold_in(None, 1), TypeError, r"rng.fold_in: key must be an int64 Tensor, got NoneType"),
    (lambda: rng.uniform(None, (2,)), TypeError, r"rng.uniform: key must be an int64 Tensor, got NoneType"),
    (
        lambda: rng.uniform(rng.key(0), None),
        TypeError,
        r"rng.uniform: shape must be an int or ints, got None",
    ),
    (lambda: rng.uniform(rng.key(0), 2.5), TypeError, r"rng.uniform: shape must be .* got float 2.5"),
    (lambda: rng.normal(rng.key(0), "ab"), TypeError, r"rng.normal: shape must be .* got str 'ab'"),
    (lambda: rng.gumbel(rng.key(0), True), TypeError, r"rng.gumbel: shape must be .* got bool True"),
    (lambda: rng.split(rng.key(0), 2.0), TypeError, r"rng.split: shape must be .* got float 2.0"),
    (
        lambda: rng.split(rng.key(0), (2, None)),
        TypeError,
        r"rng.split: shape must be .* got tuple \(2, None\)",
    ),
    (
        lambda: rng.fold_in(rng.key(0), torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        r"rng.fold_in: data must be on cpu, got meta",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
