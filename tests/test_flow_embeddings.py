"""Flows of embeddings: FLM in d dimensions and its time, LangFlow's matched filter, ELF's grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import mpmath
import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

import dlcore
from dlcore import rng
from dlcore.process import flow

KEY = rng.key(21)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sphere_table(vocab: int, width: int, seed: int = 0) -> Tensor:
    """Rows of norm √d, as LangFlow's."""
    return torch.nn.functional.normalize(normal(vocab, width, seed=seed), dim=-1) * math.sqrt(width)


# FLM.


def test_flm_in_d_dimensions_is_flm_in_v() -> None:
    """The whole sampler on z in V dimensions, and on y = zE alone, with a network that reads y."""
    vocab, width = 11, 4
    table, head = normal(vocab, width), normal(width, vocab, seed=1)
    z = normal(2, 3, vocab, seed=2)
    y = z @ table
    grid = flow.flm_gamma(torch.linspace(0, 1, 9, dtype=torch.float64), vocab)
    for now, after in pairwise(grid):
        p = torch.softmax(torch.tanh(z @ table) @ head * 3, -1)
        z = flow.step(z, p, now, after)
        logits = torch.tanh(y) @ head * 3
        y = flow.step(y, dlcore.categorical.expectation(logits, table), now, after)
        torch.testing.assert_close(y, z @ table, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(z, p)  # the last step lands on p


def test_autocast_leaves_flms_noise_alone() -> None:
    factor = flow.flm_factor(normal(9, 4).float())
    plain = flow.flm_noise(factor, (5,), key=KEY)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(flow.flm_noise(factor, (5,), key=KEY), plain)


@pytest.mark.parametrize(("vocab", "width"), [(30, 6), (4, 6)])
def test_flm_noise_has_the_law_of_noise_in_v_dimensions(vocab: int, width: int) -> None:
    table = normal(vocab, width)
    factor = flow.flm_factor(table)
    torch.testing.assert_close(factor @ factor.T, table.T @ table)
    drawn = flow.flm_noise(factor, (400, 250), key=KEY).reshape(-1, width)
    directions = torch.nn.functional.normalize(normal(width, 5, seed=3), dim=0)
    for direction in directions.unbind(-1):
        spread = float((table @ direction).norm())
        assert kstest((drawn @ direction / spread).numpy(), "norm").pvalue > 1e-4


def test_flm_training_state() -> None:
    table, x = normal(7, 4), torch.tensor([[1, 6, 0]])
    factor = flow.flm_factor(table)
    noise = flow.flm_noise(factor, x.shape, key=KEY)
    y = flow.interpolate(table[x], 0.7, noise=noise)
    torch.testing.assert_close(y, 0.7 * table[x] + 0.3 * noise)
    assert flow.flm_noise(factor.float(), (2,)).dtype == torch.float32


def test_flm_alpha_of_two_tokens_in_closed_form() -> None:
    gamma = torch.linspace(0, 1, 41, dtype=torch.float64)
    expected = torch.erf(gamma / (1 - gamma) / 2)  # 2Φ(a/√2) - 1
    torch.testing.assert_close(flow.flm_alpha(gamma, 2), expected, rtol=1e-14, atol=0)


def printed_alpha(a: float, vocab: int) -> mpmath.mpf:
    """K/(K-1)·(E[Φ(ξ + a)^{K-1}] - 1/K) in 40 digits, cut where the integrand turns."""
    with mpmath.workdps(40):
        mean = mpmath.quad(
            lambda u: mpmath.npdf(u) * mpmath.ncdf(u + a) ** (vocab - 1),
            [-14, -8, -4, *(turn - a for turn in (3, 4, 5, 6)), 8, 14]
            if a < 7
            else [-14, *(turn - a for turn in (2, 3, 4, 5, 6)), 2, 8, 14],
        )
        return (vocab * mean - 1) / (vocab - 1)


@pytest.mark.parametrize("vocab", [2, 3, 50_257, 262_144])
@pytest.mark.parametrize("gamma", [1e-6, 0.2, 0.7, 0.8, 0.85, 0.9])
def test_flm_alpha_is_the_integral_as_printed(vocab: int, gamma: float) -> None:
    expected = printed_alpha(gamma / (1 - gamma), vocab)
    assert abs(float(flow.flm_alpha(gamma, vocab)) / expected - 1) < 1e-12


@pytest.mark.parametrize("vocab", [2, 50_257, 262_144])
def test_flm_gamma_keeps_its_relative_precision_near_zero(vocab: int) -> None:
    assert float(flow.flm_gamma(flow.flm_alpha(1e-9, vocab), vocab)) == pytest.approx(1e-9, rel=1e-12)


def test_flm_alpha_is_the_chance_that_the_token_wins() -> None:
    vocab, gamma, count = 40, 0.6, 50_000
    z = (1 - gamma) * normal(count, vocab)
    z[:, 0] += gamma
    share = float((z.argmax(-1) == 0).double().mean())
    expected = (float(flow.flm_alpha(gamma, vocab)) * (vocab - 1) + 1) / vocab
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / count))


