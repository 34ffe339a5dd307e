"""Masked diffusion told what to write: classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.mdlm import MDLM
from bench.systems.network import Network
from bench.systems.system import grid, levels
from dlcore import LinearLogits, rng
from dlcore.process import guidance, masked

#: Classes of a sequence: by the share of token 0 (in text the space), few or many; and not told.
FEW, MANY, UNTOLD = range(3)
#: Above this share it is many: words are short.
SHARE = 1 / 6
#: How often the class isn't told in training.
DROPPED = 0.2
#: Of guidance: 0 is none, 1 the condition.
GAMMA = 2.0


class Guided(MDLM):
    """The network sees the class at every position; what it writes is asked to have short words."""

    name = "guidance"
    title = "classifier-free guidance"
    paper = "arXiv 2412.10193"

    def build(self) -> nn.Module:
        return Network(self.vocab_size + 1, self.vocab_size + 1, self.length, streams=2)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, mask_key, drop_key = rng.split(key, 3)
        alpha = levels(len(x), level_key)
        z = masked.corrupt(x, alpha, self.mask_id, key=mask_key)
        dropped = rng.uniform(drop_key, (len(x),)) < (DROPPED if self.training else 1)
        told = torch.where(dropped, UNTOLD, label(x))
        return masked.nelbo(self._told(z, told), z, x, alpha, -1.0, self.mask_id).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        z = self.masks(batch)
        wanted, untold = torch.full((batch,), MANY), torch.full((batch,), UNTOLD)
        for (t, s), k in zip(grid(steps), rng.split(key, steps), strict=True):
            logits = guidance.cfg(self._told(z, wanted), self._told(z, untold), GAMMA)
            z = masked.step(logits, z, t, s, self.mask_id, key=k)
        return z

    def _told(self, z: Tensor, label: Tensor) -> LinearLogits:
        logits: LinearLogits = self.network(z, label.unsqueeze(1).expand_as(z))
        return logits


def label(x: Tensor) -> Tensor:
    """The class (B,) of x (B, L)."""
    return torch.where((x == 0).double().mean(-1) > SHARE, MANY, FEW)


if __name__ == "__main__":
    main(Guided)
