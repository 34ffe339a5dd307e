"""Compositions on a GPU's tensors: everything stays there, and is what the CPU makes of the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton_calls import captured, quiet
from waiting import ON_GPU, nothing_waits

import dlcore
from dlcore import LinearLogits, rng
from dlcore.process import (
    absorbing_uniform,
    d3pm,
    distill,
    duo,
    guidance,
    hybrid,
    masked,
    order,
    score,
    uniform,
    unmask,
)

VOCAB, LEAD, MASK = 9, (3, 8), 8


class Inputs:
    """Tensors that are the same on every device."""

    def __init__(self, device: str, seed: int = 0) -> None:
        def normal(*shape: int, seed: int, start: int = seed) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(start + seed)).to(device)

        self.logits, self.other, self.third = (normal(*LEAD, VOCAB, seed=seed) for seed in range(3))
        self.head, self.other_head = (
            LinearLogits(normal(*LEAD, 5, seed=seed), normal(VOCAB, 5, seed=7)) for seed in (3, 4)
        )
        self.x = torch.randint(MASK, LEAD, generator=torch.Generator().manual_seed(seed + 5)).to(device)
        self.alpha = torch.linspace(0.2, 0.6, LEAD[0], dtype=torch.float64).unsqueeze(1).to(device)
        self.alpha_s = self.alpha + 0.2
        self.key = rng.key(6 + seed).to(device)
        self.z = torch.where(torch.arange(LEAD[1]).to(device) % 3 == 0, self.x, MASK)
        self.table = normal(VOCAB, 4, seed=8)

    def copy_(self, other: Inputs) -> None:
        """Other numbers in the same memory."""
        for mine, new in zip(tree_leaves(vars(self)), tree_leaves(vars(other)), strict=True):
            mine.copy_(new)


def _rollout(i: Inputs) -> Tensor:
    targets = distill.rollout(lambda z, a: i.logits, i.z, [i.alpha, i.alpha_s, 1.0], MASK, key=i.key)
    return distill.self_distillation_loss(i.other, targets, exclude=MASK)


def _curriculum(i: Inputs) -> tuple[Tensor, ...]:
    drawn = duo.curriculum(i.x, -2.0, 0.5, VOCAB, top_k=3, key=i.key)
    return *drawn, duo.embed(drawn.ids, drawn.weights, i.table)


def _levels(i: Inputs) -> tuple[Tensor, ...]:
    table = duo.Transformation.covering(VOCAB).to(i.alpha.device)
    return tuple(table.levels(i.alpha))


def _hybrid(i: Inputs) -> tuple[Tensor, ...]:
    t, s = (hybrid.schedule(1 - a, p_uniform=0.2) for a in (i.alpha, i.alpha_s))
    z = hybrid.corrupt(i.x, t, vocab_size=VOCAB, mask_id=MASK, key=i.key)
    return (
        z,
        hybrid.loss(i.logits, z, i.x, t, mask_id=MASK),
        hybrid.step(i.logits, z, t, s, mask_id=MASK, key=i.key),
    )


def _order(i: Inputs) -> tuple[Tensor, ...]:
    t, s = (order.power(1 - a, i.alpha + 1) for a in (i.alpha, i.alpha_s))
    z = order.corrupt(i.x, t, MASK, key=i.key)
    return z, order.nelbo(i.logits, z, i.x, t, t, MASK), order.step(i.logits, z, t, s, MASK, key=i.key)


def _classifier(i: Inputs) -> tuple[Tensor, ...]:
    z = i.x
    exact = guidance.exact_guide(lambda tokens: i.table[tokens].sum((-2, -1)), z, VOCAB)
    first = guidance.taylor_guide(lambda e: e.square().sum((-2, -1)), z, i.table)
    return (
        exact,
        first.materialize(),
        guidance.cbg_uniform_step(i.logits, exact, z, i.alpha, i.alpha_s, 1.5, key=i.key),
        guidance.cbg_masked_step(i.logits, exact, i.z, i.alpha, i.alpha_s, MASK, 1.5, key=i.key),
    )


def _arpc(i: Inputs) -> tuple[Tensor, ...]:
    doubts = guidance.arpc_score(i.logits, i.other, score="reverse_kl", exclude=MASK)
    agreed = guidance.verify(i.logits, i.x, i.z == MASK, exclude=MASK)
    renoised = guidance.renoise(i.x, doubts, i.alpha[:, 0], prior="uniform", vocab_size=VOCAB, key=i.key)
    return doubts, agreed, renoised


CASES: dict[str, Callable[[Inputs], Any]] = {
    "duo.curriculum": _curriculum,
    "duo.Transformation": _levels,
    "distill.rollout": _rollout,
    "distill.divergence": lambda i: distill.divergence(i.logits, i.other, kind="total_variation"),
    "distill.masked_inverse_loss": lambda i: distill.masked_inverse_loss(
        i.logits, i.other, i.third, i.z, i.alpha, -1.0, MASK
    ),
    "distill.uniform_inverse_loss": lambda i: distill.uniform_inverse_loss(
        i.logits, i.other, i.third, i.x, i.alpha, -1.0
    ),
    "order": _order,
    "hybrid": _hybrid,
    "score": lambda i: (
        score.entropy(i.logits, i.z, i.x, i.alpha, -1.0, mask_id=MASK, scaled=True),
        score.step(i.logits, i.z, i.alpha, i.alpha_s, mask_id=MASK, scaled=True, key=i.key),
    ),
    "d3pm": lambda i: (
        d3pm.loss(i.logits, i.z, i.x, i.alpha, i.alpha_s, mask_id=MASK),
        d3pm.step(i.logits, i.z, i.alpha, i.alpha_s, mask_id=MASK, key=i.key),
    ),
    "guidance.cfg": lambda i: masked.step(
        guidance.cfg(i.head, i.other_head, 1.5), i.z, i.alpha, i.alpha_s, MASK, key=i.key
    ),
    "guidance.cfg_uniform_step": lambda i: (
        guidance.cfg_uniform_step(i.logits, i.other, i.x, i.alpha, i.alpha_s, 1.5, key=i.key),
        guidance.cfg_uniform_step(i.head, i.other_head, i.x, i.alpha, i.alpha_s, 1.5, key=i.key),
        guidance.cfg_uniform_log_probs(i.logits, i.other, i.x, i.alpha, i.alpha_s, 1.5),
    ),
    "guidance by a classifier": _classifier,
    "guidance by an autoregressive model": _arpc,
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_the_same_on_every_device(name: str, device: str) -> None:
    found, wanted = (tree_leaves(CASES[name](Inputs(where))) for where in (device, "cpu"))
    assert {x.device.type for x in found} == {device}
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


#: Steps that a sampling loop captures once: with their levels and keys as tensors they never wait for a GPU.
STEPS: dict[str, Callable[[Inputs], Any]] = {
    "masked.step": lambda i: masked.step(i.logits, i.z, i.alpha, i.alpha_s, MASK, key=i.key),
    "masked.corrupt": lambda i: masked.corrupt(i.x, i.alpha, MASK, key=i.key),
    "uniform.step": lambda i: uniform.step(i.logits, i.x, i.alpha, i.alpha_s, exclude=MASK, key=i.key),
    "uniform.step of a denoiser": lambda i: uniform.step(
        i.head, i.x, i.alpha, i.alpha_s, parameterization="denoiser", kappa=0.5, key=i.key
    ),
    "uniform.corrupt": lambda i: uniform.corrupt(i.x, i.alpha, VOCAB, exclude=MASK, key=i.key),
    "uniform.correct": lambda i: uniform.correct(i.logits, i.x, i.alpha_s, 2, key=i.key),
    "absorbing_uniform.step": lambda i: absorbing_uniform.step(
        i.logits, i.x, i.x, i.alpha, i.alpha_s, key=i.key
    ),
    "unmask.select": lambda i: unmask.select(i.logits[..., 0], i.z == MASK, top_k=2),
    "hybrid": _hybrid,
    "order": _order,
    "score.step": lambda i: score.step(i.logits, i.z, i.alpha, i.alpha_s, mask_id=MASK, key=i.key),
    "d3pm.step": lambda i: d3pm.step(i.logits, i.z, i.alpha, i.alpha_s, mask_id=MASK, key=i.key),
    "guidance.cfg": CASES["guidance.cfg"],
    "guidance.cfg_uniform_step": CASES["guidance.cfg_uniform_step"],
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_steps_are_captured(name: str) -> None:
    """A replay gives what the call gives, also of other inputs."""
    inputs, others = Inputs("cuda"), Inputs("cuda", seed=100)
    replay = captured(lambda: tuple(tree_leaves(STEPS[name](inputs))))
    for wanted in (tuple(tree_leaves(STEPS[name](inputs))), tuple(tree_leaves(STEPS[name](others)))):
        for a, b in zip(replay(), wanted, strict=True):
            torch.testing.assert_close(a, b)
        inputs.copy_(others)


@quiet
@pytest.mark.parametrize("name", STEPS)
def test_steps_wait_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Inputs(DEVICE)
    with dlcore.use_backend("triton"):
        if ON_GPU:
            STEPS[name](inputs)
        with nothing_waits(monkeypatch):
            STEPS[name](inputs)
