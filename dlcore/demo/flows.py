"""Continuous samplers, each a few lines of `dlcore.bits`, `dlcore.sphere` and `dlcore.process.flow`.

The states are bits, embeddings and points of a sphere; the network is again the chain's exact posterior. A
sampler is a generator over the tokens that its state is read as, int64 (B, L), -1 where the posterior is
still undecided; the last one is the sample. `steps` counts network calls; the last one reads the tokens off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from dlcore import bits, rng, sphere
from dlcore.demo.samplers import Network, Sampler, Shape
from dlcore.process import flow
from dlcore.testing.emissions import bit_logits, gaussian_emission
from dlcore.testing.markov import MarkovChain

#: Of embeddings, and of the sphere. They are drawn at random, of unit norm, times √WIDTH for ELF.
WIDTH = 32
#: The noise that a bitstream starts and ends with: CoBit's.
SIGMA_MAX, SIGMA_MIN = 80.0, 0.08
#: Entropy-gated churn has γ = CHURN/√steps: as steps grow more of it in all, and less per step.
CHURN = 0.7
#: Above this noise the network of the "blind" runs sees no context, only each bit alone.
BLIND = 0.7
#: ELF's scale of noise, and the law of logit t where its embeddings are decided, for the grid.
SCALE, LOGIT_MEAN, LOGIT_STD = 2.0, -0.2, 0.8
#: ELF's γ at 32 steps.
GAMMA = 1.5
#: The noise fraction that a SLERP run ends with, and the concentration of a vMF run: by then all is decided.
LEAST_NOISE, MOST_KAPPA = 0.5, 60.0
#: Logits of bits are cut at the first, log-likelihoods of tokens at minus the second: certain, and finite.
CERTAIN, EXCLUDED = 60.0, 1e4
#: The sum of the corrector's c over a run, and the most per step: the step size is c/(d-1).
CORRECTION, MOST_CORRECTION = 8.0, 0.5


class FlowNetwork(Network):
    """The chain's exact posteriors of continuous states."""

    def __init__(self, chain: MarkovChain) -> None:
        super().__init__(chain)
        self.width = max(1, math.ceil(math.log2(self.vocab_size)))
        self.codes = bits.encode(torch.arange(self.vocab_size), self.width)
        table = rng.normal(rng.key(0), (self.vocab_size, WIDTH))
        self.points = torch.nn.functional.normalize(table, dim=-1)
        self.embeddings = self.points * math.sqrt(WIDTH)

    def residual(self, x: Tensor, sigma: float) -> Tensor:
        """(B, L·w) logits of bits beyond the matched filter, what CoBit's network learns."""
        groups = x.unflatten(-1, (-1, self.width))
        tokens = self._posterior(gaussian_emission(groups, self.codes, sigma)).denoiser
        logits = bit_logits(tokens, self.codes).clamp(-CERTAIN, CERTAIN).flatten(-2)
        return logits - bits.matched_filter(x, sigma)

    def blind_residual(self, x: Tensor, sigma: float) -> Tensor:
        """The same of a network that has not learnt high noise: nothing there."""
        known = self.residual(x, sigma)
        return known if sigma < BLIND else torch.zeros_like(known)

    def embedded(self, x: Tensor, t: float) -> Tensor:
        """(B, L, V) log-probabilities at noisy embeddings of ELF's path."""
        emission = gaussian_emission(x, self.embeddings, SCALE * (1 - t), alpha=t)
        return self._posterior(emission).denoiser

    def on_circles(self, x: Tensor, noise: float) -> Tensor:
        """(B, L, V) log-probabilities at points between tokens and uniform noise."""
        # A point that the solver's error put out of every token's reach says nothing.
        emission = sphere.posterior_logits(x, self.points, noise=noise).clamp_min(-EXCLUDED)
        return self._posterior(emission).denoiser

    def concentrated(self, x: Tensor, kappa: float) -> Tensor:
        """(B, L, V) log-probabilities at points of von Mises-Fisher laws."""
        return self._posterior(sphere.posterior_logits(x, self.points, path="vmf", kappa=kappa)).denoiser


