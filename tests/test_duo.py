"""Duo: its transformation, curriculum, consistency pairs and sampling against closed forms and laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from goodness import chi_square
from oracles import MIN_P, check_compiled
from scipy import integrate, stats
from torch import Tensor

import dlcore
from dlcore.process import distill, duo, flow, masked, uniform
from dlcore.process.duo import relaxation as drawing

#: T and dT/dγ by adaptive quadrature, to 8 digits.
TABLE = [
    (50257, -4.0, 0.99869414, -0.0148849),
    (50257, -3.5, 0.92834739, -0.37518488),
    (50257, -3.0, 0.59625285, -0.83514686),
    (50257, -2.5, 0.23796526, -0.52229455),
    (50257, -1.75, 0.03828194, -0.09690437),
    (50257, -1.0, 0.00618631, -0.01405999),
    (30522, -3.5, 0.94170575, -0.3185901),
    (30522, -2.5, 0.27372983, -0.5607837),
    (262144, -3.5, 0.87000988, -0.58564457),
    (262144, -2.5, 0.14343058, -0.38399415),
    (262144, -1.75, 0.01665328, -0.0484871),
    (27, -2.5, 0.90658059, -0.25661444),
    (3, -1.0, 0.69881455, -0.26503482),
    (3, 0.0, 0.45055307, -0.21698931),
]
N = 100_000


# --- the transformation operator ---------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "gamma", "alpha", "slope"), TABLE)
def test_transform_table(vocab: int, gamma: float, alpha: float, slope: float) -> None:
    got = duo.transform(gamma, vocab)
    assert float(got[0]) == pytest.approx(alpha, abs=6e-9)
    assert float(got[1]) == pytest.approx(slope, abs=6e-9)


def test_transform_of_two_tokens_in_closed_form() -> None:
    """V = 2: T = erf(μ/2), so dT/dγ = -μ/(2√π)·exp(-μ²/4)."""
    gamma = torch.linspace(-6, 40, 400, dtype=torch.float64)
    mu = (-gamma / 2).exp()
    alpha, slope = duo.transform(gamma, 2)
    torch.testing.assert_close(alpha, torch.special.erf(mu / 2), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        slope, -mu / (2 * math.sqrt(math.pi)) * (-(mu**2) / 4).exp(), rtol=1e-9, atol=1e-25
    )


@pytest.mark.parametrize("vocab", [2, 3, 100, 50_257, 262_144])
def test_transform_by_adaptive_quadrature(vocab: int) -> None:
    for gamma in (-4.2, -3.1, -2.0, 0.5, 6.0):
        mu = math.exp(-gamma / 2)

        def largest(u: float, mu: float = mu) -> float:
            return stats.norm.pdf(u - mu) * math.exp((vocab - 1) * stats.norm.logcdf(u))

        mass = integrate.quad(largest, mu - 12, mu + 12, epsabs=1e-14, epsrel=1e-13, limit=500)[0]
        alpha = vocab / (vocab - 1) * (mass - 1 / vocab)

        def tied(u: float, mu: float = mu) -> float:
            return stats.norm.pdf(u - mu) * stats.norm.pdf(u) * math.exp((vocab - 2) * stats.norm.logcdf(u))

        density = integrate.quad(tied, -9, mu + 9, epsabs=0, epsrel=1e-12, limit=500)[0]
        got = duo.transform(gamma, vocab)
        assert float(got[0]) == pytest.approx(alpha, abs=2e-13)
        assert float(got[1]) == pytest.approx(-mu / 2 * vocab * density, rel=1e-11)


def test_transform_slope_is_the_derivative() -> None:
    gamma = torch.linspace(-4.5, 8, 60, dtype=torch.float64)
    for vocab in (2, 27, 262_144):
        steps = [duo.transform(gamma + h, vocab)[0] for h in (-2e-3, -1e-3, 1e-3, 2e-3)]
        difference = (steps[0] - 8 * steps[1] + 8 * steps[2] - steps[3]) / 12e-3
        torch.testing.assert_close(duo.transform(gamma, vocab)[1], difference, rtol=1e-7, atol=1e-11)


def test_transform_is_the_argmax_of_normals() -> None:
    g = torch.Generator().manual_seed(0)
    vocab, gamma = 7, -0.4
    state = math.sqrt(1 / (1 + math.exp(gamma))) * torch.eye(vocab)[2]
    state = state + math.sqrt(1 / (1 + math.exp(-gamma))) * torch.randn(N, vocab, generator=g)
    alpha = float(duo.transform(gamma, vocab)[0])
    expected = alpha * torch.eye(vocab, dtype=torch.float64)[2] + (1 - alpha) / vocab
    assert chi_square(state.argmax(-1), expected) > MIN_P
    assert chi_square(state.argmax(-1), expected.lerp(torch.ones(vocab).double() / vocab, 0.05)) < MIN_P


def test_transform_ends_and_inverse() -> None:
    assert [float(v) for v in duo.transform(-200.0, 50_257)] == [1.0, 0.0]
    alpha, slope = duo.transform(200.0, 50_257)
    assert 0 < float(alpha) < 1e-40
    assert float(slope) == pytest.approx(-float(alpha) / 2)
    gamma = torch.tensor([[-3.9, -2.5], [-1.0, 4.0]], dtype=torch.float64)
    for vocab in (2, 27, 262_144):
        back = duo.inverse_transform(duo.transform(gamma, vocab)[0], vocab)
        # At V = 2, 1 - T is 1e-7 of 1.
        torch.testing.assert_close(back, gamma, rtol=1e-8, atol=0)
    assert duo.inverse_transform(torch.tensor([0.0, 1.0]), 9).tolist() == [math.inf, -math.inf]
    mu = (-gamma / 2).exp()
    torch.testing.assert_close(duo.transform(gamma, 100)[0], flow.flm_alpha(mu / (1 + mu), 100))
    # More at once than one block of the quadrature.
    many = torch.linspace(-4, 1, 5001, dtype=torch.float64)
    torch.testing.assert_close(duo.transform(many, 27)[0][::2500], duo.transform(many[::2500], 27)[0])


RANGES = [
    (2, -6.0, 8.0),
    (27, -5.0, -1.0),
    (50_257, -5.0, -1.0),
    (50_257, -3.55, -1.85),
    (262_144, -5.0, -1.0),
]


@pytest.mark.parametrize(("vocab", "low", "high"), RANGES)
def test_table_error_is_as_stated(vocab: int, low: float, high: float) -> None:
    """1e-10 and 1e-7 for cubics of 4/1024; the error measured is the largest there is."""
    table = duo.Transformation(vocab, low, high, size=math.ceil(1024 * (high - low) / 4))
    stated = table.error()
    assert stated[0] < 1e-10
    assert stated[1] < 1e-7
    g = torch.Generator().manual_seed(1)
    gamma = low + (high - low) * torch.rand(3000, generator=g, dtype=torch.float64)
    alpha, slope = duo.transform(gamma, vocab)
    assert float((table.alpha(gamma) - alpha).abs().max()) <= stated[0] * 1.001 + 1e-15
    assert float((table.derivative(gamma) - slope).abs().max()) <= stated[1] * 1.001 + 1e-14
    # Fourth and third order.
    coarse = duo.Transformation(vocab, low, high, size=math.ceil(256 * (high - low) / 4)).error()
    assert coarse[0] / stated[0] > 100
    assert coarse[1] / stated[1] > 30


@pytest.mark.parametrize(("vocab", "low", "high"), RANGES)
def test_table_inverse(vocab: int, low: float, high: float) -> None:
    table = duo.Transformation(vocab, low, high)
    gamma = torch.linspace(low, high, 2000, dtype=torch.float64)
    alpha = table.alpha(gamma)
    back = table.gamma(alpha)
    assert float((table.alpha(back) - alpha).abs().max()) < 4e-16
    known = (alpha < 1 - 1e-6) & (alpha > 1e-6)
    torch.testing.assert_close(back[known], gamma[known], rtol=0, atol=1e-8)
    assert bool((back[known].diff() > 0).all())


def test_table_levels() -> None:
    table = duo.Transformation(50_257, -3.5, -1.75)
    t = torch.tensor([[0.0, 0.25, 1.0]])
    gamma, alpha, dalpha = table.levels(t)
    torch.testing.assert_close(gamma, torch.tensor([[-3.5, -3.0625, -1.75]]).double())
    torch.testing.assert_close(alpha, duo.transform(gamma, 50_257)[0], rtol=0, atol=1e-11)
    torch.testing.assert_close(dalpha, 1.75 * duo.transform(gamma, 50_257)[1], rtol=0, atol=1e-8)
    assert float(table.levels(0.25).alpha) == float(alpha[0, 1])
    table = duo.Transformation.covering(40, 0.98, 0.02)
    assert table.levels(torch.tensor([0.0, 1.0])).alpha.tolist() == pytest.approx([0.98, 0.02], abs=1e-9)
    assert repr(table).startswith("Transformation(40, -")
    assert table.to("cpu").alpha(-1.0) == table.alpha(-1.0)
    leaf = torch.tensor([-1.0, 2.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(table.alpha(leaf).sum(), leaf)
    torch.testing.assert_close(slope, table.derivative(leaf).detach())


# --- what the curriculum draws -----------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "count"), [(2, 2), (26, 5), (50_256, 4), (262_143, 2)])
def test_order_statistics(total: int, count: int) -> None:
    """Given the one above, Φ of an order statistic is a known power of a uniform."""
    keys = dlcore.rng.split(dlcore.rng.key(3), N)
    largest = drawing._largest_normals(keys, count, total)
    assert largest.dtype == torch.float32
    assert bool((largest.diff(dim=-1) <= 0).all())
    log_cdf = torch.special.log_ndtr(largest.double())
    before = torch.zeros(N, dtype=torch.float64)
    for i in range(count):
        power = ((log_cdf[:, i] - before) * (total - i)).exp()
        assert stats.kstest(power.numpy(), "uniform").pvalue > MIN_P
        before = log_cdf[:, i]
    assert stats.kstest((log_cdf[:, 0] * (total * 1.05)).exp().numpy(), "uniform").pvalue < MIN_P


@pytest.mark.parametrize(("total", "count"), [(262_143, 2), (3, 3)])
def test_order_statistics_keep_float32_precision(total: int, count: int) -> None:
    """In both tails: a plain Φ^{-1}(exp(log U)) is infinite for 0.7 % of rows at 262,144 tokens."""
    keys = dlcore.rng.split(dlcore.rng.key(4), 20_000)
    largest = drawing._largest_normals(keys, count, total).double()
    gaps = dlcore.rng.gumbel(keys, (count,), dtype=torch.float64).neg().exp()
    log_cdf = -(gaps / torch.arange(total, total - count, -1)).cumsum(-1)
    upper, lower = -torch.special.ndtri(-torch.expm1(log_cdf)), torch.special.ndtri(log_cdf.exp())
    exact = torch.where(log_cdf > -0.7, upper, lower)
    torch.testing.assert_close(largest, exact, rtol=0, atol=5e-6)
    assert float(exact.abs().max()) > 4


@pytest.mark.parametrize(("total", "count"), [(1, 1), (2, 2), (7, 3), (4, 4)])
def test_ids_are_distinct_and_exchangeable(total: int, count: int) -> None:
    ids = drawing._distinct(dlcore.rng.split(dlcore.rng.key(5), N), count, total)
    order = {choice: i for i, choice in enumerate(itertools.permutations(range(total), count))}
    code = torch.tensor([order[tuple(row)] for row in ids.tolist()])
    assert chi_square(code, torch.ones(len(order))) > MIN_P


def test_ids_never_name_the_clean_token() -> None:
    x = torch.arange(4).repeat(500)
    relaxed = duo.curriculum(x, 3.0, 0.1, 4, top_k=3, key=dlcore.rng.key(6))
    named = (relaxed.ids == x.unsqueeze(-1)).sum(-1)
    assert set(named.tolist()) == {0, 1}
    assert bool((relaxed.ids.sort(-1).values.diff(dim=-1) > 0).all())
    assert set(relaxed.ids.flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize(("vocab", "gamma"), [(27, -1.0), (50_257, -2.5)])
def test_z_is_clean_as_often_as_it_should(vocab: int, gamma: float, top_k: int) -> None:
    """P(z = x) = T + (1 - T)/V at every k, and the published rule's excess."""
    x = torch.arange(N) % vocab
    alpha = float(duo.transform(gamma, vocab)[0])
    wanted = alpha + (1 - alpha) / vocab
    spread = math.sqrt(N * wanted * (1 - wanted))
    z = duo.curriculum(x, gamma, 1e-2, vocab, top_k=top_k, key=dlcore.rng.key(top_k)).z
    assert abs(int((z == x).sum()) - N * wanted) < 4 * spread
    biased = duo.curriculum(x, gamma, 1e-2, vocab, top_k=top_k, published=True, key=dlcore.rng.key(top_k)).z
    if top_k > 1:
        assert int((biased == x).sum()) - N * wanted > 6 * spread
        # Measured of the published function at V = 50,257.
        if vocab == 50_257:
            assert float((biased == x).double().mean()) == pytest.approx(
                {2: 0.308, 5: 0.397}[top_k], abs=0.006
            )
    else:
        assert biased.equal(z)
    # Where z is not x it is any other token.
    other = (z - x)[z != x] % vocab
    if vocab == 27:
        assert chi_square(other - 1, torch.ones(vocab - 1)) > MIN_P