@pytest.mark.slow
@pytest.mark.parametrize("vocab", [2, 17, 50_257, 262_144])
def test_flm_gamma_inverts_alpha(vocab: int) -> None:
    alpha = torch.cat([torch.tensor([0.0, 1e-12, 1e-6]), torch.linspace(0.001, 1, 50)]).double()
    gamma = flow.flm_gamma(alpha, vocab)
    assert bool((gamma.diff() > 0).all())
    assert [float(gamma[i]) for i in (0, -1)] == [0.0, 1.0]
    torch.testing.assert_close(flow.flm_alpha(gamma, vocab), alpha, rtol=1e-13, atol=0)
    assert flow.flm_gamma(0.25, vocab).shape == ()
    assert flow.flm_alpha(gamma.view(53, 1), vocab).shape == (53, 1)


# LangFlow.


@pytest.mark.parametrize(
    ("path", "t"), [("lognsr", 0.7), ("lognsr", -3.0), ("vp", 0.4), ("linear", 0.6), ("edm", 1.3)]
)
def test_matched_filter_is_the_exact_posterior(path: str, t: float) -> None:
    """Against Bayes from the Gaussian densities, with rows of one norm and a uniform prior."""
    table, x = sphere_table(9, 5), normal(2, 3, 5, seed=1)
    alpha, sigma = (float(v) for v in _levels(path, t))
    density = -((x.unsqueeze(-2) - alpha * table) ** 2).sum(-1) / (2 * (1.5 * sigma) ** 2)
    logits = flow.matched_filter(x, table, t, path=path, scale=1.5)
    torch.testing.assert_close(
        logits.materialize().log_softmax(-1).double(), density.log_softmax(-1), rtol=1e-6, atol=1e-6
    )


def _levels(path: str, t: float) -> tuple[Tensor, Tensor]:
    zero = torch.zeros(1, dtype=torch.float64)
    return flow.interpolate(zero + 1, t, noise=zero, path=path), flow.interpolate(
        zero, t, noise=zero + 1, path=path
    )


def test_langflows_scale() -> None:
    gamma = torch.linspace(-12, 12, 25, dtype=torch.float64)
    softplus = torch.nn.functional.softplus
    expected = torch.exp((softplus(-gamma) - gamma) / 2)
    got = flow.matched_filter(
        torch.ones(25, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), gamma
    ).hidden
    torch.testing.assert_close(got.squeeze(-1), expected)


def test_matched_filter_joins_a_head() -> None:
    table, x, hidden, weight = (
        sphere_table(9, 5).float(),
        *(normal(*s, seed=i).float() for i, s in enumerate([(3, 5), (3, 4), (9, 4)])),
    )
    m = flow.matched_filter(x, table, 0.3)
    joined = dlcore.LinearLogits(torch.cat([hidden, m.hidden], -1), torch.cat([weight, table], -1))
    torch.testing.assert_close(
        joined.materialize(), hidden @ weight.T + m.materialize(), rtol=1e-4, atol=1e-4
    )


def test_langflows_flow_in_root_snr() -> None:
    """y = x/σ moves by dy/du = x̂, u = α/σ: what `step` integrates, by a small step."""
    table, x = sphere_table(9, 5), normal(4, 5, seed=1)
    gamma, h = 0.4, 1e-4

    def root_snr(g: float) -> float:
        return math.exp(-g / 2)

    def sigma(g: float) -> float:
        return math.sqrt(1 / (1 + math.exp(-g)))

    def ahead(g: float) -> Tensor:
        p = (flow.matched_filter(x, table, gamma).hidden @ table.T).softmax(-1)
        return flow.step(x, p @ table, gamma, g, path="lognsr") / sigma(g)

    slope = (ahead(gamma - h) - ahead(gamma + h)) / (root_snr(gamma - h) - root_snr(gamma + h))
    clean = (flow.matched_filter(x, table, gamma).hidden @ table.T).softmax(-1) @ table
    torch.testing.assert_close(slope, clean, rtol=1e-8, atol=1e-8)


