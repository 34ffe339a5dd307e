"""Draws of the von Mises-Fisher and the spherical Cauchy law: their exact laws, noise, edges, bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import levels
from scipy import stats
from sphere_points import normal, unit
from torch import Tensor

import dlcore
from dlcore import rng, sphere
from dlcore.cpu import choose_capability
from dlcore.reference import vmf as reference
from dlcore.sphere import cauchy, vmf

LAWS = {"vmf": vmf, "cauchy": cauchy}
#: Values drawn per case, and draws at most.
BUDGET, MOST = 6_000_000, 100_000
CASES = [(2, 0.0), (2, 1.0), (2, 50.0), (2, 1e6), (3, 0.5), (3, 50.0), (8, 3.0), (64, 100.0), (768, 50.0)]
CASES += [(768, 1e3), (768, 1e6), (4096, 1e5)]


def draws(law: str, d: int, kappa: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """A mean (d) and points (n, d) around it."""
    mean = unit(d, seed=d)
    count = min(MOST, BUDGET // d)
    x = LAWS[law].sample(mean.expand(count, d), kappa, key=rng.key(seed, d))
    assert dlcore.last_backend("sphere.sample") != "reference"
    return mean, x


def angle_cdf(law: str, d: int, kappa: float) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function of the angle to the mean, by a fine sum over its density."""
    theta = np.concatenate([np.linspace(0, math.pi, 200_001), np.geomspace(1e-9, 1, 200_001)])
    theta = np.unique(theta)
    half = 2 * np.sin(theta / 2) ** 2
    q = d - 1
    if law == "vmf":
        log_f = -kappa * half
    else:
        b = q / (2 * kappa + math.sqrt(4 * kappa * kappa + q * q))
        log_f = -q * np.log(2 * b + (1 - b) * half)
    with np.errstate(divide="ignore"):
        log_f = log_f + ((d - 2) * np.log(np.sin(theta.clip(0, math.pi))) if d > 2 else 0)
    f = np.exp(log_f - log_f.max())
    mass = np.concatenate([[0.0], np.cumsum((f[1:] + f[:-1]) / 2 * np.diff(theta))])
    return lambda x: np.interp(x, theta, mass / mass[-1])


def fit(law: str, d: int, kappa: float, x: Tensor, mean: Tensor) -> float:
    """The p-value of the angles of points."""
    angles = sphere.angle(x.double(), mean.double()).numpy()
    return float(stats.kstest(angles, angle_cdf(law, d, kappa)).pvalue)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("d", "kappa"), CASES)
def test_law_of_the_cosine(law: str, d: int, kappa: float) -> None:
    mean, x = draws(law, d, kappa)
    torch.testing.assert_close(x.double().norm(dim=-1), torch.ones(len(x)).double(), rtol=0, atol=5e-7)
    assert fit(law, d, kappa, x, mean) > 1e-4


@pytest.mark.parametrize(("d", "kappa"), [(2, 1.0), (3, 3.0), (64, 100.0), (768, 1e3)])
def test_other_laws_do_not_fit(d: int, kappa: float) -> None:
    """The test above sees a missing rejection, another κ, and a uniform cosine instead of a uniform point."""
    mean, x = draws("cauchy", d, kappa)
    assert fit("vmf", d, kappa, x, mean) < 1e-4
    mean, x = draws("vmf", d, kappa)
    assert fit("vmf", d, 1.1 * kappa, x, mean) < 1e-4
    assert fit("cauchy", d, kappa, x, mean) < 1e-4
    if d == 2:
        u = 2 * rng.uniform(rng.key(5), MOST, dtype=torch.float64) - 1
        flat = torch.stack([u, torch.sqrt(1 - u * u)], -1)
        assert fit("vmf", 2, 0.0, flat, torch.eye(2, dtype=torch.float64)[0]) < 1e-4


