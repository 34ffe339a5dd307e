"""Flows' times and levels: EDM's preconditioning and grid, LangFlow's Gumbel law."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats

from dlcore.process import flow


@pytest.mark.parametrize("sigma", [1e-8, 0.002, 0.5, 3.0, 80.0, 1e30])
def test_edm_identities(sigma: float) -> None:
    data = 0.5
    c = flow.edm_precondition(torch.tensor(sigma, dtype=torch.float64), sigma_data=data)
    assert float(c.weight * c.c_out**2) == pytest.approx(1)
    assert float(c.c_in**2) * (sigma**2 + data**2) == pytest.approx(1)
    assert float(c.c_skip) == pytest.approx(data**2 / (sigma**2 + data**2))
    assert float(c.c_out) == pytest.approx(sigma * data / math.hypot(sigma, data))
    assert float(c.c_noise) == pytest.approx(math.log(sigma) / 4)


def test_edm_edges_and_dtypes() -> None:
    at_zero = flow.edm_precondition(0.0)
    assert [float(c) for c in at_zero] == [1.0, 0.0, 2.0, -math.inf, math.inf]
    half = flow.edm_precondition(torch.tensor([300.0, 6e4], dtype=torch.float16))
    assert all(c.dtype == torch.float32 and bool(c.isfinite().all()) for c in half)
    assert flow.edm_precondition(torch.ones(2, 3)).c_in.shape == (2, 3)


def test_edm_grid() -> None:
    grid = flow.edm_grid(18)
    assert grid.shape == (19,)
    assert [float(grid[i]) for i in (0, 17, 18)] == [80.0, 0.002, 0.0]
    assert bool((grid.diff() < 0).all())
    steps = (grid[:-1] ** (1 / 7)).diff()
    torch.testing.assert_close(steps, steps[:1].expand(17))
    assert flow.edm_grid(1).tolist() == [80.0, 0.0]


def test_langflows_levels_have_a_gumbel_law() -> None:
    """The quantiles of even shares are the law's; another scale is noticed."""
    q = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
    gamma = flow.langflow_gamma(q)
    law = stats.gumbel_r(loc=4.723, scale=0.852)
    torch.testing.assert_close(gamma, torch.from_numpy(law.ppf(q.numpy())), rtol=1e-12, atol=1e-12)
    assert stats.kstest(gamma.numpy(), law.cdf).statistic < 1e-3
    assert stats.kstest(flow.langflow_gamma(q, scale=0.9).numpy(), law.cdf).statistic > 1e-2
    # The share of the entropy that is left at γ is q.
    torch.testing.assert_close(torch.exp(-torch.exp(-(gamma - 4.723) / 0.852)), q)
    leaf = q[1000:1003].clone().requires_grad_()
    assert torch.autograd.gradcheck(flow.langflow_gamma, (leaf,))


def test_langflow_grid() -> None:
    grid = flow.langflow_grid(64)
    assert grid.shape == (65,)
    assert bool((grid.diff() < 0).all())
    ends = flow.langflow_gamma(torch.tensor([1 - 1e-5, 1e-5], dtype=torch.float64))
    assert [float(grid[0]), float(grid[-1])] == ends.tolist()
    assert float(flow.langflow_grid(2, location=0.0, scale=2.0)[1]) == pytest.approx(
        -2 * math.log(math.log(2))
    )


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: flow.edm_precondition(-1.0), ValueError, r"sigma must lie in \[0, inf\), got -1.0"),
    (lambda: flow.edm_precondition(1.0, sigma_data=0.0), ValueError, r"sigma_data must lie in \(0, inf\)"),
    (lambda: flow.edm_grid(0), ValueError, "flow.edm_grid: steps must be at least 1, got 0"),
    (lambda: flow.edm_grid(2.5), TypeError, "steps must be an int"),
    (lambda: flow.edm_grid(4, sigma_min=80), ValueError, "sigma_min must lie below sigma_max 80"),
    (lambda: flow.edm_grid(4, rho=0), ValueError, r"rho must lie in \(0, inf\)"),
    (
        lambda: flow.edm_grid(4, rho=0.001),
        ValueError,
        "edm_grid: rho is too small for sigma_max 80.0, got 0.001",
    ),
    (lambda: flow.edm_grid(4, rho=1e-320), ValueError, "edm_grid: rho is too small for sigma_max 80.0"),
    (lambda: flow.edm_grid(4, sigma_max=0.5, rho=5e-4), ValueError, "rho is too small for sigma_max 0.5"),
    (lambda: flow.langflow_gamma(0.0), ValueError, r"langflow_gamma: quantile must lie in \(0, 1\), got 0.0"),
    (lambda: flow.langflow_gamma(0.5, scale=0.0), ValueError, r"scale must lie in \(0, inf\)"),
    (lambda: flow.langflow_grid(0), ValueError, "flow.langflow_grid: steps must be at least 1, got 0"),
    (lambda: flow.langflow_grid(2, cutoff=0.5), ValueError, r"cutoff must lie in \(0, 0.5\), got 0.5"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
