"""Masked diffusion that also masks again what it wrote."""

from __future__ import annotations

from torch import Tensor

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.system import grid
from dlcore import rng
from dlcore.process import masked


class ReMDM(MDLM):
    """MDLM's network, remasking at a capped probability: a position is written twice on average."""

    name = "remdm"
    title = "remasking"
    paper = "arXiv 2503.00307"
    teacher = MDLM

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        for (t, s), k in zip(grid(steps), rng.split(key, steps), strict=True):
            sigma = masked.remask_probability("cap", t, s, eta=1 / steps)
            z = masked.step(self.network(z), z, t, s, self.mask_id, remask=sigma, key=k)
        return z


if __name__ == "__main__":
    main(ReMDM)
