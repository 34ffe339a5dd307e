"""What a system is: a loss and a sampler around a network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from dlcore import rng


class System(nn.Module, ABC):
    """A diffusion language model: its network, what trains it and what it writes.

    A subclass names itself and its paper and builds its network; `loss` and `generate` are composed of
    dlcore's public calls. Nothing but the network is trained; it may be exchanged for exact posteriors.

    Args:
        vocab_size: V, the tokens of a text.
        length: L, of every sequence.
        network: in place of the one that the subclass builds.
    """

    name: ClassVar[str]
    """Its module's."""
    title: ClassVar[str]
    paper: ClassVar[str]
    steps: ClassVar[int] = 64
    """Network calls of a sample in the table."""
    teacher: ClassVar[type[System] | None] = None
    """Whose trained network it starts from. A system that has its teacher's loss isn't trained further."""
    learning_rate: ClassVar[float] = 3e-3
    """At its highest."""
    bound: ClassVar[bool] = True
    """Whether the loss is (a bound of) the negative log-likelihood, in nats per token."""

    def __init__(self, vocab_size: int, length: int, network: nn.Module | None = None) -> None:
        super().__init__()
        self.vocab_size, self.length = vocab_size, length
        self.network = self.build() if network is None else network

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, untrained."""

    @abstractmethod
    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        """What is minimised, a mean in nats per token if `bound`, at text x (B, L).

        Args:
            key: int64 (2,), of this call alone.
            done: the share of the training that is over, in [0, 1].
        """

    @abstractmethod
    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        """Tokens (batch, L) below V, by `steps` calls of the network."""

    def learn_from(self, teacher: System) -> None:
        """Start from the teacher's trained network."""
        self.network.load_state_dict(teacher.network.state_dict())

    @classmethod
    def trains(cls) -> bool:
        """Whether it has a loss of its own."""
        return cls.teacher is None or cls.loss is not cls.teacher.loss


def levels(count: int, key: Tensor) -> Tensor:
    """Noise levels α (count, 1) in (0, 1), one in each of as many equal parts, in random order.

    Their mean varies little between draws.
    """
    order_key, jitter_key = rng.split(key, 2)
    order = rng.uniform(order_key, (count,)).argsort()
    alpha = (order + rng.uniform(jitter_key, (count,))) / count
    # Rounding to float32 may reach the ends.
    return alpha.float().clamp(2**-24, 1 - 2**-24).unsqueeze(1)


def grid(steps: int) -> list[tuple[float, float]]:
    """(α_t, α_s) of every reverse step, from noise to tokens."""
    return [(i / steps, (i + 1) / steps) for i in range(steps)]
