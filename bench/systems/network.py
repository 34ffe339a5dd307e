"""The one small transformer of all systems: tokens or vectors in, logits that are never stored out."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dlcore import LinearLogits, attention
from dlcore.demo.transformer import HEAD_DIM, Trunk

#: Octaves in which a network sees a noise level in [0, 1].
OCTAVES = 8
#: Depth, and d, of a network that isn't told them.
LAYERS, WIDTH = 3, 96


class Network(nn.Module):
    """A transformer in which every position sees every other.

    Args:
        inputs: tokens that may come in, or features of a vector if `vectors`.
        outputs: V of its logits.
        length: L, the most positions.
        streams: sequences of tokens that come in together, their embeddings added.
        vectors: whether (B, L, inputs) comes in instead.
        layers, width: depth, and d, a multiple of 32; LAYERS and WIDTH if None.

    Raises:
        ValueError: a width that is no such multiple.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        length: int,
        *,
        streams: int = 1,
        vectors: bool = False,
        layers: int | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        layers, width = layers or LAYERS, width or WIDTH
        if width % HEAD_DIM:
            raise ValueError(f"Network: width must be a multiple of {HEAD_DIM}, got {width}")
        self.embeddings = nn.ModuleList(_embedding(inputs, width, vectors) for _ in range(streams))
        self.level = nn.Linear(2 * OCTAVES, width, bias=False)
        self.nearby = nn.Conv1d(width, width, kernel_size=5, padding="same")
        self.trunk = Trunk(length, layers=layers, width=width)
        self.head = nn.Linear(width, outputs, bias=False)
        nn.init.zeros_(self.head.weight)

    @property
    def table(self) -> Tensor:
        """Where the first stream's tokens are looked up, (inputs, d)."""
        weight = self.embeddings[0].weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, *streams: Tensor, level: float | Tensor | None = None) -> LinearLogits:
        """Logits (B, L, V) at tokens (B, L) or vectors (B, L, inputs).

        Args:
            streams: as many as were declared.
            level: a noise level in [0, 1], broadcast to (B, L); None for a network that is not told.
        """
        return self.from_mixed(self.embed(*streams, level=level))

    def embed(self, *streams: Tensor, level: float | Tensor | None = None) -> Tensor:
        """What the layers read, (B, L, d); arguments as those of `forward`."""
        embedded = [embed(s) for embed, s in zip(self.embeddings, streams, strict=True)]
        return self.mix(torch.stack(embedded).sum(0), level)

    def mix(self, x: Tensor, level: float | Tensor | None) -> Tensor:
        """Embedded positions x (B, L, d), told the level and their neighbours: spelling is learnt sooner."""
        if level is not None:
            x = x + self.level(_waves(level, x))
        mixed: Tensor = x + self.nearby(x.mT).mT
        return mixed

    def from_mixed(self, x: Tensor) -> LinearLogits:
        """Logits of all positions of x (B, L, d)."""
        hidden = self.trunk(x, torch.arange(x.shape[1], device=x.device), attend_to_all)
        return LinearLogits(hidden, self.head.weight)


def detached(logits: LinearLogits) -> LinearLogits:
    """The same logits, from which no gradient goes back."""
    return LinearLogits(logits.hidden.detach(), logits.weight.detach())


def _embedding(inputs: int, width: int, vectors: bool) -> nn.Module:
    if vectors:
        return nn.Linear(inputs, width)
    table = nn.Embedding(inputs, width)
    nn.init.normal_(table.weight, std=0.5)
    return table


def _waves(level: float | Tensor, x: Tensor) -> Tensor:
    """cos and sin of level·π·2^k, (..., 2·OCTAVES), for x (B, L, d)."""
    level = torch.as_tensor(level, dtype=x.dtype, device=x.device).expand(x.shape[:-1])
    angle = level.unsqueeze(-1) * math.pi * 2.0 ** torch.arange(OCTAVES, device=x.device)
    return torch.cat((angle.cos(), angle.sin()), -1)


def attend_to_all(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a mask: one block."""
    mixed = attention.block_causal(q, k, v, block_size=k.shape[1], q_offset=k.shape[1] - q.shape[1])
    assert isinstance(mixed, Tensor)
    return mixed
