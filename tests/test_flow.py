"""Flows: one lerp is every family's step; Gaussian data give every map in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dlcore import rng
from dlcore.process import flow

KEY = rng.key(11)
#: A time well inside every path, and a later one of less noise.
INSIDE = {"linear": (0.3, 0.6), "edm": (3.0, 0.7), "vp": (0.2, 0.7), "lognsr": (1.5, -0.5)}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def levels(path: str, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """(α, σ) written down once more."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return {
        "linear": lambda: (t, 1 - t),
        "edm": lambda: (torch.ones_like(t), t),
        "vp": lambda: (t**0.5, (1 - t) ** 0.5),
        "lognsr": lambda: ((1 / (1 + t.exp())) ** 0.5, (1 / (1 + (-t).exp())) ** 0.5),
    }[path]()


def gaussian_denoiser(path: str, spread: float, scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """E[clean | x] of clean ~ N(0, spread²): linear in x."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels(path, t)
        gain = alpha * spread**2 / (alpha**2 * spread**2 + (scale * sigma) ** 2)
        return gain.to(x.dtype).unsqueeze(-1) * x if gain.dim() else gain.to(x.dtype) * x

    return denoise


# One structure, every family: each of these is the update as its authors write it.


def test_linear_step_is_euler_of_elf_and_flm() -> None:
    x, clean = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    t, t_next = 0.3, 0.55
    torch.testing.assert_close(
        flow.step(x, clean, t, t_next), x + (t_next - t) * (clean - x) / (1 - t), rtol=1e-12, atol=1e-12
    )
    c = (t_next - t) / (1 - t)  # FLM: z' = (1-c)z + cp
    torch.testing.assert_close(flow.step(x, clean, t, t_next), (1 - c) * x + c * clean)
    again = x + (t_next - t) * flow.velocity_from_clean(x, clean, t)
    torch.testing.assert_close(flow.step(x, clean, t, t_next), again)


def test_edm_step_is_euler_of_edm_and_cobit() -> None:
    x, clean = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    hat, sigma = 3.1, 1.7
    score = (clean - x) / hat**2
    torch.testing.assert_close(flow.step(x, clean, hat, sigma, path="edm"), x + (sigma - hat) * -hat * score)
    velocity = flow.velocity_from_clean(x, clean, hat, path="edm")
    torch.testing.assert_close(flow.step(x, clean, hat, sigma, path="edm"), x + (sigma - hat) * velocity)


def test_vp_step_is_ddim() -> None:
    x, clean = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    bar, bar_next = 0.3, 0.8
    noise = (x - bar**0.5 * clean) / (1 - bar) ** 0.5
    expected = bar_next**0.5 * clean + (1 - bar_next) ** 0.5 * noise
    torch.testing.assert_close(flow.step(x, clean, bar, bar_next, path="vp"), expected)


def test_lognsr_step_is_langflows_and_the_same_as_ddim() -> None:
    x, clean = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    gamma_t, gamma_s = 2.0, -1.0
    (a, s), (a_next, s_next) = levels("lognsr", gamma_t), levels("lognsr", gamma_s)
    got = flow.step(x, clean, gamma_t, gamma_s, path="lognsr")
    torch.testing.assert_close(got, a_next * clean + s_next / s * (x - a * clean))
    torch.testing.assert_close(got, flow.step(x, clean, float(a**2), float(a_next**2), path="vp"))


@pytest.mark.parametrize("path", INSIDE)
def test_step_is_exact_while_the_clean_state_stays(path: str) -> None:
    clean, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    t, t_next = INSIDE[path]
    start = flow.interpolate(clean, t, noise=noise, path=path)
    for aim in (t_next, t, (t + t_next) / 2):
        expected = flow.interpolate(clean, aim, noise=noise, path=path)
        torch.testing.assert_close(flow.step(start, clean, t, aim, path=path), expected)
    there = flow.step(start, clean, t, t_next, path=path)
    torch.testing.assert_close(flow.step(there, clean, t_next, t, path=path), start)  # inverted


@pytest.mark.parametrize("path", INSIDE)
def test_velocity_is_the_derivative_of_the_state(path: str) -> None:
    clean, noise = normal(5), normal(5, seed=1)
    t, h = INSIDE[path][0], 1e-6
    ahead, behind = (flow.interpolate(clean, t + d, noise=noise, path=path) for d in (h, -h))
    x = flow.interpolate(clean, t, noise=noise, path=path)
    got = flow.velocity_from_clean(x, clean, t, path=path)
    torch.testing.assert_close(got, (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-8)


def test_elfs_floor_and_weight() -> None:
    x, clean = normal(4), normal(4, seed=1)
    got = flow.velocity_from_clean(x, clean, 0.99, floor=0.05)
    torch.testing.assert_close(got, (clean - x) / 0.05)
    torch.testing.assert_close(
        flow.velocity_from_clean(x, clean, 0.3, floor=0.05), flow.velocity_from_clean(x, clean, 0.3)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_exact(dtype: torch.dtype) -> None:
    x, clean = normal(2, 3, 4, dtype=dtype), normal(2, 3, 4, seed=1, dtype=dtype)
    for path, (t, end) in {
        "linear": (0.7, 1.0),
        "edm": (0.3, 0.0),
        "vp": (0.7, 1.0),
        "lognsr": (-3.0, -math.inf),
    }.items():
        torch.testing.assert_close(flow.step(x, clean, t, end, path=path), clean, rtol=0, atol=0)
        torch.testing.assert_close(flow.step(x, clean, end, end, path=path), x, rtol=0, atol=0)
        torch.testing.assert_close(flow.interpolate(clean, end, noise=x, path=path), clean, rtol=0, atol=0)
    for path, start in {"linear": 0.0, "vp": 0.0, "lognsr": math.inf}.items():
        torch.testing.assert_close(flow.interpolate(clean, start, noise=x, path=path), x, rtol=0, atol=0)
        assert bool(flow.step(x, clean, start, INSIDE[path][1], path=path).isfinite().all())
        torch.testing.assert_close(flow.renoise(x, start, start, path=path), x, rtol=0, atol=0)
    assert flow.step(x, clean, 0.3, 0.3).equal(x)
    # Next to the clean end nothing blows up.
    near = flow.step(x, clean, 1 - 1e-12, 1 - 1e-13)
    torch.testing.assert_close(near, clean + 0.1 * (x - clean), rtol=1e-3, atol=1e-4)


def test_a_prompt_stays_while_the_rest_moves() -> None:
    x, clean = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    prompt = torch.tensor([True, False, False])
    t, t_next = (torch.where(prompt, 1.0, torch.tensor(level, dtype=torch.float64)) for level in (0.3, 0.6))
    moved = flow.step(x, clean, t, t_next)
    assert moved[:, 0].equal(x[:, 0])
    torch.testing.assert_close(moved[:, 1:], flow.step(x, clean, 0.3, 0.6)[:, 1:])


@pytest.mark.parametrize("refresh", [0.0, 0.5, 1.0, torch.tensor([[0.0], [0.7]])])
@pytest.mark.parametrize("path", INSIDE)
def test_a_prompt_stays_whatever_is_refreshed(path: str, refresh: float | Tensor) -> None:
    x, clean = (normal(2, 3, 4, seed=seed, dtype=torch.float32) for seed in (0, 1))
    end = {"linear": 1.0, "edm": 0.0, "vp": 1.0, "lognsr": -math.inf}[path]
    prompt = torch.tensor([True, False, False])
    t, t_next = (torch.where(prompt, end, torch.tensor(at, dtype=torch.float64)) for at in INSIDE[path])
    moved = flow.step(x, clean, t, t_next, path=path, refresh=refresh, key=KEY)
    assert moved[:, 0].equal(x[:, 0])
    assert bool((moved[:, 1:] != x[:, 1:]).all())


def test_times_as_numbers_and_tensors_of_any_broadcast() -> None:
    x, clean = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    t = torch.tensor([[0.1], [0.4]], dtype=torch.float64)
    rows = [[float(level)] * 3 for level in t]
    whole = flow.step(x, clean, t, 0.7)
    torch.testing.assert_close(whole, flow.step(x, clean, torch.tensor(rows, dtype=torch.float64), 0.7))
    for i in range(2):
        torch.testing.assert_close(whole[i], flow.step(x[i], clean[i], float(t[i]), 0.7))
    torch.testing.assert_close(flow.step(x, clean, 0, 1), clean)  # whole numbers are times too


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_are_moved_in_float32(dtype: torch.dtype) -> None:
    x, clean = normal(2, 3, 64, dtype=dtype), normal(2, 3, 64, seed=1, dtype=dtype)
    got = flow.step(x, clean, 0.31, 0.37)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, flow.step(x.double(), clean.double(), 0.31, 0.37).float())
    assert flow.step(x.float(), clean, 0.31, 0.37).dtype == torch.float32
    assert flow.step(x.double(), clean, 0.31, 0.37).dtype == torch.float64


def test_strided_states() -> None:
    x, clean = normal(4, 3, 2).transpose(0, 2), normal(2, 3, 8, seed=1)[..., ::2]
    want = flow.step(x.contiguous(), clean.contiguous(), 0.2, 0.5)
    torch.testing.assert_close(flow.step(x, clean, 0.2, 0.5), want)


# Gaussian data: E[clean | x] is linear, the flow's map is known.


@pytest.mark.parametrize(("path", "ends"), [("linear", (0.0, 1.0)), ("vp", (0.0, 1.0)), ("edm", (80.0, 0.0))])
def test_gaussian_flow_reaches_the_datas_spread(path: str, ends: tuple[float, float]) -> None:
    """The probability flow's exact map is x ↦ x·√(v_s/v_t) with v = α²s² + σ²."""
    spread, denoise = 0.6, gaussian_denoiser(path, 0.6)
    start = flow.interpolate(torch.zeros(1, dtype=torch.float64), ends[0], noise=torch.ones(1), path=path)
    errors = []
    for count in (100, 200):
        grid = torch.linspace(*ends, count + 1, dtype=torch.float64)
        if path == "edm":
            grid = flow.edm_grid(count)
        x = start
        for t, t_next in pairwise(grid):
            x = flow.step(x, denoise(x, t), t, t_next, path=path)
        alpha, sigma = levels(path, ends[0])
        exact = float(start) * spread / math.sqrt(alpha**2 * spread**2 + sigma**2)
        errors.append(abs(float(x) - exact))
    assert errors[1] < 0.02 * spread
    assert 1.6 < errors[0] / errors[1] < 2.6  # first order


#: Terminal standard deviation from σ = 80 on data of deviation 1/2, from the closed recursion.
EDM_TABLE = [(18, 0.423, 0.5276, 0.5448), (64, 0.478, 0.5018, 0.5060), (256, 0.494, 0.5001, 0.5012)]


@pytest.mark.parametrize(("steps", "euler", "heun", "churned"), EDM_TABLE)
def test_edm_on_gaussian_data(steps: int, euler: float, heun: float, churned: float) -> None:
    denoise = gaussian_denoiser("edm", 0.5)
    grid = flow.edm_grid(steps).tolist()
    deviation = {name: torch.tensor([math.hypot(80, 0.5)], dtype=torch.float64) for name in ("euler", "heun")}
    variance = torch.tensor([80.0**2 + 0.25], dtype=torch.float64)
    for now, after in pairwise(grid):
        x = deviation["euler"]
        clean = denoise(x, torch.tensor(now))
        deviation["euler"] = flow.step(x, clean, now, after, path="edm")
        deviation["heun"] = flow.heun_step(deviation["heun"], denoise, now, after, path="edm")
        hat = now * 1.2
        variance = variance + hat**2 - now**2
        variance = flow.heun_step(variance.sqrt(), denoise, hat, after, path="edm") ** 2
    assert float(deviation["euler"]) == pytest.approx(euler, abs=6e-4)
    assert float(deviation["heun"]) == pytest.approx(heun, abs=6e-5)
    assert float(variance.sqrt()) == pytest.approx(churned, abs=6e-5)


@pytest.mark.parametrize("path", INSIDE)
def test_heun_is_of_second_order(path: str) -> None:
    denoise, (start, end) = gaussian_denoiser(path, 0.6), INSIDE[path]
    (a, s), (a_next, s_next) = levels(path, start), levels(path, end)
    exact = math.sqrt((a_next**2 * 0.36 + s_next**2) / (a**2 * 0.36 + s**2))
    errors = []
    for count in (20, 40):
        x = torch.ones(1, dtype=torch.float64)
        grid = torch.linspace(start, end, count + 1, dtype=torch.float64).tolist()
        for t, t_next in pairwise(grid):
            x = flow.heun_step(x, denoise, t, t_next, path=path)
        errors.append(abs(float(x) - exact))
    assert 3.5 < errors[0] / errors[1] < 4.6
    assert errors[1] < 2e-4


def test_heun_as_edm_and_flow_matching_write_it() -> None:
    x = normal(2, 3, 4)
    for path, (t, t_next) in list(INSIDE.items())[:2]:
        denoise = gaussian_denoiser(path, 0.6)
        first = flow.velocity_from_clean(x, denoise(x, torch.tensor(t)), t, path=path)
        middle = x + (t_next - t) * first
        later = denoise(middle, torch.tensor(t_next))
        second = flow.velocity_from_clean(middle, later, t_next, path=path)
        expected = x + (t_next - t) * (first + second) / 2
        torch.testing.assert_close(flow.heun_step(x, denoise, t, t_next, path=path), expected)


def test_heuns_last_step_calls_once_and_no_broken_network_shows() -> None:
    calls = []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return x / t.log().unsqueeze(-1) * 0 if bool((t == 0).any()) else x / 2

    x = normal(2, 4)
    assert flow.heun_step(x, denoise, 0.5, 0.0, path="edm").equal(x / 2)
    assert len(calls) == 1
    mixed = flow.heun_step(x, denoise, 0.5, torch.tensor([0.0, 0.25]), path="edm")
    assert len(calls) == 3
    assert mixed[0].equal(x[0] / 2)
    assert bool(mixed.isfinite().all())


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: flow.interpolate(x, 0.3, noise=y, path="vp"),
        lambda x, y: flow.velocity_from_clean(x, y, 0.3),
        lambda x, y: flow.step(x, y, 0.3, 0.6),
        lambda x, y: flow.step(x, y, 0.3, 0.6, path="vp"),
        lambda x, y: flow.step(x, y, torch.tensor([0.2, 0.3]), 0.9, refresh=0.5, key=KEY),
        lambda x, y: flow.heun_step(x, lambda z, t: z * y, 3.0, 1.0, path="edm"),
        lambda x, y: flow.sde_step(x, lambda z, t: z * y, 0.3, 0.6, 1.0, key=KEY),
        lambda x, y: flow.guide(x, y, 2.0),
    ],
)
def test_gradients(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = normal(2, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, y))