@lru_cache(maxsize=1)
def entropy_schedule(chain: MarkovChain) -> bits.EntropySchedule:
    """Noise levels by how much they decide of the chain's own text, from its exact errors."""
    network = FlowNetwork(chain)
    x = network.codes[chain.sample(8, 64, generator=torch.Generator().manual_seed(0))].flatten(-2)
    levels = torch.logspace(math.log10(SIGMA_MIN), math.log10(SIGMA_MAX), 48)
    errors = []
    for sigma, key in zip(levels.tolist(), rng.split(rng.key(1), len(levels)), strict=True):
        noisy = bits.corrupt(x, sigma, key=key)
        residual = network.residual(noisy, sigma)
        errors.append(bits.loss(residual, noisy, x, sigma, kind="squared").mean())
    return bits.EntropySchedule.fit(
        levels, torch.stack(errors), bins=len(levels), sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX
    )


def _read(log_probs: Tensor, last: bool) -> Tensor:
    """The likeliest tokens; before the last call -1 where none has half of the probability."""
    best, tokens = log_probs.max(-1)
    return tokens if last else tokens.masked_fill(best < math.log(0.5), -1)


def _read_bits(network: FlowNetwork, probs: Tensor, last: bool) -> Tensor:
    """The tokens of probs (B, L·w); before the last call -1 where a bit is undecided."""
    groups = probs.unflatten(-1, (-1, network.width))
    tokens = bits.decode(groups, vocab_size=network.vocab_size)
    undecided = ((groups - 0.5).abs() < 0.25).any(-1)
    return tokens if last else tokens.masked_fill(undecided, -1)


def bitstream(
    network: FlowNetwork,
    shape: Shape,
    steps: int,
    key: Tensor,
    churn: float = 0.0,
    blind: bool = False,
) -> Iterator[Tensor]:
    """CoBit: the flow of bits on a grid of equal entropy, raised by γ = churn/√steps on the way."""
    predict = network.blind_residual if blind else network.residual
    start, *keys = rng.split(key, steps + 1)
    levels = entropy_schedule(network.chain).grid(max(steps, 2), SIGMA_MAX, SIGMA_MIN).tolist()
    gammas = [bits.churn_gamma(sigma, churn * math.sqrt(steps), steps) for sigma in levels[:-1]] + [0.0]
    sigma = levels[0] * (1 + gammas[0])
    x = 0.5 + sigma * rng.normal(start, (shape[0], shape[1] * network.width))
    for i, k in enumerate(keys):
        last = i == steps - 1
        residual = predict(x, sigma)
        after, gamma = (0.0, 0.0) if last else (levels[i + 1], gammas[i + 1])
        x, probs = bits.step(x, residual, sigma, after, gamma_next=gamma, noise_scale=1.0, key=k)
        sigma = after * (1 + gamma)
        yield _read_bits(network, probs, last)


