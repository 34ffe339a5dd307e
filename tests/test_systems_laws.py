"""With exact posteriors in its network's place, every system writes by the text's law."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from oracles import ROWS, fits
from small_systems import BLOCK, LENGTH, build, shrink
from torch import Tensor, nn

from bench.systems import blockgen_arpc, catalogue, flm, gidd
from bench.systems import guidance as guided
from bench.systems.system import System
from bench.systems.vectors import WIDTH
from dlcore import LinearLogits, rng
from dlcore.demo import flows, measures, samplers
from dlcore.process import hybrid
from dlcore.process._rows import total_variation
from dlcore.testing.emissions import gaussian_emission
from dlcore.testing.markov import MarkovChain, mask_emission, uniform_emission


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


class Exact(nn.Module):
    """Posteriors in a network's place."""

    def __init__(self, posterior: Callable[..., Tensor]) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, *states: Tensor, level: float | None = None) -> Tensor:
        return self.posterior(*states) if level is None else self.posterior(*states, level)


def _masked(system: System, chain: MarkovChain) -> None:
    system.network = Exact(samplers.Network(chain).masked)


def _uniform(system: System, chain: MarkovChain) -> None:
    known = samplers.Network(chain)
    system.network = Exact(lambda z, alpha: known.uniform(z, alpha).leave_one_out)


def _scores(system: System, chain: MarkovChain) -> None:
    known = samplers.Network(chain)
    system.network = Exact(lambda z, alpha: known.masked(z) + math.log(chain.vocab_size))


def _without_mask(system: System, chain: MarkovChain) -> None:
    known = samplers.Network(chain)
    never = torch.tensor([0.0] * chain.vocab_size + [-math.inf])
    system.network = Exact(lambda z, alpha: known.masked(z) + never)


def _hybrid(system: System, chain: MarkovChain) -> None:
    def posterior(z: Tensor, t: float) -> Tensor:
        at = hybrid.schedule(torch.as_tensor(t).expand(z.shape).unsqueeze(-1), p_uniform=gidd.UNIFORM)
        hit = z.unsqueeze(-1) == torch.arange(chain.vocab_size)
        seen = torch.where(hit, at.alpha, 0) + at.uniform / chain.vocab_size
        emission = torch.where(z.unsqueeze(-1) == chain.vocab_size, 0, seen.log()).float()
        return nn.functional.pad(chain.posterior(emission).leave_one_out, (0, 1))

    system.network = Exact(posterior)


def _absorbing(system: System, chain: MarkovChain) -> None:
    def posterior(z: Tensor, u: Tensor, alpha: float | Tensor) -> Tensor:
        emission = uniform_emission(z, 0.5, chain.vocab_size)
        settled = torch.where(emission == emission.amax(-1, keepdim=True), 0, -math.inf)
        lifted = torch.log1p(-torch.as_tensor(alpha).expand(z.shape)).unsqueeze(-1)
        undecided = torch.where(settled == 0, 0, lifted)
        return chain.posterior(torch.where((z == u).unsqueeze(-1), undecided, settled).float()).leave_one_out

    system.network = Exact(posterior)


def _bits(system: System, chain: MarkovChain) -> None:
    system.residual = flows.FlowNetwork(chain).residual


def _known(system: System, chain: MarkovChain) -> flows.FlowNetwork:
    """The exact network of the system's table."""
    known = flows.FlowNetwork(chain)
    system.points.data.copy_(known.points)
    return known


def _elf(system: System, chain: MarkovChain) -> None:
    known = _known(system, chain)
    # The last state has no noise; its posterior is that of very little.
    system.logits = lambda x, t: known.embedded(x, min(float(t), 0.999))


def _one_hot(system: System, chain: MarkovChain) -> None:
    system.points.data.copy_(torch.eye(chain.vocab_size, WIDTH))
    known = flows.FlowNetwork(chain)
    gamma = flm.gammas(chain.vocab_size).tolist()
    system.logits = lambda y, part: (
        known._posterior(gaussian_emission(y, system.table, 1 - gamma[part], alpha=gamma[part])).denoiser
    )