@pytest.mark.parametrize(
    ("d", "kappa"), [(3, 0.5), (3, 50.0), (64, 100.0), (768, 50.0), (768, 1e3), (4096, 1e5)]
)
def test_mean_and_variance_of_the_cosine(d: int, kappa: float) -> None:
    mean, x = draws("vmf", d, kappa, seed=2)
    # 1 - cosine, which keeps its digits.
    rest = 2 * torch.sin(sphere.angle(x.double(), mean.double()) / 2) ** 2
    missing, variance = float(vmf.mean_resultant(kappa, d, complement=True)), float(vmf.variance(kappa, d))
    count = len(x)
    assert abs(float(rest.mean()) - missing) < 4 * math.sqrt(variance / count)
    centred = (rest - missing) ** 2
    assert abs(float(centred.mean()) - variance) < 4 * float(centred.std()) / math.sqrt(count)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("d", "kappa"), [(2, 2.0), (3, 20.0), (5, 0.0), (64, 100.0), (768, 500.0)])
def test_direction_is_uniform_and_independent_of_the_cosine(law: str, d: int, kappa: float) -> None:
    mean, x = draws(law, d, kappa, seed=3)
    v = sphere.project(mean.double(), x.double())
    v = sphere.normalize(v)
    across = sphere.normalize(sphere.project(mean.double(), normal(d, seed=8).double()))
    cosine, share = (x.double() * mean).sum(-1).numpy(), (v * across).sum(-1)
    if d == 2:
        assert stats.binomtest(int((share > 0).sum()), len(x)).pvalue > 1e-4
        spread = (share > 0).double().numpy()
    else:
        spread = share.numpy()
        assert stats.kstest(spread, stats.beta((d - 2) / 2, (d - 2) / 2, loc=-1, scale=2).cdf).pvalue > 1e-4
    for a, b in ((cosine, spread), (abs(cosine), abs(spread)), (cosine[1:], cosine[:-1])):
        if np.ptp(b) > 1e-9:
            assert abs(stats.spearmanr(a, b).statistic) < 4.5 / math.sqrt(len(x))


def test_sphere_in_a_plane_is_the_von_mises_law() -> None:
    """d = 2 on both sides: signed angles against scipy's von Mises."""
    mean, x = draws("vmf", 2, 3.0, seed=4)
    signed = torch.atan2(mean[0] * x[:, 1] - mean[1] * x[:, 0], x @ mean).double().numpy()
    assert stats.kstest(signed, stats.vonmises(3.0).cdf).pvalue > 1e-4


ACCEPTANCE = [(768, 76.8, 0.995), (768, 768.0, 0.85), (768, 7680.0, 0.724), (768, 1e8, 0.707), (3, 1e6, 0.68)]


@pytest.mark.parametrize(("d", "kappa", "rate"), ACCEPTANCE)
def test_acceptance(d: int, kappa: float, rate: float) -> None:
    keys = rng.split(rng.key(6), 2000)
    *_, taken = reference.candidates(keys, torch.full((2000,), kappa, dtype=torch.float64), d, 20)
    assert float(taken.double().mean()) == pytest.approx(rate, abs=0.01)


def test_no_dimension_or_concentration_is_refused_often() -> None:
    """At least 0.65 everywhere, so that 32 refusals have a probability below 1e-14."""
    keys = rng.split(rng.key(7), 400)
    for d in (2, 3, 4, 6, 10):
        for kappa in (0.1, 1.0, 5.0, 30.0, 1e3, 1e6):
            *_, taken = reference.candidates(keys, torch.full((400,), kappa, dtype=torch.float64), d, 50)
            assert float(taken.double().mean()) > 0.65 - 4 * math.sqrt(0.25 / taken.numel())
    assert 0.35**reference.CANDIDATES < 1e-14


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("d", [2, 3, 17, 64, 771])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_is_the_reference(law: str, d: int, dtype: torch.dtype, level: str) -> None:
    """The same noise: the same point, at every κ, for every dtype of the mean."""
    mean, key = unit(40, d, seed=1).to(dtype), rng.key(8)
    kappa = torch.logspace(-3, 6, 40)
    kappa[0] = 0
    got = LAWS[law].sample(mean, kappa, key=key)
    assert got.dtype == dtype
    with dlcore.use_backend("reference"):
        want = LAWS[law].sample(mean.double(), kappa.double(), key=key)
        near = LAWS[law].sample(mean, kappa, key=key)
    eps = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=0, atol=eps)
    torch.testing.assert_close(near.double(), want, rtol=0, atol=eps)


