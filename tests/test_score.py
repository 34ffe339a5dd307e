"""Score entropy and the analytic step against their definitions, the NELBOs and the exact bridges."""

import pytest
import torch
from oracles import (
    ENTROPY,
    ROWS,
    V,
    bridge_given_clean,
    check_compiled,
    fits_given,
    law,
    mask_kernel,
    pairs,
    posteriors,
    quadrature,
    uniform_kernel,
)
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import masked, score, uniform

MASK = V
ALPHAS = [1e-4, 0.2, 0.5, 0.9, 1 - 1e-6]


def value_and_gradient(call, leaf: Tensor) -> tuple[Tensor, Tensor]:
    leaf = leaf.detach().clone().requires_grad_()
    out = call(leaf)
    out.sum().backward()
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def rows_of(vocab: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in float64, z and x, half of them equal."""
    g = torch.Generator().manual_seed(seed)
    z, x = torch.randint(0, vocab, (2, 8), generator=g)
    return 2 * torch.randn(8, vocab, generator=g).double(), z, torch.where(torch.arange(8) % 2 == 0, z, x)


def by_definition(log_score: Tensor, z: Tensor, x: Tensor, kernel: Tensor, rate: Tensor) -> Tensor:
    """Σ_{y≠z} Q(y, z)·[s - r·log s + r·(log r - 1)], with r = q(y|x)/q(z|x) and forward rates Q (y, z)."""
    q = kernel[x]
    r = q / q.gather(-1, z.unsqueeze(-1))
    inner = log_score.exp() - torch.where(r > 0, r * log_score, 0) + torch.special.xlogy(r, r) - r
    return (rate[:, z].T * inner).scatter(-1, z.unsqueeze(-1), 0).sum(-1)


# --- score entropy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_entropy_by_definition(alpha: float) -> None:
    """Of any scores, not only of possible ones; σ'= 0.7/α."""
    log_score, z, x = rows_of(V, seed=1)
    wanted = by_definition(log_score, z, x, uniform_kernel(alpha), torch.full((V, V), 0.7 / alpha / V))
    torch.testing.assert_close(score.entropy(log_score, z, x, alpha, -0.7), wanted)
    full, _, x = torch.cat([log_score, log_score[:, :1]], -1), z, x
    hidden = torch.full_like(x, MASK)
    rate = torch.zeros(V + 1, V + 1, dtype=torch.float64)
    rate[:V, MASK] = 0.7 / alpha
    wanted = by_definition(full, hidden, x, mask_kernel(alpha), rate)
    torch.testing.assert_close(score.entropy(full, hidden, x, alpha, -0.7, mask_id=MASK), wanted)
    # What stands at z does not count, nor has it a gradient.
    spoilt = log_score.scatter_add(-1, z.unsqueeze(-1), torch.full((8, 1), 7.0, dtype=torch.float64))
    (a, _), (b, grad) = (
        value_and_gradient(lambda s: score.entropy(s, z, x, alpha, -0.7), s) for s in (log_score, spoilt)
    )
    torch.testing.assert_close(a, b)
    assert bool((grad.gather(-1, z.unsqueeze(-1)).abs() < 1e-30).all())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("vocab", [3, 50])
def test_entropy_of_exact_scores_is_the_nelbo(alpha: float, vocab: int) -> None:
    """In value and gradient, both to float64's accuracy."""
    logits, z, x = rows_of(vocab, seed=2)
    got = value_and_gradient(
        lambda a: score.entropy(uniform.loo_to_log_score(a, z, alpha), z, x, alpha, -0.7), logits
    )
    wanted = value_and_gradient(lambda a: uniform.nelbo(a, z, x, alpha, -0.7), logits)
    # Values are differences of sums of the size of w·c, w = σ'/V.
    scale = 0.7 / alpha * (1 + alpha / (1 - alpha))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13 * scale)
    mask = vocab - 1
    z, x = torch.where(torch.arange(8) < 6, mask, z.clamp(max=mask - 1)), x.clamp(max=mask - 1)

    def absorbing(a: Tensor) -> Tensor:
        log_score = score.denoiser_to_log_score(a, z, alpha, mask)
        return score.entropy(log_score, z, x, alpha, -0.7, mask_id=mask)

    got = value_and_gradient(absorbing, logits)
    wanted = value_and_gradient(lambda a: masked.nelbo(a, z, x, alpha, -0.7, mask), logits)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13 * 0.7 / (1 - alpha))


