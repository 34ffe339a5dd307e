"""Log-densities, scores and posteriors on the sphere, and what the family says of bad input."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate
from sphere_points import normal, turned, unit
from torch import Tensor

from dlcore import rng, sphere
from dlcore.sphere import cauchy, vmf

LAWS = {"vmf": vmf, "cauchy": cauchy}
KAPPA = torch.tensor([0.0, 0.5, 20.0, 3e3], dtype=torch.float64)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("d", [2, 3, 6])
@pytest.mark.parametrize("kappa", [0.0, 1.5, 40.0])
def test_density_integrates_to_one(law: str, d: int, kappa: float) -> None:
    mean, across = torch.eye(d, dtype=torch.float64)[:2]
    log_ring = math.log(2) + (d - 1) / 2 * math.log(math.pi) - math.lgamma((d - 1) / 2)

    def mass(theta: float) -> float:
        x = math.cos(theta) * mean + math.sin(theta) * across
        return math.exp(float(LAWS[law].log_prob(x, mean, kappa)) + log_ring) * math.sin(theta) ** (d - 2)

    assert integrate.quad(mass, 0, math.pi, limit=200)[0] == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize("law", LAWS)
def test_score_is_the_slope_along_the_sphere(law: str) -> None:
    x, mean = unit(4, 9, seed=1, dtype=torch.float64), unit(4, 9, seed=2, dtype=torch.float64)
    score = LAWS[law].score(x, mean, KAPPA)
    torch.testing.assert_close((score * x).sum(-1), torch.zeros(4, dtype=torch.float64))
    v = sphere.project(x, normal(4, 9, seed=3, dtype=torch.float64))
    step = 1e-6 / v.norm(dim=-1, keepdim=True)
    ends = [LAWS[law].log_prob(sphere.exp_map(x, s * step * v), mean, KAPPA) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step.squeeze(-1))
    torch.testing.assert_close((score * v).sum(-1), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("law", LAWS)
def test_gradients(law: str) -> None:
    x, mean = unit(4, 5, seed=1, dtype=torch.float64), unit(4, 5, seed=2, dtype=torch.float64)
    kappa = torch.tensor([0.3, 0.5, 20.0, 7.0], dtype=torch.float64)
    leaves = tuple(a.requires_grad_() for a in (x, mean, kappa))
    for function in (LAWS[law].log_prob, LAWS[law].score):
        assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kappa", [10.0, 1e4, 1e6])
def test_float32_density_keeps_its_digits(law: str, kappa: float) -> None:
    """Where κ + ln C is small against κ: a density from the plain normalizer would be off by 0.06 at 1e6."""
    x = unit(50, 64, seed=1, dtype=torch.float64)
    mean = turned(x, min(1.0, 8 / math.sqrt(kappa)))
    want = LAWS[law].log_prob(x.float().double(), mean.float().double(), kappa)
    got = LAWS[law].log_prob(x.float(), mean.float(), kappa)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-5)
    assert LAWS[law].log_prob(x.bfloat16(), mean.bfloat16(), kappa).dtype == torch.float32
    assert LAWS[law].score(x.bfloat16(), mean.bfloat16(), kappa).dtype == torch.bfloat16
    exact = LAWS[law].score(x.float().double(), mean.float().double(), kappa)
    error = (LAWS[law].score(x.float(), mean.float(), kappa).double() - exact).norm(dim=-1)
    assert bool((error < 2e-6 * exact.norm(dim=-1)).all())


def test_cauchy_posterior() -> None:
    """Bayes' rule over the table, whatever the common factors."""
    x, table = unit(4, 6, seed=1, dtype=torch.float64), unit(11, 6, seed=2, dtype=torch.float64)
    logits = cauchy.posterior_logits(x, table, KAPPA)
    joint = cauchy.log_prob(x.unsqueeze(1), table, KAPPA.unsqueeze(1))
    torch.testing.assert_close(torch.softmax(logits, -1), torch.softmax(joint, -1))
    assert cauchy.posterior_logits(x.bfloat16(), table.float(), 3.0).dtype == torch.float32
    # What lies at an embedding stays finite in float32.
    assert bool(cauchy.posterior_logits(table.float(), table.float(), 1e6).isfinite().all())


def test_cauchy_in_kato_and_mccullagh_s_notation() -> None:
    """((1 - ρ²)/(1 + ρ² - 2ρ cos))^(d-1), and in the plane the wrapped Cauchy law."""
    x, mean = unit(4, 5, seed=1, dtype=torch.float64), unit(4, 5, seed=2, dtype=torch.float64)
    rho = torch.tanh(cauchy.rapidity(KAPPA, 5) / 2)
    cosine = (x * mean).sum(-1)
    area = 8 * math.pi**2 / 3
    density = ((1 - rho**2) / (1 + rho**2 - 2 * rho * cosine)) ** 4 / area
    torch.testing.assert_close(cauchy.log_prob(x, mean, KAPPA), density.log(), rtol=1e-9, atol=1e-9)
    assert cauchy.rapidity(2.0, 5).dtype == torch.float64
    assert cauchy.rapidity(torch.tensor(2), 5).dtype == torch.float32


