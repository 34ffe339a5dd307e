"""The systems made small enough to test: one layer, sixteen tokens in four blocks."""

from __future__ import annotations

import pytest
import torch

from bench.systems import block_diffusion, blockgen_arpc, catalogue, network, training
from bench.systems.system import System

TALE = (
    "the cat sat on the mat and the rat sat on the hat. a cat that sat on a rat had the rat on the mat. "
    "then the hat ran, and the cat and the rat ran at the hat. "
) * 10
DATA = training.Data(
    torch.tensor([sorted(set(TALE)).index(letter) for letter in TALE]), vocab_size=len(set(TALE))
)
LENGTH, BLOCK = 16, 4


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks and blocks until the test is over."""
    monkeypatch.setattr(network, "LAYERS", 1)
    monkeypatch.setattr(network, "WIDTH", 32)
    for module in (block_diffusion, blockgen_arpc):
        monkeypatch.setattr(module, "BLOCK", BLOCK)


def build(name: str, vocab_size: int = DATA.vocab_size, length: int = LENGTH) -> System:
    """A small system of fixed weights, started from its teacher if it has one."""
    torch.manual_seed(0)
    kind = catalogue.find(name)
    made = kind(vocab_size, length)
    if kind.teacher is not None:
        made.learn_from(build(kind.teacher.name, vocab_size, length))
    return made
