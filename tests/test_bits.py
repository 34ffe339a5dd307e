"""dlcore.bits: kernels against the float64 meaning, edges, noise, bit equality."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import levels
from scipy import stats
from torch import Tensor

import dlcore
from dlcore import _C, bits, rng
from dlcore.cpu import choose_capability
from dlcore.reference import bits as reference

KEY = rng.key(5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 1), (2, 16), (3, 2, 33), (2, 257), (2, 5000)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual and clean bits, with some bits saturated either way."""
    generator = torch.Generator().manual_seed(sum(shape))
    clean = torch.randint(2, shape, generator=generator).float()
    x = (clean + 0.7 * torch.randn(shape, generator=generator)).to(dtype)
    residual = (4 * torch.randn(shape, generator=generator)).to(dtype)
    residual.view(-1)[::7] *= 8
    return x, residual, clean.to(dtype)


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


def levels_of(shape: tuple[int, ...], kind: str) -> float | Tensor:
    """Noise levels of each form that a parameter may have."""
    generator = torch.Generator().manual_seed(9)
    sizes = {"row": shape[:-1], "broadcast": (1,) * (len(shape) - 1), "element": shape}
    return 0.7 if kind == "number" else 0.3 + torch.rand(sizes[kind], generator=generator)


FORMS = ["number", "row", "broadcast", "element"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coding", ["01", "pm1"])
def test_posterior_and_step_match_float64(level, poisoned, dtype, shape, coding):
    x, residual, _ = inputs(shape, dtype)
    sigma = levels_of(shape, "row")
    probs = bits.posterior(x, sigma, residual, coding=coding)
    assert dlcore.last_backend("bits.posterior") != "reference"
    exact = bits.posterior(*double(x, sigma, residual), coding=coding)
    assert probs.dtype == torch.float32
    near = exact > 1e-4
    torch.testing.assert_close(probs.double()[near], exact[near], rtol=2e-6, atol=0)
    # A logit of 86 in float32 is known to 4e-6, and so is its exponential.
    torch.testing.assert_close(probs.double(), exact, rtol=8e-6, atol=1e-36)
    filtered = bits.matched_filter(x, sigma, coding=coding)
    torch.testing.assert_close(
        filtered.double(), bits.matched_filter(*double(x, sigma), coding=coding), rtol=4e-7, atol=1e-7
    )
    moved, same = bits.step(x, residual, sigma, 0.5 * sigma, coding=coding)
    assert torch.equal(same, probs)
    meant, _ = bits.step(*double(x, residual, sigma), 0.5 * sigma.double(), coding=coding)
    torch.testing.assert_close(moved.double(), meant, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(5,), (2, 33), (3, 2, 33), (2, 300)])
