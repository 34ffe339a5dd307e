"""bits.EntropySchedule: fit, quantiles, grids, windows, sampling, files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy import stats

from dlcore import rng
from dlcore.bits import EntropySchedule


def recipe(seed: int = 0) -> EntropySchedule:
    """Of the public tables' shape: 128 log-spaced bins on [.002, 80], mass like a log-normal around 0.9."""
    edges = torch.logspace(math.log10(0.002), math.log10(80), 129, dtype=torch.float64)
    edges[0], edges[-1] = 0.002, 80.0
    middle = (edges[1:] * edges[:-1]).sqrt().log()
    mass = torch.exp(-((middle - 0.045) ** 2) / (2 * 1.06**2))
    mass = mass * (1 + 0.2 * torch.rand(128, generator=torch.Generator().manual_seed(seed)))
    return EntropySchedule(edges, mass)


def test_cdf_and_quantile_are_inverse():
    schedule = recipe()
    q = torch.linspace(0, 1, 501, dtype=torch.float64)
    sigma = schedule.quantile(q)
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(schedule.cdf(sigma), q, rtol=1e-9, atol=1e-12)
    assert schedule.quantile(0.0) == 0.002
    assert schedule.quantile(1.0) == 80.0
    assert (schedule.cdf(1e-9), schedule.cdf(1e9)) == (0.0, 1.0)
    assert (schedule.cdf(-1.0), schedule.cdf(0.0), schedule.cdf(-math.inf)) == (0.0, 0.0, 0.0)
    assert schedule.cdf(torch.tensor([-1.0, 99.0])).tolist() == [0.0, 1.0]
    assert math.isnan(schedule.cdf(math.nan))
    assert 0.8 < schedule.quantile(0.5) < 1.3


def test_within_a_bin_the_mass_is_log_uniform():
    schedule = EntropySchedule([1.0, 16.0, 256.0], [1, 3])
    assert schedule.quantile(0.125) == pytest.approx(4.0)
    assert schedule.quantile(0.25) == 16.0
    assert schedule.quantile(0.625) == pytest.approx(64.0)
    assert schedule.cdf(64.0) == pytest.approx(0.625)


@pytest.mark.parametrize("midpoints", [False, True])
@pytest.mark.parametrize("n", [2, 3, 64, 255, 1000])
def test_grid_is_monotone_with_exact_ends(n, midpoints):
    grid = recipe().grid(n, sigma_max=80.0, sigma_min=0.0794, midpoints=midpoints)
    assert grid.shape == (n,)
    assert (grid[0].item(), grid[-1].item()) == (80.0, 0.0794)
    assert (grid.diff() < 0).all()


def test_grid_points_are_equal_masses_apart():
    schedule = recipe()
    mass = schedule.cdf(schedule.grid(65, 80.0, 0.0794))
    torch.testing.assert_close(mass.diff(), (schedule.cdf(0.0794) - 1.0) / 64 * torch.ones(64).double())


def test_midpoints_are_half_a_bin_lower():
    """Where the mass moves slowly over bins, the public reading is the right one times e^(-half a bin)."""
    schedule = recipe()
    half = math.log(80 / 0.002) / 128 / 2
    right, shifted = (schedule.grid(33, 80.0, 0.0794, midpoints=m)[8:24].log() for m in (False, True))
    torch.testing.assert_close(right - shifted, torch.full((16,), half).double(), rtol=0.12, atol=0)


def test_a_grid_without_mass_is_log_linear():
    schedule = EntropySchedule([0.01, 0.1, 1.0, 10.0], [1, 0, 1])
    expected = torch.logspace(math.log10(0.9), math.log10(0.2), 7, dtype=torch.float64)
    torch.testing.assert_close(schedule.grid(7, 0.9, 0.2), expected)
    outside = schedule.grid(5, sigma_max=1000.0, sigma_min=20.0)
    torch.testing.assert_close(outside, torch.logspace(3, math.log10(20), 5, dtype=torch.float64))
    # An empty stretch inside is stepped over.
    grid = schedule.grid(9, 10.0, 0.01)
    assert (grid.diff() < 0).all()
    assert ((grid > 0.1001) & (grid < 0.999)).sum() == 0


