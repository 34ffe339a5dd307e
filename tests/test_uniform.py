"""Uniform-state diffusion against enumeration, exact laws and the formulas of the papers."""

import math

import pytest
import torch
from oracles import (
    ENTROPY,
    ROWS,
    V,
    bridge_given_clean,
    check_compiled,
    fits,
    fits_given,
    law,
    pairs,
    point,
    posteriors,
    quadrature,
    uniform_kernel,
)
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import uniform

CONVERSIONS = [
    uniform.loo_to_denoiser,
    uniform.denoiser_to_loo,
    uniform.loo_to_log_score,
    uniform.log_score_to_loo,
]


def denoiser_of(p: Tensor, z: Tensor, alpha: float) -> Tensor:
    """Bayes' rule, linearly: p(v)·q(z | v), normalised."""
    joint = p * uniform_kernel(alpha, p.shape[-1]).T[z]
    return joint / joint.sum(-1, keepdim=True)


# --- the enumerated joint ----------------------------------------------------------------------------------


def test_listed_numbers() -> None:
    exact = posteriors(uniform_kernel(0.4))
    z, at = torch.tensor([0, 1]), exact.loo[0, 1]
    torch.testing.assert_close(at[0] * 36, torch.tensor([10.0, 15, 11], dtype=torch.float64))
    denoiser = uniform.loo_to_denoiser(at.log(), z, 0.4).exp()
    torch.testing.assert_close(denoiser[0] * 56, torch.tensor([30.0, 15, 11], dtype=torch.float64))
    score = uniform.loo_to_log_score(at.log(), z, 0.4).exp()[0]
    torch.testing.assert_close(score, torch.tensor([1, 33 / 28, 29 / 28], dtype=torch.float64))
    bridge = uniform.bridge_log_probs(at.log(), z, 0.4, 0.7).exp()[0]
    listed = torch.tensor([0.676020408163, 0.179846938776, 0.144132653061], dtype=torch.float64)
    torch.testing.assert_close(bridge, listed, rtol=0, atol=1e-11)
    wrong = uniform.bridge_log_probs(denoiser.log(), z, 0.4, 0.7).exp()[0]
    listed = torch.tensor([0.818965517, 0.099137931, 0.081896552], dtype=torch.float64)
    torch.testing.assert_close(wrong, listed, rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", [1e-6, 0.4, 0.7, 1 - 1e-6])
def test_conversions_match_enumeration(alpha: float) -> None:
    exact = posteriors(uniform_kernel(alpha))
    z = pairs(V)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(
        uniform.loo_to_denoiser(exact.loo.log(), z, alpha).exp(), exact.denoiser, **close
    )
    torch.testing.assert_close(
        uniform.denoiser_to_loo(exact.denoiser.log(), z, alpha).exp(), exact.loo, **close
    )
    # The score of position 0 is a ratio of the masses of neighbouring sequences.
    score = exact.mass.T.unsqueeze(0) / exact.mass.unsqueeze(-1)
    given = uniform.loo_to_log_score(exact.loo.log(), z, alpha)[..., 0, :].exp()
    torch.testing.assert_close(given, score, **close)
    back = uniform.log_score_to_loo(score.log(), z[..., 0], alpha).exp()
    tolerance = 1e-12 * (1 + (1 - alpha) / alpha)
    torch.testing.assert_close(back, exact.loo[..., 0, :], rtol=0, atol=tolerance)


def test_expected_cross_entropies() -> None:
    exact = posteriors(uniform_kernel(0.4))
    x, z = pairs(V).view(V, V, 1, 1, 2), pairs(V)
    x, z = x.expand(V, V, V, V, 2), z.expand(V, V, V, V, 2)

    def expected(logits: Tensor, parameterization: str) -> float:
        each = uniform.cross_entropy(
            logits.log().expand(V, V, V, V, 2, V), z, x, 0.4, parameterization=parameterization
        )
        return float((exact.joint.unsqueeze(-1) * each)[..., 0].sum())

    assert expected(exact.loo, "denoiser") == pytest.approx(1.0400083, abs=1e-7)
    assert expected(exact.denoiser, "denoiser") == pytest.approx(0.9010442, abs=1e-7)
    assert expected(exact.loo, "loo") == pytest.approx(0.9010442, abs=1e-7)


def expected_nelbo(t: Tensor, plug_in_denoiser: bool = False) -> Tensor:
    """Σ over x and z of q(x, z)·nelbo at α = 1 - t, for the exact posterior, per position: (T, 2)."""
    found = []
    for at in t.tolist():
        exact = posteriors(uniform_kernel(1 - at))
        p = (exact.denoiser if plug_in_denoiser else exact.loo).log().expand(V, V, V, V, 2, V)
        x, z = pairs(V).view(V, V, 1, 1, 2).expand(V, V, V, V, 2), pairs(V).expand(V, V, V, V, 2)
        found.append((exact.joint.unsqueeze(-1) * uniform.nelbo(p, z, x, 1 - at, -1.0)).sum((0, 1, 2, 3)))
    return torch.stack(found)


def test_nelbo_integrates_to_the_entropy() -> None:
    t, weight = quadrature()
    assert float((weight.unsqueeze(-1) * expected_nelbo(t)).sum()) == pytest.approx(ENTROPY, abs=1e-7)


def test_nelbo_is_lowest_at_the_leave_one_out_posterior() -> None:
    at = torch.tensor([0.6], dtype=torch.float64)
    loo, denoiser = float(expected_nelbo(at)[0, 0]), float(expected_nelbo(at, plug_in_denoiser=True)[0, 0])
    assert loo == pytest.approx(0.685872, abs=1e-6)
    assert denoiser == pytest.approx(0.821181, abs=1e-6)


# --- conversions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.999, 1 - 1e-7])
def test_round_trip_in_float32_at_a_large_vocabulary(alpha: float) -> None:
    vocab = 262_144
    logits = 3 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(1))
    z = torch.tensor([7, int(logits[1].argmax())])
    loo = torch.log_softmax(logits.double(), -1)
    denoiser = uniform.loo_to_denoiser(logits, z, alpha)
    exact = uniform.loo_to_denoiser(logits.double(), z, alpha)
    torch.testing.assert_close(denoiser.double(), exact, rtol=1e-6, atol=2e-5)
    back = uniform.denoiser_to_loo(denoiser, z, alpha)
    torch.testing.assert_close(back.double(), loo, rtol=1e-6, atol=4e-5)