def whole(relaxed: duo.Relaxed, vocab: int) -> Tensor:
    """The softmax that k = V-1 entries and their sum determine."""
    missing = vocab * (vocab - 1) // 2 - relaxed.ids.sum(-1, keepdim=True)
    left = 1 - relaxed.weights.double().sum(-1, keepdim=True)
    ids, weights = torch.cat([relaxed.ids, missing], -1), torch.cat([relaxed.weights.double(), left], -1)
    return torch.zeros(weights.shape, dtype=torch.float64).scatter(-1, ids, weights)


@pytest.mark.parametrize(("gamma", "tau"), [(-0.5, 0.5), (1.0, 2.0)])
def test_all_entries_are_the_softmax(gamma: float, tau: float) -> None:
    vocab, n, x = 5, 20_000, 3
    g = torch.Generator().manual_seed(7)
    noise = torch.randn(n, vocab, generator=g, dtype=torch.float64)
    signal, spread = (math.sqrt(1 / (1 + math.exp(s))) for s in (gamma, -gamma))
    exact = torch.softmax((signal * torch.eye(vocab)[x] + spread * noise) / tau, -1)
    relaxed = duo.curriculum(torch.full((n,), x), gamma, tau, vocab, top_k=vocab - 1, key=dlcore.rng.key(8))
    got = whole(relaxed, vocab)
    assert bool((got > 0).all())
    assert relaxed.z.equal(got.argmax(-1))
    for number in (lambda p: p[:, x], lambda p: p[:, 0], lambda p: p.amax(-1), lambda p: p[:, 4] / p[:, 1]):
        assert stats.ks_2samp(number(got), number(exact)).pvalue > MIN_P
    assert stats.ks_2samp(got[:, x], torch.softmax(noise / tau, -1)[:, x]).pvalue < MIN_P