def test_entropy_integrates_to_the_entropy() -> None:
    t, weight = quadrature(16)
    total = torch.zeros((), dtype=torch.float64)
    for at, share in zip(t.tolist(), weight, strict=True):
        exact = posteriors(uniform_kernel(1 - at))
        z = pairs(V).expand(V, V, V, V, 2)
        x = pairs(V).view(V, V, 1, 1, 2).expand_as(z)
        log_score = uniform.loo_to_log_score(exact.loo.log(), pairs(V), 1 - at).expand(*z.shape, V)
        each = score.entropy(log_score, z, x, 1 - at, -1.0).sum(-1)
        total += share * (exact.joint * each).sum()
    assert float(total) == pytest.approx(ENTROPY, abs=1e-5)


def test_scaled_output() -> None:
    """SEDD's absorbing parametrisation: log s = a + log(α/(1-α)) - log(V-1)."""
    out, _, x = rows_of(V + 1, seed=3)
    z, x = torch.full_like(x, MASK), x.clamp(max=V - 1)
    for alpha in (0.1, 0.6):
        log_score = out + torch.tensor(alpha / (1 - alpha) / V).double().log()
        a = score.entropy(out, z, x, alpha, -1.0, mask_id=MASK, scaled=True)
        torch.testing.assert_close(
            a, score.entropy(log_score, z, x, alpha, -1.0, mask_id=MASK), rtol=1e-6, atol=1e-6
        )
        a = score.bridge_log_probs(out - 2, z, alpha, alpha + 0.05, mask_id=MASK, scaled=True)
        b = score.bridge_log_probs(log_score - 2, z, alpha, alpha + 0.05, mask_id=MASK)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    # It is defined from pure noise on, where a = 0 is a uniform guess.
    flat = torch.zeros(8, V + 1, dtype=torch.float64)
    start = score.entropy(flat, z, x, 0.0, -1.0, mask_id=MASK, scaled=True)
    torch.testing.assert_close(start, torch.full((8,), 3.0, dtype=torch.float64).log())
    first = score.bridge_log_probs(flat, z, 0.0, 0.3, mask_id=MASK, scaled=True).exp()
    torch.testing.assert_close(first[0], torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=torch.float64))


def test_gradients() -> None:
    log_score, z, x = rows_of(V + 1, seed=4)
    log_score.requires_grad_()
    alpha = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    hidden, x_clean = torch.full_like(z, MASK), x.clamp(max=V - 1)
    assert torch.autograd.gradcheck(lambda s: score.entropy(s, z, x, alpha, -1.0), (log_score,))
    for scaled in (False, True):
        assert torch.autograd.gradcheck(
            lambda s, scaled=scaled: score.entropy(
                s, hidden, x_clean, alpha, -1.0, mask_id=MASK, scaled=scaled
            ),
            (log_score,),
        )


# --- the analytic step -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha_t", "alpha_s"), [(0.4, 0.7), (0.05, 0.06), (0.9, 1.0), (0.3, 0.3), (0.2, 1.0)]
)
def test_tweedie_of_exact_scores_is_the_bridge(alpha_t: float, alpha_s: float) -> None:
    p = law((9, V), seed=5)
    z = torch.arange(9) % V
    log_score = uniform.loo_to_log_score(p.log(), z, alpha_t)
    got = score.bridge_log_probs(log_score, z, alpha_t, alpha_s).exp()
    torch.testing.assert_close(
        got, uniform.bridge_log_probs(p.log(), z, alpha_t, alpha_s).exp(), rtol=1e-11, atol=1e-13
    )
    # The bridge averaged over the denoiser, by enumeration.
    denoiser = uniform.loo_to_denoiser(p.log(), z, alpha_t).exp()
    exact = torch.einsum("nx,xny->ny", denoiser, bridge_given_clean(alpha_t, alpha_s, V)[:, z])
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-13)
    states = torch.cat([torch.full((9,), MASK), torch.arange(V)])
    full = torch.cat([p.log(), torch.zeros(9, 1)], -1)[torch.arange(12) % 9]
    log_score = score.denoiser_to_log_score(full, states, alpha_t, MASK)
    got = score.bridge_log_probs(log_score, states, alpha_t, alpha_s, mask_id=MASK).exp()
    reveal = (alpha_s - alpha_t) / (1 - alpha_t)
    wanted = torch.cat([reveal * p, torch.full((9, 1), 1 - reveal, dtype=torch.float64)], -1)
    torch.testing.assert_close(got[:9], wanted)
    assert got[9:].equal(torch.eye(V + 1, dtype=torch.float64)[:V])


