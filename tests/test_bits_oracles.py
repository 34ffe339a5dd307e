"""Bitstream diffusion where everything is known: a few codes with a random prior, by enumeration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from goodness import chi_square
from scipy import stats
from torch import Tensor

import dlcore
from dlcore import bits, rng


class Codes:
    """Tokens 0 .. V - 1 of a prior as codes of w bits, seen through x = bits + σ·noise."""

    def __init__(self, width: int, vocab: int, *, gray: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.codes = bits.encode(torch.arange(vocab), width, gray=gray).double()
        self.prior = torch.rand(vocab, generator=generator, dtype=torch.float64) ** 2 + 0.02
        self.prior = self.prior / self.prior.sum()
        self.width = width

    def joint(self, x: Tensor, sigma: float) -> Tensor:
        """log π_c + log N(x; code c, σ²), unnormalised: (..., V)."""
        distance = (x.double().unsqueeze(-2) - self.codes).square().sum(-1)
        return self.prior.log() - distance / (2 * sigma**2)

    def probs(self, x: Tensor, sigma: float) -> Tensor:
        """The exact posterior of every bit."""
        return torch.softmax(self.joint(x, sigma), -1) @ self.codes

    def residual(self, x: Tensor, sigma: float) -> Tensor:
        """The logit that the exact posterior adds to the matched filter, without a clip."""
        joint = self.joint(x, sigma).unsqueeze(-1)
        none = torch.tensor(-torch.inf, dtype=torch.float64)
        set_, clear = (torch.where(self.codes == b, joint, none).logsumexp(-2) for b in (1, 0))
        return set_ - clear - (x.double() - 0.5) / sigma**2

    def draw(self, n: int, sigma: float, seed: int) -> Tensor:
        """n draws of x at σ."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.multinomial(self.prior, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.width, generator=generator, dtype=torch.float64)
        return self.codes[tokens] + sigma * noise


CASES = [(2, 3), (4, 11), (6, 64), (8, 200)]


@pytest.mark.parametrize(("width", "vocab"), CASES)
@pytest.mark.parametrize("sigma", [0.15, 0.5, 3.0])
def test_exact_residual_gives_the_exact_posterior(backend, width, vocab, sigma):
    model = Codes(width, vocab, gray=True)
    x = model.draw(50, sigma, seed=1)
    residual = model.residual(x, sigma)
    probs = bits.posterior(x.float(), sigma, residual.float(), clip=math.inf)
    torch.testing.assert_close(probs.double(), model.probs(x, sigma), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("width", "vocab"), CASES)
def test_tweedie(width, vocab):
    """(D - x)/σ² is the score of p_σ, here by differentiating log p_σ."""
    model, sigma = Codes(width, vocab), 0.4
    x = model.draw(20, sigma, seed=2).requires_grad_()
    score = torch.autograd.grad(model.joint(x, sigma).logsumexp(-1).sum(), x)[0]
    x = x.detach()
    probs = bits.posterior(x, sigma, model.residual(x, sigma), clip=math.inf)
    torch.testing.assert_close((probs - x) / sigma**2, score, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("width", "vocab"), CASES)
def test_score_by_finite_differences(width, vocab):
    """The same score from differences of log p_σ alone, of fourth order: no derivative of ours or torch's."""
    model, sigma, h = Codes(width, vocab), 0.4, 1e-3
    x = model.draw(20, sigma, seed=2)
    probs = bits.posterior(x, sigma, model.residual(x, sigma), clip=math.inf)
    axes = torch.eye(width, dtype=torch.float64)
    near, far = (
        torch.stack(
            [_log_law(model, x + s * h * a, sigma) - _log_law(model, x - s * h * a, sigma) for a in axes]
        )
        for s in (1, 2)
    )
    score = ((8 * near - far) / (12 * h)).T
    torch.testing.assert_close((probs - x) / sigma**2, score, rtol=1e-7, atol=1e-7)


def _log_law(model, x, sigma):
    """log p_σ(x) up to a constant."""
    return model.joint(x, sigma).logsumexp(-1)


def test_gradients_of_corruption_and_churn():
    """Also of a gamma of 0, as outside of the window, where the noise's deviation has a kink."""
    key = dlcore.rng.key(3)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor([0.3, 0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: bits.corrupt(*a, key=key), (x, sigma))
    assert torch.autograd.gradcheck(lambda *a: bits.churn(*a, key=key)[0], (x, sigma, gamma))
    none = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(bits.churn(x, sigma, none, key=key)[0].sum(), none)
    assert gradient.isfinite().all()


def test_independent_fair_bits_need_no_residual():
    model = Codes(4, 16)
    model.prior = torch.full((16,), 1 / 16, dtype=torch.float64)
    x = model.draw(100, 0.6, seed=3)
    assert model.residual(x, 0.6).abs().max() < 1e-12
    torch.testing.assert_close(bits.posterior(x, 0.6), model.probs(x, 0.6), rtol=1e-12, atol=1e-15)
    # Codes without a token do need one.
    assert Codes(4, 11).residual(x, 0.6).abs().max() > 0.5


@pytest.mark.parametrize("sigma", [0.3, 0.7, 2.0])
def test_entropy_rate_is_the_error_over_the_variance(sigma):
    """dH(bits | x)/d ln σ = mmse/σ², by Gauss-Hermite quadrature in two dimensions."""
    model = Codes(2, 4, seed=4)
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    grid = torch.tensor(np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2))
    weight = torch.tensor(np.outer(weights, weights).reshape(-1)) / (2 * math.pi)

    def averages(s: float) -> tuple[float, float]:
        """H(bits | x) and the squared error of the posterior mean, summed over bits."""
        x = model.codes.unsqueeze(1) + s * grid
        posterior = torch.log_softmax(model.joint(x, s), -1)
        surprise = -torch.stack([posterior[c, :, c] for c in range(4)])
        probs = bits.posterior(x, s, model.residual(x, s), clip=math.inf)
        error = (probs - model.codes.unsqueeze(1)).square().sum(-1)
        each = torch.stack([(weight * v).sum(-1) @ model.prior for v in (surprise, error)])
        return float(each[0]), float(each[1])

    step = 1e-4
    slope = (averages(sigma * math.exp(step))[0] - averages(sigma * math.exp(-step))[0]) / (2 * step)
    assert slope == pytest.approx(averages(sigma)[1] / sigma**2, rel=1e-5)