@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_rest_counts_as_its_mean(top_k: int, tau: float) -> None:
    """Under one key k's entries are nested, and E[Σ of all | the k] is the sum with the mean field."""
    vocab, x = 30, torch.zeros(40_000, dtype=torch.int64)
    few, all_of_them = (
        duo.curriculum(x, -1.0, tau, vocab, top_k=k, key=dlcore.rng.key(9)) for k in (top_k, vocab - 1)
    )
    assert few.z.equal(all_of_them.z)
    seen = few.ids[:, 0] == all_of_them.ids[:, 0]
    assert top_k == 1 or bool(seen.all())
    assert few.ids[seen, : top_k - 1].equal(all_of_them.ids[seen, : top_k - 1])
    # Only the largest of the V-1, or with k = 1 where x does not displace it: that is known given the k.
    ratio = (few.weights[:, 0].double() / all_of_them.weights[:, 0].double())[seen]
    error = (ratio - 1).mean() / (ratio.std() / math.sqrt(len(ratio)))
    assert abs(float(error)) < 4
    assert float(ratio.std()) > 1e-4


@pytest.mark.parametrize("sharpness", [0.9, 1.4, 1.5, 5.0, 40.0, 1000.0, 1e10])
def test_mean_below_a_bound(sharpness: float) -> None:
    """E[e^X | X < c] at c = 1.3, s = 0.9, and far out, where the squares would cancel."""
    from mpmath import erfc, log, mp, mpf, sqrt

    mp.dps = 60
    s, bound = mpf(sharpness), mpf(1.3) / mpf(0.9)

    def log_cdf(v: mpf) -> mpf:
        return log(erfc(-v / sqrt(2)) / 2)

    if sharpness < 1e5:
        exact = s * s / 2 + log_cdf(bound - s) - log_cdf(bound) - s * bound
    else:
        # Φ's tail φ(v)/v.
        exact = -bound * bound / 2 - log(s * sqrt(2 * mp.pi)) - log_cdf(bound)
    b = torch.tensor(1.3, dtype=torch.float64).div(0.9).float()
    got = drawing._log_mean_below(b, torch.tensor(sharpness), b)
    assert float(got) == pytest.approx(float(exact), rel=2e-6)
    if sharpness == 0.9:
        moment = drawing._log_mean_below(b, torch.tensor(sharpness), torch.tensor(0.0)).exp()
        assert float(moment) == pytest.approx(1.1449856067671, rel=1e-6)


