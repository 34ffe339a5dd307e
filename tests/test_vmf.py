"""The von Mises-Fisher law's functions of κ against 50 digits, identities, and numerical integrals."""

from __future__ import annotations

import math
from functools import cache

import mpmath
import pytest
import torch
from scipy import integrate
from torch import Tensor

from dlcore.sphere import vmf

DIMENSIONS = (2, 3, 4, 5, 8, 16, 31, 63, 64, 65, 256, 768, 4096)
KAPPAS = (0.0, 1e-6, 1e-3, 0.1, 1.0, 7.0, 31.0, 300.0, 1e3, 1e4, 1e5)


@cache
def exact(d: int) -> dict[str, list[mpmath.mpf]]:
    """Every function at KAPPAS, from mpmath's Bessel functions with 50 digits."""
    found: dict[str, list[mpmath.mpf]] = {name: [] for name in ("mean", "missing", "variance", "log", "kl")}
    with mpmath.workdps(50):
        nu, half = mpmath.mpf(d) / 2 - 1, mpmath.mpf(d) / 2
        start = mpmath.loggamma(half) - mpmath.log(2) - half * mpmath.log(mpmath.pi)
        for k in map(mpmath.mpf, KAPPAS):
            mean, variance, growth = mpmath.mpf(0), 1 / mpmath.mpf(d), mpmath.mpf(0)
            if k > 0:
                bessel = mpmath.besseli(nu, k)
                mean = mpmath.besseli(nu + 1, k) / bessel
                variance = 1 - mean**2 - (d - 1) * mean / k
                growth = mpmath.loggamma(half) + nu * mpmath.log(2 / k) + mpmath.log(bessel)
            values = (mean, 1 - mean, variance, start - growth, k * mean - growth)
            for column, value in zip(found.values(), values, strict=True):
                column.append(value)
    return found


def kappas() -> Tensor:
    return torch.tensor(KAPPAS, dtype=torch.float64)


def worst(got: Tensor, want: list[mpmath.mpf], scale: list[float] | None = None) -> float:
    """The largest error, relative to the value or to `scale`."""
    assert bool(got.isfinite().all())
    with mpmath.workdps(50):
        errors = [abs(float(mpmath.mpf(g) - w)) for g, w in zip(got.tolist(), want, strict=True)]
    sizes = [abs(float(w)) for w in want] if scale is None else scale
    return max(e / s if s else math.inf if e else 0.0 for e, s in zip(errors, sizes, strict=True))


@pytest.mark.parametrize("d", DIMENSIONS)
def test_functions_of_kappa(d: int) -> None:
    """The errors that the docstrings state."""
    k, want = kappas(), exact(d)
    assert worst(vmf.mean_resultant(k, d), want["mean"]) < 2e-15
    assert worst(vmf.mean_resultant(k, d, complement=True), want["missing"]) < 5e-13
    assert worst(vmf.variance(k, d), want["variance"]) < 1e-12
    assert worst(vmf.kl_to_uniform(k, d), want["kl"]) < 1e-13
    start = abs(float(want["log"][0]))
    assert worst(vmf.log_normalizer(k, d), want["log"], [2e-15 * (start + x) for x in KAPPAS]) < 1
    with mpmath.workdps(50):
        peak = [w + mpmath.mpf(x) for w, x in zip(want["log"], KAPPAS, strict=True)]
        entropy = [-w - mpmath.mpf(x) * a for w, x, a in zip(want["log"], KAPPAS, want["mean"], strict=True)]
    scaled = vmf.log_normalizer(k, d, scaled=True)
    assert worst(scaled, peak, [5e-15 * (start + d + min(x, d)) for x in KAPPAS]) < 1
    limits = [5e-15 * start + 1e-13 * float(kl) for kl in want["kl"]]
    assert worst(vmf.entropy(k, d), entropy, limits) < 1


