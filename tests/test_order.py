"""Order-expressive masked diffusion: its special cases, its bound by enumeration, its gradients and steps."""

import itertools
import math

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
    mask_kernel,
    pairs,
    posteriors,
    quadrature,
)
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import masked, order

MASK = V


def with_mask(p: Tensor) -> Tensor:
    """Logits of p (..., V) with a column for the mask, large: it must not count."""
    return torch.cat([p.log(), torch.full_like(p[..., :1], 5.0)], -1)


# --- schedules ---------------------------------------------------------------------------------------------


def check_velocity(make, t: Tensor) -> None:
    """v = -α̇/(1-α), by autograd."""
    t = t.clone().requires_grad_()
    at = make(t)
    (slope,) = torch.autograd.grad(at.noise.sum(), t)
    some = at.noise > 0
    summed = (at.velocity * at.noise).where(some, 0)
    torch.testing.assert_close(summed.sum(-1) if summed.dim() > t.dim() else summed, slope)


def test_schedules() -> None:
    t = torch.linspace(0.03, 0.98, 9, dtype=torch.float64)  # no end of a window
    w = torch.linspace(0.2, 5, 9, dtype=torch.float64)
    check_velocity(lambda u: order.power(u, w, epsilon=0.1), t)
    torch.testing.assert_close(order.power(t, w, epsilon=0.1).noise, 0.9 * t**w)
    for overlap in (0.0, 0.4, 1.0):
        check_velocity(lambda u, overlap=overlap: order.block(u, 10, 3, overlap=overlap), t)
        at = order.block(torch.tensor([0.0, 1.0]), 10, 3, overlap=overlap)
        assert at.noise.tolist() == [[0.0] * 10, [1.0] * 10]
    torch.testing.assert_close(order.block(t, 10, 3, overlap=1.0).noise, t.unsqueeze(-1).expand(9, 10))
    same = order.level(1 - t**2, -2 * t)
    for a, b in zip(same, order.power(t, 2.0), strict=True):
        torch.testing.assert_close(a, b)
    ends = order.power(torch.tensor([0.0, 1.0]), 3.0)
    assert ends.noise.tolist() == [0.0, 1.0]
    assert ends.velocity.tolist() == [torch.inf, 3.0]
    assert order.level(1.0, -1.0).velocity == 0


# --- the special cases, exactly ----------------------------------------------------------------------------


def test_masked_order_is_the_masked_nelbo() -> None:
    """Bit for bit, with its gradient."""
    g = torch.Generator().manual_seed(1)
    z, x = torch.tensor([MASK, 1, MASK, 0, MASK, MASK]), torch.tensor([0, 1, 2, 0, 1, 0])
    alpha = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        logits = torch.randn(6, V + 1, generator=g).to(dtype)
        results = []
        for call in (
            lambda a: order.nelbo(a, z, x, order.level(alpha, -0.7), order.level(alpha, -0.7), MASK),
            lambda a: masked.nelbo(a, z, x, alpha, -0.7, MASK),
        ):
            leaf = logits.clone().requires_grad_()
            loss = call(leaf)
            results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
        for a, b in zip(*results, strict=True):
            assert a.equal(b)
    # Corruption and the step draw the same tokens, too.
    key, many = dlcore.rng.key(2), torch.arange(V).repeat(50)
    one, other = (
        order.corrupt(many, order.level(0.4, -1.0), MASK, key=key),
        masked.corrupt(many, 0.4, MASK, key=key),
    )
    assert one.equal(other)
    logits = torch.randn(150, V + 1, generator=g)
    ends = order.level(0.4, -1.0), order.level(0.7, -1.0)
    assert order.step(logits, one, *ends, MASK, key=key).equal(
        masked.step(logits, one, 0.4, 0.7, MASK, key=key)
    )


