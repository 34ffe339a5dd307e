"""The layers of a small transformer with rotary positions, to which each model brings its own attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

#: Of every attention head.
HEAD_DIM = 32

#: (layer, q, k, v), each (B, S, H, D) -> (B, S, H, D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Trunk(nn.Module):
    """Pre-norm layers with heads of 32, and the norm after them.

    Args:
        length: positions 0 to length - 1.
        layers, width: depth, and d, a multiple of 32.
    """

    def __init__(self, length: int, *, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        frequency = 10_000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
        self.register_buffer("angle", torch.arange(length).unsqueeze(1) * frequency, persistent=False)
        self.angle: Tensor

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, wanted: slice = slice(None)) -> Tensor:
        """The `wanted` rows of x (B, S, d) at positions ((B,) S); the last layer computes no others."""
        angle = self.angle[positions].unsqueeze(-2)
        rotation = angle.cos(), angle.sin()
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, partial(attend, i), wanted if i == last else slice(None))
        hidden: Tensor = self.norm(x)
        return hidden


class Layer(nn.Module):
    """Attention and a feed-forward net, each added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_feed = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        wanted: slice,
    ) -> Tensor:
        """The `wanted` rows of x (B, S, d) after the layer; all rows serve as keys."""
        h = self.before_attention(x)
        cos, sin = rotation
        q = self._split(self.query(h[:, wanted]))
        k, v = self._split(self.key_value(h)).chunk(2, -2)
        q = _rotate(q, cos[..., wanted, :, :], sin[..., wanted, :, :])
        mixed = attend(q, _rotate(k, cos, sin), v)
        x = x[:, wanted] + self.out(mixed.flatten(-2))
        fed: Tensor = x + self.feed(self.before_feed(x))
        return fed

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (-1, HEAD_DIM))
        return heads


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x (B, S, H, D), cos and sin (B or none, S, 1, D/2)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)