def test_round_trip_where_the_denoiser_is_nearly_certain() -> None:
    # 1 - D(z) is 1e-12: in float32 D(z) is 1, and 1 - D(z)·c/(1+c) would be noise.
    denoiser = torch.tensor([0.0, math.log(6e-13), math.log(4e-13)])
    z, alpha = torch.tensor(0), 1 - 1e-12
    loo = uniform.denoiser_to_loo(denoiser, z, alpha).exp()
    c = 3 * alpha / (1 - alpha)
    exact = torch.tensor([1 / (1 + c), 6e-13, 4e-13], dtype=torch.float64)
    torch.testing.assert_close(loo.double(), exact / exact.sum(), rtol=1e-5, atol=0)


def test_conversions_at_the_ends() -> None:
    p, z = law((4, 5), seed=2).log(), torch.tensor([0, 1, 2, 4])
    for convert in (uniform.loo_to_denoiser, uniform.denoiser_to_loo):
        torch.testing.assert_close(convert(p, z, 0.0), p)
    assert uniform.loo_to_denoiser(p, z, 1.0).exp().equal(point(z, 5))
    torch.testing.assert_close(uniform.denoiser_to_loo(p, z, 1.0), p)
    assert uniform.loo_to_log_score(p, z, 0.0).equal(torch.zeros_like(p))
    at_z = p.gather(-1, z.unsqueeze(-1))
    torch.testing.assert_close(uniform.loo_to_log_score(p, z, 1.0), p - at_z)
    torch.testing.assert_close(uniform.log_score_to_loo(p - at_z, z, 1.0), p)
    # Levels differ per row: the ends do not leak into their neighbours.
    alpha = torch.tensor([0.0, 0.5, 1.0, 1 - 1e-9], dtype=torch.float64)
    mixed = uniform.loo_to_denoiser(p, z, alpha)
    for row, level in enumerate(alpha.tolist()):
        assert mixed[row].equal(uniform.loo_to_denoiser(p[row], z[row], level))
    # A score that no posterior has: the negative mass is dropped.
    impossible = torch.tensor([0.0, -5.0, 1.0], dtype=torch.float64)
    out = uniform.log_score_to_loo(impossible, torch.tensor(0), 0.3).exp()
    assert out[1] == 0
    assert float(out.sum()) == pytest.approx(1)
    # Whatever stands at z is taken as log 1.
    unset = impossible.clone()
    unset[0] = 99
    assert uniform.log_score_to_loo(unset, torch.tensor(0), 0.3).exp().equal(out)


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_conversion_gradients(convert) -> None:
    x, z = law((3, 4), seed=3).log().requires_grad_(), torch.tensor([0, 3, 1])
    alpha = torch.tensor([0.2, 0.9, 1.0], dtype=torch.float64)
    if convert is uniform.log_score_to_loo:
        # Only a score that some posterior has: elsewhere the clamp has a kink.
        x = uniform.loo_to_log_score(x, z, alpha).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: convert(a, z, alpha).exp(), (x,))
    # Tokens of probability 0 give a finite gradient.
    x = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    convert(x, torch.tensor([0]), 0.5).exp().square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


