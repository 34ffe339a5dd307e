"""The absorbing-state reformulation of uniform diffusion against enumeration."""

import pytest
import torch
from oracles import (
    ENTROPY,
    ROWS,
    V,
    absorbing_kernel,
    bridge_given_clean,
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
from dlcore.process import absorbing_uniform as au

PARAMETERIZATIONS = ("loo", "denoiser")


def states(vocab: int) -> tuple[Tensor, Tensor]:
    """Every (z, u), entry z·vocab + u."""
    return pairs(vocab).view(-1, 2).unbind(-1)


def denoiser_of(p: Tensor, alpha: float, vocab: int, temperature: float = 1.0) -> Tensor:
    """Bayes' rule at every state (V·V, V): p^{1/T}(v)·q(z, u | v), normalised."""
    joint = p ** (1 / temperature) * absorbing_kernel(alpha, vocab).T
    return joint / joint.sum(-1, keepdim=True)


def carried(denoiser: Tensor, alpha_t: float, alpha_s: float, vocab: int) -> Tensor:
    """The law of z_s at every state: z where z ≠ u, else [(α_s-α_t)·D + (1-α_s)·δ_z]/(1-α_t)."""
    z, u = states(vocab)
    keep = torch.nn.functional.one_hot(z, vocab).double()
    moved = ((alpha_s - alpha_t) * denoiser + (1 - alpha_s) * keep) / (1 - alpha_t)
    return torch.where((z == u).unsqueeze(-1), moved, keep)


# --- corruption --------------------------------------------------------------------------------------------


def test_corrupt() -> None:
    x = torch.arange(V).repeat(40_000)
    z, u = au.corrupt(x, 0.35, V, key=dlcore.rng.key(1))
    assert fits_given(x, z * V + u, absorbing_kernel(0.35))
    assert fits_given(x, z, uniform_kernel(0.35))
    assert fits(u, torch.ones(V, dtype=torch.float64))
    torch.testing.assert_close(absorbing_kernel(0.35).view(V, V, V).sum(-1), uniform_kernel(0.35))
    z, u = au.corrupt(x, torch.tensor(1.0), V)
    assert z.equal(x)
    assert not u.equal(x)
    z, u = au.corrupt(torch.zeros(30_000, dtype=torch.int64), 0.0, 4, exclude=2, key=dlcore.rng.key(2))
    assert z.equal(u)
    assert fits(u, torch.tensor([1.0, 1, 0, 1], dtype=torch.float64))


# --- the step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.3, 0.75), (0.3, 1.0), (0.0, 0.4)])
def test_step_law(alpha_t: float, alpha_s: float, temperature: float, parameterization: str) -> None:
    vocab, p = 4, law(4, seed=3)
    (z, u), state = states(vocab), torch.arange(vocab * vocab).repeat(ROWS // 16)
    network = p.expand(16, vocab) if parameterization == "loo" else denoiser_of(p, alpha_t, vocab)
    drawn = au.step(
        network.log().float().clamp(min=-1e30)[state],
        z[state],
        u[state],
        alpha_t,
        alpha_s,
        parameterization=parameterization,
        temperature=temperature,
        key=dlcore.rng.key(4),
    )
    tempered = denoiser_of(p, alpha_t, vocab, temperature)
    assert fits_given(state, drawn, carried(tempered, alpha_t, alpha_s, vocab))


def test_the_denoiser_is_the_enumerated_one() -> None:
    exact = posteriors(absorbing_kernel(0.4))
    # Position 0 in every state, by Bayes' rule from what position 1 alone says of it; NaN if impossible.
    for j in range(V * V):
        found = denoiser_of(exact.loo[0, j, 0], 0.4, V)
        torch.testing.assert_close(found, exact.denoiser[:, j, 0], equal_nan=True)


@pytest.mark.parametrize("exclude", [None, 1])
def test_chain_of_steps_reaches_the_data_of_one_token(exclude: int | None) -> None:
    vocab, data, count = 4, law(4, seed=5), ROWS // 4
    if exclude is not None:
        data[exclude] = 0
        data /= data.sum()
    logits = data.log().float()
    if exclude is not None:
        logits[exclude] = 3
    for remask in (False, True):
        z, u = au.corrupt(
            torch.zeros(count, dtype=torch.int64), 0.0, vocab, exclude=exclude, key=dlcore.rng.key(6)
        )
        for i, (t, s) in enumerate([(0.0, 0.3), (0.3, 0.8), (0.8, 1.0)]):
            options = {"exclude": exclude, "key": dlcore.rng.key(7, i)}
            if remask:
                z, u = au.remask_step(logits.expand(count, vocab), z, u, t, s, **options)
            else:
                z = au.step(logits.expand(count, vocab), z, u, t, s, **options)
        assert fits(z, data)


def joint_given(clean: Tensor, alpha: float, vocab: int, exclude: int | None) -> Tensor:
    """q(z, u | x) for the clean tokens, with `exclude` out of the noise."""
    size = vocab - (exclude is not None)
    noise = torch.ones(vocab, dtype=torch.float64)
    if exclude is not None:
        noise[exclude] = 0
    eye = torch.eye(vocab, dtype=torch.float64)
    both = (alpha * eye[clean].unsqueeze(-1) + (1 - alpha) * eye) * noise
    return both.flatten(1) / size


@pytest.mark.parametrize("exclude", [None, 0])
@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.3, 0.7), (0.0, 0.5), (0.4, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_remask_step_reaches_the_joint_law(alpha_t: float, alpha_s: float, exclude: int | None) -> None:
    vocab = 4
    x = torch.tensor([i for i in range(vocab) if i != exclude]).repeat(ROWS // vocab)
    z, u = au.corrupt(x, alpha_t, vocab, exclude=exclude, key=dlcore.rng.key(8))
    sure = torch.where(torch.eye(vocab, dtype=torch.bool), 0.0, -torch.inf)[x]
    z_s, u_s = au.remask_step(sure, z, u, alpha_t, alpha_s, exclude=exclude, key=dlcore.rng.key(9))
    assert fits_given(x, z_s * vocab + u_s, joint_given(torch.arange(vocab), alpha_s, vocab, exclude))


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_remask_step_draws_from_the_uniform_bridge(parameterization: str) -> None:
    vocab, p, t, s = 4, law(4, seed=10), 0.3, 0.6
    (z, u), state = states(vocab), torch.arange(vocab * vocab).repeat(ROWS // 16)
    denoiser = denoiser_of(p, t, vocab)
    network = p.expand(16, vocab) if parameterization == "loo" else denoiser
    z_s, u_s = au.remask_step(
        network.log().float().clamp(min=-1e30)[state],
        z[state],
        u[state],
        t,
        s,
        parameterization=parameterization,
        key=dlcore.rng.key(11),
    )
    given = bridge_given_clean(t, s, vocab)
    assert fits_given(state, z_s, torch.einsum("kx,xky->ky", denoiser, given[:, z]))
    # And u_s: of its law given z_s and the draw x̂, both summed out.
    same = 1 / (1 + (vocab - 1) * s)
    eye = torch.eye(vocab, dtype=torch.float64)
    renewed = same * eye + (1 - same) / (vocab - 1) * (1 - eye)
    noise_given = torch.where(eye.bool().unsqueeze(-1), renewed.unsqueeze(1), eye.unsqueeze(0))
    joint = torch.einsum("kx,xky,xyw->kyw", denoiser, given[:, z], noise_given)
    assert fits_given(state, z_s * vocab + u_s, joint.flatten(1))


def test_ends() -> None:
    g = torch.Generator().manual_seed(12)
    x = torch.randint(7, (200,), generator=g)
    z, u = au.corrupt(x, 0.4, 7, key=dlcore.rng.key(13))
    broken = torch.full((200, 7), torch.nan)
    for parameterization in PARAMETERIZATIONS:
        options = {"parameterization": parameterization, "key": dlcore.rng.key(14)}
        # Clean and unmoving rows, and settled ones, are not read.
        for t, s in ((1.0, 1.0), (0.4, 0.4), (0.0, 0.0)):
            assert au.step(broken, z, u, t, s, **options).equal(z)
        assert au.remask_step(broken, z, u, 1.0, 1.0, **options)[0].equal(z)
        out = au.step(broken, z, u, 0.4, 1.0, **options)
        assert out.equal(torch.where(z == u, -1, z))
        for again in au.remask_step(broken, z, u, 0.4, 1.0, **options):
            assert (again == -1).equal(z == u)
        logits = torch.randn(200, 7, generator=g)
        greedy = au.step(logits, u, u, 0.0, 1.0, temperature=0.0, **options)
        assert greedy.equal(logits.argmax(-1))
    one = torch.zeros(5, dtype=torch.int64)
    assert au.step(torch.zeros(5, 1), one, one, 0.1, 0.5).equal(one)
    assert all(a.equal(one) for a in au.remask_step(torch.zeros(5, 1), one, one, 0.1, 0.5))
    assert au.remask_step(torch.zeros(5, 2), one, one, 0.0, 1.0)[1].max() <= 1


# --- the NELBO ---------------------------------------------------------------------------------------------


def formula(denoiser: Tensor, z: Tensor, u: Tensor, x: Tensor, alpha: Tensor, dalpha: float) -> Tensor:
    """1[z = u]·r·(1 - D(z) - 1[x ≠ u]·(1 + log D(x)))."""
    at_z, at_x = (denoiser.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (z, x))
    each = 1 - at_z - torch.where(x != u, 1 + at_x.log(), 0)
    return torch.where(z == u, -dalpha / (1 - alpha) * each, 0)


def test_nelbo_integrates_to_the_entropy() -> None:
    t, weight = quadrature()
    (z, u), pair = states(V), pairs(V * V)
    total = torch.zeros((), dtype=torch.float64)
    for at, share in zip(t.tolist(), weight, strict=True):
        exact = posteriors(absorbing_kernel(1 - at))
        shape = (V, V, V * V, V * V, 2)
        x = pairs(V).view(V, V, 1, 1, 2).expand(shape)
        each = au.nelbo(
            exact.loo.log().expand(*shape, V), z[pair].expand(shape), u[pair].expand(shape), x, 1 - at, -1.0
        )
        total += share * torch.where(exact.joint > 0, exact.joint * each.sum(-1), 0).sum()
    assert float(total) == pytest.approx(ENTROPY, abs=1e-7)


def test_nelbo_is_the_formula() -> None:
    g = torch.Generator().manual_seed(15)
    vocab, count = 5, 60
    p, x = law((count, vocab), seed=16), torch.randint(vocab, (count,), generator=g)
    alpha = torch.rand(count, generator=g, dtype=torch.float64) * 0.98
    z, u = au.corrupt(x, alpha, vocab, key=dlcore.rng.key(17))
    lift = torch.where(torch.arange(vocab) == u.unsqueeze(-1), 1, (1 - alpha).unsqueeze(-1))
    denoiser = p * lift / (p * lift).sum(-1, keepdim=True)
    wanted = formula(denoiser, z, u, x, alpha, -0.8)
    torch.testing.assert_close(au.nelbo(p.log(), z, u, x, alpha, -0.8), wanted)
    other = au.nelbo(denoiser.log(), z, u, x, alpha, -0.8, parameterization="denoiser")
    torch.testing.assert_close(other, wanted)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_nelbo_reads_only_open_rows(parameterization: str) -> None:
    logits = law((4, V), seed=18).log()
    z, u, x = torch.tensor([0, 1, 2, 1]), torch.tensor([0, 2, 2, 0]), torch.tensor([0, 1, 1, 1])
    logits[[1, 3]] = torch.nan
    logits.requires_grad_()
    loss = au.nelbo(logits, z, u, x, 0.6, -1.0, parameterization=parameterization)
    assert bool((loss[[1, 3]] == 0).all())
    assert bool((loss[[0, 2]] > 0).all())
    loss.sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert bool((logits.grad[[1, 3]] == 0).all())
    assert bool((logits.grad[[0, 2]] != 0).any())
    smooth = law((4, V), seed=19).log().requires_grad_()
    alpha = torch.tensor([0.0, 0.3, 0.7, 0.95], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a: au.nelbo(a, z, u, x, alpha, -1.0, parameterization=parameterization), (smooth,)
    )


def test_nelbo_is_accurate_in_float32_near_the_data() -> None:
    """x = z = u: r·(1 - D(z)) is a number of order 1, a ratio of two that vanish."""
    alpha = torch.tensor(1 - 1e-6, dtype=torch.float64)
    logits, z = 3 * torch.randn(50, 200, generator=torch.Generator().manual_seed(20)), torch.arange(50)
    exact = au.nelbo(logits.double(), z, z, z, alpha, -1.0)
    p = torch.softmax(logits.double(), -1).gather(-1, z.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(exact, (1 - p) / (1 - alpha + alpha * p))
    torch.testing.assert_close(au.nelbo(logits, z, z, z, alpha, -1.0).double(), exact, rtol=2e-5, atol=0)


# --- noise, compilation, errors ----------------------------------------------------------------------------


def test_linear_logits() -> None:
    g = torch.Generator().manual_seed(21)
    head = LinearLogits(torch.randn(2, 3, 8, generator=g), torch.randn(6, 8, generator=g))
    u, key, full = torch.randint(6, (2, 3), generator=g), dlcore.rng.key(22), head.materialize()
    assert au.step(head, u, u, 0.2, 0.7, key=key).equal(au.step(full, u, u, 0.2, 0.7, key=key))
    torch.testing.assert_close(
        au.nelbo(head, u, u, u.flip(0), 0.2, -1.0), au.nelbo(full, u, u, u.flip(0), 0.2, -1.0)
    )


def test_tokens_follow_the_key() -> None:
    g = torch.Generator().manual_seed(23)
    x = torch.randint(9, (4, 6), generator=g)
    logits, key = torch.randn(4, 6, 9, generator=g), dlcore.rng.key(24)
    z, u = au.corrupt(x, 0.2, 9, key=dlcore.rng.key(25))
    rows = dlcore.rng.fold_in(key, torch.arange(24).view(4, 6))
    for call in (
        lambda k, i: torch.stack(au.corrupt(x[i], 0.5, 9, key=k), -1),
        lambda k, i: au.step(logits[i], z[i], u[i], 0.2, 0.6, key=k),
        lambda k, i: torch.stack(au.remask_step(logits[i], z[i], u[i], 0.2, 0.6, key=k), -1),
    ):
        whole = call(key, slice(None))
        assert whole.equal(call(rows, slice(None)))
        assert whole.equal(torch.cat([call(rows[i], i) for i in (slice(0, 1), slice(1, 4))]))
        assert not whole.equal(call(dlcore.rng.key(26), slice(None)))


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(27)
    x = torch.randint(9, (2, 6), generator=g)
    z, u = au.corrupt(x, 0.5, 9, key=dlcore.rng.key(28))

    def everything(a: Tensor, t: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            *au.corrupt(x, t, 9, key=k),
            au.step(a, z, u, t, s, temperature=s, parameterization="denoiser", exclude=8, key=k),
            *au.remask_step(a, z, u, t, s, key=k),
            au.nelbo(a, z, u, x, t, -s),
        )

    logits, key = torch.randn(2, 6, 9, generator=g), dlcore.rng.key(29)
    levels = torch.linspace(0.1, 0.8, 5, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits, t, t + 0.1, key) for t in levels])


Z, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)
BAD = [
    (
        lambda: au.step(LOGITS, Z, Z, 0.4, torch.zeros(7)),
        ValueError,
        r"step: alpha_s must broadcast to \(2, 3\), got \(7,\)",
    ),
    (lambda: au.step(LOGITS, Z, Z, 0.4, 0.3), ValueError, "step: alpha_s must be at least alpha_t"),
    (lambda: au.step(LOGITS, Z, Z + 4, 0.4, 0.5), ValueError, r"step: u must lie in \[0, 4\), got 4"),
    (lambda: au.step(LOGITS, Z, Z[0], 0.4, 0.5), ValueError, r"step: u must have shape \(2, 3\), got \(3,\)"),
    (
        lambda: au.step(LOGITS, Z, Z, 0.4, 0.5, parameterization="x0"),
        ValueError,
        "step: parameterization must be one of",
    ),
    (
        lambda: au.remask_step(LOGITS, Z, Z, 1.4, 0.5),
        ValueError,
        r"remask_step: alpha_t must lie in \[0, 1\], got 1.4",
    ),
    (lambda: au.corrupt(Z + 4, 0.5, 4), ValueError, r"corrupt: x must lie in \[0, 4\), got 4"),
    (lambda: au.corrupt(Z, 0.5, 4, exclude=4), ValueError, r"corrupt: exclude must lie in \[0, 4\), got 4"),
    (lambda: au.nelbo(LOGITS, Z, Z, Z, 1.0, -1.0), ValueError, r"nelbo: alpha must lie in \[0, 1\), got 1"),
    (
        lambda: au.nelbo(LOGITS, Z, Z, Z, 0.5, 1.0),
        ValueError,
        r"nelbo: dalpha must lie in \(-inf, 0\], got 1",
    ),
    (lambda: au.nelbo(LOGITS, Z, Z, Z - 1, 0.5, -1.0), ValueError, r"nelbo: x must lie in \[0, 4\), got -1"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"absorbing_uniform.{message}"):
        call()