class Network:
    """Logits (..., L, V + 1) that depend on all of z: any function will do."""

    def __init__(self, length: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.table = torch.randn(length, V + 1, length, V + 1, generator=g, dtype=torch.float64)

    def __call__(self, z: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(z, V + 1).double()
        return torch.einsum("...lv,lvmw->...mw", one_hot, self.table)


def expected(network: Network, x: Tensor, at: order.Level) -> Tensor:
    """E_z of the NELBO's integrand, summed over positions, over all 2^L patterns of masks."""
    length = len(x)
    patterns = torch.tensor(list(itertools.product((False, True), repeat=length)))
    mass = torch.where(patterns, at.noise, 1 - at.noise).prod(-1)
    z = torch.where(patterns, MASK, x)[mass > 0]
    loss = order.nelbo(network(z), z, x.expand_as(z), at, at, MASK).sum(-1)
    return (mass[mass > 0] * loss).sum()


def test_autoregressive_order_is_next_token_cross_entropy() -> None:
    """At every time within a window the expected loss is that of one next token, L times."""
    length, x = 4, torch.tensor([2, 0, 1, 1])
    network = Network(length, seed=3)
    nexts = []
    for i in range(length):
        z = torch.where(torch.arange(length) < i, x, MASK)
        logits = network(z)[i, :V]
        nexts.append(torch.nn.functional.cross_entropy(logits, x[i]))
        for u in (0.01, 0.3, 0.99):
            t = (length - 1 - i + u) / length
            got = expected(network, x, order.block(t, length))
            torch.testing.assert_close(got, length * nexts[-1], rtol=1e-12, atol=0)
    nodes, weights = quadrature(4)
    mean = sum(
        w * expected(network, x, order.block((b + u) / length, length)) / length
        for b in range(length)
        for u, w in zip(nodes, weights, strict=True)
    )
    torch.testing.assert_close(mean, torch.stack(nexts).sum(), rtol=1e-12, atol=0)


def test_block_order_is_the_block_diffusion_nelbo() -> None:
    """At every time in its window: n times the masked NELBO of a block, given the clean ones before."""
    length, size, x = 5, 2, torch.tensor([2, 0, 1, 1, 0])
    network, count = Network(length, seed=4), 3
    block = torch.arange(length) // size
    for b in range(count):
        inside = block == b
        for tau in (0.2, 0.9):
            wanted = torch.zeros((), dtype=torch.float64)
            for pattern in itertools.product((False, True), repeat=int(inside.sum())):
                hidden = (block > b).clone()
                hidden[inside] = torch.tensor(pattern)
                z = torch.where(hidden, MASK, x)
                each = masked.nelbo(network(z), z, x, 1 - tau, -1.0, MASK)[inside].sum()
                wanted += count * each * math.prod(tau if hides else 1 - tau for hides in pattern)
            t = (count - 1 - b + tau) / count
            got = expected(network, x, order.block(t, length, size))
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        expected(network, x, order.block(0.3, length, length)), expected(network, x, order.level(0.7, -1.0))
    )


# --- the bound, by enumeration -----------------------------------------------------------------------------


def integral(kernels, loss, nodes: int = 24) -> float:
    """∫ E[loss] dt of two tokens, each with a kernel (V, V + 1) of its own at t, with exact posteriors."""
    t, weight = quadrature(nodes)
    total = torch.zeros((), dtype=torch.float64)
    z = pairs(V + 1).expand(V, V, V + 1, V + 1, 2)
    x = pairs(V).view(V, V, 1, 1, 2).expand_as(z)
    for at, share in zip(t.tolist(), weight, strict=True):
        first, second = kernels(at)
        joint = torch.einsum("ab,ai,bj->abij", JOINT, first, second)
        both = joint.sum(1).permute(1, 2, 0), joint.sum(0).permute(1, 2, 0)
        denoiser = (torch.stack(both, 2) / joint.sum((0, 1))[..., None, None]).nan_to_num(1 / V)
        each = loss(at, with_mask(denoiser).expand(*z.shape, V + 1), denoiser, z, x).sum(-1)
        total += share * torch.where(joint > 0, joint * each, 0).sum()
    return float(total)


def test_any_order_of_exact_posteriors_has_the_entropy() -> None:
    w = torch.tensor([0.6, 2.5], dtype=torch.float64)

    def loss(t: float, logits: Tensor, _: Tensor, z: Tensor, x: Tensor) -> Tensor:
        at = order.power(t, w)
        return order.nelbo(logits, z, x, at, at, MASK)

    got = integral(lambda t: [mask_kernel(1 - t ** float(e)) for e in w], loss)
    assert got == pytest.approx(ENTROPY, abs=1e-6)
    # A reverse schedule that is not the forward one costs: ∫ E[v_R - v_F + v_F log(v_F/v_R)], v_R = 2·v_F.
    worse = integral(
        lambda t: [mask_kernel(1 - t)] * 2,
        lambda t, a, _, z, x: order.nelbo(a, z, x, order.power(t, 1.0), order.power(t, 2.0), MASK),
    )
    assert worse == pytest.approx(ENTROPY + 2 * (1 - torch.tensor(2.0).log().item()), abs=1e-6)


WEIGHTS = torch.tensor([0.5, 1.0, 2.5, 7.0], dtype=torch.float64)


def token_kernel(t: float) -> Tensor:
    """q(z | x) of a schedule that depends on the token."""
    noise = t ** WEIGHTS[:V]
    return torch.cat([torch.diag(1 - noise), noise.unsqueeze(-1)], -1)


def test_schedules_that_depend_on_the_token_have_the_entropy() -> None:
    """Both ways to write the exact reverse process: rates per token, and one rate with a tilted denoiser."""
    got = integral(
        lambda t: [token_kernel(t)] * 2, lambda t, a, _, z, x: order.token_nelbo(a, z, x, t, WEIGHTS, MASK)
    )
    assert got == pytest.approx(ENTROPY, abs=1e-6)

    def tilted(t: float, _: Tensor, denoiser: Tensor, z: Tensor, x: Tensor) -> Tensor:
        rate = denoiser * WEIGHTS[:V]
        reverse = order.Level(torch.ones(()), rate.sum(-1) / t)
        logits = with_mask(rate / rate.sum(-1, keepdim=True)).expand(*z.shape, V + 1)
        return order.nelbo(logits, z, x, order.power(t, WEIGHTS[x]), reverse, MASK)

    assert integral(lambda t: [token_kernel(t)] * 2, tilted) == pytest.approx(ENTROPY, abs=1e-6)


def test_token_nelbo_formula_and_its_masked_case() -> None:
    p, t = law((4, V), seed=5), 0.4
    z, x = torch.tensor([MASK, 1, MASK, MASK]), torch.tensor([0, 1, 2, 1])
    got = order.token_nelbo(with_mask(p), z, x, t, WEIGHTS, MASK)
    at_x, mean = p.gather(-1, x.unsqueeze(-1)).squeeze(-1), p @ WEIGHTS[:V]
    wanted = -(WEIGHTS[x] * (1 + at_x.log()) - mean) / t
    torch.testing.assert_close(got, wanted.where(z == MASK, 0))
    plain = masked.nelbo(with_mask(p), z, x, 1 - t, -1.0, MASK)
    torch.testing.assert_close(order.token_nelbo(with_mask(p), z, x, t, torch.ones(4), MASK), plain)


# --- gradients ---------------------------------------------------------------------------------------------


def test_gradients() -> None:
    z, x = torch.tensor([MASK, 1, MASK, MASK]), torch.tensor([0, 1, 2, 1])
    logits = law((4, V + 1), seed=6).log().requires_grad_()
    w_f, w_r = ((0.5 + law(4, seed=s)).requires_grad_() for s in (7, 8))

    def loss(a: Tensor, f: Tensor, r: Tensor) -> Tensor:
        return order.nelbo(a, z, x, order.power(0.3, f), order.power(0.3, r), MASK)

    assert torch.autograd.gradcheck(loss, (logits, w_f, w_r))
    weights = WEIGHTS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: order.token_nelbo(a, z, x, 0.3, w, MASK), (logits, weights))
    # Velocities of 0: nothing to match, or only the reverse's own.
    still, moving = order.Level(torch.ones(()), torch.zeros(4)), order.power(0.3, w_r)
    for forward, reverse, wanted in ((still, still, 0.0), (still, moving, w_r.detach() / 0.3)):
        got = order.nelbo(logits, z, x, forward, reverse, MASK)
        torch.testing.assert_close(got.detach(), (torch.ones(4).double() * wanted).where(z == MASK, 0))
    (grad,) = torch.autograd.grad(got.sum(), w_r)
    torch.testing.assert_close(grad, torch.full((4,), 1 / 0.3, dtype=torch.float64).where(z == MASK, 0))


