"""D3PM's discrete-time losses against enumerated divergences, and their continuous limits."""

import itertools

import pytest
import torch
from oracles import (
    ROWS,
    V,
    bridge_given_clean,
    check_compiled,
    fits_given,
    law,
    mask_kernel,
    uniform_kernel,
)
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import d3pm, masked, uniform

MASK = V
STEPS = [(0.4, 0.7), (0.05, 0.06), (0.9, 1.0), (0.3, 0.3), (0.0, 0.2), (0.0, 0.0), (0.0, 1.0)]


def plug_in(p: Tensor, alpha_t: float, alpha_s: float, mask_id: int | None) -> Tensor:
    """The bridge with p (V + 1 classes with a mask) plugged in for x, as (z, y), by Bayes."""
    size = p.shape[-1]
    ratio = alpha_t / alpha_s if alpha_s > 0 else 1.0
    if mask_id is None:
        early, late = uniform_kernel(alpha_s, size), uniform_kernel(ratio, size)
    else:
        early, late = (
            torch.cat([mask_kernel(a), torch.eye(V + 1, dtype=torch.float64)[MASK:]])
            for a in (alpha_s, ratio)
        )
    joint = (p @ early).unsqueeze(-1) * late
    return (joint / joint.sum(0)).T


def divergence(own: Tensor, plug: Tensor) -> Tensor:
    return torch.where(own > 0, own * (own / plug.where(own > 0, 1)).log(), 0).sum(-1)


def pairs_of(size: int) -> tuple[Tensor, Tensor]:
    z, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return z.flatten(), x.flatten()


@pytest.mark.parametrize(("alpha_t", "alpha_s"), STEPS)
def test_uniform_loss_by_enumeration(alpha_t: float, alpha_s: float) -> None:
    p, (z, x) = law(V, seed=1), pairs_of(V)
    plug = plug_in(p, alpha_t, alpha_s, None)
    own = bridge_given_clean(alpha_t, alpha_s, V)
    got = d3pm.loss(p.log().expand(len(z), V), z, x, alpha_t, alpha_s)
    torch.testing.assert_close(got, divergence(own[x, z], plug[z]), rtol=1e-9, atol=1e-14)
    # The plug-in bridge is the law that uniform.step draws from.
    torch.testing.assert_close(
        plug, uniform.bridge_log_probs(p.log().expand(V, V), torch.arange(V), alpha_t, alpha_s).exp()
    )


@pytest.mark.parametrize(("alpha_t", "alpha_s"), STEPS)
def test_absorbing_loss_by_enumeration(alpha_t: float, alpha_s: float) -> None:
    """With mass on the mask, and without."""
    p, x = law(V + 1, seed=2), torch.arange(V)
    eye = torch.eye(V + 1, dtype=torch.float64)
    z = torch.full((V,), MASK)
    own = torch.stack([plug_in(eye[i], alpha_t, alpha_s, MASK)[MASK] for i in range(V)])
    logits = p.log().expand(V, V + 1)
    got = d3pm.loss(logits, z, x, alpha_t, alpha_s, mask_id=MASK)
    torch.testing.assert_close(
        got, divergence(own, plug_in(p, alpha_t, alpha_s, MASK)[MASK]), rtol=1e-10, atol=1e-14
    )
    clean = torch.cat([p[:V] / p[:V].sum(), torch.zeros(1)])
    got = d3pm.loss(logits, z, x, alpha_t, alpha_s, mask_id=MASK, subs=True)
    torch.testing.assert_close(
        got, divergence(own, plug_in(clean, alpha_t, alpha_s, MASK)[MASK]), rtol=1e-10, atol=1e-14
    )


def test_the_last_steps_loss_is_the_reconstruction() -> None:
    p, (z, x) = law((V * V, V), seed=3), pairs_of(V)
    denoiser = uniform.loo_to_denoiser(p.log(), z, 0.6)
    torch.testing.assert_close(
        d3pm.loss(p.log(), z, x, 0.6, 1.0), -denoiser.gather(-1, x.unsqueeze(-1)).squeeze(-1)
    )