def test_linear_logits_and_half_precision() -> None:
    g = torch.Generator().manual_seed(4)
    head = LinearLogits(torch.randn(2, 3, 8, generator=g), torch.randn(11, 8, generator=g))
    z = torch.randint(11, (2, 3), generator=g)
    full, key = head.materialize(), dlcore.rng.key(5)
    for call in (
        lambda a: uniform.loo_to_denoiser(a, z, 0.4),
        lambda a: uniform.denoiser_to_loo(a, z, 0.4),
        lambda a: uniform.loo_to_log_score(a, z, 0.4),
        lambda a: uniform.bridge_log_probs(a, z, 0.4, 0.6),
        lambda a: uniform.nelbo(a, z, z.flip(0), 0.4, -1.0),
        lambda a: uniform.cross_entropy(a, z, z.flip(0), 0.4),
    ):
        assert call(head).dtype == torch.float32
        torch.testing.assert_close(call(head), call(full))
        assert call(full.bfloat16()).dtype == torch.float32
    assert uniform.step(head, z, 0.4, 0.6, key=key).equal(uniform.step(full, z, 0.4, 0.6, key=key))
    assert uniform.correct(head, z, 0.4, 1, key=key).equal(uniform.correct(full, z, 0.4, 1, key=key))


# --- the bridge and the step -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha_t", "alpha_s"), [(0.4, 0.7), (0.0, 0.3), (0.2, 1.0), (0.5, 0.5), (0.0, 0.0), (0.0, 1.0)]
)
def test_bridge_is_the_mixture_over_the_denoiser(alpha_t: float, alpha_s: float) -> None:
    z, p = torch.arange(5), law((5, 5), seed=5)
    denoiser = denoiser_of(p, z, alpha_t)
    given = bridge_given_clean(alpha_t, alpha_s, 5)
    mixture = torch.einsum("zx,xzy->zy", denoiser, given)
    bridge = uniform.bridge_log_probs(p.log(), z, alpha_t, alpha_s)
    torch.testing.assert_close(bridge.exp(), mixture)
    other = uniform.bridge_log_probs(denoiser.log(), z, alpha_t, alpha_s, parameterization="denoiser")
    torch.testing.assert_close(other.exp(), mixture)
    # The ψ-posterior renoises the denoiser's draw afresh.
    fresh = alpha_s * denoiser + (1 - alpha_s) / 5
    for kappa in (0.0, 0.3):
        psi = uniform.bridge_log_probs(p.log(), z, alpha_t, alpha_s, kappa=kappa)
        torch.testing.assert_close(psi.exp(), kappa * mixture + (1 - kappa) * fresh)


