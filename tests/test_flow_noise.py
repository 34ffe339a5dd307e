"""Flows: noise that is added on the way, and guidance."""

from __future__ import annotations

import math

import pytest
import torch
from test_flow import INSIDE, KEY, gaussian_denoiser, levels, normal
from torch import Tensor

from dlcore import rng
from dlcore.process import flow


@pytest.mark.parametrize("path", INSIDE)
def test_renoise_keeps_the_marginal_law(path: str) -> None:
    """Coefficients, read off: x = 1 gives r, its spread √(σ_b² - r²σ²)."""
    back, t = INSIDE[path]
    (a, s), (a_back, s_back) = levels(path, t), levels(path, back)
    drawn = flow.renoise(torch.ones(400, 500, dtype=torch.float64), t, back, path=path, scale=2, key=KEY)
    kept = a_back / a
    needed = 2 * torch.sqrt(s_back**2 - (kept * s) ** 2)
    error = float(needed) / math.sqrt(drawn.numel())
    assert float(drawn.mean()) == pytest.approx(float(kept), abs=4 * error)
    assert float(drawn.std()) == pytest.approx(float(needed), abs=4 * error)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [True, False])
def test_elfs_sde_noise(exact: bool) -> None:
    """What the network is shown: exact noise has variance (1-at)², the official a²(1-t)² + (1-a)²."""
    t, t_next, gamma, scale = 0.4, 0.5, 1.5, 2.0
    a = 1 - gamma * (t_next - t)
    shown: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, time: Tensor) -> Tensor:
        shown.append((x, time))
        return torch.zeros_like(x)

    noise = scale * (1 - t) * normal(400, 500)
    options = {"exact": exact, "scale": scale, "key": KEY}
    moved = flow.sde_step(noise, denoise, t, t_next, gamma, **options)
    ((x, time),) = shown
    assert float(time) == pytest.approx(a * t)
    wanted = (1 - a * t) ** 2 if exact else a**2 * (1 - t) ** 2 + (1 - a) ** 2
    assert (wanted < 0.9 * (1 - a * t) ** 2) == (not exact)
    # A variance from n numbers has a relative error of √(2/n).
    assert float(x.var()) / scale**2 == pytest.approx(wanted, rel=4 * math.sqrt(2 / x.numel()))
    torch.testing.assert_close(moved, x * (1 - t_next) / (1 - a * t))
    if exact:
        same = flow.renoise(noise, t, a * t, scale=scale, key=KEY)
        torch.testing.assert_close(x, same)


def test_sde_without_noise_is_the_step() -> None:
    x, denoise = normal(2, 3, 4), gaussian_denoiser("linear", 0.6)
    for exact in (True, False):
        got = flow.sde_step(x, denoise, 0.3, 0.5, 0.0, exact=exact)
        torch.testing.assert_close(got, flow.step(x, denoise(x, torch.tensor(0.3)), 0.3, 0.5))
    # From t = 0 nothing but noise is kept or drawn: a = 0 draws all of it.
    fresh = flow.sde_step(100 * x, lambda x, t: x, 0.0, 0.5, 2.0, key=KEY)
    assert float(fresh.abs().max()) < 6


def test_gaussian_sde_ends_with_the_datas_variance_only_if_exact() -> None:
    """The whole of ELF's sampler on Gaussian data, as a recursion: the official noise loses 9/10."""
    spread, scale, steps, gamma = 1.0, 2.0, 256, 1.0
    denoise = gaussian_denoiser("linear", spread, scale)
    final = {}
    for exact in (True, False):
        variance = scale**2
        for i in range(steps):
            t, t_next = i / steps, (i + 1) / steps
            a = 1 - gamma / steps if i < steps - 1 else 1.0
            share = (1 - a) * (1 + a - 2 * a * t) if exact else (1 - a) ** 2
            variance = a**2 * variance + scale**2 * share
            x = torch.ones(1, dtype=torch.float64)
            gain = flow.step(x, denoise(x, torch.tensor(a * t, dtype=torch.float64)), a * t, t_next)
            variance = float(gain) ** 2 * variance
        final[exact] = variance
    assert final[True] == pytest.approx(spread**2, abs=0.03)
    assert final[False] < 0.15 * spread**2


