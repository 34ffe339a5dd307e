"""Draws and corrections in Triton: the same candidates and noise as on the CPU, every law, length and key."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from sphere_points import normal, unit
from torch import Tensor
from triton_variants import missed

import dlcore
from dlcore import rng, sphere
from dlcore.sphere import cauchy, vmf
from dlcore.triton import sphere as tiling

LAWS = {"vmf": vmf, "cauchy": cauchy}
KEY = rng.key(8)


def drawn(law: str, mean: Tensor, kappa: Tensor | float, key: Tensor = KEY) -> Tensor:
    with dlcore.use_backend("triton"):
        return LAWS[law].sample(mean.to(DEVICE), kappa, key=key.to(DEVICE)).cpu()


def exact(law: str, mean: Tensor, kappa: Tensor | float, key: Tensor = KEY) -> Tensor:
    with dlcore.use_backend("reference"):
        return LAWS[law].sample(mean.double(), kappa, key=key)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 64 numbers take several tiles of 32."""
    monkeypatch.setattr(tiling, "_TILE", 64)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("d", [2, 3, 17, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_points_are_the_references(law: str, d: int, dtype: torch.dtype) -> None:
    """The same noise: the same point at every κ, several rows a program and one."""
    mean, kappa = unit(41, d, seed=1).to(dtype), torch.logspace(-3, 6, 41)
    kappa[0], kappa[1] = 0, 1e5
    got = drawn(law, mean, kappa)
    assert got.dtype == dtype
    want = exact(law, mean, kappa)
    eps = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=0, atol=eps)


@pytest.mark.parametrize(("d", "kappa"), [(2, 1.0), (2, 1e4), (3, 5.0), (10, 10.0)])
def test_many_draws_choose_the_same_candidates(d: int, kappa: float) -> None:
    """Thousands of candidates, many of them refused."""
    mean = unit(480, d, seed=1)
    got = drawn("vmf", mean, kappa)
    torch.testing.assert_close(got.double(), exact("vmf", mean, kappa), rtol=0, atol=2e-6)
    proposed = drawn("cauchy", mean, kappa)
    torch.testing.assert_close(proposed.double(), exact("cauchy", mean, kappa), rtol=0, atol=2e-6)
    refused = (got - proposed).abs().amax(-1) > 1e-3
    assert refused.double().mean() > 0.02


@pytest.mark.usefixtures("narrow", "poisoned")
@pytest.mark.parametrize("law", LAWS)
def test_draws_longer_than_a_tile(law: str) -> None:
    mean = unit(3, 75, seed=1)
    got = drawn(law, mean, 40.0)
    torch.testing.assert_close(got.double(), exact(law, mean, 40.0), rtol=0, atol=1e-6)
    assert got.equal(drawn(law, mean, 40.0, rng.fold_in(KEY, torch.arange(3))))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", [1e-42, 1e-22, 1e20, 1e38])
def test_means_of_any_length(law: str, size: float) -> None:
    mean = (unit(4, 70, seed=5).double() * size).float()
    want = exact(law, sphere.normalize(mean.double()), 50.0)
    torch.testing.assert_close(drawn(law, mean, 50.0).double(), want, rtol=0, atol=1e-6)


def test_edges_of_draws() -> None:
    mean = unit(20, 16, seed=2)
    torch.testing.assert_close(drawn("vmf", mean, 1e30), mean, rtol=0, atol=2e-7)
    zero = torch.zeros(20, 3)
    torch.testing.assert_close(drawn("vmf", zero, 7.0).double(), exact("vmf", zero, 7.0), rtol=0, atol=1e-6)
    assert drawn("vmf", torch.ones(0, 4), 1.0).shape == (0, 4)
    broken = mean.clone()
    broken[1, 0] = math.nan
    got, clean = drawn("vmf", broken, 7.0), drawn("vmf", mean, 7.0)
    assert bool(got[1].isnan().all())
    assert got[2:].equal(clean[2:])


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("d", [20, 300])
def test_a_key_per_row_is_the_shared_one_folded(law: str, d: int) -> None:
    mean, kappa = unit(6, d, seed=3), torch.linspace(0, 300, 6)
    rows = rng.fold_in(KEY, torch.arange(6))
    assert drawn(law, mean, kappa).equal(drawn(law, mean, kappa, rows))


def test_points_follow_the_key() -> None:
    mean, kappa = unit(4, 6, 20, seed=3), torch.linspace(0, 300, 6)
    whole = drawn("vmf", mean, kappa)
    rows = rng.fold_in(KEY, torch.arange(24).view(4, 6))
    assert whole.equal(drawn("vmf", mean, kappa, rows))
    assert whole[1:].equal(drawn("vmf", mean[1:], kappa, rows[1:]))
    assert not whole.equal(drawn("vmf", mean, kappa, rng.key(16)))
    assert whole.equal(drawn("vmf", mean.mT.contiguous().mT, kappa))
    assert drawn("vmf", mean[:1].expand(4, 6, 20), kappa)[0].equal(whole[0])


def corrected(x: Tensor, score: Tensor, steps: Tensor | float, key: Tensor = KEY) -> Tensor:
    steps = steps.to(DEVICE) if isinstance(steps, Tensor) else steps
    with dlcore.use_backend("triton"):
        return sphere.correct(x.to(DEVICE), score.to(DEVICE), steps, key=key.to(DEVICE)).cpu()


def correct_exactly(x: Tensor, score: Tensor, steps: Tensor | float) -> Tensor:
    steps = steps.double() if isinstance(steps, Tensor) else steps
    with dlcore.use_backend("reference"):
        return sphere.correct(x.double(), score.double(), steps, key=KEY)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [2, 15, 33, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrections_are_the_references(dim: int, dtype: torch.dtype) -> None:
    x, score = unit(5, 3, dim, dtype=dtype), (3 * normal(5, 3, dim, seed=1)).to(dtype)
    steps = torch.linspace(0, 0.5, 15).view(5, 3)
    got = corrected(x, score, steps)
    want = correct_exactly(x, score, steps)
    assert got.dtype == dtype
    assert (got - want).norm(dim=-1).max() < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    wide = torch.full((3, 5, dim + 2), torch.nan, dtype=dtype)
    wide[..., 1:-1] = x.transpose(0, 1)
    assert torch.equal(corrected(wide[..., 1:-1].transpose(0, 1), score, steps), got)
    keys = rng.fold_in(KEY, torch.arange(15)).view(5, 3, 2)
    assert torch.equal(corrected(x, score, steps, keys), got)


@pytest.mark.usefixtures("narrow", "poisoned")
def test_corrections_longer_than_a_tile() -> None:
    x, score = unit(3, 75), 3 * normal(3, 75, seed=1)
    assert (corrected(x, score, 0.01) - correct_exactly(x, score, 0.01)).norm(dim=-1).max() < 1e-6
    gradients_agree(x, score, torch.linspace(0.01, 0.1, 3))


def gradients_agree(x: Tensor, score: Tensor, steps: Tensor, key: Tensor = KEY) -> None:
    grad = normal(*x.shape, seed=9)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        return torch.autograd.grad(sphere.correct(*leaves, key=key.to(x.device)), leaves, tensors[3])

    with dlcore.use_backend("triton"):
        got = gradients(*(t.to(DEVICE) for t in (x, score, steps, grad.to(x.dtype))))
        assert dlcore.last_backend("sphere.correct_backward") == "triton"
    with dlcore.use_backend("reference"):
        want = gradients(*(t.double() for t in (x, score, steps, grad.to(x.dtype))))
    eps = 4 * torch.finfo(x.dtype).eps
    for a, b in zip(got, want, strict=True):
        assert (a.cpu().double() - b).norm() <= max(eps, 2e-6) * b.norm()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dim", [2, 15, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_corrections(dim: int, dtype: torch.dtype) -> None:
    steps = torch.linspace(0.001, 0.5, 5)
    x, score = unit(5, dim, dtype=dtype), (3 * normal(5, dim, seed=1)).to(dtype)
    for key in (KEY, rng.split(rng.key(2), 5)):
        gradients_agree(x, score, steps, key)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrections_of_any_length(dtype: torch.dtype) -> None:
    """Zero with nothing to move it stays zero, gradients too; a huge score gives its direction."""
    leaves = [torch.zeros(2, 8, dtype=dtype, device=DEVICE).requires_grad_() for _ in range(2)]
    with dlcore.use_backend("triton"):
        still = sphere.correct(*leaves, 0.0, key=KEY.to(DEVICE))
        assert bool((still == 0).all())
        assert all(bool((g == 0).all()) for g in torch.autograd.grad(still.sum(), leaves))
    x, v = unit(6, 8, dtype=dtype), normal(6, 8, seed=2).to(dtype)
    for length in (1e21, 1e36):
        torch.testing.assert_close(corrected(x, length * v, 0.05), sphere.normalize(v))
    torch.testing.assert_close(corrected(1e-30 * x, 0 * v, 0.0), x)
    v[2, 0] = torch.nan
    there = corrected(x, v, torch.linspace(0, 1, 6))
    assert there[2].isnan().all()
    assert bool(there[[0, 1, 3, 4, 5]].isfinite().all())


def test_every_variant_was_launched() -> None:
    assert missed("sphere_sample", "sphere_dynamics") == []