def test_every_psi_posterior_preserves_the_marginal() -> None:
    """Of one position: Σ_z q_t(z | x)·q(z_s | z, x) = q_s(z_s | x), with the clean token as denoiser."""
    for alpha_t, alpha_s in ((0.4, 0.7), (0.0, 0.5), (0.3, 1.0)):
        for kappa in (0.0, 0.37, 1.0):
            z = torch.arange(V).expand(V, V)
            clean = torch.eye(V, dtype=torch.float64).unsqueeze(1).expand(V, V, V)
            moved = uniform.bridge_log_probs(
                clean.log(), z, alpha_t, alpha_s, parameterization="denoiser", kappa=kappa
            ).exp()
            marginal = torch.einsum("xz,xzy->xy", uniform_kernel(alpha_t), moved)
            torch.testing.assert_close(marginal, uniform_kernel(alpha_s))


def test_bridge_steps_are_those_of_the_enumerated_joint() -> None:
    """One position moves given the other's exact posterior: the law of z_s at that position."""
    exact, given = posteriors(uniform_kernel(0.4)), bridge_given_clean(0.4, 0.7, V)
    wanted = torch.einsum("ijx,xiy->ijy", exact.denoiser[..., 0, :], given)
    found = uniform.bridge_log_probs(exact.loo[..., 0, :].log(), pairs(V)[..., 0], 0.4, 0.7)
    torch.testing.assert_close(found.exp(), wanted)


