"""The sphere's maps: identities, kernels and gradients against float64, every angle, edges, strides, bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from conftest import levels
from sphere_points import normal, turned, unit
from torch import Tensor

import dlcore
from dlcore import sphere
from dlcore.cpu import choose_capability

Map = Callable[..., Tensor]

#: name: (function, its arguments for leading shape `lead` and dimension d, in float64).
MAPS: dict[str, tuple[Map, Callable[..., tuple[Tensor, ...]]]] = {
    "normalize": (sphere.normalize, lambda *s: (normal(*s, seed=1, dtype=torch.float64),)),
    "project": (sphere.project, lambda *s: (_unit(s, 1), normal(*s, seed=2, dtype=torch.float64))),
    "angle": (sphere.angle, lambda *s: (_unit(s, 1), _unit(s, 2))),
    "slerp": (sphere.slerp, lambda *s: (_unit(s, 1), _unit(s, 2), torch.linspace(-0.2, 1.2, s[0]).double())),
    "log_map": (sphere.log_map, lambda *s: (_unit(s, 1), _unit(s, 2))),
    "exp_map": (sphere.exp_map, lambda *s: (_unit(s, 1), _unit(s, 2) * 1.3)),
    "rotate": (
        sphere.rotate,
        lambda *s: (normal(*s, seed=3, dtype=torch.float64), _unit(s, 1), _unit(s, 2)),
    ),
}
ROWS = 24


def _unit(shape: tuple[int, ...], seed: int) -> Tensor:
    return unit(*shape, seed=seed, dtype=torch.float64)


def run(
    function: Map, arguments: tuple[Tensor, ...], dtype: torch.dtype, given: torch.dtype | None = None
) -> tuple[Tensor, ...]:
    """The result and every gradient, of vectors in `dtype`; numbers stay float32 or wider.

    What comes from above is rounded to `given`, or to `dtype`.
    """
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [a.detach().to(dtype if a.dim() > 1 else wide, copy=True).requires_grad_() for a in arguments]
    result = function(*leaves)
    grad = normal(*result.shape, seed=9, dtype=torch.float64).to(given or dtype).to(result)
    return (result.detach(), *torch.autograd.grad(result, leaves, grad))


def full(value: float) -> Tensor:
    return torch.full((ROWS,), value, dtype=torch.float64)


def rounded(arguments: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The float64 numbers that these arguments are in `dtype`."""
    return tuple(a.to(dtype if a.dim() > 1 else torch.float32).double() for a in arguments)


def error(got: Tensor, want: Tensor) -> float:
    """The largest error of a row, relative to the row."""
    assert got.shape == want.shape
    if got.dim() == 1:
        return float(((got.double() - want).abs() / (want.abs() + want.abs().mean() + 1e-6)).max())
    scale = want.norm(dim=-1) + 1e-2 * (want.norm(dim=-1).mean() + 1)
    return float(((got.double() - want).norm(dim=-1) / scale).max())


