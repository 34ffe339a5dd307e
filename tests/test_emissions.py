"""Continuous evidence against enumeration: every sequence of a tiny chain, weighed with densities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import kstest, norm, vonmises_fisher
from torch import Tensor

from dlcore import sphere
from dlcore.sphere import posterior_logits
from dlcore.testing.emissions import bit_logits, gaussian_emission
from dlcore.testing.markov import MarkovChain

V, LENGTH, WIDTH = 3, 4, 5
CODES = torch.tensor([[0, 1, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(normal(*shape, seed=seed), dim=-1)


def chain(order: int) -> MarkovChain:
    weight = normal((V) ** (order + 1), seed=order).exp().view((V,) * (order + 1))
    return MarkovChain(weight / weight.sum(-1, keepdim=True))


def enumerated(chain: MarkovChain, density: Callable[[int, int], float]) -> Tensor:
    """P(x_l = v | the observations), (L, V): Bayes over all V^L sequences; density(l, v) = p(state_l | v)."""
    mass = torch.zeros(LENGTH, V, dtype=torch.float64)
    for x in itertools.product(range(V), repeat=LENGTH):
        weight = math.exp(float(chain.log_likelihood(torch.tensor([x]))))
        for position, token in enumerate(x):
            weight *= density(position, token)
        for position, token in enumerate(x):
            mass[position, token] += weight
    return mass / mass.sum(-1, keepdim=True)


def check(chain: MarkovChain, emission: Tensor, density: Callable[[int, int], float]) -> Tensor:
    got = chain.posterior(emission).denoiser[0]
    torch.testing.assert_close(got.exp(), enumerated(chain, density), rtol=1e-10, atol=1e-12)
    return got


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.7), (0.6, 1.3)])
def test_embeddings_under_gaussian_noise(order: int, alpha: float, sigma: float) -> None:
    table, x = normal(V, WIDTH), normal(1, LENGTH, WIDTH, seed=1)

    def density(position: int, token: int) -> float:
        return float(norm.pdf(x[0, position], alpha * table[token], sigma).prod())

    check(chain(order), gaussian_emission(x, table, sigma, alpha=alpha), density)


@pytest.mark.parametrize("levels", [(0.0, 1.0), (-1.0, 1.0), (-0.5, 0.5)])
def test_bits_under_gaussian_noise_and_their_posterior(levels: tuple[float, float]) -> None:
    low, high = levels
    codes, sigma = low + (high - low) * CODES, 0.8
    x = normal(1, LENGTH * 3, seed=1).unflatten(-1, (LENGTH, 3))

    def density(position: int, token: int) -> float:
        return float(norm.pdf(x[0, position], codes[token], sigma).prod())

    log_probs = check(chain(1), gaussian_emission(x, codes, sigma), density)
    bits = bit_logits(log_probs, codes).sigmoid()
    torch.testing.assert_close(bits, log_probs.exp() @ CODES)


def test_points_under_von_mises_fisher_noise() -> None:
    table, x = unit(V, WIDTH), unit(1, LENGTH, WIDTH, seed=1)

    def density(position: int, token: int) -> float:
        return float(vonmises_fisher(table[token].numpy(), 4.0).pdf(x[0, position].numpy()))

    check(chain(2), posterior_logits(x, table, path="vmf", kappa=4.0), density)


def test_points_under_great_circle_noise() -> None:
    table, x = unit(V, WIDTH), unit(1, LENGTH, WIDTH, seed=1)
    share = 0.9

    def density(position: int, token: int) -> float:
        angle = math.acos(float(x[0, position] @ table[token]))
        return (math.sin(angle / share) / math.sin(angle)) ** (WIDTH - 2) if angle < share * math.pi else 0.0

    check(chain(1), posterior_logits(x, table, noise=share), density)


@pytest.mark.parametrize("width", [3, 16])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_great_circle_emission_is_the_density_of_its_noise(width: int, share: float) -> None:
    """Angles of slerp(e, z, s), z uniform, against the emission times the sphere's own measure."""
    e = torch.zeros(1, width, dtype=torch.float64)
    e[0, 0] = 1
    angles = sphere.angle(e, sphere.slerp(e, unit(20_000, width, seed=2), share))
    grid = torch.linspace(0, math.pi * share, 4001, dtype=torch.float64)
    points = torch.zeros(4001, width, dtype=torch.float64)
    points[:, 0], points[:, 1] = grid.cos(), grid.sin()
    law = posterior_logits(points, e, noise=share)[:, 0].exp() * grid.sin() ** (width - 2)
    cumulative = torch.cumulative_trapezoid(law, grid)
    cumulative = torch.nn.functional.pad(cumulative / cumulative[-1], (1, 0))

    def cdf(angle: Tensor) -> Tensor:
        index = torch.searchsorted(grid, torch.as_tensor(angle)).clamp(max=4000)
        return cumulative[index].numpy()

    assert kstest(angles.numpy(), cdf).pvalue > 1e-4