CASES = [
    {},
    {"parameterization": "denoiser"},
    {"kappa": 0.4},
    {"kappa": 0.0, "parameterization": "denoiser"},
    {"temperature": 0.6},
    {"temperature": 1.7, "parameterization": "denoiser", "kappa": 0.7},
    {"exclude": 4},
    {"exclude": 2, "parameterization": "denoiser", "kappa": 0.5, "temperature": 0.8},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_step_draws_from_the_bridge(options: dict[str, object]) -> None:
    vocab, excluded = 5, options.get("exclude")
    states = torch.tensor([i for i in range(vocab) if i != excluded])
    z = states.repeat(ROWS // len(states))
    logits = law((vocab, vocab), seed=6).log().float()
    drawn = uniform.step(logits[z], z, 0.35, 0.6, key=dlcore.rng.key(7), **options)
    wanted = uniform.bridge_log_probs(logits.double(), torch.arange(vocab), 0.35, 0.6, **options)
    assert fits_given(z, drawn, wanted.exp())


def test_step_with_levels_per_row() -> None:
    """Each row at its own noise level, kappa and temperature."""
    vocab, logits = 4, law(4, seed=8).log().float()
    row = torch.arange(4).repeat(ROWS // 4)
    z = torch.tensor([0, 1, 2, 3])
    t = torch.tensor([0.1, 0.4, 0.0, 0.8], dtype=torch.float64)
    s = torch.tensor([0.9, 0.6, 0.2, 1.0], dtype=torch.float64)
    kappa, heat = torch.tensor([1.0, 0.2, 0.5, 1.0]), torch.tensor([1.0, 2.0, 0.5, 0.7])
    wanted = uniform.bridge_log_probs(
        logits.double().expand(4, vocab), z, t, s, kappa=kappa, temperature=heat
    ).exp()
    drawn = uniform.step(
        logits.expand(len(row), vocab),
        z[row],
        t[row],
        s[row],
        kappa=kappa[row],
        temperature=heat[row],
        key=dlcore.rng.key(9),
    )
    assert fits_given(row, drawn, wanted)


def test_chain_of_steps_reaches_the_data_of_one_token() -> None:
    """V = 3, L = 1: p is the data law at every level, so any number of steps ends in it exactly."""
    data = law(V, seed=10)
    count = ROWS // 4
    z = torch.randint(V, (count,), generator=torch.Generator().manual_seed(11))
    for i, (t, s) in enumerate([(0.0, 0.3), (0.3, 0.8), (0.8, 1.0)]):
        z = uniform.step(data.log().float().expand(count, V), z, t, s, key=dlcore.rng.key(12, i))
    assert fits(z, data)


def test_step_at_the_ends() -> None:
    g = torch.Generator().manual_seed(13)
    z, broken = torch.randint(7, (64,), generator=g), torch.full((64, 7), torch.nan)
    key = dlcore.rng.key(14)
    for parameterization in uniform_parameterizations():
        step = lambda *a, p=parameterization, **k: uniform.step(*a, parameterization=p, key=key, **k)  # noqa: E731
        # Clean rows and rows that do not move keep z, and are not even read.
        for t, s in ((1.0, 1.0), (0.4, 0.4), (0.0, 0.0)):
            assert step(broken, z, t, s).equal(z)
        assert step(broken, z, 1.0, 1.0, kappa=0.3).equal(z)
        assert bool((step(broken, z, 0.4, 1.0) == -1).all())
        # Nothing known, nothing to keep: the last step from pure noise is the argmax at temperature 0.
        logits = torch.randn(64, 7, generator=g)
        assert step(logits, z, 0.0, 1.0, temperature=0.0).equal(logits.argmax(-1))
        # A prompt beside noise.
        alpha = torch.where(torch.arange(64) < 32, 1.0, 0.2)
        mixed = step(torch.where(alpha.unsqueeze(-1) == 1, torch.nan, logits), z, alpha, alpha.clamp(min=0.9))
        assert mixed[:32].equal(z[:32])
        assert bool((mixed[32:] >= 0).all())
    # p(z) = 0 at the last step: only what p allows.
    certain = torch.full((64, 7), -torch.inf)
    certain[:, 3] = 0
    assert bool((uniform.step(certain, z, 0.999, 1.0, key=key) == 3).all())
    assert uniform.step(torch.zeros(5, 1), torch.zeros(5, dtype=torch.int64), 0.1, 0.2).equal(
        torch.zeros(5).long()
    )
    assert fits(
        uniform.step(torch.zeros(2000, 2), torch.zeros(2000).long(), 0.0, 0.0, kappa=0.0, key=key),
        torch.ones(2),
    )


def uniform_parameterizations() -> tuple[str, str]:
    return ("loo", "denoiser")


def test_bridge_gradients() -> None:
    x, z = law((4, 4), seed=15).log().requires_grad_(), torch.tensor([0, 3, 1, 2])
    t = torch.tensor([0.2, 0.0, 1.0, 0.5], dtype=torch.float64)
    s = torch.tensor([0.4, 0.7, 1.0, 0.5], dtype=torch.float64)
    for options in ({}, {"parameterization": "denoiser", "kappa": 0.3, "temperature": 0.7}):
        assert torch.autograd.gradcheck(
            lambda a, o=options: uniform.bridge_log_probs(a, z, t, s, **o).exp(), (x,)
        )
    # Impossible tokens at the last step: -inf, with a finite gradient.
    x = torch.tensor([[0.0, -torch.inf, 1.0]], requires_grad=True)
    out = uniform.bridge_log_probs(x, torch.tensor([1]), 0.5, 1.0)
    assert bool(torch.isneginf(out[0, 1]))
    out.exp().square().sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


# --- corruption --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exclude", [None, 0, 3])
def test_corrupt(exclude: int | None) -> None:
    vocab, count = 5, 100_000
    clean = torch.tensor([i for i in range(vocab) if i != exclude])
    x = clean.repeat(count // len(clean))
    alpha = torch.rand(vocab, generator=torch.Generator().manual_seed(16), dtype=torch.float64)
    z = uniform.corrupt(x, alpha[x], vocab, exclude=exclude, key=dlcore.rng.key(17))
    noise = torch.ones(vocab, dtype=torch.float64)
    if exclude is not None:
        noise[exclude] = 0
    a = alpha.unsqueeze(-1)
    wanted = a * torch.eye(vocab, dtype=torch.float64) + (1 - a) * noise / noise.sum()
    assert fits_given(x, z, wanted)


def test_corrupt_at_the_ends() -> None:
    x = torch.randint(300, (2, 50))
    assert uniform.corrupt(x, 1.0, 300).equal(x)
    assert not uniform.corrupt(x, 0.0, 300).equal(x)
    assert uniform.corrupt(torch.zeros(3, 4, dtype=torch.int64), 0.0, 1).sum() == 0
    mixed = uniform.corrupt(x, torch.tensor([[1.0], [0.0]]), 300)
    assert mixed[0].equal(x[0])
    assert not mixed[1].equal(x[1])


# --- the corrector -----------------------------------------------------------------------------------------


def test_single_site_redraw_leaves_the_noisy_law_invariant() -> None:
    alpha = 0.7
    exact = posteriors(uniform_kernel(alpha))
    pi = alpha * exact.loo[..., 0, :] + (1 - alpha) / V
    torch.testing.assert_close(torch.einsum("ij,ijy->yj", exact.mass, pi), exact.mass)
    count = ROWS // 2
    g = torch.Generator().manual_seed(22)
    state = torch.multinomial(exact.mass.flatten(), count, replacement=True, generator=g)
    z = pairs(V).view(-1, 2)[state]
    for parameterization, p in (("loo", exact.loo), ("denoiser", exact.denoiser)):
        logits = p.view(-1, 2, V).log().float()[state]
        moved = uniform.correct(
            logits, z, alpha, 1, score="random", parameterization=parameterization, key=dlcore.rng.key(23)
        )
        changed = (moved != z).sum(-1)
        assert int(changed.max()) == 1
        assert 0.1 < float(changed.double().mean()) < 0.9
        assert fits(moved[:, 0] * V + moved[:, 1], exact.mass.flatten())


@pytest.mark.parametrize("parameterization", uniform_parameterizations())
def test_redraw_is_from_the_conditional(parameterization: str) -> None:
    alpha, vocab, p = 0.6, 4, law((4, 4), seed=24)
    z = torch.arange(vocab).repeat(ROWS // vocab)
    network = p if parameterization == "loo" else denoiser_of(p, torch.arange(vocab), alpha)
    moved = uniform.correct(
        network.log().float()[z].unsqueeze(1),
        z.unsqueeze(1),
        alpha,
        1,
        parameterization=parameterization,
        key=dlcore.rng.key(25),
    )
    assert fits_given(z, moved.squeeze(1), alpha * p + (1 - alpha) / vocab)


@pytest.mark.parametrize("score", uniform.SCORES)
@pytest.mark.parametrize("parameterization", uniform_parameterizations())
def test_positions_are_chosen_by_their_score(score: str, parameterization: str) -> None:
    """Which of three positions changed, or none: P(l) = softmax(score/τ)_l·(1 - π_l(z_l))."""
    alpha, tau, vocab = 0.8, 0.7, 4
    p, z = law((3, vocab), seed=26), torch.tensor([0, 2, 3])
    pi = alpha * p + (1 - alpha) / vocab
    at = pi.gather(-1, z.unsqueeze(-1)).squeeze(-1)
    best_other = pi.scatter(-1, z.unsqueeze(-1), 0).amax(-1)
    scores = {
        "margin": (best_other / at).log(),
        "current": -at.log(),
        "max": -pi.amax(-1).log(),
        "random": at * 0,
    }
    moves = torch.softmax(scores[score] / tau, -1) * (1 - at)
    network = p if parameterization == "loo" else denoiser_of(p, z, alpha)
    count = ROWS // 6
    moved = uniform.correct(
        network.log().float().expand(count, 3, vocab),
        z.expand(count, 3),
        alpha,
        1,
        score=score,
        tau=tau,
        parameterization=parameterization,
        key=dlcore.rng.key(27),
    )
    which = torch.where((moved != z).any(-1), (moved != z).int().argmax(-1), 3)
    assert fits(which, torch.cat([moves, 1 - moves.sum(-1, keepdim=True)]))


def test_corrector_redraws_exactly_as_many_as_asked() -> None:
    # π(z) is 1e-7: every chosen position shows.
    vocab, batch, length = 9, 8, 6
    z = torch.zeros(batch, length, dtype=torch.int64)
    logits = torch.randn(batch, length, vocab, generator=torch.Generator().manual_seed(28))
    logits[..., 0] = -torch.inf
    counts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 9])
    alpha = 1 - 1e-6
    for score in uniform.SCORES:
        moved = uniform.correct(logits, z, alpha, counts, score=score, key=dlcore.rng.key(29))
        assert (moved != z).sum(-1).tolist() == counts.clamp(max=6).tolist()
    assert ((uniform.correct(logits, z, alpha, 2) != z).sum(-1) == 2).all()
    # A prompt is never chosen, nor read.
    prompt = torch.where(torch.arange(length) < 4, 1.0, alpha).double()
    logits[:, :4] = torch.nan
    moved = uniform.correct(logits, z, prompt, 5, key=dlcore.rng.key(30))
    assert (moved[:, :4] == 0).all()
    assert (moved[:, 4:] != 0).all()
    assert uniform.correct(logits, z, 1.0, 5).equal(z)


# --- noise, compilation, errors ----------------------------------------------------------------------------


def test_tokens_follow_the_key() -> None:
    g = torch.Generator().manual_seed(31)
    z, x = torch.randint(9, (4, 6), generator=g), torch.randint(9, (4, 6), generator=g)
    logits, key = torch.randn(4, 6, 9, generator=g), dlcore.rng.key(32)
    rows = dlcore.rng.fold_in(key, torch.arange(24).view(4, 6))
    for call in (
        lambda k, i: uniform.step(logits[i], z[i], 0.3, 0.6, kappa=0.5, key=k),
        lambda k, i: uniform.correct(logits[i], z[i], 0.6, 3, key=k),
        lambda k, i: uniform.corrupt(x[i], 0.5, 9, key=k),
    ):
        whole = call(key, slice(None))
        assert whole.equal(call(key, slice(None)))
        assert not whole.equal(call(dlcore.rng.key(33), slice(None)))
        assert whole.equal(call(rows, slice(None)))
        halves = [call(rows[i], i) for i in (slice(0, 1), slice(1, 4))]
        assert whole.equal(torch.cat(halves))
    torch.manual_seed(0)
    first = uniform.step(logits, z, 0.3, 0.6)
    torch.manual_seed(0)
    assert first.equal(uniform.step(logits, z, 0.3, 0.6))
    made = [uniform.corrupt(x, 0.5, 9, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert made[0].equal(made[1])


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(34)
    z, x = torch.randint(9, (2, 6), generator=g), torch.randint(9, (2, 6), generator=g)
    logits, key = torch.randn(2, 6, 9, generator=g), dlcore.rng.key(35)

    def everything(a: Tensor, t: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            uniform.corrupt(x, t, 9, exclude=8, key=k),
            uniform.loo_to_denoiser(a, z, t),
            uniform.denoiser_to_loo(a, z, t),
            uniform.loo_to_log_score(a, z, t),
            uniform.log_score_to_loo(a, z, t),
            uniform.bridge_log_probs(a, z, t, s, kappa=0.5, parameterization="denoiser"),
            uniform.step(a, z, t, s, kappa=t, temperature=s, exclude=8, key=k),
            uniform.step(a, z, t, s, parameterization="denoiser", key=k),
            uniform.nelbo(a, z, x, t, -s, parameterization="denoiser"),
            uniform.cross_entropy(a, z, x, t),
            uniform.correct(a, z, t, 2, key=k),
        )

    levels = torch.linspace(0.1, 0.8, 5, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits, t, t + 0.1, key) for t in levels])
