"""Hybrid noise (GIDD) against enumeration, and its masked and uniform limits."""

import itertools

import pytest
import torch
from oracles import (
    ENTROPY,
    JOINT,
    ROWS,
    V,
    check_compiled,
    fits,
    fits_given,
    law,
    pairs,
    posteriors,
    quadrature,
    uniform_kernel,
)
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import hybrid, masked, uniform

MASK = V
EYE = torch.eye(V, dtype=torch.float64)


def kernel(at: hybrid.Level) -> Tensor:
    """q(z | x) as (V, V + 1), the mask last."""
    replaced = float(at.alpha) * EYE + float(at.uniform) / V
    return torch.cat([replaced, torch.full((V, 1), float(at.mask), dtype=torch.float64)], -1)


def marginal(p: Tensor, at: hybrid.Level) -> Tensor:
    """q(y | p) as (..., V + 1)."""
    return p @ kernel(at)


def transition(at_t: hybrid.Level, at_s: hybrid.Level) -> Tensor:
    """q(z_t | z_s), (V + 1, V + 1), from the semigroup: kernel(s) @ transition = kernel(t)."""
    ratio = at_t.alpha / at_s.alpha
    noise = torch.cat(
        [torch.full((V,), float(at_t.uniform - ratio * at_s.uniform) / V), torch.ones(1)]
    ).double()
    noise[MASK] = at_t.mask - ratio * at_s.mask
    return ratio * torch.eye(V + 1, dtype=torch.float64) + noise


def bridge(p: Tensor, at_t: hybrid.Level, at_s: hybrid.Level) -> Tensor:
    """q(y | z, p) by Bayes as (z, y)."""
    joint = marginal(p, at_s).unsqueeze(-1) * transition(at_t, at_s)
    return (joint / joint.sum(0)).T


def with_mask(p: Tensor) -> Tensor:
    """Logits of p (..., V) with a column for the mask, large: it must not count."""
    return torch.cat([p.log(), torch.full_like(p[..., :1], 5.0)], -1)


LEVELS = [(0.2, 1.0), (0.5, 2.0), (0.0, 1.0), (0.9, 0.3)]


# --- levels and corruption ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "gamma"), LEVELS)
def test_schedule(share: float, gamma: float) -> None:
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64, requires_grad=True)
    at = hybrid.schedule(t, p_uniform=share, gamma=gamma)
    torch.testing.assert_close(at.alpha + at.mask + at.uniform, torch.ones(7, dtype=torch.float64))
    middle = hybrid.schedule(0.5, p_uniform=share, gamma=gamma)
    assert float(middle.uniform / 1) == pytest.approx(share)
    assert float(middle.mask / middle.alpha) == pytest.approx(1.0)
    for mass, rate in ((at.mask, at.mask_rate), (at.uniform, at.uniform_rate)):
        if share or mass is at.mask:
            (slope,) = torch.autograd.grad((mass / at.alpha).log().sum(), t, retain_graph=True)
            torch.testing.assert_close(slope, rate)
    slopes = [torch.autograd.grad(mass.sum(), t, retain_graph=True)[0] for mass in (at.alpha, at.mask)]
    same = hybrid.level(at.alpha.detach(), at.mask.detach(), *slopes)
    for got, wanted in zip(same, at, strict=True):
        if share or wanted is not at.uniform_rate:
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-9, atol=1e-12)
    for end, alpha, mask in ((0.0, 1.0, 0.0), (1.0, 0.0, 1.0)):
        pure = hybrid.schedule(end, p_uniform=share, gamma=gamma)
        assert (float(pure.alpha), float(pure.mask), float(pure.uniform)) == (alpha, mask, 0.0)


def test_corrupt() -> None:
    x = torch.arange(V).repeat(20_000)
    at = hybrid.schedule(0.4, p_uniform=0.3)
    # The mask in the middle of the vocabulary.
    z = hybrid.corrupt(x + (x >= 1).long(), at, V + 1, 1, key=dlcore.rng.key(1))
    columns = kernel(at)[:, [0, MASK, 1, 2]]
    assert fits_given(x, z, columns)


# --- the NELBO ---------------------------------------------------------------------------------------------


def states() -> tuple[Tensor, Tensor]:
    """Every z and x, (V + 1)·V."""
    z, x = torch.meshgrid(torch.arange(V + 1), torch.arange(V), indexing="ij")
    return z.flatten(), x.flatten()


