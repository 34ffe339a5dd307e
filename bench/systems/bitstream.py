"""Bitstream diffusion: tokens as noisy bits, noise levels where the bits are decided."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bench.systems.command import main
from bench.systems.network import Network
from bench.systems.system import System, levels
from dlcore import bits, rng

#: The noise that training sees at least, that sampling ends with, and that both start with.
LEAST, END, MOST = 0.02, 0.08, 80.0
#: Of the errors that the schedule is fitted to, log-spaced, and how much of one each new error replaces.
BINS, RENEWED = 48, 0.05
#: Entropy-gated churn has γ = CHURN/√steps.
CHURN = 0.7


class Bitstream(System):
    """CoBit: a network of the residual beyond the matched filter, squared loss; no self-conditioning.

    `residual` is all that the sampler knows of the text; exact ones may stand in its place.
    """

    name = "bitstream"
    title = "bitstream diffusion"
    paper = "arXiv 2605.07013"
    bound = False

    def __init__(self, vocab_size: int, length: int, network: nn.Module | None = None) -> None:
        self.width = max(1, math.ceil(math.log2(vocab_size)))
        super().__init__(vocab_size, length, network)
        sigma = torch.logspace(math.log10(LEAST), math.log10(MOST), 2 * BINS + 1)[1::2]
        self.register_buffer("middles", sigma, persistent=False)
        # Of Gaussians as wide as a fair bit, until there are the network's own.
        self.register_buffer("errors", 0.25 * sigma**2 / (sigma**2 + 0.25))
        self.middles: Tensor
        self.errors: Tensor

    def build(self) -> nn.Module:
        return Network(self.width, self.width, self.length, vectors=True)

    def residual(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        """Logits (B, L·w) of noisy bits x (B, L·w) beyond their matched filter; sigma (B,) or a number."""
        seen = bits.patch(bits.scale_input(x, sigma), self.width)
        level = torch.log(torch.as_tensor(sigma) / LEAST) / math.log(2 * MOST / LEAST)
        return bits.unpatch(self.network(seen, level=level.unsqueeze(-1)).materialize())

    def schedule(self) -> bits.EntropySchedule:
        """The law of noise levels by the errors so far."""
        return bits.EntropySchedule.fit(self.middles, self.errors, bins=BINS, sigma_min=LEAST, sigma_max=MOST)

    def loss(self, x: Tensor, key: Tensor, done: float) -> Tensor:
        level_key, noise_key = rng.split(key, 2)
        clean = bits.unpatch(bits.encode(x, self.width))
        sigma = torch.as_tensor(self.schedule().quantile(levels(len(x), level_key).squeeze(1))).float()
        noisy = bits.corrupt(clean, sigma, key=noise_key)
        error = bits.loss(self.residual(noisy, sigma), noisy, clean, sigma)
        if self.training:
            self._remember(sigma, error.detach())
        return (bits.edm_weight(sigma) * error).mean()

    def generate(self, batch: int, steps: int, key: Tensor) -> Tensor:
        start, *keys = rng.split(key, steps + 1)
        sigmas = self.schedule().grid(max(steps, 2), MOST, END).tolist()[:steps]
        gammas = [bits.churn_gamma(sigma, CHURN * math.sqrt(steps), steps) for sigma in sigmas[:-1]] + [0.0]
        sigma = sigmas[0] * (1 + gammas[0])
        x = 0.5 + sigma * rng.normal(start, (batch, self.length * self.width))
        for after, gamma, k in zip(sigmas[1:], gammas[1:], keys, strict=False):
            x, _ = bits.step(
                x, self.residual(x, sigma), sigma, after, gamma_next=gamma, noise_scale=1.0, key=k
            )
            sigma = after * (1 + gamma)
        probs = bits.posterior(x, sigma, self.residual(x, sigma))
        return bits.decode(bits.patch(probs, self.width), vocab_size=self.vocab_size)

    def _remember(self, sigma: Tensor, error: Tensor) -> None:
        nearest = (sigma.log().unsqueeze(1) - self.middles.log()).abs().argmin(1)
        count = torch.bincount(nearest, minlength=BINS)
        mean = torch.bincount(nearest, weights=error, minlength=BINS) / count.clamp_min(1)
        self.errors.lerp_(mean.float(), 1 - (1 - RENEWED) ** count)


if __name__ == "__main__":
    main(Bitstream)
