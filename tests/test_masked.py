"""Masked diffusion and its remasking against enumeration and exact laws."""

import math

import pytest
import torch
from oracles import (
    ENTROPY,
    JOINT,
    MIN_P,
    ROWS,
    V,
    check_compiled,
    fits,
    fits_given,
    law,
    mask_kernel,
    pairs,
    posteriors,
    quadrature,
)
from scipy.stats import kstest
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import masked

MASK = V


def subs(p: Tensor) -> Tensor:
    """Logits of p (..., V) with a column for the mask, large: it must not count."""
    return torch.cat([p.log(), torch.full_like(p[..., :1], 5.0)], -1)


# --- corruption and the step -------------------------------------------------------------------------------


def test_corrupt() -> None:
    x = torch.arange(V).repeat(20_000)
    alpha = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    z = masked.corrupt(x, alpha[x], MASK, key=dlcore.rng.key(1))
    assert fits_given(x, z, torch.stack([mask_kernel(float(a))[i] for i, a in enumerate(alpha)]))
    assert masked.corrupt(x, 1.0, MASK).equal(x)
    assert bool((masked.corrupt(x, 0.0, MASK) == MASK).all())
    # A mask token beyond the vocabulary, as tokenizers append it.
    assert masked.corrupt(torch.tensor([1]), 0.0, 50_257).item() == 50_257


SIGMA_MAX = (1 - 0.6) / 0.5