def churned_bitstream(network: FlowNetwork, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """CoBit's entropy-gated churn: as much in every step of the entropic grid."""
    return bitstream(network, shape, steps, key, churn=CHURN)


def blind_bitstream(network: FlowNetwork, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """The flow of a network that errs at high noise: what is decided there stays."""
    return bitstream(network, shape, steps, key, blind=True)


def churned_blind_bitstream(network: FlowNetwork, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """Churn with that network: at lower noise, where it is right, it decides anew."""
    return bitstream(network, shape, steps, key, churn=CHURN, blind=True)


def embedded(
    network: FlowNetwork, shape: Shape, steps: int, key: Tensor, gamma: float = 0.0, exact: bool = True
) -> Iterator[Tensor]:
    """ELF: the flow of embeddings, or its stochastic steps with γ > 0."""
    start, *keys = rng.split(key, steps + 1)
    times = flow.elf_grid(steps, mean=LOGIT_MEAN, std=LOGIT_STD).tolist()
    x = SCALE * rng.normal(start, (*shape, WIDTH))
    read = torch.empty(0)

    def denoise(x: Tensor, t: float | Tensor) -> Tensor:
        nonlocal read
        read = network.embedded(x, float(t))
        return read.exp() @ network.embeddings

    for i, (t, after) in enumerate(pairwise(times)):
        last = i == steps - 1
        if gamma == 0 or last:
            x = flow.step(x, denoise(x, t), t, after)
        else:
            x = flow.sde_step(x, denoise, t, after, gamma, exact=exact, scale=SCALE, key=keys[i])
        yield _read(read, last)


def elf_sde(network: FlowNetwork, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """ELF's stochastic steps with the noise that keeps the law."""
    return embedded(network, shape, steps, key, gamma=GAMMA)


def elf_official(network: FlowNetwork, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """ELF's stochastic steps as its code has them, with too little noise."""
    return embedded(network, shape, steps, key, gamma=GAMMA, exact=False)


def _uniform(shape: Shape, key: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rng.normal(key, (*shape, WIDTH)), dim=-1)


def great_circles(network: FlowNetwork, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """S-FLM: great circles towards the posterior's tokens."""
    x = _uniform(shape, key)
    levels = torch.linspace(1, LEAST_NOISE, max(steps, 2)).tolist()[:steps]
    for i, s in enumerate(levels):
        logits = network.on_circles(x, s)
        yield _read(logits, i == steps - 1)
        if i < steps - 1:
            velocity = sphere.velocity(x, logits, network.points, path="slerp", noise=s)
            x = sphere.step(x, velocity, s - levels[i + 1])


def von_mises_fisher(
    network: FlowNetwork, shape: Shape, steps: int, key: Tensor, corrector: bool = False
) -> Iterator[Tensor]:
    """vMF: a flow of growing concentration; with `corrector` every second call is Langevin's."""
    start, run = rng.split(key, 2)
    x = _uniform(shape, start)
    levels = torch.linspace(0, MOST_KAPPA, max(steps // 2 + 1 if corrector else steps, 2)).tolist()
    size = min(CORRECTION / steps, MOST_CORRECTION) / (WIDTH - 1)
    at, corrected = 0, True
    for i, k in enumerate(rng.split(run, steps)):
        kappa, last = levels[at], i == steps - 1
        logits = network.concentrated(x, kappa)
        yield _read(logits, last)
        if last:
            break
        if not corrected:
            score = sphere.posterior_score(x, logits, network.points, kappa)
            x, corrected = sphere.correct(x, score, size, key=k), True
        else:
            velocity = sphere.velocity(x, logits, network.points, path="vmf", kappa=kappa)
            x = sphere.step(x, velocity, levels[at + 1] - kappa, retraction="normalize")
            at, corrected = at + 1, not corrector


def corrected_von_mises_fisher(
    network: FlowNetwork, shape: Shape, steps: int, key: Tensor
) -> Iterator[Tensor]:
    """vMF with its predictor-corrector."""
    return von_mises_fisher(network, shape, steps, key, corrector=True)


FLOWS: dict[str, Sampler] = {
    "bits": Sampler("bitstream, flow", bitstream),
    "bits-churn": Sampler("bitstream, entropy-gated churn", churned_bitstream),
    "blind": Sampler("bitstream, blind network, flow", blind_bitstream, exact=False),
    "blind-churn": Sampler("bitstream, blind network, churn", churned_blind_bitstream, exact=False),
    "slerp": Sampler("sphere, great circles (S-FLM)", great_circles),
    "vmf": Sampler("sphere, vMF", von_mises_fisher),
    "vmf-corrector": Sampler("sphere, vMF with corrector", corrected_von_mises_fisher),
    "elf": Sampler("embedding, flow (ELF)", embedded),
    "elf-sde": Sampler("embedding, SDE, exact noise", elf_sde),
    "elf-official": Sampler("embedding, SDE, official noise", elf_official, exact=False),
}
