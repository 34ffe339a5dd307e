"""Confidence steps and the leave-one-out probe of uniform diffusion."""

import pytest
import torch
from oracles import V, fits, law, posteriors, uniform_kernel
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import uniform
from dlcore.testing.markov import MarkovChain, uniform_emission


@pytest.mark.parametrize("parameterization", ["loo", "denoiser"])
def test_confidence_step_takes_the_largest_gains(parameterization: str) -> None:
    alpha, vocab = 0.6, 5
    p = law((3, 6, vocab), seed=1)
    z = torch.randint(vocab, (3, 6), generator=torch.Generator().manual_seed(2))
    denoiser = uniform.loo_to_denoiser(p.log(), z, alpha)
    network = p.log() if parameterization == "loo" else denoiser
    best = denoiser.max(-1)
    gain = best.values - denoiser.gather(-1, z.unsqueeze(-1)).squeeze(-1)
    for count in (0, 1, 3, torch.tensor([0, 2, 9])):
        moved = uniform.confidence_step(network, z, alpha, count, parameterization=parameterization)
        for b in range(3):
            k = int(count[b]) if isinstance(count, Tensor) else count
            wanted = z[b].clone()
            for at in gain[b].argsort(descending=True)[:k].tolist():
                wanted[at] = best.indices[b, at]
            assert moved[b].equal(wanted)
    # With all positions it is the denoiser's argmax everywhere, and another step changes nothing.
    whole = uniform.confidence_step(network, z, alpha, 6, parameterization=parameterization)
    assert whole.equal(best.indices)
    # The denoiser of a nearly clean sequence knows z: nothing gains, where leave-one-out logits alone would.
    assert uniform.confidence_step(p.log(), z, 1 - 1e-9, 6).equal(z)


def test_confidence_step_ranks_by_gain_not_by_doubt() -> None:
    """The likelier token of the two gains more: its best alternative is far better."""
    p = torch.tensor([[0.02, 0.9, 0.04, 0.04], [0.01, 0.33, 0.33, 0.33]])
    z = torch.zeros(1, 2, dtype=torch.int64)
    moved = uniform.confidence_step(p.log()[None], z, 0.5, 1, parameterization="denoiser")
    assert moved.tolist() == [[1, 0]]


def test_confidence_step_leaves_prompts_alone() -> None:
    z = torch.zeros(1, 4, dtype=torch.int64)
    logits = torch.tensor([0.0, 5.0, 9.0]).expand(1, 4, 3).clone()
    logits[0, :2] = torch.nan
    alpha = torch.tensor([1.0, 1.0, 0.3, 0.3])
    assert uniform.confidence_step(logits, z, alpha, 4).tolist() == [[0, 0, 2, 2]]
    assert uniform.confidence_step(logits, z, alpha, 4, exclude=2).tolist() == [[0, 0, 1, 1]]
    head = LinearLogits(logits, torch.eye(3))
    assert uniform.confidence_step(head, z, alpha, 1).tolist() == [[0, 0, 2, 0]]
    with pytest.raises(ValueError, match=r"uniform.confidence_step: z must be \(B, L\), got \(4,\)"):
        uniform.confidence_step(logits[0], z[0], alpha, 4)


@pytest.mark.parametrize("parameterization", ["loo", "denoiser"])
def test_probe_of_an_exact_posterior_is_zero(parameterization: str) -> None:
    """Of the chain's posteriors; the denoiser, taken for a leave-one-out posterior, is caught."""
    chain, alpha = MarkovChain.fit("the cat sat on the mat and the rat sat on the hat", order=1), 0.6
    x = chain.sample(5, 7, generator=torch.Generator().manual_seed(6))
    z = uniform.corrupt(x, alpha, chain.vocab_size, key=dlcore.rng.key(3))

    def model(tokens: Tensor) -> Tensor:
        exact = chain.posterior(uniform_emission(tokens, alpha, chain.vocab_size))
        return exact.leave_one_out if parameterization == "loo" else exact.denoiser

    options = {"positions": torch.tensor([0, 2, 3, 5, 6]), "key": dlcore.rng.key(4)}
    found = uniform.loo_probe(model, z, alpha, parameterization=parameterization, **options)
    torch.testing.assert_close(found, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    other = "denoiser" if parameterization == "loo" else "loo"
    assert uniform.loo_probe(model, z, alpha, parameterization=other, **options).max() > 0.1


def test_probe_is_total_variation_between_two_tokens() -> None:
    """A network that copies z: p_l moves by the whole mass that follows the token."""
    exact = posteriors(uniform_kernel(0.4))

    def model(tokens: Tensor) -> Tensor:
        return exact.denoiser[tokens[:, 0], tokens[:, 1]].log()

    z = torch.tensor([[0, 1], [2, 2]])
    at = torch.tensor([0, 1])
    for seed in range(4):
        found = uniform.loo_probe(model, z, 0.4, positions=at, key=dlcore.rng.key(seed))
        for b in range(2):
            laws = []
            for token in range(V):
                changed = z[b].clone()
                changed[at[b]] = token
                laws.append(exact.denoiser[changed[0], changed[1]][at[b]])
            here = laws[int(z[b, at[b]])]
            others = [float((x - here).abs().sum() / 2) for x in laws if x is not here]
            assert min(abs(float(found[b]) - o) for o in others) < 1e-12


def test_probe_draws_positions_and_other_tokens_uniformly() -> None:
    calls: list[Tensor] = []

    def model(tokens: Tensor) -> LinearLogits:
        calls.append(tokens)
        return LinearLogits(torch.zeros(*tokens.shape, 1), torch.zeros(5, 1))

    z = torch.full((20_000, 3), 1)
    uniform.loo_probe(model, z, 0.5, exclude=3, key=dlcore.rng.key(5))
    before, after = calls
    assert before.equal(z)
    moved = after != z
    assert bool((moved.sum(-1) == 1).all())
    assert fits(moved.int().argmax(-1), torch.ones(3, dtype=torch.float64))
    assert fits(after[moved], torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64))


def test_probe_checks_its_arguments() -> None:
    z = torch.zeros(2, 3, dtype=torch.int64)
    for options, message in (
        ({"positions": torch.tensor([0, 3])}, r"positions must lie in \[0, 3\), got 3"),
        ({"positions": torch.tensor([0])}, r"positions must have shape \(2,\), got \(1,\)"),
        ({"parameterization": "x0"}, "parameterization must be one of"),
        ({"exclude": 1}, "the vocabulary must have at least 2 tokens, got 1"),
    ):
        with pytest.raises(ValueError, match=f"uniform.loo_probe: {message}"):
            uniform.loo_probe(lambda x: torch.zeros(2, 3, 2), z, 0.5, **options)
    with pytest.raises(ValueError, match=r"uniform.loo_probe: alpha must lie in \[0, 1\), got 1"):
        uniform.loo_probe(lambda x: torch.zeros(2, 3, 2), z, 1.0)