@pytest.mark.parametrize("name", MAPS)
def test_gradcheck(name: str) -> None:
    function, arguments = MAPS[name]
    leaves = tuple(a.requires_grad_() for a in arguments(4, 5))
    assert torch.autograd.gradcheck(function, leaves)
    assert dlcore.last_backend(f"sphere.{name}_backward") == "reference"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("d", [1, 2, 3, 16, 37, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_against_float64(name: str, d: int, dtype: torch.dtype, level: str) -> None:
    function, arguments = MAPS[name]
    if d == 1 and name not in ("normalize", "exp_map"):
        pytest.skip("two points of a line are the same or antipodes")
    inputs = arguments(ROWS, d)
    got = run(function, inputs, dtype)
    assert dlcore.last_backend(f"sphere.{name}") == "cpu"
    assert dlcore.last_backend(f"sphere.{name}_backward") == "cpu"
    want = run(function, rounded(inputs, dtype), torch.float64, given=dtype)
    limit = 5e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < limit
    assert got[0].dtype == (torch.float32 if name == "angle" else dtype)


@pytest.mark.parametrize("name", MAPS)
def test_kernel_error_is_that_of_torch_in_float32(name: str) -> None:
    """At most twice, over many rows of random directions."""
    function, arguments = MAPS[name]
    inputs = arguments(256, 512)
    want = run(function, rounded(inputs, torch.float32), torch.float64, given=torch.float32)
    got = run(function, inputs, torch.float32)
    with dlcore.use_backend("reference"):
        chain = run(function, inputs, torch.float32)
    for a, b, c in zip(got, chain, want, strict=True):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-7 * c.norm()


ANGLES = [0.0, 1e-30, 1e-6, 1e-4, 0.049, 0.051, 0.06, 0.065, 0.5, 1.57, 1.58, 3.0, math.pi - 1e-3]


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_angle(angle: float, dtype: torch.dtype) -> None:
    """Lengths, ends and middles across all branches, of points made at that angle in float64."""
    x = unit(ROWS, 64, seed=4, dtype=torch.float64)
    y = turned(x, angle)
    a, b = x.to(dtype), y.to(dtype)
    limit = 1e-6 if dtype == torch.float32 else 1e-12
    # Rounding moves a float32 point by up to 6e-8, which is all that its angle can tell.
    blur = 2e-7 if dtype == torch.float32 else 1e-15
    torch.testing.assert_close(sphere.angle(a, b).double(), full(angle), rtol=limit, atol=blur)
    for t in (0.0, 0.25, 0.5, 1.0):
        turn = turned(x, t * angle) if t * angle < 2 else None
        point = sphere.slerp(a, b, t)
        torch.testing.assert_close(point.double().norm(dim=-1), torch.ones(ROWS).double(), rtol=0, atol=limit)
        torch.testing.assert_close(
            sphere.angle(a, point).double(),
            full(t * angle),
            rtol=limit,
            atol=2 * blur + 4e-4 * (angle > 3.1),
        )
        if turn is not None and angle < 3:
            torch.testing.assert_close(point.double(), turn, rtol=0, atol=5 * limit)
    tangent = sphere.log_map(a, b)
    torch.testing.assert_close((tangent * a).sum(-1), torch.zeros(ROWS, dtype=dtype), rtol=0, atol=limit)
    torch.testing.assert_close(tangent.double().norm(dim=-1), full(angle), rtol=limit, atol=blur)
    away = 1e-4 if angle > 3.1 and dtype == torch.float32 else 5 * limit
    torch.testing.assert_close(sphere.exp_map(a, tangent), b, rtol=0, atol=away)
    carried = sphere.rotate(a, a, b)
    torch.testing.assert_close(carried, b, rtol=0, atol=away)
    v = normal(ROWS, 64, seed=5).to(dtype)
    torch.testing.assert_close(sphere.rotate(v, a, b).norm(dim=-1), v.norm(dim=-1), rtol=away, atol=0)
    torch.testing.assert_close(sphere.rotate(sphere.rotate(v, a, b), b, a), v, rtol=0, atol=4 * away)


@pytest.mark.parametrize("angle", ANGLES)
@pytest.mark.parametrize("name", ["slerp", "log_map", "rotate", "angle"])
def test_gradients_at_every_angle(name: str, angle: float) -> None:
    """The kernel's gradients against the reference's in float64 on the same float32 points."""
    x = unit(ROWS, 64, seed=4)
    y = turned(x, angle)
    share = torch.linspace(0, 1, ROWS)
    inputs = {
        "slerp": (x, y, share),
        "log_map": (x, y),
        "angle": (x, y),
        "rotate": (normal(ROWS, 64, seed=6), x, y),
    }
    if name == "angle" and angle in (0.0, 1e-30, 1e-6):
        pytest.skip("its direction is the points' rounding")
    got = run(MAPS[name][0], inputs[name], torch.float32)
    # Near t = 1 slerp's gradient in x cancels, and Triton's numbers of a row are float32.
    limit = 4e-5 if dlcore.last_backend(f"sphere.{name}") == "triton" else 4e-6
    want = run(MAPS[name][0], rounded(inputs[name], torch.float32), torch.float64, torch.float32)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < limit


@pytest.mark.parametrize("length", [0.0, 1e-6, 0.05, 0.099, 0.101, 1.0, 3.0, 7.0])
def test_exp_map_at_every_length(length: float) -> None:
    """Value and gradients on both sides of every series' end."""
    x = unit(ROWS, 64, seed=4)
    v = sphere.project(x, normal(ROWS, 64, seed=5))
    v = length * sphere.normalize(v)
    got = run(sphere.exp_map, (x, v), torch.float32)
    want = run(sphere.exp_map, rounded((x, v), torch.float32), torch.float64, torch.float32)
    for a, b in zip(got, want, strict=True):
        assert error(a, b) < 4e-6


def test_slerp_identities() -> None:
    x, y = unit(ROWS, 48, seed=1, dtype=torch.float64), unit(ROWS, 48, seed=2, dtype=torch.float64)
    t = torch.linspace(0, 1, ROWS, dtype=torch.float64)
    close = torch.testing.assert_close
    close(sphere.slerp(x, y, 0.0), x)
    close(sphere.slerp(x, y, 1.0), y)
    close(sphere.slerp(x, y, t), sphere.slerp(y, x, 1 - t))
    close(sphere.slerp(x, y, 0.5 * t), sphere.slerp(x, sphere.slerp(x, y, t), 0.5))
    close(sphere.slerp(x, y, t), sphere.exp_map(x, t.unsqueeze(-1) * sphere.log_map(x, y)))
    # The plain formula, where it is good.
    w = sphere.angle(x, y)
    plain = torch.sin((1 - t) * w).unsqueeze(-1) * x + torch.sin(t * w).unsqueeze(-1) * y
    close(sphere.slerp(x, y, t), plain / torch.sin(w).unsqueeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_euler_is_exact_for_any_steps(dtype: torch.dtype) -> None:
    """Towards one known token, Δ = (s_t - s_s)/s_t log_x(e): any list of noise levels lands on e."""
    x, e = unit(ROWS, 768, seed=1, dtype=dtype), unit(ROWS, 768, seed=2, dtype=dtype)
    start, noise = x, [1.0, 0.93, 0.9, 0.5, 0.2, 0.19, 0.01, 0.0]
    for now, then in pairwise(noise):
        x = sphere.exp_map(x, (now - then) / now * sphere.log_map(x, e))
        exact = sphere.slerp(e.double(), start.double(), then)
        torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


def test_rotation_is_one() -> None:
    """Against the matrix I + K + K²/(1 + c), K = t sᵀ - s tᵀ: determinant 1, what lies across stays."""
    s, t = unit(6, seed=1, dtype=torch.float64), unit(6, seed=2, dtype=torch.float64)
    k = torch.outer(t, s) - torch.outer(s, t)
    matrix = torch.eye(6, dtype=torch.float64) + k + k @ k / (1 + s @ t)
    got = sphere.rotate(torch.eye(6, dtype=torch.float64), s, t).mT
    torch.testing.assert_close(got, matrix)
    assert torch.linalg.det(got).item() == pytest.approx(1)


# --- edges -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("d", [2, 5, 64])
def test_antipodes(dtype: torch.dtype, d: int) -> None:
    """One half circle through the axis that x is farthest from; derivatives hold it fixed."""
    x = unit(ROWS, d, seed=7, dtype=dtype)
    x[0] = torch.eye(d, dtype=dtype)[0]
    share = torch.full((ROWS,), 0.5, requires_grad=True)
    a, b = x.clone().requires_grad_(), (-x).requires_grad_()
    loose = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps}
    middle = sphere.slerp(a, b, share)
    tangent = sphere.log_map(a, b)
    turn = sphere.rotate(a.detach(), a, b)
    ones = torch.ones(ROWS, dtype=torch.float64)
    torch.testing.assert_close(middle.detach().double().norm(dim=-1), ones, **loose)
    torch.testing.assert_close((middle * a).detach().double().sum(-1), 0 * ones, **loose)
    torch.testing.assert_close(
        tangent.detach().double().norm(dim=-1), math.pi * ones, rtol=loose["atol"], atol=0
    )
    torch.testing.assert_close((tangent / math.pi).detach(), middle.detach(), **loose)
    torch.testing.assert_close(turn.detach(), -x, **loose)
    torch.testing.assert_close(
        sphere.rotate(middle.detach(), x, -x), -middle.detach(), rtol=0, atol=2 * loose["atol"]
    )
    # Two rows' directions differ only as their x do.
    again = sphere.slerp(x.flip(0), -x.flip(0), 0.5).flip(0)
    assert again.equal(middle.detach())
    for out in (middle, tangent, turn, sphere.angle(a, b)):
        for grad in torch.autograd.grad(out.sum(), (a, b, share), allow_unused=True):
            assert grad is None or bool(grad.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_zero_vectors_make_no_nan(dtype: torch.dtype) -> None:
    zero, x = torch.zeros(3, 7, dtype=dtype), unit(3, 7, dtype=dtype)
    zero.requires_grad_()
    assert bool((sphere.normalize(zero) == 0).all())
    assert bool((sphere.angle(zero, zero) == 0).all())
    torch.testing.assert_close(
        sphere.angle(zero, x).detach(), torch.full((3,), math.pi / 2).to(sphere.angle(x, x))
    )
    torch.testing.assert_close(sphere.project(zero, x).detach(), x)
    results = [
        sphere.normalize(zero),
        sphere.project(zero, x),
        sphere.project(x, zero),
        sphere.angle(zero, x),
        sphere.angle(zero, zero),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e30, 1e38])
def test_normalize_of_any_length(size: float, dtype: torch.dtype) -> None:
    x = (unit(ROWS, 40, dtype=torch.float64) * size).to(dtype).requires_grad_()
    want = torch.nn.functional.normalize(x.detach().double(), dim=-1, eps=0)
    got = sphere.normalize(x)
    torch.testing.assert_close(got.detach(), want.to(dtype))
    (grad,) = torch.autograd.grad(got[:, 0].sum(), x)
    across = torch.eye(40, dtype=torch.float64)[0] - want[:, :1] * want
    torch.testing.assert_close(
        grad.double() * x.detach().double().norm(dim=-1, keepdim=True), across, rtol=0.01, atol=1e-2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-42, 1e-25, 1e-22, 1e20, 1e36])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_project_from_any_length(size: float, dtype: torch.dtype, backend: str) -> None:
    """Value and gradients are those of float64; of x, the gradient is a number where 1/|x| is one."""
    x = (unit(ROWS, 40, dtype=torch.float64) * size).to(dtype)
    u = normal(ROWS, 40, seed=5).to(dtype)
    with dlcore.use_backend(backend):
        got = run(sphere.project, (x, u), dtype)
    want = run(sphere.project, (x.double(), u.double()), torch.float64, given=dtype)
    # The entries of a bfloat16 below 1e-38 have few digits, but the same ones here and there.
    limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for i in (0, 2):
        assert error(got[i], want[i]) < limit
    if size > 1e-36:
        assert error(got[1].double() * size, want[1] * size) < limit + 1e-3 * (size > 1e30)


def test_a_line_has_no_way_between_antipodes() -> None:
    """d = 1: what needs a direction across x says so; what does not works."""
    x = torch.ones(3, 1)
    for call in (
        lambda: sphere.slerp(x, -x, 0.5),
        lambda: sphere.log_map(x, -x),
        lambda: sphere.rotate(x, x, -x),
    ):
        with pytest.raises(ValueError, match=r"sphere\.\w+: x must be \(..., d\) with d >= 2, got \(3, 1\)"):
            call()
    assert sphere.angle(x, -x).tolist() == pytest.approx([math.pi] * 3)
    assert sphere.exp_map(x, torch.zeros(3, 1)).equal(x)
    assert sphere.project(x, 5 * x).equal(0 * x)
    assert sphere.normalize(-3 * x).equal(-x)


def test_nan_stays_in_its_row() -> None:
    for name, (function, arguments) in MAPS.items():
        inputs = [a.float() for a in arguments(4, 20)]
        inputs[0][1, 3] = math.nan
        out = function(*inputs).view(4, -1)
        assert bool(out[1].isnan().any()), name
        assert bool(out[[0, 2, 3]].isfinite().all()), name


# --- shapes, strides, bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAPS)
def test_strides_without_copies(name: str, caplog: pytest.LogCaptureFixture) -> None:
    function, arguments = MAPS[name]
    inputs = [a.float() for a in arguments(6, 33)]
    want = function(*inputs)

    def spread(a: Tensor) -> Tensor:
        wide = a.new_full((a.shape[0], 2, *a.shape[1:]), math.nan)
        wide[:, 1] = a
        return wide[:, 1]

    with caplog.at_level("INFO", logger="dlcore"):
        assert function(*map(spread, inputs)).equal(want)
        assert "copied a" not in caplog.text
        columns = [a.mT.contiguous().mT if a.dim() > 1 else a for a in inputs]
        assert function(*columns).equal(want)
        assert "copied a" in caplog.text
    blocks = function(*(a.view(2, 3, *a.shape[1:]) for a in inputs))
    assert blocks.reshape(want.shape).equal(want)
    assert function(*(a[:0] for a in inputs)).shape == want[:0].shape


def test_broadcasting_and_promotion() -> None:
    x, y = unit(3, 1, 9, seed=1), unit(4, 9, seed=2)
    t = torch.rand(3, 1, generator=torch.Generator().manual_seed(3)).requires_grad_()
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    out = sphere.slerp(a, b, t)
    whole = sphere.slerp(x.expand(3, 4, 9), y.expand(3, 4, 9), t.detach().expand(3, 4))
    assert out.detach().equal(whole)
    grads = torch.autograd.grad(out.square().sum() + out[..., 0].sum(), (a, b, t))
    assert [g.shape for g in grads] == [x.shape, y.shape, t.shape]
    assert sphere.slerp(x.bfloat16(), y, 0.5).dtype == torch.float32
    assert sphere.slerp(x, y.double(), 0.5).dtype == torch.float64
    assert sphere.angle(x.half(), y.half()).dtype == torch.float32
    assert sphere.rotate(x, y[0], y[1]).shape == x.shape


def test_only_the_gradients_asked_for() -> None:
    """A needed gradient is the same whether the others are asked for or not."""
    for function, arguments in MAPS.values():
        inputs = [a.float() for a in arguments(5, 21)]
        whole = run(function, tuple(inputs), torch.float32)[1:]
        for i, want in enumerate(whole):
            leaves = [a.clone().requires_grad_(i == j) for j, a in enumerate(inputs)]
            result = function(*leaves)
            grad = normal(*result.shape, seed=9)
            assert torch.autograd.grad(result, leaves[i], grad)[0].equal(want)


def test_a_second_derivative_raises() -> None:
    x = unit(2, 5).requires_grad_()
    (grad,) = torch.autograd.grad(sphere.log_map(x, unit(2, 5, seed=1)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"sphere.log_map: has a first derivative only"):
        grad.sum().backward()


@pytest.mark.parametrize("name", MAPS)
def test_bits_are_equal_over_threads_and_wide_levels(name: str) -> None:
    function, arguments = MAPS[name]
    inputs = tuple(a.float() for a in arguments(300, 131))
    before, found = torch.get_num_threads(), {}
    for level in levels():
        choose_capability(level)
        for count in (1, 2):
            torch.set_num_threads(count)
            found[level, count] = run(function, inputs, torch.float32)
    torch.set_num_threads(before)
    choose_capability(levels()[0])
    wide = [results for (level, _), results in found.items() if level != "baseline"]
    for results in wide[1:]:
        assert all(a.equal(b) for a, b in zip(results, wide[0], strict=True))
    for a, b in zip(found["baseline", 1], found["baseline", 2], strict=True):
        assert a.equal(b)