def _lognsr(system: System, chain: MarkovChain) -> None:
    known = _known(system, chain)

    def logits(x: Tensor, gamma: float) -> Tensor:
        power = 1 / (1 + math.exp(-gamma))
        emission = gaussian_emission(x, known.embeddings, math.sqrt(power), alpha=math.sqrt(1 - power))
        return known._posterior(emission).denoiser

    system.logits = logits


def _circles(system: System, chain: MarkovChain) -> None:
    system.logits = _known(system, chain).on_circles


def _concentrated(system: System, chain: MarkovChain) -> None:
    system.logits = _known(system, chain).concentrated


class ExactBlocks(nn.Module):
    """Posteriors of noisy blocks given the clean tokens before them, in the places of both block networks."""

    def __init__(self, chain: MarkovChain, block_size: int) -> None:
        super().__init__()
        self.chain, self.block_size, self.mask_id = chain, block_size, chain.vocab_size

    def forward(self, noisy: Tensor, clean: Tensor, block_size: int | None = None) -> LinearLogits:
        size = block_size or self.block_size
        blocks = [self.last(clean[:, :i], noisy[:, i : i + size]) for i in range(0, noisy.shape[1], size)]
        return LinearLogits(torch.cat(blocks, 1), torch.eye(self.mask_id + 1))

    def last(self, before: Tensor, block: Tensor) -> Tensor:
        """Logits (B, n, V + 1) of a block (B, n), of which nothing behind it is known."""
        emission = mask_emission(torch.cat((before, block), 1), self.mask_id, self.mask_id)
        known = self.chain.posterior(emission.float()).denoiser[:, before.shape[1] :]
        # Finite, as a linear head's are.
        return nn.functional.pad(known.clamp(min=-80), (0, 1))

    def new_cache(self, batch: int) -> CommittedTokens:
        return CommittedTokens(torch.empty(batch, 0, dtype=torch.int64))

    def decode(self, tokens: Tensor, cache: CommittedTokens, num_commit: int = 0) -> Tensor:
        cache.pending, block = tokens[:, :num_commit], tokens[:, num_commit:]
        return self.last(torch.cat((cache.tokens, cache.pending), 1), block)