def test_fit_recovers_a_known_rate():
    """Errors of fair bits: D of N(0, 1/4) data for simplicity, error σ²/(1 + 4σ²): rate 1/(1 + 4σ²)."""
    sigma = torch.logspace(-3, 2, 20_000, dtype=torch.float64)
    error = sigma**2 / (1 + 4 * sigma**2)
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(1)).double() + 0.5
    schedule = EntropySchedule.fit(sigma, error * noise)
    assert schedule.edges.numel() == 129
    assert (schedule.edges[0].item(), schedule.edges[-1].item()) == (0.002, 80.0)
    middle = (schedule.edges[1:] * schedule.edges[:-1]).sqrt()
    wanted = middle**3 / (middle**3 + 0.1**3) * (1 / (1 + 4 * middle**2)) ** 0.5
    torch.testing.assert_close(schedule.density, wanted / wanted.sum(), rtol=0.06, atol=0)
    plain = EntropySchedule.fit(sigma, error, power=1.0, gate=0.0)
    wanted = 1 / (1 + 4 * middle**2)
    torch.testing.assert_close(plain.density, wanted / wanted.sum(), rtol=0.01, atol=0)


def test_fit_is_the_mean_of_error_over_variance_per_bin():
    schedule = EntropySchedule.fit(
        torch.tensor([0.2, 0.5, 0.5, 2.0, 99.0]),
        torch.tensor([0.1, 0.1, 0.3, 1.0, 5.0]),
        bins=2,
        sigma_min=0.1,
        sigma_max=10.0,
        power=1.0,
        gate=0.0,
    )
    rates = torch.tensor([(0.1 / 0.04 + 0.1 / 0.25 + 0.3 / 0.25) / 3, 1.0 / 4], dtype=torch.float64)
    torch.testing.assert_close(schedule.density, rates / rates.sum(), rtol=1e-6, atol=0)


def test_bins_without_pairs_take_their_neighbours_error():
    sigma = torch.tensor([0.3, 30.0], dtype=torch.float64)
    fitted = EntropySchedule.fit(
        sigma, torch.tensor([0.2, 0.2]).double(), bins=6, sigma_min=0.1, sigma_max=100.0, power=1.0, gate=0.0
    )
    assert (fitted.density > 0).all()
    middle = (fitted.edges[1:] * fitted.edges[:-1]).sqrt()
    between = 0.2 / middle**2
    ratio = fitted.density / between
    assert float(ratio[2:4].std()) < 0.6 * float(ratio[2:4].mean())
    assert (fitted.density.diff() < 0).all()


def test_samples_follow_the_law():
    schedule = recipe()
    drawn = schedule.sample(50_000, key=rng.key(3))
    assert drawn.dtype == torch.float32
    uniform = schedule.cdf(drawn.double()).numpy()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    # Half a bin of shift would show.
    assert stats.kstest(schedule.cdf(drawn.double() * 1.042).numpy(), "uniform").pvalue < 1e-4
    assert schedule.sample((2, 3), generator=torch.Generator().manual_seed(1)).shape == (2, 3)
    keys = rng.split(rng.key(4), 5)
    assert torch.equal(schedule.sample((), key=keys)[2], schedule.sample((), key=keys[2]))


def test_window():
    schedule = recipe()
    low, high = schedule.window(0.1, 0.9)
    assert (low, high) == (schedule.quantile(0.1), schedule.quantile(0.9))
    assert schedule.window() == (0.002, 80.0)


def test_files_give_the_same_numbers_back(tmp_path):
    schedule = recipe()
    schedule.save(tmp_path / "table.json")
    again = EntropySchedule.load(tmp_path / "table.json")
    assert torch.equal(again.edges, schedule.edges)
    torch.testing.assert_close(again.density, schedule.density, rtol=1e-15, atol=0)
    torch.testing.assert_close(again.grid(64), schedule.grid(64), rtol=1e-12, atol=0)
    assert set(json.loads((tmp_path / "table.json").read_text())) == {"edges", "density"}
    assert repr(again).startswith("EntropySchedule(128 bins of σ in [0.002, 80], median ")


