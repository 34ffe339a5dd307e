"""Masking and uniform noise together, so that what was written wrongly can be seen and mended."""

from __future__ import annotations

from torch import Tensor

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.system import grid, levels
from dlcore import rng
from dlcore.process import hybrid

#: The mass of uniform noise at half time.
UNIFORM = 0.1


class GIDD(MDLM):
    """GIDD: trained by its weighted loss, scored by its NELBO."""

    name = "gidd"
    title = "masking and uniform noise"
    paper = "arXiv 2503.04482"

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, noise_key = rng.split(key, 2)
        t = levels(len(x), level_key)
        at = hybrid.schedule(t, p_uniform=UNIFORM)
        z = hybrid.corrupt(x, at, self.vocab_size + 1, self.mask_id, key=noise_key)
        bound = hybrid.loss if self.training else hybrid.nelbo
        return bound(self.network(z, level=t), z, x, at, self.mask_id).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        for (t, s), k in zip(grid(steps), rng.split(key, steps), strict=True):
            at_t, at_s = (hybrid.schedule(1 - share, p_uniform=UNIFORM) for share in (t, s))
            z = hybrid.step(self.network(z, level=1 - t), z, at_t, at_s, self.mask_id, key=k)
        return z


if __name__ == "__main__":
    main(GIDD)
