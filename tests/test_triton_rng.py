"""Triton's noise: known answers, the same bits as everywhere, and both ends of the exponential."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from conftest import DEVICE
from test_rng import FROZEN, KNOWN
from triton_variants import missed

import dlcore
from dlcore import rng
from dlcore.reference import rng as reference
from dlcore.triton import launch, noise


@triton.jit
def _philox_kernel(words, out):
    """The block of counter (w0, w1, w2, w3) under the key (w4, w5), by way of `noise.block`."""
    w = tl.load(words + tl.arange(0, 8))
    at = tl.arange(0, 8)
    low = tl.sum(tl.where(at == 0, w, 0), 0)
    offset = tl.sum(tl.where(at == 2, w, 0), 0) | (tl.sum(tl.where(at == 3, w, 0), 0) << 32)
    seed = tl.sum(tl.where(at == 4, w, 0), 0) | (tl.sum(tl.where(at == 5, w, 0), 0) << 32)
    high = tl.sum(tl.where(at == 1, w, 0), 0)
    a, b, c, d = noise.block(seed, offset, 0, low | (high << 32))
    tl.store(out, a.to(tl.int64))
    tl.store(out + 1, b.to(tl.int64))
    tl.store(out + 2, c.to(tl.int64))
    tl.store(out + 3, d.to(tl.int64))


@triton.jit
def _of_bits_kernel(low, high, gumbel, sine, cosine, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    words = tl.load(high + at).to(tl.uint32)
    tl.store(gumbel + at, noise.gumbel(tl.load(low + at).to(tl.uint32), words))
    s, c = noise.sine_cosine(words)
    tl.store(sine + at, s)
    tl.store(cosine + at, c)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_known_answers(counter, key, answer):
    words = torch.tensor([*counter, *key, 0, 0], device=DEVICE)
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](words, out)
    assert tuple(out.tolist()) == answer


def test_stream_v1_is_frozen():
    key = rng.key(7, 3, device=DEVICE)
    with dlcore.use_backend("triton"):
        assert rng.fold_in(key, 5).tolist() == [7, FROZEN["fold_in"]]
        for name in ("uniform", "normal", "gumbel"):
            drawn = getattr(rng, name)(key, 3, dtype=torch.float64).cpu()
            expected = torch.tensor(FROZEN[name], dtype=torch.float64)
            torch.testing.assert_close(drawn, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["uniform", "normal", "gumbel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_the_reference(name, dtype):
    keys = rng.split(rng.key(-3, 2**62), (2, 3))
    with dlcore.use_backend("reference"):
        expected = getattr(rng, name)(keys, (5, 57), dtype=dtype)
    with dlcore.use_backend("triton"):
        drawn = getattr(rng, name)(keys.to(DEVICE), (5, 57), dtype=dtype).cpu()
    torch.testing.assert_close(drawn, expected, rtol=2e-15 if dtype == torch.float64 else 6e-8, atol=1e-12)


def test_normals_are_the_doubles_of_the_cpu():
    """Of relative error 2e-15, next to their zeros absolute; so rounded they are all but surely the same."""
    keys = rng.split(rng.key(5), 3)
    wide = rng.normal(keys, 20_001, dtype=torch.float64)
    with dlcore.use_backend("triton"):
        drawn = rng.normal(keys.to(DEVICE), 20_001, dtype=torch.float64).cpu()
        rounded = rng.normal(keys.to(DEVICE), 20_001).cpu()
    torch.testing.assert_close(drawn, wide, rtol=2e-15, atol=2e-15)
    assert torch.equal(rounded, wide.float())


def test_fold_in_of_strided_keys():
    keys = rng.split(rng.key(1), 300).unsqueeze(1).expand(300, 2, 2)
    data = torch.arange(-300, 300).view(300, 2)
    expected = rng.fold_in(keys, data)
    with dlcore.use_backend("triton"):
        assert torch.equal(rng.fold_in(keys.to(DEVICE), data.to(DEVICE)).cpu(), expected)
        assert rng.uniform(keys.to(DEVICE), (0,)).shape == (300, 2, 0)


def test_noise_of_given_bits():
    """The draws' own float32 noise: both ends, every power of two, its neighbours, random ones."""
    powers = [1 << k for k in range(64)]
    patterns = [0, 2**64 - 1, *powers, *(p - 1 for p in powers), *(2**64 - 1 - p for p in powers)]
    generator = random.Random(1)
    patterns += [generator.getrandbits(64) for _ in range(4096 - len(patterns))]
    high = torch.tensor([p >> 32 for p in patterns])
    low = torch.tensor([p & 0xFFFFFFFF for p in patterns])
    gumbel, sine, cosine = torch.empty(3, 4096, device=DEVICE)
    _of_bits_kernel[(1,)](low.to(DEVICE), high.to(DEVICE), gumbel, sine, cosine, COUNT=4096)
    expected = -torch.log(reference.exponential(high, low))
    assert expected.max() > 45
    assert expected.min() < -3.8
    torch.testing.assert_close(gumbel.cpu().double(), expected, rtol=2.4e-7, atol=2.4e-7)
    angle = high.double() * (2 * torch.pi / 2**32)
    torch.testing.assert_close(sine.cpu().double(), torch.sin(angle), rtol=0, atol=2**-23)
    torch.testing.assert_close(cosine.cpu().double(), torch.cos(angle), rtol=0, atol=2**-23)


def test_the_first_launch_of_a_variant_is_logged(caplog, monkeypatch):
    """As Triton hands it back: a compiled kernel for each variant."""
    monkeypatch.setattr(launch, "watch", None)
    variants = {16: object(), 32: object()}

    class Kernel:
        __name__, arg_names = "some_kernel", ("x", "BLOCK")

        def __getitem__(self, _: tuple[int, ...]) -> Callable[..., object]:
            return lambda x, BLOCK: variants[BLOCK]

    x = torch.zeros(3, device=DEVICE)
    with caplog.at_level("INFO", logger="dlcore"):
        for block in (16, 32, 16, 32):
            launch.launch(Kernel(), 1, x, x, BLOCK=block)
    said = [r.message.split(" was")[0] for r in caplog.records]
    assert said == ["triton: some_kernel [BLOCK=16]", "triton: some_kernel [BLOCK=32]"]


def test_every_variant_was_launched():
    assert missed("rng") == []
