"""Masked diffusion: hide tokens, learn to fill them in, write by unmasking at random times."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.network import Network
from bench.systems.system import System, grid, levels
from dlcore import rng
from dlcore.process import masked


class MDLM(System):
    """The mask token is the last one, and the network isn't told the noise level."""

    name = "mdlm"
    title = "masked diffusion"
    paper = "arXiv 2406.07524"

    network: Network

    @property
    def mask_id(self) -> int:
        return self.vocab_size

    def masks(self, batch: int) -> Tensor:
        """(batch, L), nothing written."""
        return torch.full((batch, self.length), self.mask_id)

    def build(self) -> nn.Module:
        return Network(self.vocab_size + 1, self.vocab_size + 1, self.length)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, mask_key = rng.split(key, 2)
        alpha = levels(len(x), level_key)
        z = masked.corrupt(x, alpha, self.mask_id, key=mask_key)
        return masked.nelbo(self.network(z), z, x, alpha, -1.0, self.mask_id).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        for (t, s), k in zip(grid(steps), rng.split(key, steps), strict=True):
            z = masked.step(self.network(z), z, t, s, self.mask_id, key=k)
        return z


if __name__ == "__main__":
    main(MDLM)
