"""Discrete-time diffusion: the bound of a chain of finitely many steps."""

from __future__ import annotations

from torch import Tensor

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.system import grid, levels
from dlcore import rng
from dlcore.process import d3pm, masked

#: Steps of the chain that is trained.
STEPS = 128


class D3PM(MDLM):
    """D3PM with absorbing noise; the network may give the mask mass, and pays for it."""

    name = "d3pm"
    title = "discrete-time masking"
    paper = "arXiv 2107.03006"

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, mask_key = rng.split(key, 2)
        early = (levels(len(x), level_key) * STEPS).floor().clamp(max=STEPS - 1)
        alpha_t, alpha_s = early / STEPS, (early + 1) / STEPS
        z = masked.corrupt(x, alpha_t, self.mask_id, key=mask_key)
        logits = self.network(z, level=alpha_t)
        return STEPS * d3pm.loss(logits, z, x, alpha_t, alpha_s, mask_id=self.mask_id).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        for (t, s), k in zip(grid(steps), rng.split(key, steps), strict=True):
            logits = self.network(z, level=t)
            z = d3pm.step(logits, z, t, s, mask_id=self.mask_id, subs=s == 1, key=k)
        return z


if __name__ == "__main__":
    main(D3PM)