class CommittedTokens:
    """A cache of the tokens themselves."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = self.pending = tokens

    def commit(self, size: int) -> None:
        self.tokens = torch.cat((self.tokens, self.pending[:, :size]), 1)


def _blocks(system: System, chain: MarkovChain) -> None:
    system.network = ExactBlocks(chain, BLOCK)


def _redone_at_random(system: System, chain: MarkovChain) -> None:
    """Chosen by no look at the tokens: what is redone by how unlikely it is makes sharper texts."""
    _blocks(system, chain)
    keys = itertools.count()
    system.doubts = lambda clean, draft: rng.uniform(rng.key(7, next(keys)), tuple(draft.shape))


#: What puts the chain's posteriors in the place of what was learnt, and network calls that leave next to no
#: error of the steps.
EXACT: dict[str, tuple[Callable[[System, MarkovChain], None], int]] = {
    "mdlm": (_masked, 64),
    "remdm": (_masked, 64),
    "udm_loo": (_uniform, 64),
    "udm_predictor_corrector": (_uniform, 64),
    "absorbing_uniform": (_absorbing, 64),
    "sedd": (_scores, 64),
    "d3pm": (_without_mask, 64),
    "duo": (_uniform, 64),
    "gidd": (_hybrid, 64),
    "block_diffusion": (_blocks, 64),
    "blockgen_arpc": (_redone_at_random, 256),
    "entropy_bound": (_masked, 64),
    "lomdm": (_masked, 64),
    "bitstream": (_bits, 64),
    "elf": (_elf, 64),
    "flm": (_one_hot, 64),
    "langflow": (_lognsr, 64),
    "slerp": (_circles, 64),
    "vmf": (_concentrated, 64),
}
#: Nats of bigrams, and the share of perplexity, that a method itself is off by: the corrector redraws what
#: fits worst, which trades entropy for perplexity; the bound lets dependent tokens go together.
OFF = {"udm_predictor_corrector": 0.2, "entropy_bound": 0.1}
BATCH = 384


@pytest.fixture(scope="module")
def chain() -> MarkovChain:
    """Five tokens that depend much on the one before."""
    weights = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return MarkovChain((1.5 * weights).softmax(-1)).to(torch.float32)


@pytest.fixture(scope="module")
def truth(chain: MarkovChain) -> measures.Truth:
    return measures.truth(chain, BATCH, LENGTH, seed=0)


def blind(chain: MarkovChain) -> MarkovChain:
    """The same tokens, none of which knows the others."""
    return MarkovChain(chain.stationary.expand_as(chain.transition))


def sharp(chain: MarkovChain) -> MarkovChain:
    """Surer than it should be."""
    return MarkovChain((1.25 * chain.transition.log()).softmax(-1))


@torch.no_grad()
def reaches(name: str, posteriors: MarkovChain, chain: MarkovChain, truth: measures.Truth) -> bool:
    """Whether samples with these posteriors have the chain's bigrams and perplexity as its own have."""
    install, steps = EXACT[name]
    system = build(name, chain.vocab_size).eval()
    install(system, posteriors)
    figures = measures.measure(system.generate(BATCH, steps, rng.key(5)), chain)
    return agrees(figures, truth, OFF.get(name, 0.0))


def agrees(figures: measures.Figures, truth: measures.Truth, off: float = 0.0) -> bool:
    own, spread = truth.same_size, truth.spread
    excess = figures.bigram_kl - own.bigram_kl
    error = figures.perplexity - own.perplexity
    return excess < 5 * spread.bigram_kl + off and abs(error) < 5 * spread.perplexity + off * truth.perplexity


@pytest.mark.parametrize("name", EXACT)
def test_exact_posteriors_reach_the_law(name: str, chain: MarkovChain, truth: measures.Truth) -> None:
    assert reaches(name, chain, chain, truth)


@pytest.mark.parametrize("name", EXACT)
def test_blind_posteriors_do_not(name: str, chain: MarkovChain, truth: measures.Truth) -> None:
    assert not reaches(name, blind(chain), chain, truth)


@pytest.mark.parametrize("name", sorted(EXACT.keys() - OFF.keys()))
def test_sharp_posteriors_do_not(name: str, chain: MarkovChain, truth: measures.Truth) -> None:
    assert not reaches(name, sharp(chain), chain, truth)


BOUNDS = sorted(name for name in EXACT if catalogue.find(name).bound and catalogue.find(name).trains())


def excess(name: str, posteriors: MarkovChain, chain: MarkovChain) -> tuple[float, float]:
    """What the loss with these posteriors is above the text's own, in nats per token, and its error."""
    system = build(name, chain.vocab_size).eval()
    EXACT[name][0](system, posteriors)
    draws = rng.split(rng.key(6), 24)
    text = chain.sample(2048, LENGTH, generator=torch.Generator().manual_seed(2))
    # The bound is of this text's likelihood, of which the entropy is the mean over all.
    likelihood = float(chain.log_likelihood(text).mean()) / LENGTH
    found = torch.stack([system.loss(text, key, 1.0) for key in draws])
    return float(found.mean()) + likelihood, float(found.std()) / math.sqrt(len(draws))


@pytest.mark.parametrize("name", BOUNDS)
@torch.no_grad()
def test_exact_posteriors_make_the_bound_the_likelihood(name: str, chain: MarkovChain) -> None:
    gap, error = excess(name, chain, chain)
    assert abs(gap) < 5 * error
    assert error < 0.02
    gap, error = excess(name, blind(chain), chain)
    assert gap > 5 * error


