"""Flow on the sphere: von Mises-Fisher laws of growing concentration, predictor and corrector."""

from __future__ import annotations

import math

from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.network import Network
from bench.systems.system import levels
from bench.systems.vectors import WIDTH, Embedded, Logits, per_row
from dlcore import LinearLogits, categorical, rng, sphere
from dlcore.sphere import vmf

#: The concentration at which all is decided, and at the share u of the way to it κ = MOST·u².
MOST = 60.0
#: The sum of the corrector's c over a run, and the most per step: the step size is c/(d-1).
CORRECTION, MOST_CORRECTION = 8.0, 0.5


class VonMisesFisher(Embedded):
    """A random fixed table, for a draw of the law has no gradient in its mean; the head is tied to it.

    Every second call of the network corrects. Times are concentrations, on a fixed warp where the paper
    fits one.
    """

    name = "vmf"
    title = "flow on the sphere, von Mises-Fisher"
    paper = "arXiv 2605.05629"
    bound = False
    learnt = False

    def build(self) -> nn.Module:
        return Network(WIDTH, WIDTH, self.length, vectors=True)

    def logits(self, x: Tensor, time: float | Tensor) -> Logits:
        share = (per_row(time, x) / MOST).sqrt()
        direction = self.network(math.sqrt(WIDTH) * x, level=share).materialize()
        return LinearLogits(direction, self.table)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, noise_key = rng.split(key, 2)
        kappa = MOST * levels(len(x), level_key).square()
        z = vmf.sample(self.table[x], kappa, key=noise_key)
        return categorical.cross_entropy(self.logits(z, kappa), x).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        start, run = rng.split(key, 2)
        x = sphere.normalize(rng.normal(start, (batch, self.length, WIDTH)))
        moves = max(steps // 2, 1)
        size = min(CORRECTION / steps, MOST_CORRECTION) / (WIDTH - 1)
        kappa = 0.0
        for i, k in enumerate(rng.split(run, steps - 1)):
            logits = self.logits(x, kappa)
            if i % 2:
                x = sphere.correct(x, sphere.posterior_score(x, logits, self.table, kappa), size, key=k)
            else:
                after = MOST * ((i // 2 + 1) / moves) ** 2
                velocity = sphere.velocity(x, logits, self.table, path="vmf", kappa=kappa)
                x = sphere.step(x, velocity, after - kappa, retraction="normalize")
                kappa = after
        return self.read(x, kappa)


if __name__ == "__main__":
    main(VonMisesFisher)