def test_every_form_of_sigma(form, shape):
    """A number, one per row, broadcast and one per bit agree with the same levels written out."""
    x, residual, clean = inputs(shape)
    sigma = levels_of(shape, form)
    whole = torch.as_tensor(sigma)
    whole = (whole if whole.dim() == len(shape) else whole.unsqueeze(-1)).expand(shape)
    gamma = 0.1 if form == "number" else torch.where(torch.as_tensor(sigma) > 0.6, 0.3, 0.0)
    gammas = torch.as_tensor(gamma)
    gammas = (gammas if gammas.dim() == len(shape) else gammas.unsqueeze(-1)).expand(shape)
    got = bits.step(x, residual, sigma, 0.5 * sigma, gamma_next=gamma, key=KEY)
    want = bits.step(x, residual, whole, 0.5 * whole, gamma_next=gammas, key=KEY)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        bits.loss(residual, x, clean, sigma), bits.loss(residual, x, clean, whole), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(bits.corrupt(x, sigma, key=KEY), bits.corrupt(x, whole, key=KEY))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_mixed_dtypes_add_in_float32(dtypes):
    """In bfloat16 a matched filter of 20 swallows a residual of 0.03; here it does not."""
    x, residual, _ = inputs((2, 100))
    x, residual = x.to(dtypes[0]), residual.to(dtypes[1])
    probs = bits.posterior(x, 0.3, residual)
    torch.testing.assert_close(
        probs.double(), bits.posterior(x.double(), 0.3, residual), rtol=6e-6, atol=1e-36
    )
    zero, small = torch.zeros(1, dtype=torch.bfloat16), torch.full((1,), 0.03, dtype=torch.bfloat16)
    logit = bits.posterior(zero, math.sqrt(0.025), small).double().log()
    assert logit.item() == pytest.approx(-20 + small.item(), abs=1e-5)


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, otherwise laid out."""
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 5), torch.nan, dtype=x.dtype)
    padded[..., 2:-3] = x
    return {
        "padded": padded[..., 2:-3],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last": x.transpose(0, -1).contiguous().transpose(0, -1),
    }


@pytest.mark.parametrize("layout", ["padded", "transposed", "last"])
def test_strides(layout):
    x, residual, clean = inputs((3, 2, 33))
    a, b, c = (strided(t)[layout] for t in (x, residual, clean))
    assert torch.equal(bits.posterior(a, 0.5, b), bits.posterior(x, 0.5, residual))
    options = {"gamma_next": 0.2, "key": KEY}
    for got, want in zip(
        bits.step(a, b, 0.5, 0.4, **options), bits.step(x, residual, 0.5, 0.4, **options), strict=True
    ):
        assert torch.equal(got, want)
    for kind in ("squared", "bce"):
        b.requires_grad_()
        residual.requires_grad_()
        got, want = (bits.loss(r, y, z, 0.5, kind=kind) for r, y, z in ((b, a, c), (residual, x, clean)))
        assert torch.equal(got, want)
        grads = [torch.autograd.grad(v.sum(), r)[0] for v, r in ((got, b), (want, residual))]
        assert torch.equal(*grads)
        b, residual = b.detach(), residual.detach()
    row = torch.randn(1, 33).expand(4, 33)
    assert torch.equal(bits.posterior(row, 0.5), bits.posterior(row.contiguous(), 0.5))


def public_step(x: Tensor, residual: Tensor | None, sigma: float, sigma_next: float) -> Tensor:
    """The step as public code has it, with the score spelled out."""
    p = torch.sigmoid((0 if residual is None else residual) + ((x - 0.5) / sigma**2).clamp(-30, 30))
    score = (p - x) / sigma**2
    return x + (sigma_next - sigma) * (-sigma * score)


@pytest.mark.parametrize("sigmas", [(80.0, 41.0), (1.0, 0.7), (0.2, 0.0794), (0.0794, 0.0)])
def test_step_is_the_public_form(backend, sigmas):
    x, residual, _ = inputs((4, 64), torch.float32)
    x = x * sigmas[0]
    if backend == "reference":
        moved, _ = bits.step(x.double(), residual, *sigmas)
        torch.testing.assert_close(
            moved, public_step(x.double(), residual.double(), *sigmas), rtol=1e-12, atol=1e-12
        )
    moved, _ = bits.step(x, residual, *sigmas)
    torch.testing.assert_close(
        moved.double(), public_step(x.double(), residual.double(), *sigmas), rtol=1e-6, atol=1e-6
    )


def test_codings_are_the_same_process():
    x, residual, _ = inputs((3, 40), torch.float32)
    x = x.double()
    moved, probs = bits.step(x, residual, 0.6, 0.4, gamma_next=0.1, key=KEY)
    other, same = bits.step(2 * x - 1, residual, 1.2, 0.8, gamma_next=0.1, key=KEY, coding="pm1")
    torch.testing.assert_close(same, probs)
    torch.testing.assert_close(other, 2 * moved - 1)
    clean = (x > 0.5).double()
    for kind, factor in (("squared", 4), ("bce", 1)):
        a = bits.loss(residual, x, clean, 0.6, kind=kind)
        b = bits.loss(residual, 2 * x - 1, 2 * clean - 1, 1.2, kind=kind, coding="pm1")
        torch.testing.assert_close(b, factor * a)
    torch.testing.assert_close(
        bits.edm_weight(torch.tensor(1.2), coding="pm1"), bits.edm_weight(torch.tensor(0.6)) / 4
    )
    torch.testing.assert_close(bits.scale_input(2 * x - 1, 1.2, coding="pm1"), bits.scale_input(x, 0.6))


def test_step_churns_as_churn_does(backend):
    x, residual, _ = inputs((3, 100))
    plain, probs = bits.step(x, residual, 1.0, 0.7)
    both, same = bits.step(x, residual, 1.0, 0.7, gamma_next=0.2, noise_scale=1.1, key=KEY)
    churned, sigma_hat = bits.churn(plain, 0.7, 0.2, noise_scale=1.1, key=KEY)
    assert sigma_hat == pytest.approx(0.84)
    assert torch.equal(same, probs)
    torch.testing.assert_close(both, churned, rtol=1e-6, atol=1e-6)
    noise = (both - plain) / (1.1 * math.sqrt(0.84**2 - 0.7**2))
    drawn = rng.normal(rng.fold_in(KEY, torch.arange(3)), 100)
    torch.testing.assert_close(noise, drawn, rtol=1e-5, atol=1e-5)
    off = bits.step(x, residual, 1.0, 0.7, gamma_next=torch.tensor(0.0), key=KEY)[0]
    torch.testing.assert_close(off, plain, rtol=0, atol=0)


def test_where_sigma_stays_x_stays_to_the_bit(level):
    x, residual, _ = inputs((2, 50))
    sigma = torch.full((2, 50), 0.3)
    prompt = torch.arange(50).expand(1, 50) < 10
    after, gamma = torch.where(prompt, sigma, 0.1), torch.where(prompt, 0.0, 0.2)
    moved, _ = bits.step(x, residual, sigma, after, gamma_next=gamma, key=KEY)
    assert torch.equal(moved[:, :10], x[:, :10])
    assert (moved[:, 10:] != x[:, 10:]).all()
    assert torch.equal(bits.euler_step(x, torch.rand(2, 50), sigma, sigma), x)


def test_nan_in_a_held_bits_residual_shows(backend, level):
    x, residual = torch.zeros(1, 3), torch.tensor([[0.0, math.nan, 0.0]])
    moved, _ = bits.step(x, residual, 0.3, 0.3)
    assert moved.isnan().tolist() == [[False, True, False]]


def test_ends_of_sigma(backend, level):
    """σ → 0: the bit that x is nearer to, 1/2 between; σ → ∞: a fair bit; σ' = 0: the posterior mean."""
    x = torch.tensor([[-3.0, 0.4999, 0.5, 0.5001, 9.0]])
    for sigma in (0.0, 1e-20, 1e-6):
        assert bits.matched_filter(x, sigma).tolist() == [[-30, -30, 0, 30, 30]]
        probs = bits.posterior(x, sigma, clip=math.inf)
        torch.testing.assert_close(probs, torch.tensor([[0, 0, 0.5, 1, 1]]), rtol=0, atol=1e-36)
    assert bits.posterior(x, 1e30).eq(0.5).all()
    moved, probs = bits.step(x, None, 0.2, 0.0)
    assert torch.equal(moved, probs)
    moved, probs = bits.step(x, None, 0.2, 0.0, coding="pm1")
    assert torch.equal(moved, 2 * probs - 1)
    huge = torch.tensor([[300.0, -300.0]])
    assert bits.posterior(huge, 0.001, huge).tolist()[0] == pytest.approx([1.0, 0.0], abs=1e-36)
    assert bits.loss(huge, huge, torch.tensor([[0.0, 1.0]]), 0.001, kind="bce").item() == pytest.approx(330)


