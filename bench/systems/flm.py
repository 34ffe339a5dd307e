"""Flow language model: one-hot vectors under Gaussian noise, sampled in the dimensions that are read."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from bench.systems.command import main
from bench.systems.system import levels
from bench.systems.vectors import Embedded, Logits
from dlcore import categorical, rng
from dlcore.process import flow

#: Times are whole parts of 1 in this many.
PARTS = 256


@lru_cache
def gammas(vocab_size: int) -> Tensor:
    """γ of α = 0, 1/PARTS ... 1, (PARTS + 1,): FLM's change of time."""
    return flow.flm_gamma(torch.linspace(0, 1, PARTS + 1), vocab_size)


class FLM(Embedded):
    """A state z = γ·one-hot + (1-γ)·noise is seen as zE. E is learnt, with noise in V dimensions; a sample
    stays in E's own. Times are numbers of PARTS.
    """

    name = "flm"
    title = "flow of one-hot vectors"
    paper = "arXiv 2602.16813"
    bound = False

    @property
    def table(self) -> Tensor:
        return self.points

    def logits(self, x: Tensor, time: float | Tensor) -> Logits:
        part = torch.as_tensor(time)
        gamma = gammas(self.vocab_size)[part.long()].to(x.dtype)
        spread = torch.hypot(gamma, (1 - gamma) * self.vocab_size**0.5).unsqueeze(-1)
        logits: Logits = self.network(x / spread, level=part / PARTS)
        return logits

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, noise_key = rng.split(key, 2)
        part = (PARTS * levels(len(x), level_key)).long()
        clean = torch.nn.functional.one_hot(x, self.vocab_size).float()
        z = flow.interpolate(clean, gammas(self.vocab_size)[part], key=noise_key)
        return categorical.cross_entropy(self.logits(z @ self.table, part), x).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        y = flow.flm_noise(flow.flm_factor(self.table.detach()), (batch, self.length), key=key)
        parts = [i * PARTS // steps for i in range(steps)]
        gamma = gammas(self.vocab_size).tolist()
        for part, after in pairwise(parts):
            y = flow.step(y, self.clean(y, part), gamma[part], gamma[after])
        return self.read(y, parts[-1])


if __name__ == "__main__":
    main(FLM)
