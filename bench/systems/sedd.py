"""Score entropy: the network gives ratios of probabilities, and the analytic step follows them."""

from __future__ import annotations

from torch import Tensor

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.system import grid, levels
from dlcore import rng
from dlcore.process import masked, score


class SEDD(MDLM):
    """SEDD with absorbing noise; the network is told the noise level."""

    name = "sedd"
    title = "score entropy"
    paper = "arXiv 2310.16834"

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, mask_key = rng.split(key, 2)
        alpha = levels(len(x), level_key)
        z = masked.corrupt(x, alpha, self.mask_id, key=mask_key)
        log_score = self.network(z, level=alpha)
        return score.entropy(log_score, z, x, alpha, -1.0, mask_id=self.mask_id, scaled=True).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        for (t, s), k in zip(grid(steps), rng.split(key, steps), strict=True):
            z = score.step(self.network(z, level=t), z, t, s, mask_id=self.mask_id, scaled=True, key=k)
        return z


if __name__ == "__main__":
    main(SEDD)