@pytest.mark.parametrize("mask_id", [None, MASK])
def test_many_steps_become_the_nelbo(mask_id: int | None) -> None:
    """T·KL → the NELBO's integrand, with an error that falls as 1/T: values and gradients."""
    size = V if mask_id is None else V + 1
    logits = law((8, size), seed=4).log()
    z, x = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), torch.tensor([0, 1, 2, 1, 2, 0, 2, 0])
    if mask_id is not None:
        z[:6] = MASK
    alpha = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)

    def run(steps: int | None) -> tuple[Tensor, Tensor]:
        leaf = logits.clone().requires_grad_()
        if steps is None and mask_id is None:
            out = uniform.nelbo(leaf, z, x, alpha, -1.0)
        elif steps is None:
            out = masked.nelbo(leaf, z, x, alpha, -1.0, MASK)
        else:
            out = steps * d3pm.loss(
                leaf, z, x, alpha, alpha + 1 / steps, mask_id=mask_id, subs=mask_id is not None
            )
        return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]

    exact = run(None)
    coarse, fine = (
        max(float((a - b).abs().max()) for a, b in zip(run(steps), exact, strict=True))
        for steps in (10**3, 10**5)
    )
    assert fine < 1e-3
    # Of masked noise every step is exact already.
    assert coarse < 1e-10 if mask_id is not None else 50 < coarse / fine < 200


def test_the_whole_bound() -> None:
    """Σ over T steps: of one token with its exact posterior just its entropy, however few the steps."""
    p, steps = law(V, seed=5), 4
    grid = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    x = torch.arange(V)
    total = torch.zeros((), dtype=torch.float64)
    for t, s in itertools.pairwise(grid):
        z = torch.arange(V)
        joint = p.unsqueeze(-1) * uniform_kernel(float(t))
        zz, xx = torch.meshgrid(z, x, indexing="ij")
        each = d3pm.loss(p.log().expand(V, V, V), zz, xx, t, s)
        total += (joint.T * each).sum()
        hidden = torch.full((V,), MASK)
        full = torch.cat([p.log(), torch.zeros(1)]).expand(V, V + 1)
        total += ((1 - t) * p * d3pm.loss(full, hidden, x, t, s, mask_id=MASK, subs=True)).sum()
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(total, 2 * entropy)


def test_gradients() -> None:
    (z, x), alpha = pairs_of(V), torch.linspace(0.0, 0.8, V * V, dtype=torch.float64)
    logits = law((V * V, V + 1), seed=6).log().requires_grad_()
    for step in (0.1, 0.2):
        assert torch.autograd.gradcheck(
            lambda a, step=step: d3pm.loss(a, z, x, alpha, alpha + step), (logits,)
        )
        for subs in (False, True):
            assert torch.autograd.gradcheck(
                lambda a, step=step, subs=subs: d3pm.loss(
                    a, torch.full_like(z, MASK), x, alpha, alpha + step, mask_id=MASK, subs=subs
                ),
                (logits,),
            )


@pytest.mark.parametrize("subs", [False, True])
def test_a_step_of_no_length_at_an_impossible_token(subs: bool) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]], requires_grad=True)
    z, x = torch.tensor([3]), torch.tensor([0])
    value = d3pm.loss(logits, z, x, 0.5, 0.5, mask_id=3, subs=subs)
    assert value.item() == 0
    assert torch.autograd.grad(value.sum(), logits)[0].isfinite().all()