def test_temperatures_at_the_ends() -> None:
    x = torch.arange(2000) % 50
    cold = duo.curriculum(x, -1.0, 1e-10, 50, top_k=3, key=dlcore.rng.key(10))
    at_z = torch.where(cold.ids == cold.z.unsqueeze(-1), cold.weights, 0).sum(-1)
    # Where x is not shown but largest cannot be: z is always shown.
    assert float((at_z - 1).abs().max()) < 1e-6
    hot = duo.curriculum(x, -1.0, 1e6, 50, top_k=3, key=dlcore.rng.key(10))
    torch.testing.assert_close(hot.weights, torch.full((2000, 3), 0.02))
    clean = duo.curriculum(x, -300.0, 1e-2, 50, top_k=1, key=dlcore.rng.key(10))
    assert clean.z.equal(x)
    assert clean.ids[:, 0].equal(x)
    assert bool((clean.weights == 1).all())
    two = duo.curriculum(x % 2, 300.0, 0.5, 2, top_k=1, key=dlcore.rng.key(10))
    assert bool((two.weights >= 0.5).all())
    assert bool(duo.curriculum(x[:0], 0.0, 1.0, 50).weights.shape == (0, 2))


def test_rows_draw_by_their_key() -> None:
    x = torch.arange(12).view(3, 4)
    key = dlcore.rng.key(11)
    together = duo.curriculum(x, -1.0, 0.1, 12, top_k=4, key=key)
    keys = dlcore.rng.split(key, (3, 4))
    apart = duo.curriculum(x[1], -1.0, 0.1, 12, top_k=4, key=keys[1])
    assert all(a[1].equal(b) for a, b in zip(together, apart, strict=True))
    assert duo.corrupt(x, -1.0, 12, key=key).equal(together.z)
    gamma = torch.tensor([[-9.0], [0.0], [9.0]])
    assert duo.corrupt(x, gamma, 12, key=key)[0].equal(x[0])


