"""Embedded language flows: straight lines from noise to embeddings, followed with new noise on the way."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from bench.systems.command import main
from bench.systems.system import levels
from bench.systems.vectors import WIDTH, Embedded, Logits, per_row
from dlcore import categorical, rng
from dlcore.process import flow

#: The scale of the noise, and the least that 1 - t counts for in the loss.
SCALE, FLOOR = 2.0, 0.05
#: The law of logit t, where embeddings of this width are decided (the paper's of 512 are at -1.5).
MEAN, STD = -0.2, 0.8
#: One sequence in so many learns to be read: at its own time of logit mean and deviation 0.8, more noise.
READERS, READ_LAW, READ_SCALE = 5, 0.8, 5.0
#: γ of the stochastic steps: the paper's at 64 of them.
GAMMA = 1.0


class ELF(Embedded):
    """The table is random and fixed, where the paper has a frozen encoder; no self-conditioning.

    The clean prediction is the posterior's mean embedding.
    """

    name = "elf"
    title = "embedded language flow"
    paper = "arXiv 2605.10938"
    bound = False
    learnt = False

    @property
    def table(self) -> Tensor:
        return math.sqrt(WIDTH) * super().table

    def logits(self, x: Tensor, time: float | Tensor) -> Logits:
        t = per_row(time, x)
        spread = torch.hypot(t, SCALE * (1 - t)).unsqueeze(-1)
        logits: Logits = self.network(x / spread, level=t)
        return logits

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, read_key, noise_key = rng.split(key, 3)
        clean, reader = self.table[x], (torch.arange(len(x)) % READERS == 0).unsqueeze(1)
        t = torch.sigmoid(MEAN + STD * torch.special.ndtri(levels(len(x), level_key)))
        at = torch.where(reader, torch.sigmoid(READ_LAW + READ_LAW * rng.normal(read_key, x.shape)), t)
        scale = torch.where(reader, READ_SCALE, SCALE)
        z = flow.interpolate(clean, at, scale=scale, key=noise_key)
        logits = self.logits(z, torch.where(reader, 1.0, t))
        # The state cancels in the difference of two velocities.
        error = flow.velocity_from_clean(clean, categorical.expectation(logits, self.table), t, floor=FLOOR)
        return torch.where(reader, categorical.cross_entropy(logits, x), error.square().mean(-1)).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        start, *keys = rng.split(key, steps)
        times = flow.elf_grid(max(steps - 1, 1), mean=MEAN, std=STD).tolist()[:steps]
        x = SCALE * rng.normal(start, (batch, self.length, WIDTH))
        for (t, after), k in zip(pairwise(times), keys, strict=True):
            gamma = GAMMA if after < 1 else 0.0
            x = flow.sde_step(x, self.clean, t, after, gamma, scale=SCALE, key=k)
        return self.read(x, 1.0)


if __name__ == "__main__":
    main(ELF)