def test_clip_binds_before_the_residual_is_added(level):
    x = torch.tensor([1.0])
    assert bits.posterior(x, 0.05, torch.tensor([-30.0])).item() == 0.5
    assert bits.posterior(x, 0.05, torch.tensor([-5.0]), clip=3.0).item() == pytest.approx(
        torch.sigmoid(torch.tensor(-2.0)).item()
    )


def test_nan_stays_where_it_is(backend, level):
    x, residual, clean = inputs((2, 40))
    x[0, 3], residual[1, 17] = torch.nan, torch.nan
    wanted = x.isnan() | residual.isnan()
    for result in (
        *bits.step(x, residual, 0.5, 0.4, gamma_next=0.1, key=KEY),
        bits.posterior(x, 0.5, residual),
    ):
        assert torch.equal(result.isnan(), wanted)
    x[0, 3] = 0
    for kind in ("squared", "bce"):
        assert bits.loss(residual, x, clean, 0.5, kind=kind).isnan().tolist() == [False, True]
        grad = loss_gradients(residual, x, clean, 0.5, kind)[0]
        assert torch.equal(grad.isnan(), residual.isnan())


@pytest.mark.parametrize("kind", ["squared", "bce"])
@pytest.mark.parametrize("coding", ["01", "pm1"])
@pytest.mark.parametrize("shape", [(3, 1), (2, 3, 16), (2, 257), (1, 9001)])
def test_loss_matches_float64(level, poisoned, kind, coding, shape):
    x, residual, clean = inputs(shape)
    clean = 2 * clean - 1 if coding == "pm1" else clean
    # A clip that binds for some bits, which then hand no gradient to x.
    options = {"kind": kind, "coding": coding, "clip": 3.0}
    mean = bits.loss(residual, x, clean, 0.4, **options)
    assert dlcore.last_backend("bits.loss") != "reference"
    exact = bits.loss(residual.double(), x, clean, 0.4, **options)
    assert mean.shape == shape[:-1]
    torch.testing.assert_close(mean.double(), exact, rtol=2e-6, atol=1e-9)
    got = loss_gradients(residual, x, clean, 0.4, **options)
    want = loss_gradients(*double(residual, x, clean), 0.4, **options)
    for a, b in zip(got, want, strict=True):
        # Relative to each entry: saturated bits have small gradients that must be right too.
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-34)
    assert shape == (3, 1) or 0 < int((got[1] == 0).sum()) < got[1].numel()