def test_embed() -> None:
    g = torch.Generator().manual_seed(12)
    table = torch.randn(9, 4, generator=g, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(9, (2, 3, 5), generator=g)
    weights = torch.rand(2, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        duo.embed(ids, weights, table), (weights.unsqueeze(-1) * table[ids]).sum(-2), rtol=1e-14, atol=1e-14
    )
    assert torch.autograd.gradcheck(lambda w, e: duo.embed(ids, w, e), (weights, table))
    half = duo.embed(ids, weights.detach().float(), table.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), duo.embed(ids, weights, table).detach(), rtol=0.02, atol=0.05)
    assert duo.embed(ids[:0], weights[:0], table).shape == (0, 3, 4)
    # A point mass is the token's own embedding.
    z = torch.tensor([[4]])
    assert duo.embed(z, torch.ones(1, 1), table.detach().float()).equal(table.detach().float()[4:5])


def test_curriculum_temperature() -> None:
    schedule = {"start": 10, "stop": 20, "tau_start": 1e-1, "tau_stop": 1e-3}
    got = [duo.curriculum_temperature(step, **schedule) for step in (0, 10, 15, 19, 20, 99)]
    assert got == pytest.approx([1e-1, 1e-1, 1e-2, 10**-2.8, 1e-10, 1e-10])
    shares = {"start": 0.1, "stop": 0.2, "tau_start": 1e-1, "tau_stop": 1e-3}
    got = [duo.curriculum_temperature(share, **shares) for share in (0.0, 0.1, 0.15, 0.19, 0.2, 1)]
    assert got == pytest.approx([1e-1, 1e-1, 1e-2, 10**-2.8, 1e-10, 1e-10])


# --- consistency distillation ------------------------------------------------------------------------------