@pytest.mark.parametrize("d", DIMENSIONS)
def test_derivatives_do_not_cancel(d: int) -> None:
    k, want = kappas().requires_grad_(), exact(d)

    def slope(x: Tensor) -> Tensor:
        return torch.autograd.grad(x.sum(), k)[0]

    with mpmath.workdps(50):
        negated = [-w for w in want["mean"]]
        moved = [w * mpmath.mpf(x) for w, x in zip(want["variance"], KAPPAS, strict=True)]
    assert worst(slope(vmf.mean_resultant(k, d)), want["variance"]) < 1e-12
    assert worst(-slope(vmf.mean_resultant(k, d, complement=True)), want["variance"]) < 1e-12
    assert worst(slope(vmf.log_normalizer(k, d)), negated) < 2e-15
    assert worst(slope(vmf.log_normalizer(k, d, scaled=True)), want["missing"]) < 5e-13
    assert worst(slope(vmf.kl_to_uniform(k, d)), moved) < 1e-12
    assert worst(-slope(vmf.entropy(k, d)), moved) < 1e-12


FUNCTIONS = (vmf.mean_resultant, vmf.variance, vmf.log_normalizer, vmf.kl_to_uniform, vmf.entropy)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck_twice(function) -> None:
    k = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64, requires_grad=True)
    for d in (3, 70):
        assert torch.autograd.gradcheck(lambda x, d=d: function(x, d), (k,))
        assert torch.autograd.gradgradcheck(lambda x, d=d: function(x, d), (k,))


def test_identities() -> None:
    k = torch.logspace(-3, 5, 33, dtype=torch.float64)
    # d = 3: the Langevin function.
    small = k < 0.05
    langevin = torch.where(small, k / 3 - k**3 / 45 + 2 * k**5 / 945, 1 / torch.tanh(k) - 1 / k)
    torch.testing.assert_close(vmf.mean_resultant(k, 3), langevin, rtol=1e-12, atol=0)
    for d in (2, 9, 62, 63, 400):
        mean, nu = vmf.mean_resultant(k, d), d / 2 - 1
        # The recurrence, across the dimension where the expansion takes over.
        torch.testing.assert_close(mean, 1 / (d / k + vmf.mean_resultant(k, d + 2)), rtol=1e-14, atol=0)
        # Amos's bounds.
        assert bool((mean * (1 + 1e-15) >= k / (nu + 0.5 + torch.sqrt((nu + 1.5) ** 2 + k * k))).all())
        assert bool((mean * (1 - 1e-15) <= k / (nu + 0.5 + torch.sqrt((nu + 0.5) ** 2 + k * k))).all())


@pytest.mark.parametrize("d", range(3, 9))
@pytest.mark.parametrize("kappa", [0.0, 0.7, 30.0])
def test_density_integrates_to_one(d: int, kappa: float) -> None:
    log_area = math.log(2) + (d - 1) / 2 * math.log(math.pi) - math.lgamma((d - 1) / 2)
    log_c = float(vmf.log_normalizer(kappa, d))

    def mass(u: float) -> float:
        return math.exp(log_c + log_area + kappa * u) * (1 - u * u) ** ((d - 3) / 2)

    assert integrate.quad(mass, -1, 1)[0] == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_dtypes(dtype: torch.dtype) -> None:
    k = torch.tensor([[0.0], [2.5]], dtype=dtype)
    for function in FUNCTIONS:
        got = function(k, 7)
        assert got.shape == k.shape
        assert got.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(got, function(k.double(), 7).to(got.dtype))
        assert function(2.5, 7).dtype == torch.float64
        assert function(k[:0], 7).shape == (0, 1)


BAD = [
    (lambda: vmf.mean_resultant(-1.0, 3), ValueError, r"vmf.mean_resultant: kappa must lie in \[0, "),
    (lambda: vmf.variance(math.inf, 3), ValueError, r"vmf.variance: kappa must lie in \[0, .* got inf"),
    (lambda: vmf.entropy(math.nan, 3), ValueError, r"vmf.entropy: kappa must lie in \[0, .* got nan"),
    (lambda: vmf.log_normalizer(1.0, 1), ValueError, "vmf.log_normalizer: d must be at least 2, got 1"),
    (lambda: vmf.kl_to_uniform(1.0, 3.0), TypeError, "vmf.kl_to_uniform: d must be an int, got float 3.0"),
    (lambda: vmf.mean_resultant("1", 3), TypeError, "vmf.mean_resultant: kappa must be a number or a Tensor"),
    (lambda: vmf.mean_resultant(None, 3), TypeError, "vmf.mean_resultant: kappa must be .* got None"),
    (
        lambda: vmf.mean_resultant(torch.ones(2, dtype=torch.bool), 3),
        TypeError,
        "vmf.mean_resultant: kappa must be a real Tensor",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