@pytest.mark.parametrize(("share", "gamma"), [case for case in LEVELS if case[0]])
@pytest.mark.parametrize("t", [0.07, 0.5, 0.9])
def test_nelbo_is_the_rate_of_the_bridges_divergence(share: float, gamma: float, t: float) -> None:
    """KL(bridge(x) || bridge(p)) of one step of length dt, over dt."""
    p, dt = law(V, seed=3), 1e-5
    at_t, at_s = (hybrid.schedule(u, p_uniform=share, gamma=gamma) for u in (t, t - dt))
    z, x = states()
    own = torch.stack([bridge(one, at_t, at_s) for one in EYE])
    plug = bridge(p, at_t, at_s)
    divergence = torch.special.xlogy(own, own / plug).sum(-1) / dt
    at = hybrid.schedule(t - dt / 2, p_uniform=share, gamma=gamma)
    got = hybrid.nelbo(with_mask(p).expand(len(z), -1), z, x, at, MASK)
    torch.testing.assert_close(got, divergence[x, z], rtol=2e-4, atol=1e-5)


def test_nelbo_and_weights_as_published() -> None:
    """w·[KL + r - log r - 1] written out, with the weights of the three kinds of rows."""
    p, (z, x) = law(V, seed=4), states()
    for t, share, gamma in ((0.3, 0.2, 1.0), (0.8, 0.5, 1.5)):
        at = hybrid.schedule(t, p_uniform=share, gamma=gamma)
        q, q_p = kernel(at)[x], marginal(p, at)
        divergence = torch.special.xlogy(q, q / q_p).sum(-1)
        r = q.gather(-1, z.unsqueeze(-1)).squeeze(-1) / q_p[z]
        b = 2**gamma * share / (1 - share)
        c = b * (t * (1 - t)) ** (gamma / 2)
        dc = gamma / 2 * (1 - 2 * t) / (t * (1 - t)) * c
        at_x = (c + (1 - t) * dc) / V / ((1 - t) * (1 - t + c / V))
        other = (c + (1 - t) * dc) / ((1 - t) * c)
        weight = torch.where(z == MASK, 1 / (t * (1 - t)), torch.where(z == x, at_x, other))
        logits = with_mask(p).expand(len(z), -1)
        inner = divergence + r - r.log() - 1
        torch.testing.assert_close(hybrid.nelbo(logits, z, x, at, MASK), weight * inner)
        clipped = hybrid.loss(logits, z, x, at, MASK, weighting="clip", max_weight=1.5)
        torch.testing.assert_close(clipped, weight.clamp(max=1.5) * inner)
        if gamma == 1:
            snr = b / V * (t / (1 - t)) ** 0.5
            dynamic = torch.where(z == MASK, 2.0, torch.where(z == x, snr, 1.0))
            torch.testing.assert_close(hybrid.loss(logits, z, x, at, MASK), dynamic * inner)
            most = hybrid.loss(logits, z, x, at, MASK, max_weight=1.0)
            torch.testing.assert_close(most, dynamic.clamp(max=1) * inner)


def test_nelbo_integrates_to_the_entropy() -> None:
    """With the leave-one-out posterior as predictor the bound is tight."""
    nodes, weights = quadrature(24)
    total = torch.zeros((), dtype=torch.float64)
    for at, share in zip(nodes.tolist(), weights, strict=True):
        level = hybrid.schedule(at, p_uniform=0.4, gamma=2.0)
        exact = posteriors(kernel(level))
        z = pairs(V + 1).expand(V, V, V + 1, V + 1, 2)
        x = pairs(V).view(V, V, 1, 1, 2).expand_as(z)
        logits = with_mask(exact.loo).expand(*z.shape, V + 1)
        each = hybrid.nelbo(logits, z, x, level, MASK).sum(-1)
        total += share * (exact.joint * each).sum()
    assert float(total) == pytest.approx(ENTROPY, abs=1e-7)