def loss_gradients(residual, x, clean, sigma, kind, **options):
    leaves = [t.detach().requires_grad_() for t in (residual, x)]
    mean = bits.loss(*leaves, clean, sigma, kind=kind, **options)
    weights = torch.linspace(1, 2, mean.numel(), dtype=mean.dtype).view(mean.shape)
    return torch.autograd.grad((mean * weights).sum(), leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["squared", "bce"])
def test_loss_of_every_dtype(dtype, kind):
    x, residual, clean = inputs((3, 100), dtype)
    got = loss_gradients(residual, x, clean, 0.6, kind)
    want = loss_gradients(*double(residual, x, clean), 0.6, kind)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=1e-7)


def test_loss_against_torch_and_saturation():
    x, residual, clean = inputs((4, 64))
    logits = residual.double() + ((x.double() - 0.5) / 0.36).clamp(-30, 30)
    squared = (logits.sigmoid() - clean).square().mean(-1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, clean.double(), reduction="none").mean(
        -1
    )
    torch.testing.assert_close(bits.loss(residual, x, clean, 0.6).double(), squared, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        bits.loss(residual, x, clean, 0.6, kind="bce").double(), bce, rtol=1e-6, atol=0
    )
    # A right bit at logit 40: 1 - p is e^-40, not 0; a wrong one costs 40 nats.
    half, forty = torch.full((1, 1), 0.5), torch.full((1, 1), 40.0)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    assert bits.loss(forty, half, one, 1.0, kind="bce").item() == pytest.approx(math.exp(-40), rel=1e-5)
    assert bits.loss(forty, half, zero, 1.0, kind="bce").item() == pytest.approx(40)
    grad = loss_gradients(forty, half, one, 1.0, "bce")[0]
    assert grad.item() == pytest.approx(-math.exp(-40), rel=1e-5)
    grad = loss_gradients(forty, half, zero, 1.0, "squared")[0]
    assert grad.item() == pytest.approx(2 * math.exp(-40), rel=1e-5)