def test_normal_noise_to_the_tail() -> None:
    """The direction's normals against float64, where 400,000 of them reach 4.7."""
    zero, keys = torch.zeros(1, 400_000), rng.split(rng.key(9), 1)
    got = vmf.sample(zero, 0.0, key=keys)
    g = reference.rng.normal_noise(keys, reference.Domain.DIRECTION, torch.arange(400_000))
    assert g.abs().max() > 4.5
    torch.testing.assert_close(got.double() * g.norm(), g, rtol=3e-6, atol=5e-7)


def test_edges() -> None:
    mean = unit(1000, 16, seed=2)
    far = vmf.sample(mean, 1e30, key=rng.key(10))
    torch.testing.assert_close(far, mean, rtol=0, atol=2e-7)
    # κ → ∞: normal deviations across of variance 1/κ.
    near = vmf.sample(mean, 1e6, key=rng.key(11)) - mean
    assert float(near.square().sum(-1).mean()) == pytest.approx(15 / 1e6, rel=0.05)
    # Any length will do, zero is uniform.
    torch.testing.assert_close(
        vmf.sample(5 * mean, 7.0, key=rng.key(12)), vmf.sample(mean, 7.0, key=rng.key(12))
    )
    flat = vmf.sample(torch.zeros(20_000, 3), 7.0, key=rng.key(13))
    assert stats.kstest(flat[:, 2].numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4
    # Close to its own mean in the plane, where a projected normal vector almost vanishes.
    plane = vmf.sample(unit(1, 2).expand(50_000, 2), 0.0, key=rng.key(14))
    torch.testing.assert_close(plane.norm(dim=-1), torch.ones(50_000), rtol=0, atol=3e-7)
    assert vmf.sample(torch.ones(0, 4), 1.0).shape == (0, 4)
    broken = mean[:3].clone()
    broken[1, 0] = math.nan
    got = vmf.sample(broken, 7.0, key=rng.key(12))
    assert bool(got[1].isnan().all())
    assert got[[0, 2]].equal(vmf.sample(mean[:3], 7.0, key=rng.key(12))[[0, 2]])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e-22, 1e20, 1e38])
def test_means_of_any_length(law: str, backend: str, size: float) -> None:
    """The same points as for the unit mean that the rounded one points to."""
    mean = (unit(40, 70, seed=5).double() * size).float()
    with dlcore.use_backend(backend):
        got = LAWS[law].sample(mean, 50.0, key=rng.key(18))
    with dlcore.use_backend("reference"):
        want = LAWS[law].sample(sphere.normalize(mean.double()), 50.0, key=rng.key(18))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.usefixtures("poisoned")
def test_points_follow_the_key(law: str) -> None:
    sample = LAWS[law].sample
    mean, kappa = unit(4, 6, 70, seed=3), torch.linspace(0, 300, 6)
    key = rng.key(15)
    whole = sample(mean, kappa, key=key)
    assert whole.equal(sample(mean, kappa, key=key))
    assert not whole.equal(sample(mean, kappa, key=rng.key(16)))
    rows = rng.fold_in(key, torch.arange(24).view(4, 6))
    assert whole.equal(sample(mean, kappa, key=rows))
    halves = [sample(mean[i], kappa, key=rows[i]) for i in (slice(0, 1), slice(1, 4))]
    assert whole.equal(torch.cat(halves))
    assert whole.equal(sample(mean.mT.contiguous().mT, kappa, key=key))
    assert sample(mean[:1].expand(4, 6, 70), kappa, key=key)[0].equal(whole[0])
    torch.manual_seed(0)
    first = sample(mean, kappa)
    torch.manual_seed(0)
    assert first.equal(sample(mean, kappa))
    made = [sample(mean, kappa, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert made[0].equal(made[1])


@pytest.mark.parametrize("law", LAWS)
def test_bits_are_equal_over_threads_and_wide_levels(law: str) -> None:
    mean, before, found = unit(600, 131, seed=4), torch.get_num_threads(), {}
    for level in levels():
        choose_capability(level)
        for count in (1, 2):
            torch.set_num_threads(count)
            found[level, count] = LAWS[law].sample(mean, 60.0, key=rng.key(17))
    torch.set_num_threads(before)
    choose_capability(levels()[0])
    wide = [x for (level, _), x in found.items() if level != "baseline"]
    assert all(x.equal(wide[0]) for x in wide)
    assert found["baseline", 1].equal(found["baseline", 2])
    torch.testing.assert_close(found["baseline", 1], wide[0])
