"""Compositions on a GPU's tensors: everything stays there, and is what the CPU makes of the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dlcore import LinearLogits, rng
from dlcore.process import d3pm, distill, duo, guidance, hybrid, masked, order, score

VOCAB, LEAD, MASK = 9, (3, 8), 8


class Inputs:
    """Tensors that are the same on every device."""

    def __init__(self, device: str) -> None:
        def normal(*shape: int, seed: int) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)

        self.logits, self.other, self.third = (normal(*LEAD, VOCAB, seed=seed) for seed in range(3))
        self.head, self.other_head = (
            LinearLogits(normal(*LEAD, 5, seed=seed), normal(VOCAB, 5, seed=7)) for seed in (3, 4)
        )
        self.x = torch.randint(MASK, LEAD, generator=torch.Generator().manual_seed(5)).to(device)
        self.alpha = torch.linspace(0.2, 0.6, LEAD[0], dtype=torch.float64).unsqueeze(1).to(device)
        self.alpha_s = self.alpha + 0.2
        self.key = rng.key(6).to(device)
        self.z = torch.where(torch.arange(LEAD[1]).to(device) % 3 == 0, self.x, MASK)
        self.table = normal(VOCAB, 4, seed=8)


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