def test_float32_over_many_steps() -> None:
    """T·KL keeps its digits in float32, though KL itself falls as 1/T."""
    g = torch.Generator().manual_seed(7)
    logits, (z, x) = 3 * torch.randn(64, 1000, generator=g), torch.randint(1000, (2, 64), generator=g)
    z[:32] = x[:32]
    exact, got = (1000 * d3pm.loss(a, z, x, 0.5, 0.501) for a in (logits.double(), logits))
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.4, 0.7), (0.0, 0.2), (0.6, 1.0)])
@pytest.mark.parametrize(("mask_id", "subs"), [(None, False), (MASK, False), (MASK, True)])
def test_step_law(alpha_t: float, alpha_s: float, mask_id: int | None, subs: bool) -> None:
    p = law(V + 1, seed=8)
    z = torch.arange(V + 1).repeat(ROWS // (V + 1))
    logits = p.log().float().expand(len(z), V + 1)
    drawn = d3pm.step(logits, z, alpha_t, alpha_s, mask_id=mask_id, subs=subs, key=dlcore.rng.key(9))
    clean = torch.cat([p[:V] / p[:V].sum(), torch.zeros(1)]) if subs else p
    wanted = plug_in(clean, alpha_t, alpha_s, mask_id)
    if mask_id is not None:
        wanted[:V] = torch.eye(V + 1, dtype=torch.float64)[:V]
    assert fits_given(z, drawn, wanted)


def test_linear_logits_and_unread_rows() -> None:
    g = torch.Generator().manual_seed(10)
    head = LinearLogits(torch.randn(2, 3, 8, generator=g), torch.randn(V + 1, 8, generator=g))
    full, z, x = head.materialize(), torch.tensor([[0, 1, MASK]] * 2), torch.tensor([[0, 2, 1]] * 2)
    for mask_id in (None, MASK):
        a, b = (d3pm.loss(h, z, x, 0.4, 0.5, mask_id=mask_id) for h in (head, full))
        torch.testing.assert_close(a, b)
    full[:, :2] = torch.nan
    loss = d3pm.loss(full, z, x, 0.4, 0.5, mask_id=MASK)
    assert loss[:, :2].tolist() == [[0.0, 0.0]] * 2
    assert bool((loss[:, 2] > 0).all())
    # Clean positions of a prompt.
    alpha = torch.tensor([1.0, 1.0, 0.4]).double()
    assert d3pm.step(full, z, alpha, alpha.clamp(min=0.5), mask_id=MASK)[:, :2].equal(z[:, :2])


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(11)
    x = torch.randint(V, (2, 6), generator=g)
    z = torch.where(torch.rand(2, 6, generator=g) < 0.5, x, MASK)

    def everything(a: Tensor, t: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            d3pm.loss(a, z, x, t, s),
            d3pm.loss(a, z, x, t, s, mask_id=MASK),
            d3pm.step(a, z, t, s, mask_id=MASK, key=k),
        )

    logits, key = torch.randn(2, 6, V + 1, generator=g), dlcore.rng.key(12)
    levels = torch.linspace(0.1, 0.8, 4, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits, t, t + 0.1, key) for t in levels])


Z, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, V + 1)
BAD = [
    (lambda: d3pm.loss(LOGITS, Z, Z, 0.4, 0.3), ValueError, "d3pm.loss: alpha_s must be at least alpha_t"),
    (lambda: d3pm.loss(LOGITS, Z, Z, 1.0, 1.0), ValueError, "d3pm.loss: alpha_t must be below 1, got 1"),
    (
        lambda: d3pm.loss(LOGITS, Z + MASK, Z, 1.0, 1.0, mask_id=MASK),
        ValueError,
        "below 1 where z is masked, got 1",
    ),
    (
        lambda: d3pm.loss(LOGITS, Z, Z, 0.2, 0.3, subs=True),
        ValueError,
        "d3pm.loss: subs is of absorbing noise",
    ),
    (lambda: d3pm.loss(LOGITS, Z, Z + 4, 0.2, 0.3), ValueError, r"d3pm.loss: x must lie in \[0, 4\), got 4"),
    (lambda: d3pm.step(LOGITS, Z, 0.4, 0.3), ValueError, "d3pm.step: alpha_s must be at least alpha_t"),
    (lambda: d3pm.step(LOGITS, Z, 0.2, 0.3, mask_id=-1), ValueError, r"mask_id must lie in \[0, 4\), got -1"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