def test_tweedie_by_its_matrices() -> None:
    """e^{-Q·dσ}·s times the transition into z, of scores that no law has; negative masses count as 0."""
    log_score, z, _ = rows_of(V + 1, seed=6)
    alpha_t, alpha_s = 0.5, 0.55
    r = alpha_t / alpha_s
    own = log_score.scatter(-1, z.unsqueeze(-1), 0).exp()
    mix = uniform_kernel(r, V + 1)
    mass = ((own @ torch.linalg.inv(mix)) * mix[:, z].T).clamp(min=0)
    got = score.bridge_log_probs(log_score, z, alpha_t, alpha_s).exp()
    torch.testing.assert_close(got, mass / mass.sum(-1, keepdim=True))
    assert bool((mass == 0).any())
    hidden = torch.full_like(z, MASK)
    absorb = r * torch.eye(V + 1, dtype=torch.float64)
    absorb[:, MASK] += 1 - r
    own = log_score.scatter(-1, hidden.unsqueeze(-1), 0).exp()
    # Transitions are rows (from) by columns (to); a law, and so a score, is carried by the transpose.
    mass = ((own @ torch.linalg.inv(absorb)) * absorb[:, MASK]).clamp(min=0)
    got = score.bridge_log_probs(log_score, hidden, alpha_t, alpha_s, mask_id=MASK).exp()
    torch.testing.assert_close(got, mass / mass.sum(-1, keepdim=True))
    assert bool((mass[:, MASK] == 0).any())
    assert bool((mass[:, MASK] > 0).any())


@pytest.mark.parametrize("alpha_s", [0.55, 1.0])
@pytest.mark.parametrize("mask_id", [None, MASK])
def test_step_draws_the_law(alpha_s: float, mask_id: int | None) -> None:
    states = torch.arange(V + 1)
    log_score = (law((V + 1, V + 1), seed=7) * 3).log()
    z = states.repeat(ROWS // (V + 1))
    wanted = score.bridge_log_probs(log_score, states, 0.5, alpha_s, mask_id=mask_id).exp()
    drawn = score.step(log_score[z].float(), z, 0.5, alpha_s, mask_id=mask_id, key=dlcore.rng.key(8))
    assert fits_given(z, drawn, wanted)
    if mask_id is not None:
        assert (alpha_s == 1) == (float(wanted[MASK, MASK]) == 0)


@pytest.mark.parametrize("mask_id", [None, MASK])
def test_marginal_is_carried(mask_id: int | None) -> None:
    """Σ_z q_t(z|x)·step(y|z) = q_s(y|x) where the score is that of x itself."""
    size = V if mask_id is None else V + 1
    kernel = uniform_kernel if mask_id is None else mask_kernel
    z, eye = torch.arange(size), torch.eye(V, dtype=torch.float64)
    for x in range(V):
        p = torch.cat([eye[x], eye[x, :1]])[:size].expand(size, size).log()
        if mask_id is None:
            log_score = uniform.loo_to_log_score(p, z, 0.4)
        else:
            log_score = score.denoiser_to_log_score(p, z, 0.4, MASK)
        law_s = score.bridge_log_probs(log_score, z, 0.4, 0.7, mask_id=mask_id).exp()
        torch.testing.assert_close(kernel(0.4)[x] @ law_s, kernel(0.7)[x])


# --- heads, keys, compilation, errors ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_linear_logits(bias: bool) -> None:
    g = torch.Generator().manual_seed(9)
    tensors = [torch.randn(2, 3, 8, generator=g), torch.randn(V + 1, 8, generator=g)]
    if bias:
        tensors.append(torch.randn(V + 1, generator=g))
    z, x, key = torch.tensor([[0, 1, MASK]] * 2), torch.tensor([[0, 2, 1]] * 2), dlcore.rng.key(10)
    for mask_id in (None, MASK):
        results = []
        for make in (lambda *h: LinearLogits(*h), lambda *h: LinearLogits(*h).materialize()):
            leaves = [h.clone().requires_grad_() for h in tensors]
            loss = score.entropy(make(*leaves), z, x, 0.4, -1.0, mask_id=mask_id)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        head = LinearLogits(*tensors)
        one, other = (
            score.step(h, z, 0.4, 0.6, mask_id=mask_id, key=key) for h in (head, head.materialize())
        )
        assert one.equal(other)
    assert score.entropy(head.materialize().bfloat16(), z, x, 0.4, -1.0).dtype == torch.float32


def test_a_step_of_no_length_has_a_gradient() -> None:
    log_score = torch.zeros(2, V + 1, requires_grad=True)
    z = torch.tensor([MASK, 0])
    law = score.bridge_log_probs(log_score, z, 0.4, 0.4, mask_id=MASK)
    assert law.argmax(-1).equal(z)
    assert torch.autograd.grad(law.exp().sum(), log_score)[0].isfinite().all()


def test_broken_rows_and_keys() -> None:
    g = torch.Generator().manual_seed(11)
    log_score, key = torch.randn(2, 3, V + 1, generator=g), dlcore.rng.key(12)
    z = torch.tensor([[0, MASK, MASK], [MASK, 1, 2]])
    log_score[0, :2] = torch.nan
    whole = score.step(log_score, z, 0.4, 0.9, mask_id=MASK, key=key)
    assert whole[0, :2].tolist() == [0, -1]
    keys = dlcore.rng.fold_in(key, torch.arange(6).view(2, 3))
    parts = [score.step(log_score[i], z[i], 0.4, 0.9, mask_id=MASK, key=keys[i]) for i in range(2)]
    assert whole.equal(torch.stack(parts))
    loss = score.entropy(log_score, z, torch.zeros_like(z), 0.4, -1.0, mask_id=MASK)
    assert loss.isnan().tolist() == [[False, True, False], [False, False, False]]


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(13)
    x = torch.randint(V, (2, 6), generator=g)
    z = torch.where(torch.rand(2, 6, generator=g) < 0.5, x, MASK)

    def everything(a: Tensor, t: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            score.entropy(a, z, x, t, -s),
            score.entropy(a, z, x, t, -s, mask_id=MASK, scaled=True),
            score.step(a, z, t, s, key=k),
            score.step(a, z, t, s, mask_id=MASK, scaled=True, key=k),
        )

    logits, key = torch.randn(2, 6, V + 1, generator=g), dlcore.rng.key(14)
    levels = torch.linspace(0.1, 0.8, 4, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits, t, t + 0.1, key) for t in levels])


