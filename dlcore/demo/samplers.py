"""The samplers of the literature, each a few lines of `dlcore.process`, with exact posteriors as the network.

A sampler is a generator over its states, int64 (B, L); the last one is the sample. Noise levels go from
α = 0, pure noise, to α = 1 in equal parts, and `steps` counts network calls, the corrector's among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlcore import categorical, rng
from dlcore.process import absorbing_uniform, masked, uniform, unmask
from dlcore.testing.markov import MarkovChain, Posterior, mask_emission, uniform_emission

#: How often remasking and ψ redraw a position over a whole run: fixed, so that the error falls as 1/steps.
REDRAWS = 1.0


class Network:
    """The chain's exact posteriors, called as a trained network would be. Counts its calls."""

    def __init__(self, chain: MarkovChain) -> None:
        self.chain = chain
        self.vocab_size = chain.vocab_size
        self.mask_id = chain.vocab_size
        self.calls = 0

    def masked(self, z: Tensor) -> Tensor:
        """Logits (B, L, V + 1) at z with masks; the mask's own column is never drawn."""
        emission = mask_emission(z, self.mask_id, self.vocab_size, dtype=self.chain.transition.dtype)
        return torch.nn.functional.pad(self._posterior(emission).denoiser, (0, 1))

    def uniform(self, z: Tensor, alpha: float) -> Posterior:
        """Denoiser and leave-one-out posterior at z under uniform noise, each (B, L, V)."""
        return self._posterior(uniform_emission(z, alpha, self.vocab_size))

    def absorbing(self, z: Tensor, u: Tensor, alpha: float) -> Tensor:
        """The leave-one-out posterior at (z, u), (B, L, V)."""
        return self._posterior(absorbing_emission(z, u, alpha, self.vocab_size)).leave_one_out

    def _posterior(self, log_emission: Tensor) -> Posterior:
        self.calls += 1
        return self.chain.posterior(log_emission)


def absorbing_emission(z: Tensor, u: Tensor, alpha: float, vocab_size: int) -> Tensor:
    """log q(z, u | x = v) up to a constant: certainty where z ≠ u, else log(α·1[v = u] + 1 - α)."""
    agrees = z.unsqueeze(-1) == torch.arange(vocab_size, device=z.device)
    undecided = torch.where(agrees, 0.0, math.log1p(-alpha) if alpha < 1 else -math.inf)
    settled = torch.where(agrees, 0.0, -math.inf)
    return torch.where((z == u).unsqueeze(-1), undecided, settled)


Shape = tuple[int, int]
#: (its chapter's network, shape, steps, key) -> states.
Sample = Callable[[Any, Shape, int, Tensor], Iterator[Tensor]]


def _levels(steps: int) -> list[tuple[float, float]]:
    """(α_t, α_s) of every step."""
    return [(i / steps, (i + 1) / steps) for i in range(steps)]


def _masks(network: Network, shape: Shape) -> Tensor:
    return torch.full(shape, network.mask_id)


def _noise(network: Network, shape: Shape, key: Tensor) -> Tensor:
    return uniform.corrupt(torch.zeros(shape, dtype=torch.int64), 0.0, network.vocab_size, key=key)


