"""Moves on the sphere: steps stay on it and go where they say, corrections keep their law."""

from __future__ import annotations

import pytest
import torch
from conftest import levels
from test_sphere_velocity import points, resultant
from torch import Tensor

import dlcore
from dlcore import rng, sphere
from dlcore.cpu import choose_capability

DIM = 8
X = points(6, DIM)
_RAW = points(6, DIM, seed=1)
V = _RAW - (_RAW * X).sum(-1, keepdim=True) * X
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def test_step_is_the_exponential_map():
    """The angle moved is |delta · v|, and two steps along one circle are one."""
    speed = V.norm(dim=-1)
    there = sphere.step(X, V, 0.7)
    torch.testing.assert_close(torch.arccos((there * X).sum(-1)), 0.7 * speed)
    turned = torch.cos(0.3 * speed).unsqueeze(-1) * V - (speed * torch.sin(0.3 * speed)).unsqueeze(-1) * X
    halfway = sphere.step(X, V, 0.3)
    torch.testing.assert_close(sphere.step(halfway, turned, 0.4), there)
    around = sphere.step(X, V / speed.unsqueeze(-1), 2 * torch.pi)
    torch.testing.assert_close(around, X, rtol=0, atol=1e-14)


def test_retraction_by_normalizing_has_the_angle_of_the_arctangent():
    there = sphere.step(X, V, 0.7, retraction="normalize")
    torch.testing.assert_close(torch.arccos((there * X).sum(-1)), torch.arctan(0.7 * V.norm(dim=-1)))