ONE = torch.ones(3)
BAD = [
    (lambda p: EntropySchedule([1.0], []), ValueError, "edges must be at least two ascending"),
    (lambda p: EntropySchedule([1.0, 1.0], [1.0]), ValueError, "edges must be at least two ascending"),
    (lambda p: EntropySchedule([0.0, 1.0], [1.0]), ValueError, "edges must be at least two ascending"),
    (lambda p: EntropySchedule([1.0, math.inf], [1.0]), ValueError, "edges must be at least two ascending"),
    (lambda p: EntropySchedule("ab", [1.0]), TypeError, "edges must be numbers, got str 'ab'"),
    (lambda p: EntropySchedule(torch.ones(2, 2), [1.0]), ValueError, r"edges must be a vector, got \(2, 2\)"),
    (lambda p: EntropySchedule([1.0, 2.0], [1.0, 2.0]), ValueError, r"density must have shape \(1,\), got"),
    (lambda p: EntropySchedule([1.0, 2.0], [0.0]), ValueError, "density must be non-negative"),
    (lambda p: EntropySchedule([1.0, 2.0, 3.0], [1.0, -1.0]), ValueError, "density must be non-negative"),
    (lambda p: EntropySchedule([1.0, 2.0], [math.nan]), ValueError, "density must be non-negative"),
    (lambda p: EntropySchedule.fit([1.0], ONE), TypeError, "fit: sigma must be a floating Tensor, got list"),
    (lambda p: EntropySchedule.fit(ONE, ONE[:2]), ValueError, r"error must have sigma's shape \(3,\), got"),
    (lambda p: EntropySchedule.fit(ONE, -ONE), ValueError, "error must be finite and non-negative"),
    (lambda p: EntropySchedule.fit(ONE, ONE * math.nan), ValueError, "error must be finite"),
    (lambda p: EntropySchedule.fit(ONE * 100, ONE), ValueError, r"no sigma lies in \[0.002, 80.0\]"),
    (lambda p: EntropySchedule.fit(ONE, ONE, bins=0), ValueError, "takes bins >= 1"),
    (lambda p: EntropySchedule.fit(ONE, ONE * 0), ValueError, "density must be non-negative, finite and not"),
    (lambda p: EntropySchedule.fit(ONE * math.nan, ONE), ValueError, "fit: sigma must be numbers, got nan"),
    (lambda p: EntropySchedule.fit(ONE.index_fill(0, torch.tensor(1), math.nan), ONE), ValueError, "got nan"),
    (lambda p: EntropySchedule.fit(ONE, ONE, power="a"), TypeError, "fit: power must be a number, got str"),
    (
        lambda p: EntropySchedule.fit(ONE, ONE, power=math.nan),
        ValueError,
        "fit: power must lie in .* got nan",
    ),
    (lambda p: EntropySchedule.fit(ONE, ONE, power=-1.0), ValueError, "fit: power must lie in .* got -1"),
    (lambda p: EntropySchedule.fit(ONE, ONE, gate=-0.1), ValueError, "fit: gate must lie in .* got -0.1"),
    (
        lambda p: EntropySchedule.fit(ONE, ONE, gate=1e200),
        ValueError,
        r"fit: gate must lie in .* got 1e\+200",
    ),
    (lambda p: EntropySchedule.fit(ONE, ONE, gate=None), TypeError, "fit: gate must be a number, got NoneT"),
    (lambda p: EntropySchedule.fit(ONE, ONE, sigma_min="a"), TypeError, "fit: sigma_min must be a number"),
    (lambda p: recipe().quantile(1.5), ValueError, r"quantile: q must lie in \[0, 1\], got 1.5"),
    (lambda p: recipe().window(0.5, 0.1), ValueError, "takes 0 <= low <= high <= 1, got 0.5, 0.1"),
    (lambda p: recipe().grid(1), ValueError, "grid: takes n >= 2"),
    (lambda p: recipe().grid(5, 0.1, 0.2), ValueError, "takes n >= 2 and 0 < sigma_min < sigma_max"),
    (lambda p: recipe().grid(5.0), TypeError, "grid: n must be an int"),
    (lambda p: recipe().grid(3, sigma_max="a"), TypeError, "grid: sigma_max must be a number, got str 'a'"),
    (lambda p: recipe().grid(3, sigma_min="a"), TypeError, "grid: sigma_min must be a number, got str 'a'"),
    (lambda p: recipe().sample(3, key=ONE), TypeError, "sample: key must be an int64 Tensor"),
    (lambda p: load_text(p, "[1, 2]"), ValueError, "must hold edges and density"),
    (lambda p: load_text(p, '{"edges": [1]}'), ValueError, "must hold edges and density"),
]


def load_text(folder, text: str) -> EntropySchedule:
    (folder / "broken.json").write_text(text)
    return EntropySchedule.load(folder / "broken.json")


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)