def test_no_velocity_at_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0]], requires_grad=True)
    velocity = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    z, x, noise = torch.tensor([3]), torch.tensor([0]), torch.tensor([0.5])
    reverse = order.Level(noise, torch.tensor([2.0]))
    value = order.nelbo(logits, z, x, order.Level(noise, velocity), reverse, 3)
    assert value.item() == 2
    assert all(g.isfinite().all() for g in torch.autograd.grad(value.sum(), (logits, velocity)))


def test_rloo_is_unbiased() -> None:
    """Its mean over both draws, enumerated, is the gradient of the enumerated expectation."""
    x, network = torch.tensor([2, 0]), Network(2, seed=9)
    w = torch.tensor([0.7, 1.9], dtype=torch.float64, requires_grad=True)
    patterns = torch.tensor(list(itertools.product((False, True), repeat=2)))
    z = torch.where(patterns, MASK, x)

    def parts() -> tuple[Tensor, Tensor]:
        forward = order.power(0.4, w)
        f = order.nelbo(network(z), z, x.expand_as(z), forward, order.power(0.4, 1.2), MASK).sum(-1)
        return f, order.log_prob(z, forward, MASK).sum(-1)

    f, log_q = parts()
    exact = (log_q.exp() * f).sum()
    (wanted,) = torch.autograd.grad(exact, w)
    f, log_q = parts()
    i, j = (k.flatten() for k in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"))
    mass = log_q.exp().detach()
    surrogate = (mass[i] * mass[j] * order.rloo(f[i], f[j], log_q[i], log_q[j])).sum()
    torch.testing.assert_close(surrogate, exact)
    (got,) = torch.autograd.grad(surrogate, w, retain_graph=True)
    torch.testing.assert_close(got, wanted)
    # The path through the loss alone is not the gradient.
    (path,) = torch.autograd.grad((mass * f).sum(), w)
    assert float((path - wanted).abs().max()) > 1e-2


def test_log_prob_is_that_of_corrupt() -> None:
    x = torch.arange(V).repeat(20_000)
    forward = order.power(0.5, WEIGHTS[x], epsilon=0.2)
    z = order.corrupt(x, forward, MASK, key=dlcore.rng.key(10))
    noise = 0.8 * 0.5 ** WEIGHTS[:V]
    assert fits_given(x, z, torch.cat([torch.diag(1 - noise), noise.unsqueeze(-1)], -1))
    states = torch.tensor([[v, MASK] for v in range(V)])
    at = order.power(0.5, WEIGHTS[:V].unsqueeze(-1), epsilon=0.2)
    torch.testing.assert_close(order.log_prob(states, at, MASK).exp(), torch.stack([1 - noise, noise], -1))


# --- steps -------------------------------------------------------------------------------------------------


def test_step_law() -> None:
    p, z = law(V, seed=11), torch.arange(V + 1).repeat(ROWS // (V + 1))
    at_t, at_s = order.power(0.8, 2.0, epsilon=0.1), order.power(0.5, 2.0, epsilon=0.1)
    reveal = 1 - (0.5 / 0.8) ** 2
    for heat in (1.0, 0.5):
        drawn = order.step(
            with_mask(p).float().expand(len(z), V + 1),
            z,
            at_t,
            at_s,
            MASK,
            temperature=heat,
            key=dlcore.rng.key(12),
        )
        tempered = p ** (1 / heat) / (p ** (1 / heat)).sum()
        wanted = torch.eye(V + 1, dtype=torch.float64)
        wanted[MASK] = torch.cat([reveal * tempered, torch.tensor([1 - reveal])])
        assert fits_given(z, drawn, wanted)


def test_token_step_law() -> None:
    p, z = law(V, seed=13), torch.arange(V + 1).repeat(ROWS // (V + 1))
    logits = with_mask(p).float().expand(len(z), V + 1)
    drawn = order.token_step(logits, z, 0.8, 0.5, WEIGHTS.float(), MASK, key=dlcore.rng.key(14))
    takes = p * (1 - (0.5 / 0.8) ** WEIGHTS[:V])
    wanted = torch.eye(V + 1, dtype=torch.float64)
    wanted[MASK] = torch.cat([takes, 1 - takes.sum(0, keepdim=True)])
    assert fits_given(z, drawn, wanted)
    # Exact over a step of any length: masked at t and at s, the posterior is q(x | masked at t) thinned.
    kernel_t, kernel_s = token_kernel(0.8), token_kernel(0.5)
    prior = law(V, seed=15)
    given_mask = prior * kernel_t[:, MASK] / (prior @ kernel_t[:, MASK])
    revealed = given_mask * (1 - (0.5 / 0.8) ** WEIGHTS[:V])
    wanted_s = prior * (kernel_s.diagonal() - kernel_t.diagonal()) / (prior @ kernel_t[:, MASK])
    torch.testing.assert_close(revealed, wanted_s)
    last = order.token_step(logits, z, 0.8, 0.0, WEIGHTS.float(), MASK, key=dlcore.rng.key(16))
    assert bool((last != MASK).all())


@pytest.mark.parametrize("positions", ["right_to_left", "left_to_right"])
def test_one_position_at_a_time_samples_the_joint(positions: str) -> None:
    """An autoregressive schedule in steps of one block, from all masks, with exact posteriors."""
    count = ROWS // 4
    z = torch.full((count, 2), MASK)
    denoiser = posteriors(mask_kernel(0.5)).denoiser.nan_to_num(1 / V)
    for i, (t, s) in enumerate(((1.0, 0.5), (0.5, 0.0))):
        levels = [order.block(u, length=2) for u in (t, s)]
        if positions == "right_to_left":
            levels = [order.Level(*(part.flip(-1) for part in at)) for at in levels]
        z = order.step(
            with_mask(denoiser[z[:, 0], z[:, 1]]).float(), z, *levels, MASK, key=dlcore.rng.key(17, i)
        )
        assert int((z == MASK).sum()) == count * (1 - i)
    assert fits(z[:, 0] * V + z[:, 1], JOINT.flatten())


def test_step_where_alpha_rounds_to_one() -> None:
    """1-α = t^w of 1e-24, 1e-40: a position that is masked all the same unmasks as it should."""
    z = torch.full((2_000,), MASK)
    logits = torch.zeros(2_000, V + 1)
    at_t, at_s = order.power(1e-3, 8.0), order.power(5e-4, 8.0)
    drawn = order.step(logits, z, at_t, at_s, MASK, key=dlcore.rng.key(18))
    assert 0 < int((drawn == MASK).sum()) < 30
    assert bool((order.step(logits, z, at_t, order.power(0.0, 8.0), MASK) != MASK).all())
    gone = order.Level(torch.zeros(()), torch.zeros(()))
    assert bool((order.step(logits, z, gone, gone, MASK) != MASK).all())


def test_unread_rows_heads_and_keys() -> None:
    g = torch.Generator().manual_seed(19)
    head = LinearLogits(torch.randn(2, 3, 8, generator=g), torch.randn(V + 1, 8, generator=g))
    full, key = head.materialize(), dlcore.rng.key(20)
    z, x = torch.tensor([[MASK, 1, MASK], [0, MASK, MASK]]), torch.tensor([[2, 1, 0], [0, 0, 1]])
    at_t, at_s = (order.power(t, torch.tensor([0.5, 1.0, 3.0])) for t in (0.9, 0.4))
    keys = dlcore.rng.fold_in(key, torch.arange(6).view(2, 3))
    for call in (
        lambda a, i, k: order.step(a[i], z[i], at_t, at_s, MASK, key=k),
        lambda a, i, k: order.token_step(a[i], z[i], 0.9, 0.4, WEIGHTS.float(), MASK, key=k),
        lambda a, i, k: order.corrupt(x[i], at_t, MASK, key=k),
    ):
        whole = call(full, slice(None), key)
        assert whole.equal(call(full, slice(None), keys))
        assert whole.equal(torch.cat([call(full, slice(i, i + 1), keys[i : i + 1]) for i in range(2)]))
    for loss in (
        lambda a: order.nelbo(a, z, x, at_t, at_s, MASK),
        lambda a: order.token_nelbo(a, z, x, 0.9, WEIGHTS.float(), MASK),
    ):
        torch.testing.assert_close(loss(head), loss(full))
    assert order.step(head, z, at_t, at_s, MASK, key=key).equal(
        order.step(full, z, at_t, at_s, MASK, key=key)
    )
    full[0, 1] = full[1, 0] = torch.nan
    assert bool(order.nelbo(full, z, x, at_t, at_s, MASK).isfinite().all())
    assert bool((order.step(full, z, at_t, at_s, MASK, key=key) >= 0).all())
    assert bool((order.token_step(full, z, 0.9, 0.0, WEIGHTS.float(), MASK, key=key) >= 0).all())


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(21)
    x = torch.randint(V, (2, 6), generator=g)
    z = torch.where(torch.rand(2, 6, generator=g) < 0.5, x, MASK)
    w = torch.rand(2, 6, generator=g) + 0.5

    def everything(a: Tensor, t: Tensor, s: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        at_t, at_s = order.power(t, w), order.power(s, w)
        return (
            order.corrupt(x, at_t, MASK, key=k),
            order.nelbo(a, z, x, at_t, order.block(t, 6, 2, overlap=1.0), MASK),
            order.step(a, z, at_t, at_s, MASK, key=k),
            order.token_nelbo(a, z, x, t, WEIGHTS.float(), MASK),
            order.token_step(a, z, t, s, WEIGHTS.float(), MASK, key=k),
        )

    logits, key = torch.randn(2, 6, V + 1, generator=g), dlcore.rng.key(22)
    times = torch.linspace(0.2, 0.8, 4, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits, t, t - 0.1, key) for t in times])


Z, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, V + 1)
AT, LATER = order.power(0.3, 1.0), order.power(0.6, 1.0)
BAD = [
    (lambda: order.power(0.5, 0.0), ValueError, r"order.power: exponent must lie in \(0, inf\), got 0"),
    (lambda: order.power(2.0, 1.0), ValueError, r"order.power: t must lie in \[0, 1\], got 2"),
    (lambda: order.power(torch.zeros(2), torch.ones(3)), ValueError, "t, exponent must broadcast together"),
    (lambda: order.block(0.5, 4, 0), ValueError, "order.block: block_size must be at least 1, got 0"),
    (
        lambda: order.block(0.5, 4, overlap=2.0),
        ValueError,
        r"order.block: overlap must lie in \[0, 1\], got 2",
    ),
    (lambda: order.level(0.5, 1.0), ValueError, r"order.level: dalpha must lie in \(-inf, 0\]"),
    (
        lambda: order.corrupt(Z, 0.5, MASK),
        TypeError,
        "order.corrupt: forward must be an order.Level, got float 0.5",
    ),
    (
        lambda: order.corrupt(Z, order.block(0.5, 3), -1),
        ValueError,
        "order.corrupt: mask_id must not be negative, got -1",
    ),
    (
        lambda: order.corrupt(Z, order.block(0.5, 7), MASK),
        ValueError,
        r"order.corrupt: forward.noise must broadcast to \(2, 3\), got \(7,\)",
    ),
    (
        lambda: order.nelbo(LOGITS, Z + MASK, Z, order.power(0.0, 1.0), AT, MASK),
        ValueError,
        r"order.nelbo: forward.velocity where z is masked must lie in \[0, inf\), got inf",
    ),
    (
        lambda: order.step(LOGITS, Z, AT, LATER, MASK),
        ValueError,
        "reverse_s.noise must be at most reverse_t.noise",
    ),
    (
        lambda: order.rloo(LOGITS, LOGITS, LOGITS, LOGITS[0]),
        ValueError,
        "other_log_prob must have loss's shape",
    ),
    (
        lambda: order.token_nelbo(LOGITS, Z, Z, 0.0, torch.ones(4), MASK),
        ValueError,
        r"t must lie in \(0, 1\], got 0",
    ),
    (
        lambda: order.token_nelbo(LOGITS, Z, Z, 0.5, torch.ones(3), MASK),
        ValueError,
        r"exponents must be \(4,\)",
    ),
    (
        lambda: order.token_step(LOGITS, Z, 0.3, 0.5, torch.ones(4), MASK),
        ValueError,
        "s must be at most t, got 0.5",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