@pytest.mark.parametrize("d", [3, 8])
def test_cauchy_flow_per_rapidity_is_the_projected_mean(d: int) -> None:
    """∂p/∂a + div(p P_x w) = 0: the claim that the path rests on, by finite differences."""
    w, a, h = torch.eye(d, dtype=torch.float64)[0], 0.7, 1e-5
    theta = torch.linspace(0.2, 3.0, 15, dtype=torch.float64)

    def density(angle: Tensor, rapidity: float) -> Tensor:
        x = torch.zeros(len(angle), d, dtype=torch.float64)
        x[:, 0], x[:, 1] = torch.cos(angle), torch.sin(angle)
        return cauchy.log_prob(x, w, (d - 1) / 2 * math.sinh(2 * rapidity)).exp()

    def flux(angle: Tensor) -> Tensor:
        return -torch.sin(angle) * density(angle, a) * torch.sin(angle) ** (d - 2)

    change = (density(theta, a + h) - density(theta, a - h)) / (2 * h)
    divergence = (flux(theta + h) - flux(theta - h)) / (2 * h) / torch.sin(theta) ** (d - 2)
    torch.testing.assert_close(change, -divergence, rtol=1e-6, atol=1e-8)


X, KEY = torch.ones(2, 3, 4), rng.key(0)
BAD = [
    (lambda: sphere.slerp(X.long(), X, 0.5), TypeError, "sphere.slerp: x must be float32, bfloat16"),
    (lambda: sphere.slerp(X, 1.0, 0.5), TypeError, "sphere.slerp: y must be a Tensor, got float 1.0"),
    (
        lambda: sphere.slerp(X, X[..., :3], 0.5),
        ValueError,
        r"sphere.slerp: x and y must have the same last dimension, got \(2, 3, 4\) and \(2, 3, 3\)",
    ),
    (
        lambda: sphere.log_map(X, X[:, :2]),
        ValueError,
        r"sphere.log_map: leading dimensions must broadcast, got x \(2, 3, 4\), y \(2, 2, 4\)",
    ),
    (
        lambda: sphere.slerp(X, X, torch.ones(2)),
        ValueError,
        r"sphere.slerp: t must broadcast to \(2, 3\), got \(2,\)",
    ),
    (lambda: sphere.slerp(X, X, None), TypeError, "sphere.slerp: t must be a number or a Tensor, got None"),
    (lambda: sphere.slerp(X, X, "a"), TypeError, "sphere.slerp: t must be a number or a Tensor, got str 'a'"),
    (lambda: sphere.angle(X, X.to("meta")), ValueError, "sphere.angle: y must be on cpu, got meta"),
    (lambda: sphere.normalize(torch.tensor(1.0)), ValueError, r"sphere.normalize: x must be \(..., n\)"),
    (lambda: sphere.rotate(X, X, X[0, 0, :2]), ValueError, "sphere.rotate: x and target must have the same"),
    (lambda: sphere.exp_map(X, None), TypeError, "sphere.exp_map: v must be a Tensor, got NoneType"),
    (lambda: sphere.project(X, [1.0]), TypeError, "sphere.project: u must be a Tensor, got list"),
    (lambda: vmf.sample(X[..., :1], 1.0), ValueError, r"vmf.sample: mean must be \(..., d\) with d >= 2"),
    (lambda: vmf.sample(X, -1.0), ValueError, r"vmf.sample: kappa must lie in \[0, .* got -1"),
    (lambda: cauchy.sample(X, math.inf), ValueError, r"cauchy.sample: kappa must lie in \[0, .* got inf"),
    (lambda: vmf.sample(X, torch.ones(4)), ValueError, r"vmf.sample: kappa must broadcast to \(2, 3\)"),
    (lambda: vmf.sample(X, None), TypeError, "vmf.sample: kappa must be a number or a Tensor, got None"),
    (
        lambda: vmf.sample(X, 1.0, key=KEY[:1]),
        ValueError,
        r"vmf.sample: key must have shape \(2,\) or \(2, 3, 2\)",
    ),
    (
        lambda: cauchy.sample(X, 1.0, key=KEY, generator=torch.Generator()),
        ValueError,
        "cauchy.sample: give key or generator, not both",
    ),
    (lambda: vmf.sample(X.int(), 1.0), TypeError, "vmf.sample: mean must be float32"),
    (lambda: vmf.score(X, X, -2.0), ValueError, "vmf.score: kappa must lie in"),
    (
        lambda: cauchy.log_prob(X[..., :1], X[..., :1], 1.0),
        ValueError,
        r"cauchy.log_prob: x must be \(..., d\) with",
    ),
    (
        lambda: cauchy.posterior_logits(X, X, 1.0),
        ValueError,
        r"cauchy.posterior_logits: table must be \(V, 4\)",
    ),
    (lambda: cauchy.rapidity(1.0, 1), ValueError, "cauchy.rapidity: d must be at least 2, got 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 16])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_great_circle_noise_has_its_mean_cosine(width, share):
    """E cos(sω) by quadrature over the angle ω of a uniform point, density ∝ sin^{d-2} ω."""
    angle = torch.linspace(0, math.pi, 4001, dtype=torch.float64)
    density = angle.sin() ** (width - 2)
    wanted = torch.trapezoid((share * angle).cos() * density, angle) / torch.trapezoid(density, angle)
    generator = torch.Generator().manual_seed(5)
    noise = sphere.normalize(torch.randn(100_000, width, dtype=torch.float64, generator=generator))
    token = torch.zeros_like(noise)
    token[:, 0] = 1
    cosine = sphere.slerp(token, noise, share)[:, 0]
    assert abs(cosine.mean() - wanted) < 4 * cosine.std() / cosine.numel() ** 0.5