def test_edges() -> None:
    table = unit(V, WIDTH)
    on_top = posterior_logits(table, table, noise=0.5)
    torch.testing.assert_close(
        on_top.diagonal(), torch.full((V,), (WIDTH - 2) * math.log(2), dtype=torch.float64)
    )
    assert posterior_logits(-table, table, noise=0.5).diagonal().tolist() == [-math.inf] * V
    assert posterior_logits(-table, table, noise=1.0).abs().max() == 0
    assert posterior_logits(table, table, path="vmf", kappa=0.0).abs().max() == 0
    assert gaussian_emission(table, table, math.inf).abs().max() == 0
    torch.testing.assert_close(
        gaussian_emission(table, table, torch.tensor([1.0, 2.0, 3.0]))[1],
        gaussian_emission(table[1], table, 2.0),
    )
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert bit_logits(certain, CODES).tolist() == [[-math.inf, math.inf, -math.inf]]


@pytest.mark.slow
def test_errors_of_bits_integrate_to_the_chains_entropy() -> None:
    """I-MMSE: dH(bits | x)/d ln σ = Σ mmse/σ², from 0 where all is known to the entropy itself at σ = ∞."""
    source, length = chain(2), 24
    tokens = source.sample(400, length, generator=torch.Generator().manual_seed(3))
    clean, levels = CODES[tokens], torch.logspace(-1.2, 1.5, 55, dtype=torch.float64)
    rates = []
    for seed, sigma in enumerate(levels.tolist()):
        x = clean + sigma * normal(*clean.shape, seed=seed)
        bits = bit_logits(source.posterior(gaussian_emission(x, CODES, sigma)).denoiser, CODES).sigmoid()
        rates.append((bits - clean).square().sum((-1, -2)).mean() / sigma**2)
    # Beyond the last level the error is the bits' own variance, and ∫ dσ/σ³ = 1/(2σ²).
    found = float(torch.trapezoid(torch.stack(rates), levels.log()) + rates[-1] / 2)
    assert found == pytest.approx(source.entropy(length), rel=0.02)


X, TABLE = torch.zeros(2, 3), torch.eye(3)
BAD = [
    (
        lambda: gaussian_emission(X, torch.eye(4), 1.0),
        ValueError,
        r"gaussian_emission: table must be \(V, 3\)",
    ),
    (lambda: gaussian_emission(X.long(), TABLE, 1.0), TypeError, "gaussian_emission: x must be float32"),
    (lambda: gaussian_emission(X, TABLE, 0.0), ValueError, r"sigma must lie in \(0, inf\], got 0.0"),
    (
        lambda: gaussian_emission(X, TABLE, torch.ones(5)),
        ValueError,
        r"sigma must broadcast to \(2,\), got \(5,\)",
    ),
    (lambda: gaussian_emission(X, TABLE, 1.0, alpha=-1.0), ValueError, "alpha must lie in"),
    (lambda: bit_logits(X, CODES[:2]), ValueError, r"bit_logits: codes must be \(3, w\), got \(2, 3\)"),
    (lambda: bit_logits(X, TABLE + torch.arange(3)), ValueError, "codes must have two levels"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
