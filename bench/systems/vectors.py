"""What systems share whose tokens are vectors and whose network sees noisy ones."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from bench.systems.network import Network
from bench.systems.system import System
from dlcore import LinearLogits, categorical, sphere

Logits = Tensor | LinearLogits

#: Of the tokens' vectors.
WIDTH = 32


class Embedded(System):
    """A system over rows of a table, whose samplers know the text by `logits` alone.

    Exact posteriors may stand in the place of `logits`.
    """

    learnt: ClassVar[bool] = True
    """Whether the table is trained; else it stays as random as it starts."""

    def __init__(self, vocab_size: int, length: int, network: nn.Module | None = None) -> None:
        super().__init__(vocab_size, length, network)
        self.points = nn.Parameter(torch.randn(vocab_size, WIDTH), requires_grad=self.learnt)

    def build(self) -> nn.Module:
        return Network(WIDTH, self.vocab_size, self.length, vectors=True)

    @property
    def table(self) -> Tensor:
        """(V, WIDTH), the clean states of tokens; unit vectors unless a subclass says otherwise."""
        return sphere.normalize(self.points)

    @abstractmethod
    def logits(self, x: Tensor, time: float | Tensor) -> Logits:
        """Of every token at states x (B, L, WIDTH), at a time of the process that broadcasts to (B, L)."""

    def clean(self, x: Tensor, time: float | Tensor) -> Tensor:
        """The expectation of the clean states, (B, L, WIDTH)."""
        return categorical.expectation(self.logits(x, time), self.table)

    def read(self, x: Tensor, time: float | Tensor) -> Tensor:
        """The likeliest tokens (B, L)."""
        return categorical.stats(self.logits(x, time)).argmax


def per_row(value: float | Tensor, x: Tensor) -> Tensor:
    """A time in x's dtype."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)
