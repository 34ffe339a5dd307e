"""Uniform-state diffusion with the leave-one-out posterior."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.network import Network
from bench.systems.system import System, grid, levels
from dlcore import rng
from dlcore.process import uniform


class LeaveOneOut(System):
    """The network's logits are read as the leave-one-out posterior's, the NELBO's optimum."""

    name = "udm_loo"
    title = "uniform diffusion, leave-one-out"
    paper = "arXiv 2605.22765"
    network: Network

    def build(self) -> nn.Module:
        return Network(self.vocab_size, self.vocab_size, self.length)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, noise_key = rng.split(key, 2)
        alpha = levels(len(x), level_key)
        z = uniform.corrupt(x, alpha, self.vocab_size, key=noise_key)
        return uniform.nelbo(self.network(z, level=alpha), z, x, alpha, -1.0).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        start, run = rng.split(key, 2)
        z = self.noise(batch, start)
        for (t, s), k in zip(grid(steps), rng.split(run, steps), strict=True):
            z = uniform.step(self.network(z, level=t), z, t, s, key=k)
        return z

    def noise(self, batch: int, key: Tensor) -> Tensor:
        """Uniform tokens (batch, L)."""
        some = torch.zeros(batch, self.length, dtype=torch.int64)
        return uniform.corrupt(some, 0.0, self.vocab_size, key=key)


if __name__ == "__main__":
    main(LeaveOneOut)
