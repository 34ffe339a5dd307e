"""Bitstream diffusion in Triton: the kernels against float64 and the CPU's, in every form and layout."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from conftest import DEVICE
from test_bits import DTYPES, FORMS, double, inputs, levels_of, strided
from torch import Tensor
from triton_variants import missed

import dlcore
from dlcore import bits, rng

KEY = rng.key(5)
#: Rows of one bit, several in a tile, a tile and a bit, and a second span.
SHAPES = [(3, 1), (5, 2, 16), (2, 257), (2, 1500)]


def on_device(*values: object) -> tuple[object, ...]:
    return tuple(v.to(DEVICE) if isinstance(v, Tensor) else v for v in values)


def wide(*values: object) -> tuple[object, ...]:
    """Tensors in float64, anything else as it is."""
    return tuple(v.double() if isinstance(v, Tensor) else v for v in values)


def triton(op: str, *args: object, **options: object) -> tuple[Tensor, ...]:
    """What Triton makes of it, on the CPU."""
    options = dict(zip(options, on_device(*options.values()), strict=True))
    with dlcore.use_backend("triton"):
        result = getattr(bits, op)(*on_device(*args), **options)
    return tuple(r.cpu() for r in (result if isinstance(result, tuple) else (result,)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coding", ["01", "pm1"])
def test_posterior_and_step_match_float64(dtype, shape, coding):
    x, residual, _ = inputs(shape, dtype)
    sigma = levels_of(shape, "row")
    (probs,) = triton("posterior", x, sigma, residual, coding=coding)
    exact = bits.posterior(*double(x, sigma, residual), coding=coding)
    assert probs.dtype == torch.float32
    near = exact > 1e-4
    torch.testing.assert_close(probs.double()[near], exact[near], rtol=2e-6, atol=0)
    # A logit of 86 in float32 is known to 4e-6, and so is its exponential.
    torch.testing.assert_close(probs.double(), exact, rtol=8e-6, atol=1e-36)
    (filtered,) = triton("matched_filter", x, sigma, coding=coding)
    meant = bits.matched_filter(*double(x, sigma), coding=coding)
    torch.testing.assert_close(filtered.double(), meant, rtol=4e-7, atol=1e-7)
    moved, same = triton("step", x, residual, sigma, 0.5 * sigma, coding=coding)
    assert torch.equal(same, probs)
    meant, _ = bits.step(*double(x, residual, sigma), 0.5 * sigma.double(), coding=coding)
    torch.testing.assert_close(moved.double(), meant, rtol=1e-6, atol=1e-6)
    (alone,) = triton("posterior", x, sigma, coding=coding)
    torch.testing.assert_close(
        alone.double(), bits.posterior(*double(x, sigma), coding=coding), rtol=8e-6, atol=0
    )


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5,), (3, 2, 33), (2, 1100)])
@pytest.mark.parametrize("own", [False, True], ids=["shared key", "key per row"])
def test_noise_is_that_of_the_cpu(form, shape, own):
    """To rounding, with levels of every form."""
    x, residual, clean = inputs(shape)
    sigma = levels_of(shape, form)
    key = rng.split(KEY, shape[:-1]) if own else KEY
    gamma = 0.1 if form == "number" else torch.where(torch.as_tensor(sigma) > 0.6, 0.3, 0.0)
    options = {"gamma_next": gamma, "key": key}
    got = triton("step", x, residual, sigma, 0.5 * sigma, **options)
    for a, b in zip(got, bits.step(x, residual, sigma, 0.5 * sigma, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)
    for noiseless in (x.bfloat16(), x):
        (got,) = triton("corrupt", noiseless, sigma, key=key)
        torch.testing.assert_close(got, bits.corrupt(noiseless, sigma, key=key), rtol=1e-6, atol=1e-6)
    assert (got - x).std() > 0.2 or got.numel() < 9
    for kind in ("squared", "bce"):
        (got,) = triton("loss", residual, x, clean, sigma, kind=kind)
        torch.testing.assert_close(got, bits.loss(residual, x, clean, sigma, kind=kind), rtol=1e-6, atol=1e-7)


def loss_gradients(residual, x, clean, sigma, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (residual, x)]
    mean = bits.loss(*leaves, clean, sigma, **options)
    weights = torch.linspace(1, 2, mean.numel(), dtype=mean.dtype).view(mean.shape)
    grads = torch.autograd.grad((mean * weights.to(mean.device)).sum(), leaves)
    return [mean.detach().cpu(), *(g.cpu() for g in grads)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["squared", "bce"])
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 16), (2, 1500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_its_gradients_match_float64(kind, coding, shape, dtype):
    x, residual, clean = inputs(shape, dtype)
    clean = 2 * clean - 1 if coding == "pm1" else clean
    # A clip that binds for some bits, which then hand no gradient to x.
    options = {"kind": kind, "coding": coding, "clip": 3.0}
    with dlcore.use_backend("triton"):
        got = loss_gradients(*on_device(residual, x, clean), 0.4, **options)
        assert dlcore.last_backend("bits.loss_backward") == "triton"
    want = loss_gradients(*double(residual, x, clean), 0.4, **options)
    torch.testing.assert_close(got[0].double(), want[0], rtol=2e-6, atol=1e-9)
    for a, b in zip(got[1:], want[1:], strict=True):
        assert a.dtype == dtype
        # Relative to each entry: saturated bits have small gradients that must be right too.
        torch.testing.assert_close(a.double(), b, rtol=2e-5 + torch.finfo(dtype).eps, atol=1e-34)
    assert shape == (3, 1) or 0 < int((got[2] == 0).sum()) < got[2].numel()


def test_only_the_gradients_asked_for():
    x, residual, clean = (t.to(DEVICE) for t in inputs((2, 40)))
    residual.requires_grad_()
    with dlcore.use_backend("triton"):
        (alone,) = torch.autograd.grad(bits.loss(residual, x, clean, 0.4).sum(), residual)
        x.requires_grad_()
        both = torch.autograd.grad(bits.loss(residual, x, clean, 0.4).sum(), (residual, x))
    assert torch.equal(alone, both[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_posterior_gradients(dtype):
    x, residual, _ = inputs((3, 50), dtype)

    def gradients(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        total = (bits.posterior(leaves[0], 0.6, leaves[1], clip=2.0) ** 2).sum()
        total = total + bits.matched_filter(leaves[0], 0.6, clip=2.0).sum()
        return torch.autograd.grad(total, leaves)

    with dlcore.use_backend("triton"):
        got = gradients(*on_device(x, residual))
    for a, b in zip(got, gradients(*double(x, residual)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.cpu().double(), b, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-6)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", FORMS)
def test_levels_of_every_form_match_float64(form):
    """Without noise or residual; gradients in the residual alone and in both."""
    x, residual, clean = inputs((3, 40))
    sigma = levels_of((3, 40), form)
    half = 0.5 * sigma
    calls: list[tuple[str, tuple[object, ...]]] = [
        ("matched_filter", (x, sigma)),
        ("posterior", (x, sigma, residual)),
        ("step", (x, None, sigma, half)),
    ]
    for op, args in calls:
        with dlcore.use_backend("reference"):
            meant = getattr(bits, op)(*wide(*args))
        for a, b in zip(triton(op, *args), meant if isinstance(meant, tuple) else (meant,), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=1e-6)
    for kind, count in itertools.product(("squared", "bce"), (1, 2)):
        with dlcore.use_backend("triton"):
            got = first_gradients(count, kind, *on_device(sigma, residual, x, clean))
        want = first_gradients(count, kind, *wide(sigma, residual, x, clean))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-9)


def first_gradients(count: int, kind: str, sigma: object, *tensors: Tensor) -> list[Tensor]:
    """Those of a loss in the first `count` of residual and x."""
    leaves = [t.detach().requires_grad_(i < count) for i, t in enumerate(tensors)]
    total = bits.loss(*leaves, sigma, kind=kind).sum()
    return [g.cpu() for g in torch.autograd.grad(total, leaves[:count])]


@pytest.mark.parametrize("layout", ["padded", "transposed", "last"])
def test_strides(layout, caplog):
    x, residual, clean = inputs((3, 2, 33))
    a, b, c = (strided(t)[layout] for t in (x, residual, clean))
    options = {"gamma_next": 0.2, "key": KEY}
    with caplog.at_level("INFO", logger="dlcore"):
        got = triton("step", a, b, 0.5, 0.4, **options)
    assert ("copied" in caplog.text) == (layout == "last")
    for one, other in zip(got, triton("step", x, residual, 0.5, 0.4, **options), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(*triton("loss", b, a, c, 0.5), *triton("loss", residual, x, clean, 0.5))
    row = torch.randn(1, 33).expand(4, 33)
    assert torch.equal(*triton("posterior", row, 0.5), *triton("posterior", row.contiguous(), 0.5))
    for empty in triton("step", x[:0], residual[:0], 0.5, 0.4, **options):
        assert empty.shape == (0, 2, 33)


def test_ends_of_sigma():
    """σ → 0: the bit that x is nearer to, 1/2 between; σ → ∞: a fair bit; σ' = 0: the posterior mean."""
    x = torch.tensor([[-3.0, 0.4999, 0.5, 0.5001, 9.0]])
    for sigma in (0.0, 1e-20, 1e-6):
        assert triton("matched_filter", x, sigma)[0].tolist() == [[-30, -30, 0, 30, 30]]
        (probs,) = triton("posterior", x, sigma, clip=math.inf)
        torch.testing.assert_close(probs, torch.tensor([[0, 0, 0.5, 1, 1]]), rtol=0, atol=1e-36)
    assert triton("posterior", x, 1e30)[0].eq(0.5).all()
    moved, probs = triton("step", x, None, 0.2, 0.0)
    assert torch.equal(moved, probs)
    huge = torch.tensor([[300.0, -300.0]])
    (probs,) = triton("posterior", huge, 0.001, huge)
    torch.testing.assert_close(probs, torch.tensor([[1.0, 0.0]]), rtol=0, atol=1e-36)
    (loss,) = triton("loss", huge, huge, torch.tensor([[0.0, 1.0]]), 0.001, kind="bce")
    assert loss.item() == pytest.approx(330)