def masked_ancestral(network: Network, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """MDLM: unmask at random times (arXiv 2406.07524)."""
    z = _masks(network, shape)
    for (t, s), k in zip(_levels(steps), rng.split(key, steps), strict=True):
        z = masked.step(network.masked(z), z, t, s, network.mask_id, key=k)
        yield z


def masked_confidence(network: Network, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """Keep the draws of highest probability, as many in every step: MaskGIT's and LLaDA's order."""
    z = _masks(network, shape)
    for left, k in zip(range(steps, 0, -1), rng.split(key, steps), strict=True):
        draw = categorical.sample(network.masked(z), exclude=network.mask_id, key=k)
        hidden = z == network.mask_id
        count = -(-int(hidden[0].sum()) // left)
        z = torch.where(unmask.select(draw.logprob, hidden, top_k=count), draw.tokens, z)
        yield z


def remdm(network: Network, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """ReMDM: also mask again, with a capped probability (arXiv 2503.00307)."""
    z = _masks(network, shape)
    for (t, s), k in zip(_levels(steps), rng.split(key, steps), strict=True):
        sigma = masked.remask_probability("cap", t, s, eta=min(1.0, REDRAWS / steps))
        z = masked.step(network.masked(z), z, t, s, network.mask_id, remask=sigma, key=k)
        yield z


def uniform_plug_in(network: Network, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """The known mistake: the denoiser where the bridge wants the leave-one-out posterior."""
    start, run = rng.split(key, 2)
    z = _noise(network, shape, start)
    for (t, s), k in zip(_levels(steps), rng.split(run, steps), strict=True):
        z = uniform.step(network.uniform(z, t).denoiser, z, t, s, key=k)
        yield z


def uniform_loo(
    network: Network, shape: Shape, steps: int, key: Tensor, kappa: float = 1.0
) -> Iterator[Tensor]:
    """Ancestral steps of the leave-one-out posterior (arXiv 2605.22765); kappa < 1 makes it a ψ-sampler."""
    start, run = rng.split(key, 2)
    z = _noise(network, shape, start)
    for (t, s), k in zip(_levels(steps), rng.split(run, steps), strict=True):
        z = uniform.step(network.uniform(z, t).leave_one_out, z, t, s, kappa=kappa, key=k)
        yield z


def psi(network: Network, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """ψ-sampler (arXiv 2602.21185)."""
    return uniform_loo(network, shape, steps, key, kappa=1 - min(1.0, REDRAWS / steps))


def predictor_corrector(
    network: Network,
    shape: Shape,
    steps: int,
    key: Tensor,
    positions: int | None = None,
    score: str = "margin",
) -> Iterator[Tensor]:
    """Ancestral steps, the first half followed each by a redraw of `positions` (arXiv 2605.22765).

    Only positions=1 with score="random" leaves the noisy law invariant; by "margin" the tokens that fit worst
    go first, which trades entropy for perplexity. positions=None: one in 32.
    """
    corrections = (steps - 1) // 2
    redrawn = max(1, shape[1] // 32) if positions is None else positions
    start, run = rng.split(key, 2)
    z = _noise(network, shape, start)
    predictions = steps - corrections
    every_key = rng.split(run, (predictions, 2))
    for i, ((t, s), keys) in enumerate(zip(_levels(predictions), every_key, strict=True)):
        z = uniform.step(network.uniform(z, t).leave_one_out, z, t, s, key=keys[0])
        yield z
        if i < corrections:
            z = uniform.correct(network.uniform(z, s).leave_one_out, z, s, redrawn, score=score, key=keys[1])
            yield z


def absorbing(network: Network, shape: Shape, steps: int, key: Tensor) -> Iterator[Tensor]:
    """The absorbing-state reformulation of uniform diffusion: a token that left its noise is settled."""
    start, run = rng.split(key, 2)
    z = u = _noise(network, shape, start)
    for (t, s), k in zip(_levels(steps), rng.split(run, steps), strict=True):
        z = absorbing_uniform.step(network.absorbing(z, u, t), z, u, t, s, key=k)
        yield z


@dataclass(frozen=True)
class Sampler:
    """A sampler, its name in tables, and whether it reaches the chain's law as steps grow."""

    label: str
    sample: Sample
    exact: bool = True


SAMPLERS: dict[str, Sampler] = {
    "masked": Sampler("masked, ancestral", masked_ancestral),
    "confidence": Sampler("masked, by confidence", masked_confidence, exact=False),
    "remdm": Sampler("masked, remasking (ReMDM)", remdm),
    "plug-in": Sampler("uniform, denoiser plugged in (wrong)", uniform_plug_in, exact=False),
    "loo": Sampler("uniform, leave-one-out", uniform_loo),
    "psi": Sampler("uniform, ψ-sampler", psi),
    "corrector": Sampler("uniform, predictor-corrector", predictor_corrector, exact=False),
    "absorbing": Sampler("uniform, absorbing reformulation", absorbing),
}
