"""Exact figures of sampled text under the true chain."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from dlcore.testing.markov import BigramStatistics, MarkovChain, bigram_statistics


@dataclass(frozen=True)
class Figures:
    """What a batch of sequences is worth. Entropies and divergences in nats."""

    perplexity: float
    """exp(-log p / L) under the chain."""
    perplexity_error: float
    """Its standard error over sequences."""
    bigram_entropy: float
    bigram_kl: float
    """KL(the bigrams of the batch || the chain's)."""


@dataclass(frozen=True)
class Truth:
    """The chain's own figures: exact, and those of its own samples at the demo's sample size.

    A finite batch has too little bigram entropy and too much divergence even if it is drawn from the chain
    itself, so the second is what a perfect sampler would show.
    """

    perplexity: float
    bigram_entropy: float
    same_size: Figures
    spread: Figures
    """Standard deviations of `same_size` over batches."""


@dataclass(frozen=True)
class Result:
    """One sampler at one number of steps."""

    sampler: str
    steps: int
    seconds: float
    figures: Figures
    text: str
    """The first sequence."""


def measure(tokens: Tensor, chain: MarkovChain) -> Figures:
    """Figures of tokens (B, L)."""
    loss = -chain.log_likelihood(tokens).double() / tokens.shape[1]
    perplexity = math.exp(float(loss.mean()))
    error = float(loss.std()) / math.sqrt(len(loss)) if len(loss) > 1 else math.nan
    bigrams: BigramStatistics = bigram_statistics(tokens, chain)
    return Figures(perplexity, perplexity * error, bigrams.entropy, bigrams.kl)


def truth(chain: MarkovChain, batch: int, length: int, seed: int, repeats: int = 16) -> Truth:
    """The chain's figures, and the mean and spread of `repeats` batches that it draws itself."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [measure(chain.sample(batch, length, generator=generator), chain) for _ in range(repeats)]
    columns = list(zip(*(vars(figures).values() for figures in drawn), strict=True))
    return Truth(
        perplexity=math.exp(chain.entropy(length) / length),
        bigram_entropy=float(torch.special.entr(chain.ngram(2).double()).sum()),
        same_size=Figures(*(statistics.fmean(column) for column in columns)),
        spread=Figures(*(statistics.stdev(column) for column in columns)),
    )
