"""Flow on the sphere: great circles from uniform noise to the tokens' unit vectors."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from bench.systems.command import main
from bench.systems.system import levels
from bench.systems.vectors import WIDTH, Embedded, Logits, per_row
from dlcore import categorical, rng, sphere

#: The share of noise at which all is decided, in so few dimensions (0.88 in the paper's 768).
LEAST = 0.5


class SLERP(Embedded):
    """S-FLM: a learnt table of unit vectors, even times, cross-entropy. Times are shares of noise."""

    name = "slerp"
    title = "flow on the sphere, great circles"
    paper = "arXiv 2605.11125"
    bound = False

    def logits(self, x: Tensor, time: float | Tensor) -> Logits:
        logits: Logits = self.network(math.sqrt(WIDTH) * x, level=(1 - per_row(time, x)) / (1 - LEAST))
        return logits

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, noise_key = rng.split(key, 2)
        share = 1 - (1 - LEAST) * levels(len(x), level_key)
        noise = rng.normal(noise_key, (*x.shape, WIDTH))
        z = sphere.slerp(self.table[x], sphere.normalize(noise), share)
        return categorical.cross_entropy(self.logits(z, share), x).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        x = sphere.normalize(rng.normal(key, (batch, self.length, WIDTH)))
        times = torch.linspace(1, LEAST, max(steps, 2)).tolist()[:steps]
        for s, after in pairwise(times):
            velocity = sphere.velocity(x, self.logits(x, s), self.table, noise=s)
            x = sphere.step(x, velocity, s - after)
        return self.read(x, times[-1])


if __name__ == "__main__":
    main(SLERP)
