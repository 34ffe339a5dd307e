"""Vocabulary drifts on the sphere: what they mean, against the laws of their paths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from conftest import expected_backend
from torch import Tensor

import dlcore
from dlcore import LinearLogits, sphere

PATHS = ("slerp", "vmf", "cauchy")
DIM, VOCAB = 6, 4
PRIOR = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
#: A level of each path where all four tokens matter.
LEVEL = {"slerp": 0.8, "vmf": 5.0, "cauchy": 0.7}


def own(path: str, level: Any) -> dict[str, Any]:
    """A path's parameter at a level of its time: the noise fraction, κ, or the rapidity."""
    if path == "cauchy":
        return {"kappa": (DIM - 1) / 2 * torch.sinh(2 * torch.as_tensor(level, dtype=torch.float64))}
    return {"noise" if path == "slerp" else "kappa": level}


def points(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x / x.norm(dim=-1, keepdim=True)).to(dtype)


TABLE, X = points(VOCAB, DIM), points(20, DIM, seed=1)


def wide(*values: float) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def resultant(kappa: float, dim: int) -> mp.mpf:
    """The mean resultant length A_d(κ)."""
    nu = mp.mpf(dim) / 2
    return mp.besseli(nu, kappa) / mp.besseli(nu - 1, kappa) if kappa else mp.mpf(0)


def posterior(x: Tensor, path: str, level: float) -> Tensor:
    return PRIOR + sphere.posterior_logits(x, TABLE, path=path, **own(path, level))


def density(x: Tensor, path: str, level: float) -> Tensor:
    """The mixture's density at unit x, up to a constant that does not depend on the level."""
    total = posterior(x, path, level).exp().sum(-1)
    if path == "slerp":
        return total / level
    if path == "cauchy":
        return total / torch.cosh(torch.tensor(level, dtype=torch.float64)) ** (DIM - 1)
    nu = DIM / 2 - 1
    return total * float(mp.mpf(level) ** nu / mp.besseli(nu, level))


def exact_velocity(x: Tensor, path: str, level: float) -> Tensor:
    given = {} if path == "cauchy" else own(path, level)
    return sphere.velocity(x, posterior(x, path, level), TABLE, path=path, **given)


def slope(f: Callable[[float], Tensor], h: float = 1e-3) -> Tensor:
    """df/dt at 0 by central differences of sixth order."""
    return sum(w * (f(n * h) - f(-n * h)) for n, w in ((1, 45), (2, -9), (3, 1))) / (60 * h)  # type: ignore[return-value]


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_carries_the_mixture(path):
    """∂ρ/∂t + div(ρ v) = 0 where v comes from the exact posterior; t runs against the noise of slerp."""
    level, sign = LEVEL[path], -1 if path == "slerp" else 1

    def flux(x: Tensor) -> Tensor:
        on = unit(x)
        return density(on, path, level).unsqueeze(-1) * exact_velocity(on, path, level)

    change = sign * slope(lambda t: density(X, path, level + t))
    axes = torch.eye(DIM, dtype=torch.float64)
    # Extended as constant along rays, a tangent field's divergence is that on the sphere.
    divergence = sum(slope(lambda t, i=i: flux(X + t * axes[i])[:, i]) for i in range(DIM))
    residual = (change + divergence).abs() / density(X, path, level)
    assert residual.max() < 1e-8
    assert (change.abs() / density(X, path, level)).max() > 0.1


def test_score_is_the_gradient_of_the_log_density():
    kappa = LEVEL["vmf"]
    score = sphere.posterior_score(X, posterior(X, "vmf", kappa), TABLE, kappa)
    for i in range(DIM):
        axis = torch.eye(DIM, dtype=torch.float64)[i]
        exact = slope(lambda t, axis=axis: density(unit(X + t * axis), "vmf", kappa).log())
        torch.testing.assert_close(score[:, i], exact, rtol=0, atol=1e-10)
    assert (score * X).sum(-1).abs().max() < 1e-14


