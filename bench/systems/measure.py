"""What a trained system is worth, and where its time goes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dlcore
from bench.systems.system import System
from dlcore.demo import measures
from dlcore.testing.markov import MarkovChain


@dataclass(frozen=True)
class Written:
    """A system's samples, and what they took."""

    tokens: Tensor
    seconds: float
    reference_seconds: float
    """The same samples by the torch references."""
    dlcore_share: float
    """Of the seconds, spent in dlcore's ops."""

    @property
    def per_second(self) -> float:
        return len(self.tokens) / self.seconds

    @property
    def reference_per_second(self) -> float:
        return len(self.tokens) / self.reference_seconds


@torch.no_grad()
def write(system: System, batch: int, steps: int, key: Tensor) -> Written:
    """Sample, with the kernels and with the references; each is warmed up by a short run."""

    def timed() -> tuple[Tensor, float]:
        system.generate(batch, min(steps, 4), key)
        start = time.perf_counter()
        result = system.generate(batch, steps, key)
        return result, time.perf_counter() - start

    tokens, seconds = timed()
    with _OpTimer() as timer:
        system.generate(batch, steps, key)
    with dlcore.use_backend("reference"):
        _, reference_seconds = timed()
    return Written(tokens, seconds, reference_seconds, min(1.0, timer.seconds / seconds))


def figures(tokens: Tensor, chain: MarkovChain) -> measures.Figures:
    """Exact perplexity and entropy of tokens (B, L) under the chain fitted to the text."""
    return measures.measure(tokens, chain)


class _OpTimer(TorchDispatchMode):
    """Seconds spent in ops of the library dlcore."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "dlcore":
            return func(*args, **(kwargs or {}))
        start = time.perf_counter()
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.seconds += time.perf_counter() - start
