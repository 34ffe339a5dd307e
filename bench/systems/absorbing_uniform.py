"""Uniform-state diffusion with its noise remembered: a token that left its noise is settled."""

from __future__ import annotations

from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.network import Network
from bench.systems.system import grid, levels
from bench.systems.udm_loo import LeaveOneOut
from dlcore import rng
from dlcore.process import absorbing_uniform


class AbsorbingUniform(LeaveOneOut):
    """The network sees the tokens and their noise."""

    name = "absorbing_uniform"
    title = "uniform diffusion, absorbing form"
    paper = "arXiv 2605.22765"

    def build(self) -> nn.Module:
        return Network(self.vocab_size, self.vocab_size, self.length, streams=2)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, noise_key = rng.split(key, 2)
        alpha = levels(len(x), level_key)
        z, u = absorbing_uniform.corrupt(x, alpha, self.vocab_size, key=noise_key)
        logits = self.network(z, u, level=alpha)
        return absorbing_uniform.nelbo(logits, z, u, x, alpha, -1.0).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        start, run = rng.split(key, 2)
        z = u = self.noise(batch, start)
        for (t, s), k in zip(grid(steps), rng.split(run, steps), strict=True):
            z = absorbing_uniform.step(self.network(z, u, level=t), z, u, t, s, key=k)
        return z


if __name__ == "__main__":
    main(AbsorbingUniform)
