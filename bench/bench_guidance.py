"""Classifier-free guidance of a uniform process: one step of two streams, dense and as linear heads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.case import Case, Shape, Work, name, nbytes, normal, random_tokens, rows, tokens_in_range
from dlcore import LinearLogits, rng
from dlcore.process import guidance

#: Sequences, tokens of each, V; D of a head.
SHAPE, SMALL, TINY, WIDTH = (8, 128, 50_257), (8, 128, 32), (2, 3, 11), 768
ALPHA_T, ALPHA_S, GAMMA = 0.4, 0.5, 2.0


def posteriors(cond: Tensor, uncond: Tensor, z: Tensor) -> Tensor:
    """D-CFG as it is mostly written: both posteriors over V, their logarithms blended, a Gumbel-max draw."""
    vocab, kept = cond.shape[-1], ALPHA_T / ALPHA_S
    hit = torch.zeros_like(cond).scatter_(-1, z.unsqueeze(-1), 1.0)

    def log_posterior(logits: Tensor) -> Tensor:
        p = torch.softmax(logits, -1)
        joint = (vocab * kept * hit + 1 - kept) * (ALPHA_S * p + (1 - ALPHA_S) / vocab)
        return (joint / joint.sum(-1, keepdim=True)).log()

    guided = torch.softmax(GAMMA * log_posterior(cond) + (1 - GAMMA) * log_posterior(uncond), -1)
    return (guided / (1e-10 - (torch.rand_like(guided) + 1e-10).log())).argmax(-1)


def _dense(shape: Shape) -> Work:
    cond, uncond, z, key = (
        normal(shape),
        normal(shape, seed=1),
        random_tokens(shape[:-1], shape[-1]),
        rng.key(7),
    )
    return Work(
        inputs=(cond, uncond, z),
        functions={
            "dlcore": lambda c, u, z: guidance.cfg_uniform_step(c, u, z, ALPHA_T, ALPHA_S, GAMMA, key=key),
            "eager": posteriors,
        },
        check=tokens_in_range,
        bytes=nbytes(cond, uncond, z, z),
    )


def _linear(shape: Shape) -> Work:
    *lead, vocab = shape
    weight, z, key = normal((vocab, WIDTH)) / WIDTH**0.5, random_tokens(tuple(lead), vocab), rng.key(7)
    cond, uncond = (normal((*lead, WIDTH), seed=seed) for seed in (1, 2))

    def ours(c: Tensor, u: Tensor, z: Tensor) -> Tensor:
        cond, uncond = LinearLogits(c, weight), LinearLogits(u, weight)
        return guidance.cfg_uniform_step(cond, uncond, z, ALPHA_T, ALPHA_S, GAMMA, key=key)

    def check(result: Tensor, *_: Tensor) -> None:
        assert result.shape == z.shape
        assert 0 <= int(result.min()) <= int(result.max()) < vocab

    return Work(
        inputs=(cond, uncond, z),
        functions={"dlcore": ours, "eager": lambda c, u, z: posteriors(c @ weight.T, u @ weight.T, z)},
        check=check,
        bytes=0,
        flops=4 * z.numel() * vocab * WIDTH,
    )


CASES = (
    Case("guidance.cfg_uniform_step", SHAPE, TINY, _dense, "float32"),
    Case("guidance.cfg_uniform_step", SMALL, TINY, _dense, "float32"),
    Case("guidance.cfg_uniform_step", SHAPE, TINY, _linear, f"linear heads, D = {WIDTH}"),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_guidance(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