@pytest.mark.parametrize("fractions", [(0.0,), (0.7, 0.2, 0.0), (0.999, 0.5, 0.4999, 1e-3, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_with_a_certain_posterior_is_exact_for_any_steps(fractions, dtype):
    """Every step lands on the great circle's own point, the last one on the token."""
    dim = 64
    table, start = points(VOCAB, dim, dtype=dtype), points(VOCAB, dim, seed=3, dtype=dtype)
    certain = torch.full((VOCAB, VOCAB), -torch.inf, dtype=dtype).fill_diagonal_(0)
    omega = torch.arccos((table * start).sum(-1, keepdim=True).double())
    x, now = start, 1.0
    for then in fractions:
        v = sphere.velocity(x, certain, table, noise=now)
        x = sphere.step(x, v, now - then)
        on = (torch.sin((1 - then) * omega) * table + torch.sin(then * omega) * start) / torch.sin(omega)
        assert (x - on).abs().max() < (2e-6 if dtype == torch.float32 else 1e-14)
        now = then
    assert (x - table).abs().max() < (2e-6 if dtype == torch.float32 else 1e-14)


def test_posterior_logits():
    """The great circle's, by its formula; -inf beyond its reach; flat without information."""
    theta = torch.arccos(X @ TABLE.T)
    for s in (0.9, 0.5, 0.2):
        logits = sphere.posterior_logits(X, TABLE, noise=s)
        formula = (DIM - 2) * (torch.sin(theta / s).log() - torch.sin(theta).log())
        reached = theta < s * torch.pi
        torch.testing.assert_close(logits[reached], formula[reached], rtol=1e-12, atol=1e-12)
        assert (logits[~reached] == -torch.inf).all()
    at = torch.stack([TABLE[0], -TABLE[0]])
    assert sphere.posterior_logits(at, TABLE, noise=0.5)[:, 0].tolist() == [
        pytest.approx(4 * 0.6931472),
        -torch.inf,
    ]
    for path in PATHS:
        level = 1.0 if path == "slerp" else 0.0
        flat = sphere.posterior_logits(torch.cat([X, at]), TABLE, path=path, **own(path, level))
        assert flat.abs().max() < 1e-12
    m = torch.tanh(torch.tensor(0.7, dtype=torch.float64))
    cauchy = sphere.posterior_logits(X, TABLE, path="cauchy", **own("cauchy", 0.7))
    torch.testing.assert_close(cauchy, (1 - DIM) * torch.log(1 - m * (X @ TABLE.T)))
    leaf = at.clone().requires_grad_()
    for path in PATHS:
        logits = sphere.posterior_logits(leaf, TABLE, path=path, **own(path, torch.full((2,), 0.5)))
        (found,) = torch.autograd.grad(logits[:, 0].sum(), leaf)
        assert found.isfinite().all()


def weight_by_quadrature(mu: float, kappa: float, dim: int) -> mp.mpf:
    """ψ = -J/(f·(1-μ²)), f = e^{κμ}(1-μ²)^{(d-3)/2}, J the integral of (s - A) f, from the nearer end."""
    k, a = mp.mpf(kappa), resultant(kappa, dim)
    at = mp.acos(mp.mpf(mu))
    end = mp.pi if mu < a else mp.mpf(0)
    pieces = [at, *(at + (end - at) * mp.mpf(2) ** -j for j in range(16, -1, -1))]
    total = mp.quad(
        lambda t: (
            (mp.cos(t) - a) * mp.e ** (k * (mp.cos(t) - mp.cos(at))) * (mp.sin(t) / mp.sin(at)) ** (dim - 2)
        ),
        pieces,
    )
    return -total / mp.sin(at)


@pytest.mark.parametrize("dim", [2, 3, 5, 11, 12, 16, 64, 768])
def test_vmf_weight_against_quadrature_and_ends(dim):
    def weight(*cosines: float) -> Tensor:
        return sphere.radial_weight(wide(*cosines), dim, path="vmf", kappa=kappa)

    with mp.workdps(20):
        for kappa in (0.0, 0.5, 50.0, 1e5):
            cosines = (-0.999, 0.02, 0.9) if kappa else (0.02,)
            exact = wide(*(weight_by_quadrature(c, kappa, dim) for c in cosines))
            torch.testing.assert_close(weight(*cosines), exact, rtol=2e-9, atol=0)
            a = resultant(kappa, dim)
            ends = wide(float(1 - a), float(1 + a)) / (dim - 1)
            torch.testing.assert_close(weight(1.0, -1.0), ends, rtol=2e-9, atol=0)


@pytest.mark.parametrize("dim", [5, 64])
def test_vmf_weight_of_a_flat_law(dim):
    got = sphere.radial_weight(torch.linspace(-1, 1, 9).double(), dim, path="vmf", kappa=0.0)
    assert (got - 1 / (dim - 1)).abs().max() < 1e-15


def test_vmf_weight_in_three_dimensions():
    """Its closed form, from F = (e^{κμ} - e^{-κ}) / (2 sinh κ): ψ = -∂F/∂κ / (f·(1-μ²))."""
    mu = torch.linspace(-0.99, 0.99, 199, dtype=torch.float64)
    for kappa in (0.3, 3.0, 20.0):
        k = torch.tensor(kappa, dtype=torch.float64)
        up, down, s = (k * mu).exp(), (-k).exp(), torch.sinh(k)
        change = (mu * up + down) / (2 * s) - (up - down) / (2 * s) / torch.tanh(k)
        exact = -change / (k * up / (2 * s) * (1 - mu * mu))
        got = sphere.radial_weight(mu, 3, path="vmf", kappa=kappa)
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=0)


@pytest.mark.parametrize("kappa", [0.0, 1e-3, 1.0, 100.0, 1e4, 1e8])
@pytest.mark.parametrize("dim", [2, 3, 7, 16, 100, 4096])
def test_vmf_weight_is_positive_and_falls(dim, kappa):
    """Also where κ is beyond what quadrature reaches; float32 and κ per row agree with float64."""
    mu = torch.linspace(-1, 1, 101, dtype=torch.float64)
    g = sphere.radial_weight(mu, dim, path="vmf", kappa=kappa)
    assert (g > 0).all()
    assert (g.diff() <= 1e-12 * g[1:]).all()
    rows = sphere.radial_weight(mu.float().expand(3, -1), dim, path="vmf", kappa=torch.full((3,), kappa))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.double(), g.expand(3, -1), rtol=5e-6, atol=0)


def test_slerp_weight():
    angle = torch.linspace(1e-6, 3.13, 2001, dtype=torch.float64)
    got = sphere.radial_weight(torch.cos(angle), 10)
    torch.testing.assert_close(got, angle / torch.sin(angle), rtol=1e-10, atol=0)
    ends = sphere.radial_weight(torch.tensor([1.0, 0.0, -1.0]), 10)
    torch.testing.assert_close(ends, torch.tensor([1.0, torch.pi / 2, torch.pi * 2**9.5]), rtol=1e-3, atol=0)
    assert (sphere.radial_weight(torch.tensor([0.3, -0.3]), 10, path="cauchy") == 1).all()


@pytest.mark.parametrize("path", PATHS)
def test_radial_weight_is_differentiable(path):
    own = {"kappa": 3.0} if path == "vmf" else {}
    cosine = torch.tensor([-0.999, -0.7, -1e-3, 0.0, 0.5, 0.75, 0.999], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: sphere.radial_weight(c, 5, path=path, **own), cosine, eps=1e-7)


def test_top_k_is_the_velocity_of_the_largest_logits(backend):
    """Against -inf everywhere else; ties go to the lowest ids."""
    rows, vocab, dim = 5, 40, 8
    x, table = points(rows, dim, seed=5, dtype=torch.float32), points(vocab, dim, seed=6, dtype=torch.float32)
    hidden = torch.randint(-2, 3, (rows, 3), generator=torch.Generator().manual_seed(7)).float()
    weight = torch.randint(-2, 3, (vocab, 3), generator=torch.Generator().manual_seed(8)).float()
    bias = torch.arange(vocab) % 2 * 1.0
    linear = LinearLogits(hidden, weight, bias)
    logits = linear.materialize()
    for k in (1, 3, 10, vocab, vocab + 5):
        order = logits.sort(dim=-1, descending=True, stable=True).indices
        kept = torch.full_like(logits, -torch.inf).scatter(-1, order[:, :k], logits.gather(-1, order[:, :k]))
        assert k != 3 or (logits == logits.gather(-1, order[:, 2:3])).sum() > rows, "no ties"
        for kw in ({"path": "slerp", "noise": 0.5}, {"path": "vmf", "kappa": 3.0}, {"path": "cauchy"}):
            expected = sphere.velocity(x, kept, table, **kw)
            for given in (logits, linear, logits.double().float().T.contiguous().T):
                got = sphere.velocity(x, given, table, top_k=k, **kw)
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert dlcore.last_backend("sphere.largest") == expected_backend("sphere.largest", backend)


def test_top_1_is_the_log_map_of_the_argmax():
    x, table = points(7, 12, seed=5), points(30, 12, seed=6)
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(0)).double()
    e = table[logits.argmax(-1)]
    landed = sphere.step(x, sphere.velocity(x, logits, table, top_k=1), 1.0)
    torch.testing.assert_close(landed, e, rtol=0, atol=1e-14)


def test_more_of_a_path_than_of_another():
    """noise divides, kappa matters, and the paths differ by more than a factor."""
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0)).double()
    whole, half = sphere.velocity(X, logits, TABLE), sphere.velocity(X, logits, TABLE, noise=0.5)
    torch.testing.assert_close(half, 2 * whole)
    per_row = sphere.velocity(X, logits, TABLE, noise=torch.linspace(0.1, 1, 20))
    torch.testing.assert_close(per_row, whole / torch.linspace(0.1, 1, 20).double().unsqueeze(-1))
    kappas = torch.linspace(0, 9, 20)
    rows = sphere.velocity(X, logits, TABLE, path="vmf", kappa=kappas)
    for r in (0, 7, 19):
        alone = sphere.velocity(X[r], logits[r], TABLE, path="vmf", kappa=float(kappas[r]))
        torch.testing.assert_close(rows[r], alone)
    cauchy = sphere.velocity(X, logits, TABLE, path="cauchy")
    torch.testing.assert_close(rows[0] * (DIM - 1), cauchy[0])
    for a, b in ((whole, cauchy), (rows[1:], cauchy[1:])):
        ratio = a / b
        assert ((ratio.amax(-1) / ratio.amin(-1)) - 1).abs().min() > 1e-3