@pytest.mark.parametrize("retraction", ["exp", "normalize"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_stay_on_the_sphere(retraction, dtype):
    x, v = X.to(dtype), V.to(dtype)
    for delta in (0.0, 1e-20, 0.5, 100.0, torch.linspace(-1, 1, 6)):
        there = sphere.step(x, v, delta, retraction=retraction)
        assert there.dtype == dtype
        assert (there.double().norm(dim=-1) - 1).abs().max() < torch.finfo(dtype).eps
    still = sphere.step(x, torch.zeros_like(v), 1.0, retraction=retraction)
    torch.testing.assert_close(still, sphere.step(x, v, 0.0, retraction=retraction))


@pytest.mark.parametrize("retraction", ["exp", "normalize"])
def test_one_pass_is_what_the_maps_give(retraction, level):
    """Against float64, strided and with a step per row; norms are 1 where little is left, too."""
    x, v = X.float(), V.float()
    steps = torch.linspace(-1, 3, 6)
    got = sphere.step(x, v, steps, retraction=retraction)
    assert dlcore.last_backend("sphere.step") != "reference"
    torch.testing.assert_close(
        got, sphere.step(X, V, steps, retraction=retraction).float(), rtol=0, atol=1e-6
    )
    wide = torch.full((2, x.shape[1] + 3), torch.nan).repeat(3, 1)
    wide[:, 1 : x.shape[1] + 1] = x
    assert torch.equal(sphere.step(wide[:, 1 : x.shape[1] + 1], v, steps, retraction=retraction), got)
    for a, b in ((x, -x * (1 - 1e-6)), (1e-25 * x, 1e-25 * v), (1e25 * x, 1e-25 * v), (x, 1e-30 * v)):
        there = sphere.step(a, b, 1.0, retraction=retraction)
        assert (there.double().norm(dim=-1) - 1).abs().max() < 1e-6
    assert sphere.step(0 * x, 0 * v, 1.0, retraction=retraction).abs().max() == 0


@pytest.mark.parametrize("retraction", ["exp", "normalize"])
def test_step_is_differentiable(retraction):
    leaves = [t.clone().requires_grad_() for t in (X, V, torch.linspace(0, 1, 6).double())]
    assert torch.autograd.gradcheck(lambda *a: sphere.step(*a, retraction=retraction), leaves)
    # Also where there is no move, and so no direction.
    leaves[1] = torch.zeros_like(V).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: sphere.step(*a, retraction=retraction), leaves)


def relaxed(dim: int, kappa: float, c: float, steps: int, chains: int = 4096) -> Tensor:
    """Cosines with the mean after so many corrections under a vMF law, from a start at its mean cosine."""
    mean = torch.eye(dim)[0]
    a = float(resultant(kappa, dim))
    x = points(chains, dim, seed=5, dtype=torch.float32)
    x[:, 0] = 0
    x = (1 - a * a) ** 0.5 * x / x.norm(dim=-1, keepdim=True) + a * mean
    logits = torch.zeros(chains, 1)
    key = rng.key(11)
    for i in range(steps):
        score = sphere.posterior_score(x, logits, mean.unsqueeze(0), kappa)
        x = sphere.correct(x, score, c / (dim - 1), key=rng.fold_in(key, i))
    return x @ mean


@pytest.mark.parametrize(
    ("c", "steps", "bias"),
    [(0.02, 150, 0.004), (0.1, 40, 0.008), (1.0, 8, 0.03)],
    ids=["short", "middle", "long"],
)
def test_corrections_keep_a_law(c, steps, bias):
    """κ = d/2: the mean cosine and its deviation stay, up to the discretisation's bias that grows with c."""
    dim = 48
    kappa = dim / 2
    cosine, a = relaxed(dim, kappa, c, steps).double(), float(resultant(kappa, dim))
    deviation = (1 - a * a - (dim - 1) * a / kappa) ** 0.5
    assert abs(cosine.mean() - a) < bias + 4 * deviation / 4096**0.5
    assert abs(cosine.std() / deviation - 1) < 0.05 + 2 * bias


def test_a_step_of_any_length_keeps_the_uniform_law():
    """c = 8: the noise alone remains, uniform."""
    dim = 48
    cosine = relaxed(dim, 0.0, 8.0, 3).double()
    assert abs(cosine.mean()) < 4 / (4096 * dim) ** 0.5
    assert abs(cosine.var() * dim - 1) < 0.1


@pytest.mark.parametrize("c", [0.3, 1.0, 2.5])
def test_a_correction_forgets_as_brownian_motion_does(c):
    """Without a score E<x', x> = e^{-(d-1)·step_size}, Brownian motion's; for x + noise it is 1/√(1 + 2c)."""
    dim = 256
    x = points(4096, dim, seed=5, dtype=torch.float32)
    there = sphere.correct(x, torch.zeros_like(x), c / (dim - 1), key=rng.key(12))
    cosine = (there * x).sum(-1).double()
    decay = torch.tensor(-c).exp().double()
    # Normalizing moves the mean by at most 1/d of it.
    assert abs(cosine.mean() - decay) < decay / dim + 4 * cosine.std() / 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_corrections_of_any_length(name, dtype):
    """Zero with nothing to move it stays zero, gradients too; a huge score gives its direction."""
    zero = torch.zeros(2, DIM, dtype=dtype)
    with dlcore.use_backend(name if dtype != torch.float64 else "reference"):
        leaves = [zero.clone().requires_grad_() for _ in range(2)]
        still = sphere.correct(*leaves, 0.0, key=rng.key(3))
        assert torch.equal(still.detach(), zero)
        assert all((g == 0).all() for g in torch.autograd.grad(still.sum(), leaves))
        x, v = X.to(dtype), V.to(dtype)
        for length in (1e21, 1e36):
            far = sphere.correct(x, length * v, 0.05, key=rng.key(3))
            torch.testing.assert_close(far, sphere.normalize(v))
        short = sphere.correct(1e-30 * x, 0 * v, 0.0, key=rng.key(3))
        torch.testing.assert_close(short, x)


def test_corrections_under_a_sharp_posterior():
    """κ = 1e21: the score's square is no float."""
    x, table = points(6, DIM, dtype=torch.float32), points(3, DIM, seed=4, dtype=torch.float32)
    score = sphere.posterior_score(x, torch.zeros(6, 3), table, 1e21)
    assert (sphere.correct(x, score, 0.05, key=rng.key(3)).norm(dim=-1) - 1).abs().max() < 1e-6


def test_correction_noise_is_keyed():
    """Per-row keys draw what a shared key does; chunks agree with the whole; another key is other noise."""
    x, score = X.float().view(2, 3, DIM), V.float().view(2, 3, DIM)
    key = rng.key(3)
    whole = sphere.correct(x, score, 0.05, key=key)
    keys = rng.fold_in(key, torch.arange(6)).view(2, 3, 2)
    assert torch.equal(whole, sphere.correct(x, score, 0.05, key=keys))
    assert torch.equal(whole[1], sphere.correct(x[1], score[1], 0.05, key=keys[1]))
    assert not torch.equal(whole, sphere.correct(x, score, 0.05, key=rng.key(4)))
    generator = torch.Generator().manual_seed(1)
    a, b = (sphere.correct(x, score, 0.05, generator=generator) for _ in range(2))
    assert not torch.equal(a, b)
    assert torch.equal(sphere.correct(x, score, 0.0), sphere.correct(x, score, 0.0))
    torch.testing.assert_close(sphere.correct(x, score, 0.0), x)


def test_correction_is_differentiable():
    leaves = [t.clone().requires_grad_() for t in (X, V, torch.full((6,), 0.1).double())]
    assert torch.autograd.gradcheck(lambda *a: sphere.correct(*a, key=rng.key(3)), leaves)


@pytest.mark.parametrize("dim", [2, 15, 16, 17, 31, 33, 100])
def test_correction_kernel_is_the_reference(dim, level, poisoned):
    """The same noise, for every width; x and score of any leading strides."""
    x, score = points(5, 3, dim, dtype=torch.float32), points(5, 3, dim, seed=1, dtype=torch.float32)
    steps, key = torch.linspace(0, 0.5, 15).view(5, 3), rng.key(9)
    got = sphere.correct(x, 3 * score, steps, key=key)
    assert dlcore.last_backend("sphere.correct") != "reference"
    with dlcore.use_backend("reference"):
        exact = sphere.correct(x.double(), 3 * score.double(), steps.double(), key=key)
    assert (got - exact).norm(dim=-1).max() < 1e-6
    wide = torch.full((3, 5, dim + 2), torch.nan)
    wide[..., 1:-1] = x.transpose(0, 1)
    assert torch.equal(sphere.correct(wide[..., 1:-1].transpose(0, 1), 3 * score, steps, key=key), got)


def test_corrections_have_the_same_bits_on_any_threads_and_level():
    x, score, key = points(999, 40, dtype=torch.float32), torch.zeros(999, 40), rng.key(9)
    found, threads = sphere.correct(x, score, 0.01, key=key), torch.get_num_threads()
    fused = [name for name in levels() if name != "baseline"]
    try:
        for count, name in ((1, fused[0]), (3, fused[0]), (2, fused[-1])):
            torch.set_num_threads(count)
            choose_capability(name)
            assert torch.equal(sphere.correct(x, score, 0.01, key=key), found)
    finally:
        torch.set_num_threads(threads)
        choose_capability(fused[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_corrections_stay_on_the_sphere_and_in_their_row(dtype):
    x, score = X.to(dtype), V.to(dtype)
    score[2, 0] = torch.nan
    there = sphere.correct(x, score, torch.linspace(0, 1, 6), key=rng.key(3))
    assert there.dtype == dtype
    assert there[2].isnan().all()
    assert (there.double().norm(dim=-1) - 1)[[0, 1, 3, 4, 5]].abs().max() < torch.finfo(dtype).eps
    assert sphere.correct(x, score.float(), 0.1).dtype == torch.promote_types(dtype, torch.float32)