# --- the informed corrector --------------------------------------------------------------------------------


def redone(chain: MarkovChain, drafts: MarkovChain, informed: bool) -> Tensor:
    """The chain's own sequences, the last block redone token by token; that, and the token before it."""
    system = build("blockgen_arpc", chain.vocab_size).eval()
    assert isinstance(system, blockgen_arpc.BlockGen)
    (_blocks if informed else _redone_at_random)(system, drafts)
    x = chain.sample(4 * BATCH, LENGTH, generator=torch.Generator().manual_seed(3))
    clean, z = x[:, :-BLOCK], x[:, -BLOCK:]
    *rounds, last = rng.split(rng.key(8), 4 * BLOCK)
    for key in rounds:
        z = system._draft_and_redo(clean, z, 1 - 1 / BLOCK, key)
    return torch.cat((clean[:, -1:], system._draft_and_redo(clean, z, 1.0, last)), 1)


def test_the_corrector_keeps_the_law_if_it_chooses_at_random(chain: MarkovChain) -> None:
    """One token drawn anew given all others, as often as one likes: Gibbs. What it doubts most goes first
    in BlockGen, which trades entropy for perplexity."""
    truth = measures.truth(chain, 4 * BATCH, BLOCK + 1, seed=0)

    def figures(drafts: MarkovChain, informed: bool) -> measures.Figures:
        return measures.measure(redone(chain, drafts, informed), chain)

    assert agrees(figures(chain, False), truth)
    assert not agrees(figures(blind(chain), False), truth)
    assert not agrees(figures(sharp(chain), False), truth)
    informed = figures(chain, True)
    assert informed.perplexity < 0.95 * truth.perplexity
    assert informed.bigram_entropy < 0.95 * truth.bigram_entropy


def test_doubts_are_of_each_token_given_those_before(chain: MarkovChain) -> None:
    system = build("blockgen_arpc", chain.vocab_size).eval()
    assert isinstance(system, blockgen_arpc.BlockGen)
    _blocks(system, chain)
    x = chain.sample(20, LENGTH, generator=torch.Generator().manual_seed(6))
    for cut in (0, BLOCK, LENGTH - 1):
        wanted = chain.log_likelihood(x[:, :cut]) - chain.log_likelihood(x)
        torch.testing.assert_close(system.doubts(x[:, :cut], x[:, cut:]).sum(-1), wanted)


# --- guidance ----------------------------------------------------------------------------------------------


class Short(NamedTuple):
    """A chain's law of every sequence of four tokens out of three."""

    sequences: Tensor
    """(81, 4)."""
    law: Tensor
    """(81,) float64."""

    @property
    def vocab_size(self) -> int:
        return 3

    def of_class(self, label: int) -> Tensor:
        """The law given a class, untold as it is."""
        likely = self.law * ((guided.label(self.sequences) == label) | (label == guided.UNTOLD))
        return likely / likely.sum()

    def posterior(self, z: Tensor, labels: Tensor) -> Tensor:
        """Logits (B, 4, V + 1) at z (B, 4), told labels (B, 4), with masks."""
        laws = torch.stack([self.of_class(label) for label in range(3)])[labels[:, 0]]
        seen = z.unsqueeze(1)
        likely = laws * ((seen == self.sequences) | (seen == self.vocab_size)).all(-1)
        counts = torch.einsum("bs,slv->blv", likely, nn.functional.one_hot(self.sequences).double())
        return nn.functional.pad((counts / likely.sum(-1)[:, None, None]).log(), (0, 1)).float()

    def written(self, gamma: float, steps: int) -> Tensor:
        """The law (81,) of what ancestral steps write whose draws are c^γ·u^(1-γ), summed over all paths."""
        v = self.vocab_size
        states = torch.cartesian_prod(*[torch.arange(v + 1)] * 4)
        labels = torch.full_like(states, guided.MANY)
        c, u = (
            self.posterior(states, x)[..., :v].double().exp() for x in (labels, labels * 0 + guided.UNTOLD)
        )
        token = torch.where(c > 0, c**gamma * u ** (1 - gamma), 0) if gamma else u
        token = token / token.sum(-1, keepdim=True)
        reached = (states == v).all(-1).double()
        for i in range(steps):
            leaves = 1 / (steps - i)
            masked = torch.cat((leaves * token, torch.full_like(token[..., :1], 1 - leaves)), -1)
            stays = nn.functional.one_hot(states, v + 1).double()
            each = torch.where((states == v).unsqueeze(-1), masked, stays)
            reached = torch.einsum("s,sa,sb,sc,sd->abcd", reached, *each.unbind(1)).flatten()
        return reached.view([v + 1] * 4)[:v, :v, :v, :v].flatten()