@pytest.mark.parametrize("kind", ["squared", "bce"])
def test_gradcheck(kind):
    x, residual, clean = (t.double().requires_grad_() for t in inputs((2, 6)))
    sigma = torch.tensor([0.5, 0.9], dtype=torch.float64)
    check = torch.autograd.gradcheck
    assert check(lambda r, y: bits.loss(r, y, clean.detach(), sigma, kind=kind, clip=1.0), (residual, x))
    assert check(lambda r, y: bits.posterior(y, sigma, r, clip=1.0), (residual, x))
    assert check(lambda y: bits.matched_filter(y, sigma, clip=1.0), (x,))
    assert check(lambda y, p: bits.euler_step(y, p, sigma, 0.5 * sigma), (x, clean))
    assert check(lambda y, p, q: bits.heun_step(y, p, q, sigma, 0.5 * sigma), (x, clean, residual))
    assert check(lambda y: bits.scale_input(y, sigma), (x,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_posterior_gradients_on_the_kernel(dtype):
    x, residual, _ = inputs((3, 50), dtype)

    def gradients(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        total = (bits.posterior(leaves[0], 0.6, leaves[1], clip=2.0) ** 2).sum()
        total = total + bits.matched_filter(leaves[0], 0.6, clip=2.0).sum()
        return torch.autograd.grad(total, leaves)

    for a, b in zip(gradients(x, residual), gradients(*double(x, residual)), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-6)


def test_sampling_carries_no_gradient():
    x, residual, _ = inputs((2, 8))
    residual.requires_grad_()
    moved, probs = bits.step(x, residual, 0.5, 0.4)
    assert not moved.requires_grad
    assert not probs.requires_grad
    first = torch.autograd.grad(bits.loss(residual, x, x, 0.5).sum(), residual, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="a second one was asked for"):
        torch.autograd.grad(first.sum(), residual)


def test_heun_is_the_mean_of_both_slopes():
    x, residual, _ = (t.double() for t in inputs((3, 40)))
    sigma, after = 0.8, 0.5
    moved, probs = bits.step(x, residual, sigma, after)
    there = bits.posterior(moved, after, residual)
    slopes = (x - probs) / sigma, (moved - there) / after
    textbook = x + (after - sigma) * (slopes[0] + slopes[1]) / 2
    torch.testing.assert_close(bits.heun_step(moved, probs, there, sigma, after), textbook)
    assert torch.equal(bits.heun_step(moved, probs, there, sigma, 0.0), moved)
    one, wide = bits.step(x, residual, sigma, after, coding="pm1")
    end = bits.posterior(one, after, residual, coding="pm1")
    slopes = (x - 2 * wide + 1) / sigma, (one - 2 * end + 1) / after
    textbook = x + (after - sigma) * (slopes[0] + slopes[1]) / 2
    torch.testing.assert_close(bits.heun_step(one, wide, end, sigma, after, coding="pm1"), textbook)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_levels_are_computed_in_float32(dtype):
    sigma, gamma = torch.tensor([1, 300], dtype=dtype), torch.tensor(0.1, dtype=torch.bfloat16)
    weight, (_, raised) = bits.edm_weight(sigma), bits.churn(torch.zeros(2, 4), sigma, gamma, key=KEY)
    assert weight.dtype == raised.dtype == torch.float32
    torch.testing.assert_close(weight, bits.edm_weight(sigma.double()).float())
    torch.testing.assert_close(raised, (sigma.double() * (1 + gamma.double())).float())


def test_weight_at_the_ends():
    assert [bits.edm_weight(sigma) for sigma in (0.0, 1e-200, 1e200)] == [math.inf, math.inf, 4.0]
    assert bits.edm_weight(torch.tensor([0.0, 1e30])).tolist() == [math.inf, 4.0]
    assert bits.edm_weight(2) == 4.25


def test_churn_gamma():
    assert bits.churn_gamma(1.0, 12.0, 100) == 0.12
    assert bits.churn_gamma(1.0, 90.0, 100) == pytest.approx(math.sqrt(2) - 1)
    sigma = torch.tensor([80.0, 10.0, 1.0, 0.1])
    gamma = bits.churn_gamma(sigma, 12.0, 100, window=(1.0, 10.0))
    torch.testing.assert_close(gamma, torch.tensor([0, 0.12, 0.12, 0]))


# Noise.


def test_noise_is_rng_normal_up_to_rounding(level):
    """Half a million draws at every ISA level, also far out in a row, against the float64 definition."""
    keys = rng.split(rng.key(-3, 2**61), 2)
    drawn = bits.corrupt(torch.zeros(2, 250_001), 1.0, key=keys)
    with dlcore.use_backend("reference"):
        meant = rng.normal(keys, 250_001, dtype=torch.float64)
    assert (drawn - meant).abs().max() < 2e-6
    torch.testing.assert_close(drawn.double(), meant, rtol=3e-6, atol=5e-7)
    assert drawn.abs().max() > 4.4


def test_noise_distribution():
    drawn = bits.corrupt(torch.zeros(3, 100_001), 1.0, key=rng.key(11)).double()
    flat = drawn.flatten().numpy()
    assert stats.kstest(flat, "norm").pvalue > 1e-4
    # Squares know of a wrong radius, and of radii shared beyond their pair.
    assert stats.kstest(flat**2, "chi2", args=(1,)).pvalue > 1e-4
    pairs = drawn[:, :100_000].reshape(-1, 2)
    assert stats.kstest(pairs.square().sum(-1).numpy(), "chi2", args=(2,)).pvalue > 1e-4
    turn = torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) + 0.5
    assert stats.chisquare(torch.histc(turn, 64, 0, 1).numpy()).pvalue > 1e-4
    for lag in (1, 2, 16, 32):
        assert abs(stats.spearmanr(flat[:-lag], flat[lag:]).statistic) < 4 / math.sqrt(len(flat))
    # What these tests see: a deviation two per cent off, a constant, an angle of 31 parts in 32.
    assert stats.kstest(1.02 * flat, "norm").pvalue < 1e-4
    assert stats.kstest(flat + 0.01, "norm").pvalue < 1e-4
    assert stats.chisquare(torch.histc(turn * 31 / 32, 64, 0, 1).numpy()).pvalue < 1e-4


def test_chunks_of_rows_and_columns_agree(backend):
    """With a key per row any split of the rows agrees; a row's start does not depend on its length."""
    x, residual, _ = inputs((7, 130))
    keys = rng.split(KEY, 7)
    options = {"gamma_next": 0.3}
    whole = bits.step(x, residual, 0.5, 0.4, key=keys, **options)[0]
    parts = [
        bits.step(x[r], residual[r], 0.5, 0.4, key=keys[r], **options)[0] for r in (slice(0, 3), slice(3, 7))
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(bits.step(x, residual, 0.5, 0.4, key=KEY, **options)[0], whole)
    short = bits.step(x[:, :61], residual[:, :61], 0.5, 0.4, key=KEY, **options)[0]
    assert torch.equal(short, whole[:, :61])
    assert not torch.equal(bits.step(x, residual, 0.5, 0.4, key=rng.key(6), **options)[0], whole)


def test_fresh_noise_follows_the_seed():
    x = torch.zeros(2, 9)
    torch.manual_seed(3)
    first, second = bits.corrupt(x, 1.0), bits.corrupt(x, 1.0)
    torch.manual_seed(3)
    assert torch.equal(bits.corrupt(x, 1.0), first)
    assert not torch.equal(first, second)
    a, b = (bits.churn(x, 1.0, 0.5, generator=torch.Generator().manual_seed(4))[0] for _ in range(2))
    assert torch.equal(a, b)


# Determinism.


def results() -> list[Tensor]:
    x, residual, clean = inputs((3, 2, 9001))
    leaf = residual.clone().requires_grad_()
    half = x.to(torch.bfloat16)
    found = [
        *bits.step(x, residual, 0.6, 0.4, gamma_next=0.2, key=KEY),
        *bits.step(half, residual.half(), 0.6, 0.4),
        bits.posterior(x, 0.6),
        bits.churn(x, 0.6, 0.2, key=KEY)[0],
        bits.encode(torch.arange(999), 13, gray=True),
        bits.decode(x[..., :40]),
    ]
    for kind in ("squared", "bce"):
        value = bits.loss(leaf, x, clean, 0.6, kind=kind)
        found += [value.detach(), *torch.autograd.grad(value.sum(), leaf)]
    return found


def test_same_bits_on_any_number_of_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            assert all(map(torch.equal, one, results()))
    finally:
        torch.set_num_threads(before)


def test_same_bits_on_every_level_with_fused_products():
    found = {}
    current = _C.capability()
    for name in levels():
        choose_capability(name)
        found[name] = results()
    choose_capability(current)
    if not {"avx2", "avx512"} <= found.keys():
        pytest.skip("this machine has no two such levels")
    assert all(map(torch.equal, found["avx2"], found["avx512"]))


def test_reference_runs_float64_and_matches_the_meaning():
    x, residual, _ = inputs((2, 30))
    bits.step(x.double(), residual, 0.5, 0.4)
    assert dlcore.last_backend("bits.step") == "reference"
    slope = torch.tensor([4.0], dtype=torch.float64)
    assert torch.equal(
        bits.posterior(x.double(), 0.5, residual),
        reference.posterior(x.double(), residual.double(), slope, 0.5, 30.0),
    )


def test_empty_rows():
    assert bits.step(torch.zeros(0, 4), None, 0.5, 0.4, gamma_next=0.1, key=KEY)[0].shape == (0, 4)
    assert bits.loss(*(torch.zeros(0, 4),) * 3, 0.5).shape == (0,)


def test_churned_levels_per_row_and_per_bit():
    """A level per row lies along the rows, also where x is square."""
    x, sigma = torch.zeros(2, 2), torch.tensor([1.0, 3.0])
    gamma = torch.tensor([[0.5, 0.1], [0.5, 0.1]])
    lifted = bits.churn(x, sigma, gamma, key=dlcore.rng.key(1))[1]
    torch.testing.assert_close(lifted, torch.tensor([[1.5, 1.1], [4.5, 3.3]]))