# ELF.


def test_elf_grid() -> None:
    grid = flow.elf_grid(32)
    assert grid.shape == (33,)
    assert grid[[0, -1]].tolist() == [0.0, 1.0]
    assert bool((grid.diff() > 0).all())
    assert float(grid[16]) == pytest.approx(1 / (1 + math.exp(1.5)))
    assert flow.elf_grid(1).tolist() == [0.0, 1.0]


def test_elf_grid_of_draws_has_trainings_law() -> None:
    grid = flow.elf_grid(20_001, key=KEY)
    assert grid.equal(flow.elf_grid(20_001, key=KEY))
    assert bool((grid.diff() >= 0).all())
    assert grid[[0, -1]].tolist() == [0.0, 1.0]
    assert kstest(((grid[1:-1].logit() + 1.5) / 0.8).numpy(), "norm").pvalue > 1e-4
    generator = torch.Generator().manual_seed(0)
    assert not flow.elf_grid(4, generator=generator).equal(flow.elf_grid(4, generator=generator))


def test_gradients() -> None:
    x, table = normal(2, 3).requires_grad_(), sphere_table(5, 3).requires_grad_()

    def logits(x: Tensor, table: Tensor) -> Tensor:
        m = flow.matched_filter(x, table, 0.3)
        return m.hidden @ m.weight.T

    assert torch.autograd.gradcheck(logits, (x, table))


TABLE = torch.eye(4)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (
        lambda: flow.flm_noise(torch.eye(4), 4),
        TypeError,
        "flm_noise: shape must be a tuple of ints, got int 4",
    ),
    (lambda: flow.flm_noise(torch.eye(4), (2.0,)), TypeError, "flm_noise: shape must be an int, got float"),
    (lambda: flow.flm_noise(torch.eye(4), (-1,)), ValueError, r"shape must not be negative, got \(-1,\)"),
    (
        lambda: flow.flm_factor(torch.ones(3)),
        ValueError,
        r"flow.flm_factor: table must be \(V, d\), got \(3,\)",
    ),
    (lambda: flow.flm_factor(TABLE.long()), TypeError, "flow.flm_factor: table must be float32"),
    (lambda: flow.flm_noise(torch.ones(2, 3), (2,)), ValueError, r"factor must be \(d, d\), got \(2, 3\)"),
    (
        lambda: flow.flm_noise(TABLE, (2,), key=rng.split(KEY, 3)),
        ValueError,
        "flow.flm_noise: key must have shape",
    ),
    (lambda: flow.flm_alpha(1.5, 10), ValueError, r"flow.flm_alpha: gamma must lie in \[0, 1\], got 1.5"),
    (lambda: flow.flm_alpha(0.5, 1), ValueError, "vocab_size must be at least 2, got 1"),
    (lambda: flow.flm_alpha(0.5, 2.5), TypeError, "vocab_size must be an int"),
    (lambda: flow.flm_gamma(-0.1, 10), ValueError, r"flow.flm_gamma: alpha must lie in \[0, 1\], got -0.1"),
    (lambda: flow.flm_gamma("half", 10), TypeError, "alpha must be a number or a Tensor"),
    (
        lambda: flow.matched_filter(torch.ones(3), TABLE, 0.0),
        ValueError,
        r"x must be \(..., 4\) .*got \(3,\)",
    ),
    (
        lambda: flow.matched_filter(TABLE, TABLE, 1.0, path="linear"),
        ValueError,
        r"σ\(t\) must lie in \(0, inf\], got 0.0",
    ),
    (lambda: flow.matched_filter(TABLE, TABLE, 0.5, scale=0.0), ValueError, r"scale must lie in \(0, inf\)"),
    (lambda: flow.elf_grid(0), ValueError, "flow.elf_grid: steps must be at least 1, got 0"),
    (lambda: flow.elf_grid(4, std=0.0), ValueError, r"std must lie in \(0, inf\), got 0.0"),
    (lambda: flow.elf_grid(4, mean=math.inf), ValueError, "mean must lie in"),
    (
        lambda: flow.elf_grid(4, key=KEY, generator=torch.Generator()),
        ValueError,
        "key or generator, not both",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
