"""Masked diffusion, written block by block, the tokens that the network is surest of first."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from dlcore import categorical, rng
from dlcore.process import unmask

#: Of the blocks that are written from left to right.
BLOCK = 16


class LLaDA(MDLM):
    """MDLM's network; confidence is the drawn token's probability, from the read that drew it."""

    name = "llada"
    title = "low-confidence remasking"
    paper = "arXiv 2502.09992"
    teacher = MDLM

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        block = torch.arange(self.length) // BLOCK
        blocks = int(block[-1]) + 1
        calls = [range(b * steps // blocks, (b + 1) * steps // blocks) for b in range(blocks)]
        keys = rng.split(key, steps)
        for b, own in enumerate(calls):
            for i in own or [steps - 1]:
                draw = categorical.sample(self.network(z), exclude=self.mask_id, key=keys[i])
                hidden = (z == self.mask_id) & (block == b)
                share = -(-int(hidden[0].sum()) // max(own.stop - i, 1))
                z = torch.where(unmask.select(draw.logprob, hidden, top_k=share), draw.tokens, z)
        return z


if __name__ == "__main__":
    main(LLaDA)