Z, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, V + 1)
BAD = [
    (
        lambda: score.entropy(LOGITS, Z, Z, 0.0, -1.0),
        ValueError,
        r"score.entropy: alpha must lie in \(0, 1\), got 0",
    ),
    (lambda: score.entropy(LOGITS, Z, Z, 0.5, -1.0, scaled=True), ValueError, "scaled is of absorbing noise"),
    (
        lambda: score.entropy(LOGITS, Z, Z, 0.5, -1.0, mask_id=4),
        ValueError,
        r"mask_id must lie in \[0, 4\), got 4",
    ),
    (
        lambda: score.entropy(LOGITS, Z + MASK, Z, 1.0, -1.0, mask_id=MASK),
        ValueError,
        "score.entropy: alpha must be below 1 where z is masked",
    ),
    (lambda: score.entropy(LOGITS[..., :1], Z, Z, 0.5, -1.0), ValueError, "V >= 2, got V = 1"),
    (
        lambda: score.entropy(LOGITS, Z, Z, 0.5, 1.0),
        ValueError,
        r"score.entropy: dalpha must lie in \(-inf, 0\]",
    ),
    (lambda: score.step(LOGITS, Z, 0.4, 0.3), ValueError, "score.step: alpha_s must be at least alpha_t"),
    (lambda: score.step(LOGITS, Z, 0.0, 0.3), ValueError, r"score.step: alpha_t must lie in \(0, 1\], got 0"),
    (lambda: score.step(LOGITS, Z.int(), 0.2, 0.3), TypeError, "score.step: z must be an int64 Tensor"),
    (
        lambda: score.denoiser_to_log_score(LOGITS, Z, 0.2, None),
        TypeError,
        "score.denoiser_to_log_score: mask_id must be an int, got NoneType None",
    ),
    (lambda: score.entropy(Z, Z, Z, 0.5, -1.0), TypeError, "score.entropy: log_score must be float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
