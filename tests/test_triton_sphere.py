"""The sphere's maps in Triton: values and gradients against float64 everywhere, edges, strides."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from sphere_points import normal, turned, unit
from test_sphere import ANGLES, MAPS, ROWS, error, rounded, run
from torch import Tensor
from triton_variants import missed

import dlcore
from dlcore import sphere
from dlcore.triton import sphere as compiled


def here(name: str, arguments: tuple[Tensor, ...], dtype: torch.dtype, given: torch.dtype | None = None):
    """`run` in Triton, its results on the CPU."""
    with dlcore.use_backend("triton"):
        got = run(MAPS[name][0], tuple(a.to(DEVICE) for a in arguments), dtype, given)
    return tuple(g.cpu() for g in got)


def worst(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest error of a row relative to the row, or to the gradient that came from above."""
    return max(error(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("d", [1, 2, 16, 37, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(name: str, d: int, dtype: torch.dtype) -> None:
    """Several rows a program, and one."""
    function, arguments = MAPS[name]
    if d == 1 and name not in ("normalize", "exp_map"):
        pytest.skip("two points of a line are the same or antipodes")
    inputs = arguments(ROWS if d < 100 else 5, d)
    got = here(name, inputs, dtype)
    assert dlcore.last_backend(f"sphere.{name}") == "triton"
    assert dlcore.last_backend(f"sphere.{name}_backward") == "triton"
    want = run(function, rounded(inputs, dtype), torch.float64, given=dtype)
    assert worst(got, want) < (5e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert got[0].dtype == (torch.float32 if name == "angle" else dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", MAPS)
def test_rows_longer_than_a_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read tile by tile they give what they give as a whole."""
    function, arguments = MAPS[name]
    inputs = arguments(3, 75)
    whole = here(name, inputs, torch.float32)
    monkeypatch.setattr(compiled, "_TILE", 32)
    want = run(function, rounded(inputs, torch.float32), torch.float64, given=torch.float32)
    got = here(name, inputs, torch.float32)
    assert worst(got, want) < 2e-6
    assert not all(a.equal(b) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize("name", MAPS)
def test_error_is_that_of_torch_in_float32(name: str) -> None:
    """At most twice, over rows of random directions."""
    function, arguments = MAPS[name]
    inputs = arguments(64, 256)
    want = run(function, rounded(inputs, torch.float32), torch.float64, given=torch.float32)
    got = here(name, inputs, torch.float32)
    with dlcore.use_backend("reference"):
        chain = run(function, inputs, torch.float32)
    for a, b, c in zip(got, chain, want, strict=True):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 2e-7 * c.norm()


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("name", ["slerp", "log_map", "rotate", "angle"])
def test_every_angle(name: str, angle: float) -> None:
    """Values and gradients against the reference in float64 on the same float32 points."""
    x = unit(ROWS, 64, seed=4)
    y = turned(x, angle)
    inputs = {
        "slerp": (x, y, torch.linspace(-0.5, 1.5, ROWS)),
        "log_map": (x, y),
        "angle": (x, y),
        "rotate": (normal(ROWS, 64, seed=6), x, y),
    }
    got = here(name, inputs[name], torch.float32)
    want = run(MAPS[name][0], rounded(inputs[name], torch.float32), torch.float64, torch.float32)
    if name == "angle" and angle < 1e-5:
        # The direction of its gradient is the points' rounding.
        got, want = got[:1], want[:1]
    assert error(got[0], want[0]) < 1e-6
    assert worst(got[1:], want[1:]) < 6e-6 if len(got) > 1 else True


@pytest.mark.parametrize("t", [0.0, 1.0, 2.0, -1.0, 1e6])
@pytest.mark.parametrize("angle", [1e-3, 1.0, 2.0, math.pi - 1e-3])
def test_ends_of_slerp(t: float, angle: float) -> None:
    """A whole number of ways: x and y themselves; however far, the circle is not left."""
    x = unit(ROWS, 32, seed=4)
    y = turned(x, angle)
    with dlcore.use_backend("triton"):
        point = sphere.slerp(x.to(DEVICE), y.to(DEVICE), t).cpu()
    torch.testing.assert_close(point.norm(dim=-1), torch.ones(ROWS), rtol=0, atol=1e-6)
    if t in (0, 1):
        torch.testing.assert_close(point, y if t else x, rtol=0, atol=3e-7)
    elif t < 10:
        wanted = sphere.slerp(x.double(), y.double(), t)
        torch.testing.assert_close(point.double(), wanted, rtol=0, atol=3e-6 if angle < 3 else 3e-4)


@pytest.mark.parametrize("length", [0.0, 1e-6, 0.05, 0.099, 0.101, 1.0, 3.0, 7.0])
def test_exp_map_at_every_length(length: float) -> None:
    x = unit(ROWS, 64, seed=4)
    v = length * sphere.normalize(sphere.project(x, normal(ROWS, 64, seed=5)))
    got = here("exp_map", (x, v), torch.float32)
    want = run(sphere.exp_map, rounded((x, v), torch.float32), torch.float64, torch.float32)
    assert worst(got, want) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [4096, 32])
def test_antipodes(dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of the way that the reference takes, ties to the lowest axis."""
    monkeypatch.setattr(compiled, "_TILE", tile)
    x = unit(ROWS, 40, seed=7, dtype=dtype)
    x[0] = torch.eye(40, dtype=dtype)[0]
    # Half of the rows have a way of their own.
    y = torch.where(torch.arange(ROWS).unsqueeze(-1) % 2 == 0, -x, unit(ROWS, 40, seed=8, dtype=dtype))
    v = normal(ROWS, 40, seed=6, dtype=dtype)
    for name, inputs in {
        "slerp": (x, y, torch.linspace(0.1, 0.9, ROWS)),
        "log_map": (x, y),
        "angle": (x, y),
        "rotate": (v, x, y),
    }.items():
        got = here(name, inputs, dtype)
        # In float64 the bfloat16 points are antipodes, too: they are exactly opposite.
        want = run(MAPS[name][0], rounded(inputs, dtype), torch.float64, given=dtype)
        assert worst(got, want) < (4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_vectors_make_no_nan(dtype: torch.dtype) -> None:
    zero, x = torch.zeros(3, 7, dtype=dtype, device=DEVICE), unit(3, 7, dtype=dtype).to(DEVICE)
    zero.requires_grad_()
    with dlcore.use_backend("triton"):
        assert bool((sphere.normalize(zero) == 0).all())
        assert bool((sphere.angle(zero, zero) == 0).all())
        torch.testing.assert_close(sphere.angle(zero, x).detach().cpu(), torch.full((3,), math.pi / 2))
        torch.testing.assert_close(sphere.project(zero, x).detach(), x)
        results = [
            sphere.normalize(zero),
            sphere.project(zero, x),
            sphere.project(x, zero),
            sphere.angle(zero, x),
            *(
                f(*pair)
                for f in (sphere.log_map, sphere.exp_map)
                for pair in ((zero, zero), (zero, x), (x, zero))
            ),
            *(sphere.slerp(*pair, 0.3) for pair in ((zero, zero), (zero, x), (x, zero))),
            sphere.rotate(x, zero, zero),
            sphere.rotate(zero, x, -x),
            sphere.rotate(x, x, zero),
        ]
        for i, result in enumerate(results):
            assert bool(result.isfinite().all()), i
            (grad,) = torch.autograd.grad(result.sum(), zero, retain_graph=True)
            assert bool(grad.isfinite().all()), i


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e-22, 1e20, 1e36])
@pytest.mark.parametrize("tile", [4096, 32])
def test_vectors_of_any_length(
    size: float, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """normalize and project; of x, the gradient is a number where 1/|x| is one."""
    monkeypatch.setattr(compiled, "_TILE", tile)
    x = (unit(6, 40, dtype=torch.float64) * size).to(dtype)
    limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, inputs in {"normalize": (x,), "project": (x, normal(6, 40, seed=5).to(dtype))}.items():
        got = here(name, inputs, dtype)
        want = run(MAPS[name][0], tuple(a.double() for a in inputs), torch.float64, given=dtype)
        for i in (0, 2)[: len(inputs)]:
            assert error(got[i], want[i]) < limit
        if size > 1e-36:
            assert error(got[1].double() * size, want[1] * size) < limit + 1e-3 * (size > 1e30)


def test_nan_stays_in_its_row() -> None:
    for name, (_, arguments) in MAPS.items():
        inputs = [a.float() for a in arguments(4, 20)]
        inputs[0][1, 3] = math.nan
        got = [out.view(4, -1) for out in here(name, tuple(inputs), torch.float32)]
        assert bool(got[0][1].isnan().any()), name
        assert all(bool(out[[0, 2, 3]].isfinite().all()) for out in got), name


@pytest.mark.parametrize("name", MAPS)
def test_strides_without_copies(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function, arguments = MAPS[name]
    inputs = [a.float().to(DEVICE) for a in arguments(6, 33)]

    def spread(a: Tensor) -> Tensor:
        wide = a.new_full((a.shape[0], 2, *a.shape[1:]), math.nan)
        wide[:, 1] = a
        return wide[:, 1]

    with dlcore.use_backend("triton"), caplog.at_level("INFO", logger="dlcore"):
        want = function(*inputs)
        assert function(*map(spread, inputs)).equal(want)
        assert "copied" not in caplog.text
        assert function(*(a.mT.contiguous().mT if a.dim() > 1 else a for a in inputs)).equal(want)
        assert "copied" in caplog.text
        blocks = function(*(a.view(2, 3, *a.shape[1:]) for a in inputs))
        assert blocks.reshape(want.shape).equal(want)
        assert function(*(a[:0] for a in inputs)).shape == want[:0].shape


def test_broadcasting_and_promotion() -> None:
    x, y = unit(3, 1, 9, seed=1).to(DEVICE), unit(4, 9, seed=2).to(DEVICE)
    t = torch.rand(3, 1, generator=torch.Generator().manual_seed(3)).to(DEVICE).requires_grad_()
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    with dlcore.use_backend("triton"):
        out = sphere.slerp(a, b, t)
        whole = sphere.slerp(x.expand(3, 4, 9), y.expand(3, 4, 9), t.detach().expand(3, 4))
        assert out.detach().equal(whole)
        grads = torch.autograd.grad(out.square().sum() + out[..., 0].sum(), (a, b, t))
        assert [g.shape for g in grads] == [x.shape, y.shape, t.shape]
        assert sphere.slerp(x.bfloat16(), y, 0.5).dtype == torch.float32
        assert sphere.angle(x.half(), y.half()).dtype == torch.float32
        assert sphere.rotate(x, y[0], y[1]).shape == x.shape


def stepped(x: Tensor, v: Tensor, delta: float | Tensor, retraction: str) -> Tensor:
    delta = delta.to(DEVICE) if isinstance(delta, Tensor) else delta
    with dlcore.use_backend("triton"):
        got = sphere.step(x.to(DEVICE), v.to(DEVICE), delta, retraction=retraction).cpu()
    assert dlcore.last_backend("sphere.step") == "triton"
    return got


@pytest.mark.parametrize("retraction", ["exp", "normalize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [3, 37, 300])
def test_step(retraction: str, dtype: torch.dtype, dim: int) -> None:
    """Several rows a program and one; of strided rows, by one delta and by one per row."""
    x, v = unit(5, dim, seed=1).to(dtype), normal(5, dim, seed=2).to(dtype)
    near = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for delta in (0.3, torch.linspace(-0.2, 1, 5, dtype=torch.float64)):
        got = stepped(x, v, delta, retraction)
        want = sphere.step(x.double(), v.double(), delta, retraction=retraction)
        assert got.dtype == dtype
        assert error(got, want) < near
        wide = torch.full((2, 5, dim + 2), torch.nan, dtype=dtype)
        wide[0, :, 1:-1] = x
        assert torch.equal(stepped(wide[0, :, 1:-1], v, delta, retraction), got)


@pytest.mark.parametrize("retraction", ["exp", "normalize"])
def test_ends_of_step(retraction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of any length, no move, nothing at all, NaN in its row alone; a row longer than a tile."""
    x, v = unit(6, 20, seed=1), normal(6, 20, seed=2)
    for a, b in ((x, -x * (1 - 1e-6)), (1e-25 * x, 1e-25 * v), (1e25 * x, 1e-25 * v), (x, 1e-30 * v)):
        assert (stepped(a, b, 1.0, retraction).double().norm(dim=-1) - 1).abs().max() < 1e-6
    assert torch.equal(stepped(0 * x, 0 * v, 1.0, retraction), torch.zeros(6, 20))
    assert stepped(x[:0], v[:0], 1.0, retraction).shape == (0, 20)
    whole, broken = stepped(x, v, 0.5, retraction), x.clone()
    broken[1, 3] = math.nan
    got = stepped(broken, v, 0.5, retraction)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2, 3, 4, 5]], whole[[0, 2, 3, 4, 5]])
    monkeypatch.setattr(compiled, "_TILE", 16)
    torch.testing.assert_close(stepped(x, v, 0.5, retraction), whole, rtol=0, atol=3e-7)


def test_every_variant_was_launched():
    assert missed("sphere") == []