def test_consistency_pair() -> None:
    vocab, key = 27, dlcore.rng.key(13)
    x = torch.arange(N) % vocab
    z_t, z_s = duo.consistency_pair(x, 0.0, -1.0, vocab, key=key)
    assert z_t.equal(duo.corrupt(x, 0.0, vocab, key=key))
    assert z_s.equal(duo.corrupt(x, -1.0, vocab, key=key))
    assert bool((z_s == x)[z_t == x].all())
    # One noise: where neither has become x they are the same wrong token.
    assert bool((z_s == z_t)[z_s != x].all())
    for z, gamma in ((z_t, 0.0), (z_s, -1.0)):
        alpha = float(duo.transform(gamma, vocab)[0])
        expected = torch.full((vocab,), (1 - alpha) / vocab, dtype=torch.float64)
        expected[0] += alpha
        assert chi_square((z - x) % vocab, expected) > MIN_P
    same = duo.consistency_pair(x, -1.0, -1.0, vocab, key=key)
    assert same[0].equal(same[1])


def test_consistency_loss_vanishes_at_the_teacher() -> None:
    g = torch.Generator().manual_seed(14)
    table = torch.randn(27, 27, generator=g)
    x = torch.randint(27, (4, 16), generator=g)
    z_t, z_s = duo.consistency_pair(x, -1.0, -1.0, 27, key=dlcore.rng.key(15))
    student = table[z_t].requires_grad_()
    loss = duo.consistency_loss(student, table[z_s])
    assert float(loss.detach().abs().max()) < 1e-6
    assert float(torch.autograd.grad(loss.sum(), student)[0].abs().max()) < 1e-6
    z_t, z_s = duo.consistency_pair(x, 0.0, -1.0, 27, key=dlcore.rng.key(15))
    student, teacher = table[z_t].requires_grad_(), table[z_s].requires_grad_()
    loss = duo.consistency_loss(student, teacher)
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(loss, (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-4, atol=1e-5)
    forward = duo.consistency_loss(student, teacher, kind="forward")
    torch.testing.assert_close(forward, (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-4, atol=1e-5)
    assert float(loss.detach().sum()) > 1
    assert torch.autograd.grad(loss.sum(), teacher, allow_unused=True) == (None,)


# --- sampling ----------------------------------------------------------------------------------------------


def test_kappa_rules() -> None:
    """ReMDM(σ) is the ψ-mixture with κ = 1 - σ/(1 - α_s)."""
    t, s, eta = 0.5, 0.6, 0.1
    for rule, sigma in (("cap", 0.1), ("rescale", 0.1 * 0.8), ("remdm", 0.1)):
        k = float(duo.kappa(rule, t, s, eta))
        assert k == pytest.approx(1 - sigma / 0.4)
        stays = k * (1 - s) / (1 - t) + (1 - k) * (1 - s)
        assert stays == pytest.approx((1 - s - sigma * t) / (1 - t))
        # Unmasked: the mask again with probability (1-κ)(1-α_s) = σ.
        assert (1 - k) * (1 - s) == pytest.approx(sigma)
    assert float(duo.kappa("cap", t, s, 1.0)) == 0
    assert float(duo.kappa("remdm", 0.98, 0.99, 0.5)) == float(duo.kappa("cap", 0.98, 0.99, 0.5)) == 0
    assert float(duo.kappa("rescale", t, s, eta, published=True)) == pytest.approx(1 - 0.01 / 0.4)
    assert float(duo.kappa("constant", t, s, eta)) == 0.1
    assert [float(duo.kappa(rule, 0.9, 1.0, eta)) for rule in ("constant", "cap", "rescale", "remdm")] == [
        1
    ] * 4
    assert duo.kappa("cap", torch.full((2, 1), t), s, torch.full((1,), eta)).shape == (2, 1)
    etas = torch.tensor([0.1, 0.2], dtype=torch.float64)
    for rule in ("constant", "cap", "rescale", "remdm"):
        each = torch.stack([duo.kappa(rule, t, s, float(e)) for e in etas])
        torch.testing.assert_close(duo.kappa(rule, t, s, etas), each)
    assert masked.remask_probability("rescale", t, s, eta=eta) == pytest.approx(0.08)


def test_profiles() -> None:
    assert duo.alpha_profile(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    alphas = duo.alpha_profile(99, plateau=0.9, high=0.45, middle=0.5)
    assert len(alphas) == 100
    assert float(alphas[0]) == 0
    assert float(alphas[-1]) == 1
    assert bool((alphas.diff() >= 0).all())
    assert int((alphas == 0.9).sum()) == 1 + 50 + 1
    kappas = duo.kappa_profile(
        alphas, ("constant", 1.0), ("remdm", 0.01), ("rescale", 0.05), high=0.45, middle=0.5
    )
    assert kappas.shape == (99,)
    assert bool((kappas[:45] == 1).all())
    torch.testing.assert_close(kappas[45:94], torch.full((49,), 0.9, dtype=torch.float64))
    torch.testing.assert_close(kappas[95:], duo.kappa("rescale", alphas[95:-1], alphas[96:], 0.05))
    # They go as they are into the step.
    z, logits = torch.randint(9, (2, 5)), torch.randn(2, 5, 9)
    for i in range(99):
        z = uniform.step(logits, z, alphas[i], alphas[i + 1], kappa=kappas[i])
    assert bool(((z >= 0) & (z < 9)).all())


@pytest.mark.parametrize("parameterization", ["loo", "denoiser"])
def test_greedy(parameterization: str) -> None:
    g = torch.Generator().manual_seed(16)
    logits, z = torch.randn(300, 11, generator=g), torch.randint(11, (300,), generator=g)
    alpha = torch.rand(300, generator=g, dtype=torch.float64) * 0.5
    got = duo.greedy(logits, z, alpha, parameterization=parameterization)
    log_d = uniform.loo_to_denoiser(logits, z, alpha) if parameterization == "loo" else logits
    assert got.equal(log_d.argmax(-1))
    raw = duo.greedy(logits, z, alpha, parameterization=parameterization, published=True)
    assert raw.equal(logits.argmax(-1))
    assert raw.equal(got) == (parameterization == "denoiser")
    assert duo.greedy(logits, z, 1.0, parameterization=parameterization).equal(z)
    head = dlcore.LinearLogits(torch.randn(300, 5, generator=g), torch.randn(11, 5, generator=g))
    dense = duo.greedy(head.materialize(), z, alpha, parameterization=parameterization)
    assert duo.greedy(head, z, alpha, parameterization=parameterization).equal(dense)


# --- compilation and bad input -----------------------------------------------------------------------------


def test_the_loop_compiles() -> None:
    table = duo.Transformation(27, -3.0, 2.0)
    weight = torch.randn(27, 8, generator=torch.Generator().manual_seed(17))

    def train(x: Tensor, t: Tensor, tau: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        gamma, alpha, dalpha = table.levels(t)
        z, ids, weights = duo.curriculum(x, gamma, tau, 27, top_k=3, key=key)
        hidden = duo.embed(ids, weights, weight)
        loss = uniform.nelbo(dlcore.LinearLogits(hidden, weight), z, x, alpha, dalpha)
        earlier = duo.consistency_pair(x, gamma, gamma - 0.01, 27, key=key)
        return z, ids, weights, loss, *earlier, table.gamma(alpha), duo.greedy(weight[z] @ weight.T, z, alpha)

    x = torch.arange(12).view(3, 4)
    check_compiled(
        train,
        [
            (x, torch.full((3, 1), t), torch.tensor(tau), dlcore.rng.key(seed))
            for seed, (t, tau) in enumerate([(0.3, 0.1), (0.5, 0.5), (0.9, 1e-10)])
        ],
    )


X = torch.tensor([0, 1])
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: duo.transform(0.0, 1), ValueError, "duo.transform: vocab_size must be at least 2, got 1"),
    (lambda: duo.transform(0.0, 2.0), TypeError, "vocab_size must be an int"),
    (lambda: duo.transform(math.nan, 9), ValueError, r"gamma must lie in \(-inf, inf\), got nan"),
    (lambda: duo.inverse_transform(1.5, 9), ValueError, r"duo.inverse_transform: alpha must lie in \[0, 1\]"),
    (lambda: duo.Transformation(9, -1.0, -1.0), ValueError, "gamma_min must lie below gamma_max -1, got -1"),
    (lambda: duo.Transformation(9, size=0), ValueError, "size must be at least 1, got 0"),
    (lambda: duo.Transformation(9).alpha(-6.0), ValueError, r"gamma must lie in \[-5, -1\], got -6.0"),
    (lambda: duo.Transformation(9).gamma(0.01), ValueError, "Transformation.gamma: alpha must lie in"),
    (lambda: duo.Transformation(9).levels(1.1), ValueError, r"t must lie in \[0, 1\], got 1.1"),
    (lambda: duo.corrupt(X, 0.0, 1), ValueError, "duo.corrupt: vocab_size must be at least 2, got 1"),
    (lambda: duo.corrupt(X.int(), 0.0, 4), TypeError, "x must be an int64 Tensor"),
    (lambda: duo.corrupt(X + 3, 0.0, 4), ValueError, r"x must lie in \[0, 4\), got 4"),
    (lambda: duo.corrupt(X, torch.zeros(3), 4), ValueError, r"gamma must broadcast to \(2,\), got \(3,\)"),
    (lambda: duo.corrupt(X, math.inf, 4), ValueError, "gamma must lie in"),
    (lambda: duo.curriculum(X, 0.0, 0.0, 4), ValueError, r"tau must lie in \(0, inf\), got 0.0"),
    (lambda: duo.curriculum(X, 0.0, 1.0, 4, top_k=4), ValueError, r"top_k must lie in \[1, 4\), got 4"),
    (lambda: duo.curriculum(X, 0.0, 1.0, 4, top_k=1.0), TypeError, "top_k must be an int"),
    (
        lambda: duo.consistency_pair(X, -1.0, 0.0, 4),
        ValueError,
        "gamma_s must be at most gamma_t, got 0.0 above -1.0",
    ),
    (
        lambda: duo.consistency_loss(torch.zeros(2, 4), torch.zeros(2, 5)),
        ValueError,
        "duo.consistency_loss: teacher must have",
    ),
    (lambda: duo.embed(X, torch.ones(3), torch.ones(4, 2)), ValueError, r"ids must have shape \(3,\)"),
    (lambda: duo.embed(X, X, torch.ones(4, 2)), TypeError, "weights must be float32"),
    (lambda: duo.embed(X, torch.ones(2), torch.ones(1, 2)), ValueError, r"ids must lie in \[0, 1\), got 1"),
    (lambda: duo.embed(X, torch.ones(2), torch.ones(4)), ValueError, r"table must be \(V, E\)"),
    (lambda: duo.kappa("max", 0.1, 0.2, 0.1), ValueError, "rule must be one of 'constant', 'cap'"),
    (lambda: duo.kappa("cap", 0.1, 0.2, 1.1), ValueError, r"eta must lie in \[0, 1\]"),
    (lambda: duo.kappa("cap", 0.3, 0.2, 0.1), ValueError, "duo.kappa: alpha_s must be at least alpha_t"),
    (
        lambda: duo.kappa("cap", 0.1, 0.2, 0.1, published=True),
        ValueError,
        "published is about rule 'rescale'",
    ),
    (lambda: duo.alpha_profile(0), ValueError, "steps must be at least 1, got 0"),
    (lambda: duo.alpha_profile(9, plateau=1.0), ValueError, r"plateau must lie in \(0, 1\), got 1"),
    (lambda: duo.alpha_profile(9, plateau=0.5, high=0.7), ValueError, r"high \+ middle must be at most 1"),
    (lambda: duo.alpha_profile(2, plateau=0.5), ValueError, "must hold a level each"),
    (
        lambda: duo.kappa_profile(torch.ones(1), *[("constant", 1.0)] * 3),
        ValueError,
        r"alphas must be \(steps \+ 1,\)",
    ),
    (lambda: duo.greedy(torch.zeros(2, 4), X[:1], 0.5), ValueError, r"duo.greedy: z must have shape \(2,\)"),
    (
        lambda: duo.greedy(torch.zeros(2, 4), X, 0.5, parameterization="x"),
        ValueError,
        "parameterization must be",
    ),
    (
        lambda: duo.curriculum_temperature(0, start=2, stop=1, tau_start=1.0, tau_stop=1.0),
        ValueError,
        "stop must be at least start 2, got 1",
    ),
    (
        lambda: duo.curriculum_temperature(0, start=0, stop=1, tau_start=0, tau_stop=1.0),
        ValueError,
        "tau_start must be positive",
    ),
    (lambda: distill.step_size(-1), ValueError, "step must be at least 0"),
]


@pytest.mark.parametrize(("call", "error", "match"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