def test_noise_is_keyed_by_row() -> None:
    clean = torch.zeros(2, 3, 4)
    whole = flow.interpolate(clean, 0.0, key=KEY)
    keys = rng.fold_in(KEY, torch.arange(6)).view(2, 3, 2)
    assert flow.interpolate(clean, 0.0, key=keys).equal(whole)
    assert flow.interpolate(clean[1], 0.0, key=keys[1]).equal(whole[1])
    assert not flow.interpolate(clean, 0.0, key=rng.key(12)).equal(whole)
    assert flow.renoise(clean, 1.0, 0.0, key=KEY).equal(whole)
    torch.manual_seed(3)
    first = flow.interpolate(clean, 0.0)
    torch.manual_seed(3)
    assert flow.interpolate(clean, 0.0).equal(first)
    generator = torch.Generator().manual_seed(3)
    assert not flow.interpolate(clean, 0.0, generator=generator).equal(
        flow.interpolate(clean, 0.0, generator=generator)
    )


def test_noise_is_the_same_with_and_without_a_gradient() -> None:
    x = normal(2, 3, 40, dtype=torch.float32)
    for function in (
        lambda x: flow.interpolate(x, 0.4, key=KEY),
        lambda x: flow.renoise(x, 0.6, torch.tensor([[0.2], [0.5]]), scale=2.0, key=KEY),
        lambda x: flow.sde_step(x, lambda x, t: x, 0.3, 0.6, 1.0, key=KEY),
        lambda x: flow.step(x, x, 0.3, 0.6, refresh=0.5, key=KEY),
    ):
        with_gradient = function(x.clone().requires_grad_())
        assert with_gradient.requires_grad
        torch.testing.assert_close(function(x), with_gradient.detach(), rtol=1e-6, atol=2e-6)


def test_refresh_mixes_old_and_new_noise() -> None:
    """CTM: z' = t'x̂ + (1-t')s(√(1-γ²)ε_old + γε)."""
    clean, old = normal(300, 400), normal(300, 400, seed=1)
    t, t_next, gamma, scale = 0.3, 0.6, 0.75, 2.0
    x = flow.interpolate(clean, t, noise=old, scale=scale)
    got = flow.step(x, clean, t, t_next, refresh=gamma, scale=scale, key=KEY)
    rest = (got - t_next * clean) / ((1 - t_next) * scale)
    new = (rest - math.sqrt(1 - gamma**2) * old) / gamma
    torch.testing.assert_close(
        new, rng.normal(rng.fold_in(KEY, torch.arange(300)), (400,), dtype=torch.float64)
    )
    assert flow.step(x, clean, t, 1.0, refresh=gamma, key=KEY).equal(clean)
    torch.testing.assert_close(
        flow.step(x, clean, t, t_next, refresh=torch.tensor(0.0), key=KEY), flow.step(x, clean, t, t_next)
    )


# Guidance.


@pytest.mark.parametrize("path", INSIDE)
def test_guidance_of_clean_states_and_of_velocities_is_one(path: str) -> None:
    x, cond, uncond = normal(2, 3, 4), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    t, _ = INSIDE[path]
    guided = flow.velocity_from_clean(x, flow.guide(cond, uncond, 3.0), t, path=path)
    v_cond, v_uncond = (flow.velocity_from_clean(x, y, t, path=path) for y in (cond, uncond))
    torch.testing.assert_close(guided, flow.guide(v_cond, v_uncond, 3.0))


def test_guidance_of_probabilities_is_that_of_embeddings_but_not_of_logits() -> None:
    table = normal(5, 4)
    cond, uncond = normal(3, 5, seed=1), normal(3, 5, seed=2)
    probabilities = flow.guide(cond.softmax(-1), uncond.softmax(-1), 2.0)
    embedded = flow.guide(cond.softmax(-1) @ table, uncond.softmax(-1) @ table, 2.0)
    torch.testing.assert_close(probabilities @ table, embedded)
    assert float((flow.guide(cond, uncond, 2.0).softmax(-1) - probabilities).abs().max()) > 0.05


def test_guidance_weights() -> None:
    cond, uncond = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    assert flow.guide(cond, uncond, 0.0).equal(uncond)
    assert flow.guide(cond, uncond, 1.0).equal(cond)
    torch.testing.assert_close(flow.guide(cond, uncond, 2.5), 2.5 * cond - 1.5 * uncond)
    per_row = flow.guide(cond, uncond, torch.tensor([[0.0], [2.5]]))
    assert per_row[0].equal(uncond[0])
    torch.testing.assert_close(per_row[1], 2.5 * cond[1] - 1.5 * uncond[1])