@pytest.mark.parametrize("remask", [0.0, 0.3, SIGMA_MAX])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_step_law(remask: float, temperature: float) -> None:
    """ReMDM: masked, token mass (α_s - (1-σ)α_t)/(1-α_t); unmasked, mask mass σ."""
    p = law(V, seed=2)
    z = torch.arange(V + 1).repeat(ROWS // (V + 1))
    logits = subs(p).float().expand(len(z), V + 1)
    drawn = masked.step(
        logits, z, 0.5, 0.6, MASK, remask=remask, temperature=temperature, key=dlcore.rng.key(3)
    )
    tempered = p ** (1 / temperature) / (p ** (1 / temperature)).sum()
    reveal = (0.6 - (1 - remask) * 0.5) / 0.5
    wanted = (1 - remask) * torch.eye(V + 1, dtype=torch.float64)
    wanted[:, MASK] += remask
    wanted[MASK] = torch.cat([reveal * tempered, torch.tensor([1 - reveal], dtype=torch.float64)])
    assert fits_given(z, drawn, wanted)


@pytest.mark.parametrize(
    ("alpha_t", "alpha_s", "share"),
    [
        (0.5, 0.6, 0.0),
        (0.5, 0.6, 0.5),
        (0.5, 0.6, 1.0),
        (0.2, 0.3, 1.0),
        (0.0, 0.4, 1.0),
        (0.7, 1.0, 1.0),
        (0.6, 0.6, 1.0),
    ],
)
def test_marginal_is_exact_for_every_remask_probability(alpha_t: float, alpha_s: float, share: float) -> None:
    x = torch.arange(V).repeat(ROWS // V)
    z = masked.corrupt(x, alpha_t, MASK, key=dlcore.rng.key(4))
    sigma = share * masked.remask_probability("max", alpha_t, alpha_s)
    logits = subs(torch.eye(V, dtype=torch.float64))[x].float()
    z_s = masked.step(logits, z, alpha_t, alpha_s, MASK, remask=sigma, key=dlcore.rng.key(5))
    assert fits_given(x, z_s, mask_kernel(alpha_s))


def test_only_rows_that_take_a_draw_are_read() -> None:
    z = torch.tensor([MASK, 0, 1, 2]).repeat(500)
    broken = torch.full((2000, V + 1), torch.nan)
    out = masked.step(broken, z, 0.2, 0.5, MASK, remask=0.1, key=dlcore.rng.key(6)).view(-1, 4)
    assert set(out[:, 0].tolist()) == {-1, MASK}
    assert all(set(out[:, 1 + i].tolist()) == {i, MASK} for i in range(V))
    assert masked.step(broken, z, 1.0, 1.0, MASK).equal(z)
    assert masked.step(broken, z, 0.3, 0.3, MASK).equal(z)


def test_step_at_the_ends() -> None:
    g = torch.Generator().manual_seed(7)
    logits, z = torch.randn(64, V + 1, generator=g), torch.full((64,), MASK)
    logits[:, MASK] = 9
    last = masked.step(logits, z, 0.0, 1.0, MASK, temperature=0.0)
    assert last.equal(logits[:, :MASK].argmax(-1))
    assert masked.step(logits, z, 0.0, 0.0, MASK).equal(z)
    # σ_max is 1 where little is known yet: all may be masked again.
    clean = torch.zeros(64, dtype=torch.int64)
    assert masked.step(logits, clean, 0.0, 0.5, MASK, remask=1.0).equal(z)
    # One token beside the mask.
    assert masked.step(torch.zeros(5, 2), torch.ones(5, dtype=torch.int64), 0.0, 1.0, 1).tolist() == [0] * 5
    # A float32 bound may exceed the exact one by its rounding.
    bound = masked.remask_probability("max", 0.9, 0.97).float() + 1e-8
    masked.step(logits, clean, 0.9, 0.97, MASK, remask=bound)


# --- remasking rules ---------------------------------------------------------------------------------------


def test_remask_rules() -> None:
    rule = masked.remask_probability
    for t, s, most in (
        (0.5, 0.6, 0.8),
        (0.2, 0.3, 1.0),
        (0.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
        (1.0, 1.0, 0.0),
        (0.5, 1.0, 0.0),
    ):
        assert float(rule("max", t, s)) == pytest.approx(most)
        assert float(rule("cap", t, s, eta=0.04)) == pytest.approx(min(0.04, most))
        assert float(rule("rescale", t, s, eta=0.5)) == pytest.approx(0.5 * most)
    assert rule("cap", torch.full((2, 1), 0.5), torch.full((3,), 0.6), eta=0.1).shape == (2, 3)
    confidence = torch.tensor(
        [[0.9, 0.5, torch.inf, 0.1], [torch.nan, torch.inf, torch.inf, torch.nan], [0.2, 0.2, 0.2, 0.2]]
    )
    sigma = rule(
        "confidence",
        torch.tensor([[0.5], [0.5], [0.2]]),
        torch.tensor([[0.6], [0.6], [0.3]]),
        confidence=confidence,
    )
    share = torch.softmax(torch.tensor([-0.9, -0.5, -0.1], dtype=torch.float64), 0) * 0.8
    torch.testing.assert_close(sigma[0, [0, 1, 3]], share, rtol=1e-6, atol=0)
    assert sigma[0, 2] == 0
    assert sigma[1].tolist() == [0.0] * 4
    assert sigma[2].tolist() == [0.25] * 4
    # A per-position prompt (alpha = 1) is left alone by the bound itself.
    alpha = torch.tensor([1.0, 0.5])
    assert rule("max", alpha, torch.tensor([1.0, 0.6]))[0] == 0


# --- the first-hitting sampler -----------------------------------------------------------------------------


def test_first_hitting_law() -> None:
    count, alpha = 50_000, 0.3
    z = torch.tensor([4, MASK, 1, MASK, MASK]).expand(count, 5)
    when, where = masked.first_hitting(z, alpha, MASK, key=dlcore.rng.key(8))
    survival = ((1 - when) / (1 - alpha)) ** 3
    assert kstest(survival.numpy(), "uniform").pvalue > MIN_P
    assert fits(where, torch.tensor([0, 1, 0, 1, 1], dtype=torch.float64))
    assert when.dtype == torch.float64
    assert bool(((when > alpha) & (when <= 1)).all())


def test_first_hitting_at_the_ends() -> None:
    z = torch.tensor([[0, 1, 2], [MASK, 1, 2], [0, 1, MASK]])
    when, where = masked.first_hitting(z, torch.tensor([0.1, 0.2, 0.3]), MASK)
    assert where.tolist() == [-1, 0, 2]
    assert when[0] == 1
    assert masked.first_hitting(z, 1.0, MASK)[0].tolist() == [1.0, 1.0, 1.0]
    assert masked.first_hitting(torch.zeros(2, 0, dtype=torch.int64).new_zeros(2, 1), 0.5, MASK)[
        1
    ].tolist() == [-1, -1]


def test_first_hitting_with_exact_conditionals_samples_the_joint() -> None:
    count = ROWS // 4
    z = torch.full((count, 2), MASK)
    alpha = torch.zeros(count, dtype=torch.float64)
    denoiser = posteriors(mask_kernel(0.5)).denoiser.nan_to_num(1 / V)
    for i in range(2):
        alpha, where = masked.first_hitting(z, alpha, MASK, key=dlcore.rng.key(9, i))
        rows = torch.arange(count)
        p = denoiser[z[:, 0], z[:, 1]][rows, where]
        z[rows, where] = dlcore.categorical.sample(p.log().float(), key=dlcore.rng.key(10, i)).tokens
    assert bool((z != MASK).all())
    assert fits(z[:, 0] * V + z[:, 1], JOINT.flatten())


# --- the NELBO ---------------------------------------------------------------------------------------------


def test_nelbo_integrates_to_the_entropy() -> None:
    t, weight = quadrature(16)
    total = torch.zeros((), dtype=torch.float64)
    for at, share in zip(t.tolist(), weight, strict=True):
        exact = posteriors(mask_kernel(1 - at))
        z = pairs(V + 1).expand(V, V, V + 1, V + 1, 2)
        x = pairs(V).view(V, V, 1, 1, 2).expand_as(z)
        # Observations of mass 0 have no posterior; any logits do.
        logits = subs(exact.denoiser.nan_to_num(1 / V)).expand(*z.shape, V + 1)
        each = masked.nelbo(logits, z, x, 1 - at, -1.0, MASK).sum(-1)
        total += share * torch.where(exact.joint > 0, exact.joint * each, 0).sum()
    assert float(total) == pytest.approx(ENTROPY, abs=1e-9)


def test_nelbo_formula_and_unread_rows() -> None:
    p, x = law((4, V), seed=11), torch.tensor([0, 1, 2, 1])
    z = torch.tensor([MASK, 1, MASK, 1])
    alpha = torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    logits = subs(p)
    logits[[1, 3]] = torch.nan
    logits.requires_grad_()
    loss = masked.nelbo(logits, z, x, alpha, -0.7, MASK)
    weight, cross = 0.7 / (1 - alpha), -p.gather(-1, x.unsqueeze(-1)).squeeze(-1).log()
    wanted = torch.tensor([weight[0] * cross[0], 0, weight[2] * cross[2], 0], dtype=torch.float64)
    torch.testing.assert_close(loss, wanted)
    # σ'·score entropy of SEDD with s = k·p, k = 1/(e^σ - 1), α = e^-σ.
    k, at_x = alpha / (1 - alpha), (-cross).exp()
    entropy = k - k * (k * at_x).log() + k * (k.log() - 1)
    torch.testing.assert_close(loss[0], (0.7 / alpha * entropy)[0])
    loss.sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert bool((logits.grad[[1, 3]] == 0).all())
    assert bool((logits.grad[:, MASK] == 0).all())
    smooth = p.log().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a: masked.nelbo(torch.cat([a, a[..., :1]], -1), z, x, alpha.clamp(max=0.9), -1.0, MASK),
        (smooth,),
    )


def test_linear_logits() -> None:
    g = torch.Generator().manual_seed(12)
    head = LinearLogits(torch.randn(2, 3, 8, generator=g), torch.randn(V + 1, 8, generator=g))
    z, x = torch.full((2, 3), MASK), torch.zeros(2, 3, dtype=torch.int64)
    full, key = head.materialize(), dlcore.rng.key(13)
    torch.testing.assert_close(
        masked.nelbo(head, z, x, 0.5, -1.0, MASK), masked.nelbo(full, z, x, 0.5, -1.0, MASK)
    )
    assert masked.step(head, z, 0.2, 0.9, MASK, key=key).equal(masked.step(full, z, 0.2, 0.9, MASK, key=key))


# --- noise, compilation, errors ----------------------------------------------------------------------------


def test_tokens_follow_the_key() -> None:
    g = torch.Generator().manual_seed(14)
    x = torch.randint(V, (4, 6), generator=g)
    z = torch.where(torch.rand(4, 6, generator=g) < 0.5, x, MASK)
    logits, key = torch.randn(4, 6, V + 1, generator=g), dlcore.rng.key(15)
    rows = dlcore.rng.fold_in(key, torch.arange(24).view(4, 6))
    for call in (
        lambda k, i: masked.step(logits[i], z[i], 0.3, 0.6, MASK, remask=0.2, key=k),
        lambda k, i: masked.corrupt(x[i], 0.5, MASK, key=k),
    ):
        whole = call(key, slice(None))
        assert whole.equal(call(rows, slice(None)))
        assert whole.equal(torch.cat([call(rows[i], i) for i in (slice(0, 1), slice(1, 4))]))
        assert not whole.equal(call(dlcore.rng.key(16), slice(None)))
    per_sequence = dlcore.rng.fold_in(key, torch.arange(4))
    for a, b in zip(
        masked.first_hitting(z, 0.2, MASK, key=key),
        masked.first_hitting(z, 0.2, MASK, key=per_sequence),
        strict=True,
    ):
        assert a.equal(b)


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(17)
    x = torch.randint(V, (2, 6), generator=g)
    z = torch.where(torch.rand(2, 6, generator=g) < 0.5, x, MASK)
    confidence = torch.rand(2, 6, generator=g)

    def everything(a: Tensor, t: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        sigma = masked.remask_probability("confidence", t, s, confidence=confidence)
        return (
            masked.corrupt(x, t, MASK, key=k),
            sigma,
            masked.remask_probability("cap", t, s, eta=0.1),
            masked.step(a, z, t, s, MASK, remask=sigma, temperature=s, key=k),
            masked.nelbo(a, z, x, t, -s, MASK),
            *masked.first_hitting(z, t, MASK, key=k),
        )

    logits, key = torch.randn(2, 6, V + 1, generator=g), dlcore.rng.key(18)
    levels = torch.linspace(0.1, 0.8, 5, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits, t, t + 0.1, key) for t in levels])


Z, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, V + 1)
RULE = masked.remask_probability
BAD = [
    (
        lambda: masked.step(LOGITS, Z, 0.4, torch.zeros(7), MASK),
        ValueError,
        r"masked.step: alpha_s must broadcast to \(2, 3\), got \(7,\)",
    ),
    (
        lambda: masked.step(LOGITS, Z, 0.4, 0.3, MASK),
        ValueError,
        "masked.step: alpha_s must be at least alpha_t",
    ),
    (
        lambda: masked.step(LOGITS, Z, 0.4, 0.5, 4),
        ValueError,
        r"masked.step: mask_id must lie in \[0, 4\), got 4",
    ),
    (
        lambda: masked.step(LOGITS, Z, 0.4, 0.5, None),
        TypeError,
        "masked.step: mask_id must be an int, got NoneType None",
    ),
    (
        lambda: masked.step(LOGITS, Z, 0.9, 0.95, MASK, remask=0.1),
        ValueError,
        r"masked.step: remask must be at most min.*, got 0.1 above 0.0555",
    ),
    (
        lambda: masked.step(LOGITS, Z, 0.1, 0.2, MASK, remask=-0.1),
        ValueError,
        r"masked.step: remask must lie in \[0, 1\], got -0.1",
    ),
    (
        lambda: masked.step(LOGITS, Z - 1, 0.1, 0.2, MASK),
        ValueError,
        r"masked.step: z must lie in \[0, 4\), got -1",
    ),
    (lambda: masked.corrupt(Z.float(), 0.1, MASK), TypeError, "masked.corrupt: x must be an int64 Tensor"),
    (lambda: masked.corrupt(None, 0.1, MASK), TypeError, "masked.corrupt: x must be an int64 Tensor"),
    (
        lambda: masked.corrupt(Z, 1.1, MASK),
        ValueError,
        r"masked.corrupt: alpha must lie in \[0, 1\], got 1.1",
    ),
    (lambda: RULE("best", 0.1, 0.2), ValueError, "masked.remask_probability: rule must be one of 'cap'"),
    (lambda: RULE("cap", 0.1, 0.2), ValueError, "masked.remask_probability: rule 'cap' needs eta"),
    (
        lambda: RULE("max", 0.1, 0.2, eta=0.1),
        ValueError,
        "masked.remask_probability: rule 'max' takes no eta",
    ),
    (
        lambda: RULE("confidence", 0.1, 0.2),
        ValueError,
        "masked.remask_probability: rule 'confidence' needs confidence",
    ),
    (
        lambda: RULE("cap", 0.1, 0.2, eta=2.0),
        ValueError,
        r"masked.remask_probability: eta must lie in \[0, 1\], got 2",
    ),
    (
        lambda: RULE("max", torch.zeros(2), torch.ones(3)),
        ValueError,
        r"alpha_t, alpha_s must broadcast together, got alpha_t \(2,\), alpha_s \(3,\)",
    ),
    (
        lambda: RULE("confidence", 0.1, 0.2, confidence=Z),
        TypeError,
        "masked.remask_probability: confidence must be float32",
    ),
    (
        lambda: masked.nelbo(LOGITS, Z, Z + 4, 0.5, -1.0, MASK),
        ValueError,
        r"masked.nelbo: x must lie in \[0, 4\), got 4",
    ),
    (lambda: masked.corrupt(Z, 0.5, -1), ValueError, "masked.corrupt: mask_id must not be negative, got -1"),
    (
        lambda: masked.first_hitting(Z, 0.5, -1),
        ValueError,
        "masked.first_hitting: mask_id must not be negative, got -1",
    ),
    (
        lambda: masked.first_hitting(Z[:, :0], 0.5, MASK),
        ValueError,
        r"masked.first_hitting: z must be \(B, L\), L >= 1, got \(2, 0\)",
    ),
    (
        lambda: masked.nelbo(LOGITS, Z + MASK, Z, 1.0, -1.0, MASK),
        ValueError,
        "masked.nelbo: alpha must be below 1 where z is masked, got 1",
    ),
    (
        lambda: masked.nelbo(LOGITS, Z, Z, 0.5, 0.1, MASK),
        ValueError,
        r"masked.nelbo: dalpha must lie in \(-inf, 0\], got 0.1",
    ),
    (
        lambda: masked.first_hitting(Z[0], 0.5, MASK),
        ValueError,
        r"masked.first_hitting: z must be \(B, L\), L >= 1, got \(3,\)",
    ),
    (
        lambda: masked.first_hitting(Z, torch.zeros(3), MASK),
        ValueError,
        r"masked.first_hitting: alpha_t must broadcast to \(2,\), got \(3,\)",
    ),
    (
        lambda: masked.first_hitting(Z, math.nan, MASK),
        ValueError,
        "masked.first_hitting: alpha_t must lie in",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
