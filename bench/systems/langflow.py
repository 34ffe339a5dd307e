"""LangFlow: embeddings in log-SNR time, at noise levels that each hold as much of the text's entropy."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.system import levels
from bench.systems.vectors import WIDTH, Embedded, Logits, per_row
from dlcore import LinearLogits, categorical, rng
from dlcore.process import flow

#: Where the law of γ = ln(σ²/α²) starts: as wide as the paper's, where embeddings of this width are decided.
LOCATION, SCALE = 2.0, 0.852
#: Quantiles that are nearer to an end are left out.
CUTOFF = 1e-4
#: γ is shown as a sigmoid of so many of its units.
SHOWN = 4.0


class LangFlow(Embedded):
    """A learnt table of norm √d; the matched filter is part of the head; no self-conditioning.

    The law of γ is fitted beside the network, to the cross-entropy that is left at γ.
    """

    name = "langflow"
    title = "LangFlow"
    paper = "arXiv 2604.11748"
    bound = False

    def __init__(self, vocab_size: int, length: int, network: nn.Module | None = None) -> None:
        super().__init__(vocab_size, length, network)
        #: Location, ln scale, and ln of the entropy at γ = ∞.
        self.law = nn.Parameter(torch.tensor([LOCATION, math.log(SCALE), math.log(math.log(vocab_size))]))

    @property
    def table(self) -> Tensor:
        return math.sqrt(WIDTH) * super().table

    def logits(self, x: Tensor, time: float | Tensor) -> Logits:
        gamma = per_row(time, x)
        own = flow.matched_filter(x, self.table, gamma)
        learnt = self.network(x, level=torch.sigmoid(gamma / SHOWN))
        head = torch.cat((learnt.weight, own.weight), -1)
        return LinearLogits(torch.cat((learnt.hidden, own.hidden), -1), head)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, noise_key = rng.split(key, 2)
        location, scale, _ = self._law()
        share = levels(len(x), level_key).clamp(CUTOFF, 1 - CUTOFF)
        gamma = flow.langflow_gamma(share, location=location, scale=scale).float()
        z = flow.interpolate(self.table[x], gamma, path="lognsr", key=noise_key)
        left = categorical.cross_entropy(self.logits(z, gamma), x)
        middle, spread, whole = self.law[0], self.law[1].exp(), self.law[2].exp()
        fitted = whole * (-(-(gamma - middle) / spread).exp()).exp()
        return left.mean() + (left.detach().mean(-1, keepdim=True) - fitted).square().mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        location, scale, _ = self._law()
        times = flow.langflow_grid(max(steps - 1, 1), location=location, scale=scale, cutoff=CUTOFF).tolist()
        times = times[:steps]
        x = rng.normal(key, (batch, self.length, WIDTH))
        for t, after in pairwise(times):
            x = flow.step(x, self.clean(x, t), t, after, path="lognsr")
        return self.read(x, times[-1])

    def _law(self) -> tuple[float, float, float]:
        location, scale, entropy = self.law.tolist()
        return location, math.exp(scale), math.exp(entropy)


if __name__ == "__main__":
    main(LangFlow)