@pytest.fixture(scope="module")
def short() -> Short:
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    chain = MarkovChain((1.5 * weights).softmax(-1))
    sequences = torch.cartesian_prod(*[torch.arange(3)] * 4)
    return Short(sequences, chain.log_likelihood(sequences).exp())


@torch.no_grad()
def guided_draws(
    short: Short, gamma: float, steps: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """Which of the sequences are written, (count,)."""
    monkeypatch.setattr(guided, "GAMMA", gamma)
    system = build("guidance", short.vocab_size, 4).eval()
    system.network = Exact(short.posterior)
    drawn = system.generate(count, steps, rng.key(9))
    return (drawn * 3 ** torch.arange(3, -1, -1)).sum(-1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_guidance_writes_by_the_law_of_its_steps(
    gamma: float, short: Short, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = guided_draws(short, gamma, 3, ROWS // 8, monkeypatch)
    assert fits(drawn, short.written(gamma, 3))
    assert not fits(drawn, short.written(gamma + 0.25, 3))


@pytest.mark.parametrize(("gamma", "label"), [(0.0, guided.UNTOLD), (1.0, guided.MANY)])
def test_guidance_at_its_ends_is_the_chain_and_the_chain_given_the_class(
    gamma: float, label: int, short: Short, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = guided_draws(short, gamma, 64, ROWS // 40, monkeypatch)
    assert fits(drawn, short.written(gamma, 64))
    few, many = (short.written(gamma, steps) for steps in (512, 1024))
    # What is left of one step's draws not knowing of each other falls with the steps.
    assert total_variation(many, short.of_class(label)) < 0.6 * total_variation(few, short.of_class(label))
    assert total_variation(many, short.of_class(label)) < 2e-3
    for other in {guided.UNTOLD, guided.MANY, guided.FEW} - {label}:
        assert total_variation(many, short.of_class(other)) > 0.1


@torch.no_grad()
def test_guidance_is_scored_without_the_class(short: Short) -> None:
    """With exact posteriors the bound is the entropy; told the class it would be below."""
    system = build("guidance", short.vocab_size, 4).eval()
    system.network = Exact(short.posterior)
    weights, count = short.law, 20_000
    x = short.sequences[torch.multinomial(weights, count, True, generator=torch.Generator().manual_seed(5))]
    found = torch.stack([system.loss(x, key, 1.0) for key in rng.split(rng.key(10), 16)])
    error = float(found.std()) / math.sqrt(len(found))
    likelihood = float(short.law.log()[(x * 3 ** torch.arange(3, -1, -1)).sum(-1)].mean()) / 4
    many = float(short.law[guided.label(short.sequences) == guided.MANY].sum())
    told = -(many * math.log(many) + (1 - many) * math.log1p(-many)) / 4
    assert abs(float(found.mean()) + likelihood) < 5 * error
    assert 20 * error < told