def test_gradient_in_time() -> None:
    x, y, t = normal(2, 3), normal(2, 3, seed=1), torch.tensor([0.3, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: flow.step(x, y, t, t + 0.2), (t.requires_grad_(),))


def test_gradients_are_finite_where_no_noise_is_added() -> None:
    x, (t, gamma) = normal(2, 3), (torch.tensor([at, 0.5]).requires_grad_() for at in (0.3, 0.0))
    back = torch.tensor([0.3, 0.2])  # the first row's own time
    moved = flow.renoise(x, t, back, key=KEY)
    assert bool(torch.autograd.grad(moved.square().sum(), t)[0].isfinite().all())
    moved = flow.sde_step(x, lambda z, t: z / 2, 0.3, 0.6, gamma, key=KEY)
    (slope,) = torch.autograd.grad(moved.square().sum(), gamma)
    assert bool(slope.isfinite().all())
    refresh = torch.ones(2, requires_grad=True)
    moved = flow.step(x, x / 2, 0.3, 0.6, refresh=refresh, key=KEY)
    assert bool(torch.autograd.grad(moved.square().sum(), refresh)[0].isfinite().all())


X = torch.zeros(2, 3, 4)
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: flow.step(X, X[:1], 0.1, 0.2), ValueError, r"flow.step: clean must have x's shape \(2, 3, 4\)"),
    (lambda: flow.step(X.long(), X, 0.1, 0.2), TypeError, "flow.step: x must be float32, bfloat16"),
    (lambda: flow.step([1.0], X, 0.1, 0.2), TypeError, "flow.step: x must be a Tensor, got list"),
    (lambda: flow.step(torch.tensor(1.0), X, 0.1, 0.2), ValueError, r"flow.step: x must be \(..., n\)"),
    (lambda: flow.step(X, X, 1.2, 0.2), ValueError, r"flow.step: t must lie in \[0, 1\], got 1.2"),
    (lambda: flow.step(X, X, math.nan, 0.2), ValueError, r"flow.step: t must lie in \[0, 1\], got nan"),
    (lambda: flow.step(X, X, 0.1, -0.1), ValueError, r"flow.step: t_next must lie in \[0, 1\], got -0.1"),
    (lambda: flow.step(X, X, -1.0, 0.1, path="edm"), ValueError, r"t must lie in \[0, inf\), got -1.0"),
    (lambda: flow.step(X, X, math.inf, 0.1, path="edm"), ValueError, r"t must lie in \[0, inf\), got inf"),
    (lambda: flow.step(X, X, None, 0.1), TypeError, "flow.step: t must be a number or a Tensor, got None"),
    (lambda: flow.step(X, X, torch.rand(7), 0.1), ValueError, r"t must broadcast to \(2, 3\), got \(7,\)"),
    (
        lambda: flow.step(X, X, 1.0, 0.5),
        ValueError,
        "flow.step: a clean state .* cannot become noisy at t_next",
    ),
    (lambda: flow.step(X, X, 0.1, 0.2, path="cosine"), ValueError, "path must be one of 'linear', 'edm'"),
    (lambda: flow.step(X, X, 0.1, 0.2, refresh=2.0), ValueError, r"refresh must lie in \[0, 1\], got 2"),
    (lambda: flow.step(X, X, 0.1, 0.2, refresh=1.0, scale=-1.0), ValueError, "scale must lie in"),
    (lambda: flow.interpolate(X, 0.1, noise=X, key=KEY), ValueError, "give noise, or key or generator"),
    (lambda: flow.interpolate(X, 0.1, noise=X[0]), ValueError, "noise must have clean's shape"),
    (lambda: flow.interpolate(X, 0.1, key=rng.split(KEY, 5)), ValueError, "key must have shape"),
    (
        lambda: flow.velocity_from_clean(X, X, 1.0),
        ValueError,
        "velocity of path 'linear' is unbounded at t = 1",
    ),
    (lambda: flow.velocity_from_clean(X, X, 0.0, path="vp"), ValueError, "unbounded at t = 0"),
    (lambda: flow.velocity_from_clean(X, X, 0.3, floor=-1.0), ValueError, r"floor must lie in \[0, 1\]"),
    (
        lambda: flow.velocity_from_clean(X, X, 0.3, floor=0.1, path="vp"),
        ValueError,
        "floor belongs to path 'linear'",
    ),
    (
        lambda: flow.renoise(X, 0.3, 0.4),
        ValueError,
        "t_back must be at least as noisy as t, got 0.4 after 0.3",
    ),
    (lambda: flow.renoise(X, 0.0, 0.4), ValueError, "pure noise .* cannot gain signal at t_back"),
    (lambda: flow.sde_step(X, lambda x, t: x, 0.4, 0.3, 1.0), ValueError, "t_next must be at least t"),
    (lambda: flow.sde_step(X, lambda x, t: x, 0.3, 0.4, -1.0), ValueError, r"gamma must lie in \[0, inf\)"),
    (lambda: flow.sde_step(X, lambda x, t: x[0], 0.3, 0.4, 1.0), ValueError, "clean must have x's shape"),
    (lambda: flow.heun_step(X, lambda x, t: x.long(), 0.3, 0.4), TypeError, "clean must be float32"),
    (lambda: flow.guide(X, X[0], 1.0), ValueError, "flow.guide: uncond must have cond's shape"),
    (
        lambda: flow.guide(X, X, math.nan),
        ValueError,
        r"flow.guide: weight must lie in \(-inf, inf\), got nan",
    ),
    (lambda: flow.step(X, X, 0.1, 0.2, scale="x"), TypeError, "flow.step: scale must be a number"),
    (lambda: flow.step(X, X, 0.1, 0.2, key=KEY.float()), TypeError, "flow.step: key must be an int64 Tensor"),
    (
        lambda: flow.step(X, X, 0.1, 0.2, generator=7),
        TypeError,
        "generator must be a torch.Generator, got int",
    ),
    (
        lambda: flow.step(X, X, torch.rand(3, device="meta"), 0.2),
        ValueError,
        "flow.step: t must be on cpu, got meta",
    ),
    (lambda: flow.guide(X, X, "high"), TypeError, "flow.guide: weight must be a number or a Tensor"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
