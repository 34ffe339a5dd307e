"""Masked diffusion whose order is learned: every position has schedules of its own."""

from __future__ import annotations

from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.network import Network
from bench.systems.system import grid, levels
from dlcore import LinearLogits, rng
from dlcore.process import order

#: The earliest time: at 0 every velocity is infinite.
EARLIEST = 1e-3


class LoMDM(MDLM):
    """Schedules 1 - α = t^w, w from a small network of the text (forward) and of its noisy form (reverse).

    The gradient through what is masked is estimated from two draws, each the other's baseline.
    """

    name = "lomdm"
    title = "learned order"
    paper = "arXiv 2602.02112"

    def __init__(self, vocab_size: int, length: int, network: nn.Module | None = None) -> None:
        super().__init__(vocab_size, length, network)
        self.forward_order = Network(vocab_size, 1, length, layers=1, width=32)
        self.reverse_order = Network(vocab_size + 1, 1, length, layers=1, width=32)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, *keys = rng.split(key, 3)
        t = levels(len(x), level_key).clamp(min=EARLIEST)
        forward = order.power(t, _exponent(self.forward_order(x)))
        draws = [order.corrupt(x, forward, self.mask_id, key=k) for k in keys]
        losses = [self._bound(x, z, t, forward) for z in draws]
        chances = [order.log_prob(z, forward, self.mask_id).sum(-1) for z in draws]
        return order.rloo(*losses, *chances).mean() / self.length

    def _bound(self, x: Tensor, z: Tensor, t: Tensor, forward: order.Level) -> Tensor:
        """Nats per sequence (B,)."""
        reverse = order.power(t, _exponent(self.reverse_order(z)))
        return order.nelbo(self.network(z), z, x, forward, reverse, self.mask_id).sum(-1)

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        for (t, s), k in zip(grid(steps), rng.split(key, steps), strict=True):
            exponent = _exponent(self.reverse_order(z))
            early, late = (order.power(1 - share, exponent) for share in (t, s))
            z = order.step(self.network(z), z, early, late, self.mask_id, key=k)
        return z


def _exponent(numbers: LinearLogits) -> Tensor:
    """w (B, L) within e^±2 of one another, their geometric mean 1 in each sequence.

    A factor that all share only warps time: it leaves the bound as it is, and grows without end because the
    few times that still count are seldom drawn.
    """
    log_w = numbers.materialize().squeeze(-1).tanh()
    return (log_w - log_w.mean(-1, keepdim=True)).exp()


if __name__ == "__main__":
    main(LoMDM)
