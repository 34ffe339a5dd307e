"""Masked diffusion that commits as many tokens at once as their entropies allow."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from dlcore import categorical, rng
from dlcore.process import unmask

#: Nats by which the joint law of what is committed together may miss its parts' product.
BOUND = 0.1


class EntropyBound(MDLM):
    """MDLM's network; the least uncertain positions go first. Calls that remain are used to the last one."""

    name = "entropy_bound"
    title = "entropy-bounded unmasking"
    paper = "arXiv 2505.24857"
    teacher = MDLM

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        for left, k in zip(range(steps, 0, -1), rng.split(key, steps), strict=True):
            draw = categorical.sample(self.network(z), exclude=self.mask_id, key=k)
            hidden = z == self.mask_id
            assert draw.stats is not None
            chosen = unmask.select(draw.stats.entropy, hidden, entropy_bound=BOUND)
            due = -(-hidden.sum(-1) // left)
            at_least = unmask.select(-draw.stats.entropy, hidden, top_k=due)
            z = torch.where(chosen | at_least, draw.tokens, z)
        return z


if __name__ == "__main__":
    main(EntropyBound)