def log_levels(high: float, low: float, steps: int) -> list[float]:
    return torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp().tolist()


def sampled(model: Codes, n: int, levels: list[float], *, gamma: float = 0.0, heun: bool = False) -> Tensor:
    """Tokens from the exact denoiser by the public functions."""
    key = rng.key(31)
    x = bits.corrupt(torch.full((n, model.width), 0.5), levels[0], key=rng.fold_in(key, 0))
    sigma = levels[0]
    for i, after in enumerate(levels[1:]):
        residual = model.residual(x, sigma).float()
        last = i == len(levels) - 2
        options = {"gamma_next": 0.0 if last else gamma, "noise_scale": 1.0, "clip": math.inf}
        moved, probs = bits.step(x, residual, sigma, after, key=rng.fold_in(key, i + 1), **options)
        if heun:
            there = bits.posterior(moved, after, model.residual(moved, after).float(), clip=math.inf)
            moved = bits.heun_step(moved, probs, there, sigma, after)
        x, sigma = moved, after * (1 + options["gamma_next"])
    return bits.decode(model.probs(x, levels[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("coarse", [{}, {"heun": True}, {"gamma": 0.05}])
def test_sampler_reproduces_the_prior(coarse):
    """Flow, Heun and churn with the exact denoiser from σ = 80: the histogram of tokens is the prior."""
    model, n = Codes(4, 11), 20_000
    levels = log_levels(80, 0.06, 60 if "heun" in coarse else 250)
    tokens = sampled(model, n, levels, **coarse)
    assert int(tokens.max()) < 11
    assert chi_square(tokens, model.prior) > 1e-4
    # A prior a few per cent off is seen.
    skewed = model.prior * (1 + 0.06 * torch.where(torch.arange(11) % 2 == 0, 1.0, -1.0))
    assert chi_square(tokens, skewed / skewed.sum()) < 1e-4


def mixture_cdf(model: Codes, sigma: float, bit: int):
    ones = float(model.prior @ model.codes[:, bit])
    return lambda x: (1 - ones) * stats.norm.cdf(x, 0, sigma) + ones * stats.norm.cdf(x, 1, sigma)


@pytest.mark.slow
@pytest.mark.parametrize(("noise_scale", "stays"), [(1.0, True), (1.4, False)])
def test_churn_with_the_exact_score_leaves_the_law_alone(noise_scale, stays):
    """Up by γ and down again, many times over; with too much noise it does not stay."""
    model, sigma, gamma = Codes(4, 11), 0.5, 0.01
    x = model.draw(20_000, sigma, seed=5).float()
    key = rng.key(32)
    for i in range(40):
        raised, sigma_hat = bits.churn(x, sigma, gamma, noise_scale=noise_scale, key=rng.fold_in(key, i))
        residual = model.residual(raised, sigma_hat).float()
        x, _ = bits.step(raised, residual, sigma_hat, sigma, clip=math.inf)
    pvalues = [stats.kstest(x[:, b].numpy(), mixture_cdf(model, sigma, b)).pvalue for b in range(4)]
    assert (min(pvalues) > 1e-4) == stays


@pytest.mark.slow
def test_gated_churn_runs_end_to_end():
    """Schedule from measured errors, its grid and window, churn and decoding: the whole of a sampler."""
    model = Codes(4, 11)
    levels = torch.logspace(-1.5, 1.9, 400).tolist()
    errors = [
        float((model.probs(x := model.draw(64, s, seed=i), s) - x.round().clamp(0, 1)).square().mean())
        for i, s in enumerate(levels)
    ]
    schedule = bits.EntropySchedule.fit(torch.tensor(levels), torch.tensor(errors), bins=32)
    grid = schedule.grid(200, sigma_max=80.0, sigma_min=0.06).tolist()
    window = schedule.window(0.02, 0.98)
    key = rng.key(33)
    x, sigma = bits.corrupt(torch.full((20_000, 4), 0.5), 80.0, key=rng.fold_in(key, 0)), grid[0]
    churned = 0
    for i, after in enumerate(grid[1:]):
        gamma = bits.churn_gamma(after, 4.0, len(grid) - 1, window=window) if i < len(grid) - 2 else 0.0
        churned += gamma > 0
        residual = model.residual(x, sigma).float()
        x, _ = bits.step(
            x,
            residual,
            sigma,
            after,
            gamma_next=gamma,
            noise_scale=1.0,
            clip=math.inf,
            key=rng.fold_in(key, i + 1),
        )
        sigma = after * (1 + gamma)
    assert 0.5 * len(grid) < churned < len(grid) - 2
    assert chi_square(bits.decode(model.probs(x, sigma)), model.prior) > 1e-4
    assert dlcore.last_backend("bits.step") == "cpu"
