"""The sphere's CUDA kernels: values, gradients and draws against float64, edges, strides, long rows."""

from __future__ import annotations

import math

import cuda_on_host
import pytest
import torch
from conftest import DEVICE, run_python
from sphere_points import normal, turned, unit
from test_sphere import MAPS, error, rounded, run
from torch import Tensor
from triton_calls import call

import dlcore
from dlcore import rng, sphere
from dlcore.sphere import cauchy, vmf

pytestmark = [
    pytest.mark.usefixtures("cuda_kernels", "guarded"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (rows, d): 16, 16, 8 and 4 rows a warp, some left over; one; one for several warps; more than a tile.
#: Of the second and of the sixth, teams have several rows.
SHAPES = [(21, 2), (530, 3), (13, 37), (9, 100), (3, 768), (37, 530), (2, 1601), (2, 4500), (2, 9001)]


def here(name: str, arguments: tuple[Tensor, ...], dtype: torch.dtype, given: torch.dtype | None = None):
    """`run` on the CUDA kernels, its results on the CPU."""
    with dlcore.use_backend("cuda"):
        got = run(MAPS[name][0], tuple(a.to(DEVICE) for a in arguments), dtype, given)
    return tuple(g.cpu() for g in got)


def worst(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest error of a row relative to the row, or to the gradient that came from above."""
    return max(error(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("rows", "d"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_and_gradients(name: str, rows: int, d: int, dtype: torch.dtype) -> None:
    function, arguments = MAPS[name]
    inputs = arguments(rows, d)
    got = here(name, inputs, dtype)
    assert dlcore.last_backend(f"sphere.{name}") == "cuda"
    assert dlcore.last_backend(f"sphere.{name}_backward") == "cuda"
    want = run(function, rounded(inputs, dtype), torch.float64, given=dtype)
    assert worst(got, want) < (2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert got[0].dtype == (torch.float32 if name == "angle" else dtype)


@pytest.mark.parametrize("name", MAPS)
def test_error_is_that_of_torch_in_float32(name: str) -> None:
    """At most twice, over rows of random directions."""
    function, arguments = MAPS[name]
    inputs = arguments(40, 256)
    want = run(function, rounded(inputs, torch.float32), torch.float64, given=torch.float32)
    got = here(name, inputs, torch.float32)
    with dlcore.use_backend("reference"):
        chain = run(function, inputs, torch.float32)
    for a, b, c in zip(got, chain, want, strict=True):
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + 1e-7 * c.norm()


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.049, 0.051, 1.57, 3.0, math.pi - 1e-3])
def test_every_angle(angle: float) -> None:
    x = unit(10, 64, seed=4)
    y = turned(x, angle)
    for name, inputs in {
        "slerp": (x, y, torch.linspace(-0.5, 1.5, 10)),
        "log_map": (x, y),
        "angle": (x, y),
        "rotate": (normal(10, 64, seed=6), x, y),
    }.items():
        got = here(name, inputs, torch.float32)
        want = run(MAPS[name][0], rounded(inputs, torch.float32), torch.float64, torch.float32)
        # Below 1e-5 the direction of the angle's gradient is the points' rounding.
        checked = 1 if name == "angle" and angle < 1e-5 else len(got)
        assert worst(got[:checked], want[:checked]) < 6e-6


@pytest.mark.parametrize("length", [0.0, 1e-6, 0.099, 0.101, 3.0, 7.0])
def test_exp_map_at_every_length(length: float) -> None:
    x = unit(5, 64, seed=4)
    v = length * sphere.normalize(sphere.project(x, normal(5, 64, seed=5)))
    got = here("exp_map", (x, v), torch.float32)
    want = run(sphere.exp_map, rounded((x, v), torch.float32), torch.float64, torch.float32)
    assert worst(got, want) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [7, 40, 700, 5000])
def test_antipodes(dtype: torch.dtype, d: int) -> None:
    """The way that the reference takes, ties to the lowest axis; every second row has a way of its own."""
    rows = 10 if d < 100 else 2
    x = unit(rows, d, seed=7, dtype=dtype)
    x[0] = torch.eye(1, d, dtype=dtype)[0]
    y = torch.where(torch.arange(rows).unsqueeze(-1) % 2 == 0, -x, unit(rows, d, seed=8, dtype=dtype))
    v = normal(rows, d, seed=6, dtype=dtype)
    for name, inputs in {
        "slerp": (x, y, torch.linspace(0.1, 0.9, rows)),
        "log_map": (x, y),
        "angle": (x, y),
        "rotate": (v, x, y),
    }.items():
        got = here(name, inputs, dtype)
        want = run(MAPS[name][0], rounded(inputs, dtype), torch.float64, given=dtype)
        assert worst(got, want) < (4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_vectors(dtype: torch.dtype) -> None:
    """As on the CPU, next to others in a warp."""
    zero, x = torch.zeros(5, 7, dtype=dtype), unit(5, 7, dtype=dtype)
    zero[3], x[4] = x[3], 0
    one, t = torch.ones(5, 7, dtype=dtype), torch.full((5,), 0.3)
    for name, (_, arguments) in MAPS.items():
        for pair in ((zero, zero), (zero, x), (x, zero), (x, -x)):
            inputs = {"normalize": pair[:1], "slerp": (*pair, t), "rotate": (one, *pair)}.get(name, pair)
            assert len(inputs) == len(arguments(2, 3))
            got = here(name, inputs, dtype)
            want = run(MAPS[name][0], inputs, dtype)
            for a, b in zip(got, want, strict=True):
                assert bool(a.isfinite().all())
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-42, 1e-22, 1e20, 1e36])
@pytest.mark.parametrize("d", [40, 700])
def test_vectors_of_any_length(size: float, dtype: torch.dtype, d: int) -> None:
    """normalize and project; of x, the gradient is a number where 1/|x| is one. Every second row is long."""
    x = unit(6, d, dtype=torch.float64)
    x[::2] *= size
    x = x.to(dtype)
    limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for name, inputs in {"normalize": (x,), "project": (x, normal(6, d, seed=5).to(dtype))}.items():
        got = here(name, inputs, dtype)
        want = run(MAPS[name][0], tuple(a.double() for a in inputs), torch.float64, given=dtype)
        for i in (0, 2)[: len(inputs)]:
            assert error(got[i], want[i]) < limit
        if size > 1e-36:
            assert error(got[1][::2].double() * size, want[1][::2] * size) < limit + 1e-3 * (size > 1e30)


@pytest.mark.parametrize("exponential", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [3, 37, 700])
def test_step(exponential: bool, dtype: torch.dtype, d: int) -> None:
    """As on the CPU, too where x and t·v cancel, are tiny, zero or huge."""
    x, v = unit(12, d, seed=1).to(dtype), normal(12, d, seed=2).to(dtype)
    t = torch.linspace(-1, 1, 12)
    v[1], v[2], v[3], t[1] = -x[1], 0, v[3] * 1e-20, 1
    x[4], x[5], x[6] = 0, x[5] * 1e-20, x[6] * 1e4
    v[7], t[7] = -x[7] + 1e-3 * v[8], 1
    for times in (t, torch.tensor(0.4)):
        args = (x, v, times, exponential)
        (got,), (want,) = call("sphere.step", "cuda", *args), call("sphere.step", "cpu", *args)
        atol = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=0, atol=atol)


def test_nan_stays_in_its_row() -> None:
    for name, (_, arguments) in MAPS.items():
        inputs = [a.float() for a in arguments(4, 20)]
        inputs[0][1, 3] = math.nan
        got = [out.view(4, -1) for out in here(name, tuple(inputs), torch.float32)]
        assert bool(got[0][1].isnan().any()), name
        assert all(bool(out[[0, 2, 3]].isfinite().all()) for out in got), name


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("d", [44, 46, 47, 48, 1200])
def test_strides_and_addresses(name: str, d: int, caplog: pytest.LogCaptureFixture) -> None:
    """Rows with gaps, at addresses that packets cannot be read from: the same bits, no copies."""
    function, arguments = MAPS[name]
    inputs = [a.bfloat16() if a.dim() > 1 else a.float() for a in arguments(6, d)]

    def spread(a: Tensor, offset: int) -> Tensor:
        wide = a.new_full((3, 2, 2, *a.shape[1:-1], a.shape[-1] + offset), math.nan)
        part = wide[:, :, 1, offset:]
        part.copy_(a.view(3, 2, d))
        return part

    def results(own: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [a.to(DEVICE).requires_grad_() for a in own]
        with dlcore.use_backend("cuda"):
            out = function(*leaves)
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return tuple(x.detach().cpu().reshape(6, -1) for x in (out, *grads))

    want = results(inputs)
    with caplog.at_level("INFO", logger="dlcore"):
        for offsets in ((0, 0, 0), (1, 1, 1), (2, 2, 2), (4, 4, 4), (0, 2, 8), (8, 1, 0)):
            placed = [
                spread(a, o) if a.dim() > 1 else a.view(3, 2) for a, o in zip(inputs, offsets, strict=False)
            ]
            assert all(a.equal(b) for a, b in zip(results(placed), want, strict=True)), offsets
    assert "copied" not in caplog.text


def test_only_the_gradients_asked_for() -> None:
    """A needed gradient is the same whether the others are asked for or not."""
    for name, (function, arguments) in MAPS.items():
        inputs = [a.float().to(DEVICE) for a in arguments(5, 21)]
        whole = here(name, tuple(inputs), torch.float32)[1:]
        for i, want in enumerate(whole):
            leaves = [a.clone().requires_grad_(i == j) for j, a in enumerate(inputs)]
            with dlcore.use_backend("cuda"):
                result = function(*leaves)
                grad = normal(*result.shape, seed=9).to(DEVICE)
                assert torch.autograd.grad(result, leaves[i], grad)[0].cpu().equal(want)


def test_no_rows() -> None:
    for function, arguments in MAPS.values():
        inputs = [a.float()[:0].to(DEVICE).requires_grad_() for a in arguments(2, 5)]
        with dlcore.use_backend("cuda"):
            out = function(*inputs)
            assert [g.shape for g in torch.autograd.grad(out.sum(), inputs)] == [a.shape for a in inputs]


# --- draws -------------------------------------------------------------------------------------------------

LAWS = {"vmf": vmf, "cauchy": cauchy}
KEY = rng.key(8)


def drawn(law: str, mean: Tensor, kappa: Tensor | float, key: Tensor = KEY) -> Tensor:
    with dlcore.use_backend("cuda"):
        return LAWS[law].sample(mean.to(DEVICE), kappa, key=key.to(DEVICE)).cpu()


def exact(law: str, mean: Tensor, kappa: Tensor | float, key: Tensor = KEY) -> Tensor:
    with dlcore.use_backend("reference"):
        return LAWS[law].sample(mean.double(), kappa, key=key)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("d", [2, 3, 17, 64, 300, 771])
@pytest.mark.parametrize("dtype", DTYPES)
def test_points_are_the_references(law: str, d: int, dtype: torch.dtype) -> None:
    """The same noise: the same point at every κ, from several rows a warp to several warps a row."""
    rows = 41 if d < 100 else 6
    mean, kappa = unit(rows, d, seed=1).to(dtype), torch.logspace(-3, 6, rows)
    kappa[0], kappa[1] = 0, 1e5
    got = drawn(law, mean, kappa)
    assert dlcore.last_backend("sphere.sample") == "cuda"
    assert got.dtype == dtype
    eps = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact(law, mean, kappa), rtol=0, atol=eps)


@pytest.mark.parametrize(("d", "kappa"), [(2, 1.0), (2, 1e4), (3, 5.0), (10, 10.0), (200, 1e6)])
def test_many_draws_choose_the_same_candidates(d: int, kappa: float) -> None:
    """Hundreds of rows, many of whose first candidates are refused."""
    mean = unit(530 if d < 100 else 60, d, seed=1)
    got = drawn("vmf", mean, kappa)
    torch.testing.assert_close(got.double(), exact("vmf", mean, kappa), rtol=0, atol=2e-6)
    refused = (got - drawn("cauchy", mean, kappa)).abs().amax(-1) > 1e-3 / math.sqrt(kappa)
    assert refused.double().mean() > 0.02


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_longer_than_a_tile(law: str, dtype: torch.dtype) -> None:
    mean = unit(2, 4500, seed=1).to(dtype)
    atol = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(drawn(law, mean, 40.0).double(), exact(law, mean, 40.0), rtol=0, atol=atol)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("size", [1e-42, 1e-22, 1e20, 1e38])
@pytest.mark.parametrize("d", [5, 70, 1100, 4500])
def test_means_of_any_length(law: str, size: float, d: int) -> None:
    mean = (unit(2, d, seed=5).double() * size).float()
    want = exact(law, sphere.normalize(mean.double()), 50.0)
    torch.testing.assert_close(drawn(law, mean, 50.0).double(), want, rtol=0, atol=1e-6)


def test_edges_of_draws() -> None:
    mean = unit(20, 16, seed=2)
    torch.testing.assert_close(drawn("vmf", mean, 1e30), mean, rtol=0, atol=2e-7)
    zero = torch.zeros(20, 3)
    torch.testing.assert_close(drawn("vmf", zero, 7.0).double(), exact("vmf", zero, 7.0), rtol=0, atol=1e-6)
    # In the plane a projected normal vector may almost vanish.
    plane = drawn("vmf", unit(1, 2).expand(2000, 2), 0.0)
    torch.testing.assert_close(plane.norm(dim=-1), torch.ones(2000), rtol=0, atol=3e-7)
    assert drawn("vmf", torch.ones(0, 4), 1.0).shape == (0, 4)
    broken = mean.clone()
    broken[1, 0] = math.nan
    got, clean = drawn("vmf", broken, 7.0), drawn("vmf", mean, 7.0)
    assert bool(got[1].isnan().all())
    assert got[2:].equal(clean[2:])


def test_points_follow_the_key() -> None:
    mean, kappa = unit(4, 6, 20, seed=3), torch.linspace(0, 300, 6)
    whole = drawn("vmf", mean, kappa)
    rows = rng.fold_in(KEY, torch.arange(24).view(4, 6))
    assert whole.equal(drawn("vmf", mean, kappa, rows))
    assert whole[1:].equal(drawn("vmf", mean[1:], kappa, rows[1:]))
    assert not whole.equal(drawn("vmf", mean, kappa, rng.key(16)))
    wide = torch.full((6, 4, 23), math.nan)
    wide[..., 1:-2] = mean.transpose(0, 1)
    assert whole.equal(drawn("vmf", wide[..., 1:-2].transpose(0, 1), kappa))
    assert drawn("vmf", mean[:1].expand(4, 6, 20), kappa)[0].equal(whole[0])


# --- corrections -------------------------------------------------------------------------------------------


def corrected(x: Tensor, score: Tensor, steps: Tensor | float, key: Tensor = KEY) -> Tensor:
    steps = steps.to(DEVICE) if isinstance(steps, Tensor) else steps
    with dlcore.use_backend("cuda"):
        return sphere.correct(x.to(DEVICE), score.to(DEVICE), steps, key=key.to(DEVICE)).cpu()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [2, 15, 33, 300, 800, 4500])
def test_corrections_are_the_references(d: int, dtype: torch.dtype) -> None:
    lead = (5, 3) if d < 1000 else (2, 1)
    x, score = unit(*lead, d, dtype=dtype), (3 * normal(*lead, d, seed=1)).to(dtype)
    rows = math.prod(lead)
    steps = torch.linspace(0, 0.5, rows).view(lead)
    got = corrected(x, score, steps)
    assert dlcore.last_backend("sphere.correct") == "cuda"
    with dlcore.use_backend("reference"):
        want = sphere.correct(x.double(), score.double(), steps.double(), key=KEY)
    assert got.dtype == dtype
    assert (got - want).norm(dim=-1).max() < (1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
    wide = torch.full((lead[1], lead[0], d + 2), torch.nan, dtype=dtype)
    wide[..., 1:-1] = x.transpose(0, 1)
    assert torch.equal(corrected(wide[..., 1:-1].transpose(0, 1), score, steps), got)
    keys = rng.fold_in(KEY, torch.arange(rows)).view(*lead, 2)
    assert torch.equal(corrected(x, score, steps, keys), got)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [2, 15, 300, 1100, 4500])
def test_gradients_of_corrections(d: int, dtype: torch.dtype) -> None:
    rows = 5 if d < 1000 else 2
    x, score = unit(rows, d, dtype=dtype), (3 * normal(rows, d, seed=1)).to(dtype)
    steps = torch.linspace(0.02, 2, rows) / (d - 1)
    grad = normal(rows, d, seed=9).to(dtype)

    def gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors[:3]]
        return torch.autograd.grad(sphere.correct(*leaves, key=KEY.to(tensors[0].device)), leaves, tensors[3])

    with dlcore.use_backend("cuda"):
        got = gradients(*(t.to(DEVICE) for t in (x, score, steps, grad)))
    assert dlcore.last_backend("sphere.correct_backward") == "cuda"
    with dlcore.use_backend("reference"):
        want = gradients(*(t.double() for t in (x, score, steps, grad)))
    for a, b, like in zip(got, want, (x, score, steps), strict=True):
        assert a.dtype == like.dtype
        assert (a.cpu().double() - b).norm() <= max(4 * torch.finfo(dtype).eps, 2e-6) * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrections_of_any_length(dtype: torch.dtype) -> None:
    """Zero with nothing to move it stays zero, gradients too; a huge score gives its direction."""
    leaves = [torch.zeros(2, 8, dtype=dtype, device=DEVICE).requires_grad_() for _ in range(2)]
    with dlcore.use_backend("cuda"):
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
    assert corrected(x[:0], v[:0], 0.1).shape == (0, 8)


# --- what these tests see ----------------------------------------------------------------------------------

#: A sum over warps read before it is there; a bound one too large; noise of another domain.
FAULTS = [
    ("csrc/cuda/team.h", "    __syncthreads();\n", ""),
    (
        "csrc/cuda/team.h",
        "if (4 * k + 4 <= left && address % 4 == 0) {\n      reinterpret_cast<unsigned*>(p)[k] = word[k];",
        "if (4 * k + 2 * (left % 4) <= left && address % 4 == 0) {\n"
        "      reinterpret_cast<unsigned*>(p)[k] = word[k];",
    ),
    ("csrc/common/noise.h", "normals(key, Domain::kDirection, pair)", "normals(key, Domain::kElement, pair)"),
]


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the faulty kernels run on the host alone")
def test_faults_show() -> None:
    """What these tests say of kernels without a barrier, with an off-by-one, with other noise."""
    module = cuda_on_host.build(edits=FAULTS)
    code = f"import pytest; pytest.main(['-q', '-rfE', '--tb=line', '-m', 'not slow', {__file__!r}])"
    said = run_python(code, DLCORE_CUDA_ON_HOST=str(module))
    # Each of these has one fault alone: odd numbers of halves are stored right, 64 numbers end with a packet.
    assert "FAILED tests/test_cuda_sphere.py::test_maps_and_gradients[dtype1-2-1601-slerp]" in said
    assert "a kernel wrote past a buffer" in said
    assert "FAILED tests/test_cuda_sphere.py::test_points_are_the_references[dtype0-64-cauchy]" in said
    assert "FAILED tests/test_cuda_sphere.py::test_points_are_the_references[dtype1-64-vmf]" in said
    assert "FAILED tests/test_cuda_sphere.py::test_maps_and_gradients[dtype0-3-768-slerp]" not in said