def value_and_gradient(call, leaf: Tensor) -> tuple[Tensor, Tensor]:
    leaf = leaf.detach().clone().requires_grad_()
    out = call(leaf)
    out.sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def test_masked_limit() -> None:
    p, x = law((6, V), seed=5).log(), torch.tensor([0, 1, 2, 0, 1, 2])
    z = torch.tensor([MASK, MASK, MASK, 0, 1, MASK])
    full = torch.cat([p, p[:, :1]], -1)
    for at, alpha, slope in (
        (hybrid.schedule(0.3, p_uniform=0.0), 0.7, -1.0),
        (hybrid.level(0.6, 1 - 0.6, -0.4, 0.4), 0.6, -0.4),
    ):
        got = value_and_gradient(lambda a, at=at: hybrid.nelbo(a, z, x, at, MASK), full)
        wanted = value_and_gradient(
            lambda a, alpha=alpha, slope=slope: masked.nelbo(a, z, x, alpha, slope, MASK), full
        )
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    at_t, at_s = hybrid.schedule(0.5, p_uniform=0.0), hybrid.schedule(0.3, p_uniform=0.0)
    step = hybrid.bridge_log_probs(full, z, at_t, at_s, MASK).exp()
    reveal = (0.7 - 0.5) / 0.5
    wanted = torch.nn.functional.one_hot(z, V + 1).double()
    drawn = torch.cat([reveal * p.exp(), torch.full((6, 1), 1 - reveal, dtype=torch.float64)], -1)
    torch.testing.assert_close(step, torch.where((z == MASK).unsqueeze(-1), drawn, wanted))
    # The limit is approached, not only met.
    close = hybrid.nelbo(full, z, x, hybrid.schedule(0.3, p_uniform=1e-9), MASK)
    torch.testing.assert_close(close, masked.nelbo(full, z, x, 0.7, -1.0, MASK), rtol=1e-6, atol=1e-7)


def test_uniform_limit() -> None:
    p, z, x = law((6, V), seed=6).log(), torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 0, 0, 1, 1, 2])
    at = hybrid.level(0.6, 0.0, -0.4, 0.0)

    def hybrid_loss(a: Tensor) -> Tensor:
        return hybrid.nelbo(torch.cat([a, a[:, :1] + 9], -1), z, x, at, MASK)

    got = value_and_gradient(hybrid_loss, p)
    wanted = value_and_gradient(lambda a: uniform.nelbo(a, z, x, 0.6, -0.4), p)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    full = torch.cat([p, p[:, :1]], -1)
    step = hybrid.bridge_log_probs(full, z, at, hybrid.level(0.8, 0.0, -0.4, 0.0), MASK).exp()
    torch.testing.assert_close(step[:, :V], uniform.bridge_log_probs(p, z, 0.6, 0.8).exp())
    assert bool((step[:, MASK] == 0).all())
    x_many = torch.arange(V).repeat(5_000)
    assert fits_given(
        x_many,
        hybrid.corrupt(x_many, at, V + 1, MASK, key=dlcore.rng.key(2)),
        torch.cat([uniform_kernel(0.6), torch.zeros(V, 1)], -1),
    )


def test_gradients() -> None:
    z, x = states()
    weight = law((len(z), V), seed=7).log().requires_grad_()
    for at in (hybrid.schedule(0.4, p_uniform=0.3), hybrid.schedule(0.02, p_uniform=0.05, gamma=0.5)):
        assert torch.autograd.gradcheck(
            lambda a, at=at: hybrid.nelbo(torch.cat([a, a[:, :1]], -1), z, x, at, MASK), (weight,)
        )
    at_t, at_s = hybrid.schedule(0.4, p_uniform=0.0), hybrid.schedule(0.0, p_uniform=0.0)
    leaf = torch.cat([weight, weight[:, :1]], -1).detach().requires_grad_()
    hybrid.bridge_log_probs(leaf, torch.full_like(z, MASK), at_t, at_s, MASK).exp().square().sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())