def test_where_sigma_stays_x_stays_to_the_bit():
    x, residual, _ = inputs((2, 50))
    sigma = torch.full((2, 50), 0.3)
    prompt = torch.arange(50).expand(1, 50) < 10
    after, gamma = torch.where(prompt, sigma, 0.1), torch.where(prompt, 0.0, 0.2)
    moved, _ = triton("step", x, residual, sigma, after, gamma_next=gamma, key=KEY)
    assert torch.equal(moved[:, :10], x[:, :10])
    assert (moved[:, 10:] != x[:, 10:]).all()


def test_nan_stays_where_it_is():
    x, residual, clean = inputs((2, 40))
    x[0, 3], residual[1, 17] = torch.nan, torch.nan
    wanted = x.isnan() | residual.isnan()
    for sigmas in ((0.5, 0.4), (0.5, 0.5)):
        for result in triton("step", x, residual, *sigmas, gamma_next=0.1, key=KEY):
            assert torch.equal(result.isnan(), wanted)
    x[0, 3] = 0
    for kind in ("squared", "bce"):
        assert triton("loss", residual, x, clean, 0.5, kind=kind)[0].isnan().tolist() == [False, True]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [1, 15, 16, 33, 62])
@pytest.mark.parametrize("order", ["msb", "lsb"])
@pytest.mark.parametrize("gray", [False, True])
def test_codes(width, order, gray):
    """As on the CPU, with codes that wrap around and bits that are NaN."""
    tokens = torch.randint(0, 2 ** min(width, 62), (3, 30), generator=torch.Generator().manual_seed(width))
    tokens[0, :2] = torch.tensor([0, 2**width - 1])
    options = {"order": order, "gray": gray, "coding": "pm1"}
    (encoded,) = triton("encode", tokens, width, **options)
    assert torch.equal(encoded, bits.encode(tokens, width, **options))
    assert torch.equal(*triton("decode", encoded, **options), tokens)
    noisy = (
        encoded + 0.5 * torch.randn(encoded.shape, generator=torch.Generator().manual_seed(1))
    ).bfloat16()
    noisy[1, 7, width // 2] = math.nan
    vocab = 2 ** (width - 1) + 1 if width > 1 else None
    (decoded,) = triton("decode", noisy, vocab_size=vocab, **options)
    assert torch.equal(decoded, bits.decode(noisy, vocab_size=vocab, **options))
    assert decoded[1, 7] == -1


def test_every_variant_was_launched():
    assert missed("bits") == []