def test_pure_ends_have_numbers_and_gradients() -> None:
    """Whatever has no mass tells nothing: all masked, all replaced, all clean."""
    x = torch.tensor([0, 1, 2])
    all_masked, replaced, clean = torch.full_like(x, MASK), torch.tensor([1, 1, 2]), x
    logits = with_mask(torch.rand(3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ends = [
        (hybrid.nelbo, all_masked, hybrid.level(0.0, 1.0, -1.0, 1.0)),
        (hybrid.nelbo, replaced, hybrid.level(0.0, 0.0, -1.0, 0.0)),
        (hybrid.loss, all_masked, hybrid.schedule(1.0)),
        (hybrid.loss, replaced, hybrid.level(0.0, 0.0, -1.0, 0.0)),
        (hybrid.loss, clean, hybrid.schedule(0.0)),
    ]
    for function, z, at in ends:
        given = logits.clone().requires_grad_()
        value = function(given, z, x, at, MASK)
        (gradient,) = torch.autograd.grad(value.sum(), given)
        assert torch.equal(value.detach(), torch.zeros_like(value))
        assert torch.equal(gradient, torch.zeros_like(gradient))
    impossible = logits.index_fill(-1, torch.tensor([0]), -torch.inf).requires_grad_()
    value = hybrid.nelbo(impossible, all_masked, x, hybrid.schedule(0.5, p_uniform=0.0), MASK)
    assert value[0] == torch.inf
    assert value[1:].isfinite().all()
    assert torch.autograd.grad(value.sum(), impossible)[0].isfinite().all()


def test_infinite_rates_are_refused() -> None:
    x = torch.tensor([0])
    for t, z, got in ((0.0, 0, "nan"), (0.0, 1, "inf"), (1.0, MASK, "inf")):
        at = hybrid.schedule(t)
        with pytest.raises(ValueError, match=rf"hybrid.nelbo: at's rate into z must lie in .*, got {got}"):
            hybrid.nelbo(torch.zeros(1, V + 1), torch.tensor([z]), x, at, MASK)
    with pytest.raises(ValueError, match=r"hybrid.loss: at's rate into z must lie in .*, got nan"):
        hybrid.loss(torch.zeros(1, V + 1), x, x, hybrid.schedule(0.0), MASK, weighting="clip")


def test_float32_and_large_vocabularies() -> None:
    g = torch.Generator().manual_seed(22)
    vocab, mask = 20_000, 19_999
    logits, (z, x) = 3 * torch.randn(24, vocab, generator=g), torch.randint(mask, (2, 24), generator=g)
    z[:8], z[8:16] = mask, x[8:16]
    for t in (0.01, 0.5, 0.99):
        at = hybrid.schedule(t, p_uniform=0.2)
        exact, got = (hybrid.nelbo(a, z, x, at, mask) for a in (logits.double(), logits))
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


# --- the reverse step --------------------------------------------------------------------------------------


STEPS = [(0.6, 0.4), (1.0, 0.7), (0.3, 0.0), (1.0, 0.0), (0.5, 0.5)]


@pytest.mark.parametrize(("t", "s"), STEPS)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_bridge_by_enumeration_and_step_law(t: float, s: float, share: float) -> None:
    p = law(V, seed=8)
    at_t, at_s = (hybrid.schedule(u, p_uniform=share) for u in (t, s))
    z = torch.arange(V + 1)
    got = hybrid.bridge_log_probs(with_mask(p).expand(V + 1, -1), z, at_t, at_s, MASK).exp()
    possible = marginal(p, at_t) > 0
    torch.testing.assert_close(got[possible], bridge(p, at_t, at_s)[possible])
    assert got[~possible].equal(torch.eye(V + 1, dtype=torch.float64)[~possible])
    # The marginal is carried from t to s, whatever x is.
    for x in range(V):
        each = hybrid.bridge_log_probs(with_mask(EYE[x]).expand(V + 1, -1), z, at_t, at_s, MASK).exp()
        torch.testing.assert_close(kernel(at_t)[x] @ each, kernel(at_s)[x])
    many = z.repeat(ROWS // (V + 1))
    logits = with_mask(p).float().expand(len(many), V + 1)
    drawn = hybrid.step(logits, many, at_t, at_s, MASK, key=dlcore.rng.key(9))
    assert fits_given(many, drawn, got)


def test_step_options() -> None:
    p, at_t, at_s = law(V, seed=10), hybrid.schedule(0.6, p_uniform=0.3), hybrid.schedule(0.3, p_uniform=0.3)
    z = torch.arange(V + 1)
    many = z.repeat(ROWS // (V + 1))
    logits = with_mask(p).float().expand(len(many), V + 1)
    hot = p**2 / (p**2).sum()
    drawn = hybrid.step(logits, many, at_t, at_s, MASK, temperature=0.5, key=dlcore.rng.key(11))
    assert fits_given(many, drawn, bridge(hot, at_t, at_s))
    exact = bridge(p, at_t, at_s)
    kept = exact * (exact >= 0.12)
    assert 0 < int((kept == 0).sum()) < kept.numel()
    drawn = hybrid.step(logits, many, at_t, at_s, MASK, min_p=0.12, key=dlcore.rng.key(12))
    assert fits_given(many, drawn, kept / kept.sum(-1, keepdim=True))
    drawn = hybrid.step(logits, many, at_t, at_s, MASK, min_p=1.0, key=dlcore.rng.key(13))
    assert drawn.equal(exact.argmax(-1)[many])
    drawn = hybrid.step(logits, many, at_t, at_s, MASK, min_p=0.0, key=dlcore.rng.key(14))
    assert fits_given(many, drawn, exact)
    # Only rows that need their logits are read; levels may differ per position, and a prompt stays.
    alpha = torch.tensor([0.0, 0.6]).double()
    mixed_t, mixed_s = (hybrid.schedule(alpha * u, p_uniform=0.3) for u in (1.0, 0.5))
    pair, broken = torch.tensor([1, 1]), torch.full((2, V + 1), torch.nan)
    assert hybrid.step(broken, pair, mixed_t, mixed_s, MASK).tolist() == [1, -1]


def final_law(steps: int) -> Tensor:
    """The exact law that `step` ends in, from all masks, with the leave-one-out posterior as predictor."""
    states = pairs(V + 1).view(-1, 2)
    mass = torch.zeros(len(states), dtype=torch.float64)
    mass[-1] = 1
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t, s in itertools.pairwise(grid):
        at_t, at_s = (hybrid.schedule(u, p_uniform=0.3, gamma=2.0) for u in (t, s))
        loo = posteriors(kernel(at_t)).loo.nan_to_num(1 / V).flatten(0, 1)
        step = hybrid.bridge_log_probs(with_mask(loo), states, at_t, at_s, MASK).exp()
        both = step[:, 0].unsqueeze(-1) * step[:, 1].unsqueeze(-2)
        mass = mass @ both.flatten(1)
    return mass.view(V + 1, V + 1)


def test_fine_steps_end_in_the_joint() -> None:
    laws = [final_law(n) for n in (1, 32, 64)]
    assert all(float(law[MASK].sum() + law[:, MASK].sum()) == 0 for law in laws)
    far, near, nearer = (float((law[:V, :V] - JOINT).abs().sum()) for law in laws)
    assert far > 0.3
    assert near < 0.05
    assert nearer < 0.6 * near


def test_correct() -> None:
    logits = torch.tensor(
        [[[0.0, 4.0, 0.0, 9.0], [0.0, 5.0, 0.0, 9.0], [6.0, 0.0, 0.0, 9.0], [0.0, 0.0, 3.0, 9.0]]]
    )
    z = torch.tensor([[0, 0, 0, 0]])
    for count, wanted in ((0, [0, 0, 0, 0]), (1, [0, 1, 0, 0]), (2, [1, 1, 0, 0]), (9, [1, 1, 0, 2])):
        assert hybrid.correct(logits, z, MASK, count, temperature=0.0).tolist() == [wanted]
    many = 2_000
    p = law(V, seed=16)
    drawn = hybrid.correct(
        with_mask(p).float().expand(many, 1, V + 1),
        torch.zeros(many, 1, dtype=torch.int64),
        MASK,
        key=dlcore.rng.key(17),
    )
    assert fits(drawn.flatten(), p)
    both = torch.tensor([[0, 0, 0, 0]] * 2)
    counts = hybrid.correct(logits.expand(2, -1, -1), both, MASK, torch.tensor([0, 3]), temperature=0.0)
    assert counts.tolist() == [[0, 0, 0, 0], [1, 1, 0, 2]]
    logits[0, 1] = torch.nan
    assert hybrid.correct(logits, z, MASK, 9, temperature=0.0).tolist() == [[1, 0, 0, 2]]


# --- heads, keys, compilation, errors ----------------------------------------------------------------------


def test_linear_logits_and_keys() -> None:
    g = torch.Generator().manual_seed(18)
    head = LinearLogits(torch.randn(2, 3, 8, generator=g), torch.randn(V + 1, 8, generator=g))
    full, key = head.materialize(), dlcore.rng.key(19)
    z, x = torch.tensor([[0, 1, MASK]] * 2), torch.tensor([[0, 2, 1]] * 2)
    at_t, at_s = hybrid.schedule(0.6, p_uniform=0.3), hybrid.schedule(0.1, p_uniform=0.3)
    torch.testing.assert_close(hybrid.nelbo(head, z, x, at_t, MASK), hybrid.nelbo(full, z, x, at_t, MASK))
    whole = hybrid.step(head, z, at_t, at_s, MASK, key=key)
    assert whole.equal(hybrid.step(full, z, at_t, at_s, MASK, key=key))
    keys = dlcore.rng.fold_in(key, torch.arange(6).view(2, 3))
    assert whole.equal(hybrid.step(full, z, at_t, at_s, MASK, key=keys))
    parts = [hybrid.step(full[i], z[i], at_t, at_s, MASK, key=keys[i]) for i in range(2)]
    assert whole.equal(torch.stack(parts))
    assert hybrid.nelbo(full.bfloat16(), z, x, at_t, MASK).dtype == torch.float32


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(20)
    x = torch.randint(V, (2, 6), generator=g)
    z = torch.where(torch.rand(2, 6, generator=g) < 0.5, x, MASK)

    def everything(a: Tensor, t: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        at_t, at_s = hybrid.schedule(t, p_uniform=0.2), hybrid.schedule(s, p_uniform=0.2)
        return (
            hybrid.corrupt(x, at_t, V + 1, MASK, key=k),
            hybrid.nelbo(a, z, x, at_t, MASK),
            hybrid.loss(a, z, x, at_t, MASK),
            hybrid.step(a, z, at_t, at_s, MASK, key=k),
        )

    logits, key = torch.randn(2, 6, V + 1, generator=g), dlcore.rng.key(21)
    times = torch.linspace(0.2, 0.8, 4, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits, t, t - 0.1, key) for t in times])


Z, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, V + 1)
AT, LATER = hybrid.schedule(0.3), hybrid.schedule(0.6)
BAD = [
    (lambda: hybrid.schedule(1.5), ValueError, r"hybrid.schedule: t must lie in \[0, 1\], got 1.5"),
    (
        lambda: hybrid.schedule(0.5, gamma=3),
        ValueError,
        r"hybrid.schedule: gamma must lie in \(0, 2\], got 3",
    ),
    (lambda: hybrid.schedule(0.5, p_uniform=1.0), ValueError, r"p_uniform must lie in \[0, 1\), got 1"),
    (lambda: hybrid.level(0.6, 0.5, -1.0, 0.0), ValueError, "1 - alpha - mask must lie in"),
    (
        lambda: hybrid.level(0.5, 0.2, -0.1, -1.0),
        ValueError,
        r"d log\(mask/alpha\)/dt must lie in \[0, inf\]",
    ),
    (
        lambda: hybrid.corrupt(Z, 0.5, 4, MASK),
        TypeError,
        "hybrid.corrupt: at must be a hybrid.Level, got float 0.5",
    ),
    (lambda: hybrid.corrupt(Z, AT, 4, 4), ValueError, r"hybrid.corrupt: exclude must lie in \[0, 4\), got 4"),
    (
        lambda: hybrid.nelbo(LOGITS, Z, Z + MASK, AT, MASK),
        ValueError,
        "hybrid.nelbo: x must not be the mask token 3",
    ),
    (
        lambda: hybrid.step(LOGITS, Z, AT, LATER, MASK),
        ValueError,
        "hybrid.step: alpha_s must be at least alpha_t",
    ),
    (
        lambda: hybrid.step(LOGITS, Z, hybrid.schedule(torch.full((7,), 0.5)), AT, MASK),
        ValueError,
        r"hybrid.step: at_t.alpha must broadcast to \(2, 3\), got \(7,\)",
    ),
    (
        lambda: hybrid.step(LOGITS, Z, LATER, AT, MASK, min_p=2.0),
        ValueError,
        r"min_p must lie in \[0, 1\], got 2",
    ),
    (
        lambda: hybrid.loss(LOGITS, Z, Z, AT, MASK, weighting="raw"),
        ValueError,
        "weighting must be one of 'clip'",
    ),
    (
        lambda: hybrid.correct(LOGITS[0], Z[0], MASK),
        ValueError,
        r"hybrid.correct: z must be \(B, L\), got \(3,\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
