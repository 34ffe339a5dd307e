"""Classifier-based guidance against enumeration and exact laws."""

import itertools
from collections.abc import Callable

import pytest
import torch
from oracles import (
    ROWS,
    V,
    fits,
    fits_given,
    law,
)
from test_guidance import MASK, PARAMETERIZATIONS, bridge, denoiser_of, heads, network, subs, tempered
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import guidance


def bilinear(seed: int, length: int, vocab: int) -> Callable[[Tensor], Tensor]:
    """log p(class | one-hots (B, L, V)), linear in them."""
    weight = torch.randn(length, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return lambda e: (e * weight).sum((-2, -1))


def test_exact_guide_tries_every_token_everywhere() -> None:
    table = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(18))

    def classifier(tokens: Tensor) -> Tensor:
        assert len(tokens) <= 4
        return table[tuple(tokens.unbind(-1))]

    z = torch.tensor([[0, 1, 2], [2, 2, 0]])
    found = guidance.exact_guide(classifier, z, 3, chunk=4)
    for b, at, y in itertools.product(range(2), range(3), range(3)):
        changed = z[b].clone()
        changed[at] = y
        assert found[b, at, y] == table[tuple(changed)]
    where = torch.tensor([[True, False, False], [False, True, True]])
    some = guidance.exact_guide(classifier, z, 3, where=where, chunk=4)
    assert some.equal(found * where.unsqueeze(-1))
    none = guidance.exact_guide(lambda tokens: pytest.fail("called"), z, 3, where=torch.zeros_like(where))
    assert none.equal(torch.zeros(2, 3, 3))


def test_taylor_guide_is_exact_where_the_classifier_is_linear() -> None:
    vocab, eye = 5, torch.eye(5, dtype=torch.float64)
    classifier = bilinear(19, 4, vocab)
    z = torch.randint(vocab, (3, 4), generator=torch.Generator().manual_seed(20))
    exact = guidance.exact_guide(lambda tokens: classifier(eye[tokens]), z, vocab)
    first = guidance.taylor_guide(classifier, z, eye)
    assert first.shape == (3, 4, vocab)
    ratio = first.materialize() - first.materialize().gather(-1, z.unsqueeze(-1))
    torch.testing.assert_close(ratio, exact - exact.gather(-1, z.unsqueeze(-1)))
    logits = law((3, 4, vocab), seed=21).log()
    for gamma in (0.0, 1.0, 2.3):
        both = [torch.softmax(guidance.cbg(logits, guide, gamma), -1) for guide in (exact, first)]
        torch.testing.assert_close(*both)
    # A gradient, so to first order for any classifier: the error falls with the square of the embeddings.
    bent = [
        (
            guidance.exact_guide(lambda t, s=s: torch.tanh(classifier(s * eye[t])), z, vocab),
            guidance.taylor_guide(lambda e: torch.tanh(classifier(e)), z, s * eye).materialize(),
        )
        for s in (1e-2, 1e-3)
    ]
    errors = [
        float(((a - a.gather(-1, z[..., None])) - (b - b.gather(-1, z[..., None]))).abs().max())
        for a, b in bent
    ]
    assert 0 < errors[1] < errors[0] / 50


def test_linear_guide_stays_linear() -> None:
    gamma = torch.tensor([[0.0, 1.0, 2.5], [-0.5, 0.3, 4.0]])
    for bias, other in itertools.product((False, True), repeat=2):
        logits, guide = heads(11, 2, 3, seed=22, bias=bias), heads(11, 2, 3, seed=23, bias=other)
        found = guidance.cbg(logits, guide, gamma)
        assert isinstance(found, LinearLogits)
        dense = guidance.cbg(logits.materialize(), guide.materialize(), gamma)
        torch.testing.assert_close(found.materialize(), dense, rtol=1e-5, atol=1e-5)
    # A classifier that starts with the very embedding of the head copies no weight.
    tied = heads(11, 2, 3, seed=24)
    guide = guidance.taylor_guide(lambda e: e.square().sum((-2, -1)), torch.zeros(2, 3).long(), tied.weight)
    found = guidance.cbg(tied, guide, 0.7)
    assert isinstance(found, LinearLogits)
    assert found.weight is tied.weight
    torch.testing.assert_close(found.materialize(), tied.materialize() + 0.7 * guide.materialize())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize(("gamma", "temperature"), [(0.0, 1.0), (1.0, 0.6), (2.5, 1.4)])
@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.4, 0.7), (0.0, 0.3), (0.2, 1.0), (0.0, 0.0)])
def test_guided_uniform_step_law(
    alpha_t: float, alpha_s: float, gamma: float, temperature: float, parameterization: str, linear: bool
) -> None:
    p, z = law((V, V), seed=25), torch.arange(V)
    ratio = torch.randn(V, V, generator=torch.Generator().manual_seed(26))
    each = z.repeat(ROWS // (4 * V))
    logits = network(p, z, alpha_t, parameterization).float()[each]
    guide: Tensor | LinearLogits = ratio[each]
    if linear:
        logits, guide = LinearLogits(logits, torch.eye(V)), LinearLogits(ratio[each], torch.eye(V))
    drawn = guidance.cbg_uniform_step(
        logits,
        guide,
        each,
        alpha_t,
        alpha_s,
        gamma,
        parameterization=parameterization,
        temperature=temperature,
        key=dlcore.rng.key(27),
    )
    wanted = bridge(tempered(p, temperature), z, alpha_t, alpha_s) * (gamma * ratio.double()).exp()
    assert fits_given(each, drawn, wanted / wanted.sum(-1, keepdim=True))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("gamma", "temperature"), [(0.0, 1.0), (1.0, 0.6), (2.5, 1.4)])
@pytest.mark.parametrize(("alpha_t", "alpha_s"), [(0.4, 0.7), (0.0, 0.3), (0.2, 1.0)])
def test_guided_masked_step_law(
    alpha_t: float, alpha_s: float, gamma: float, temperature: float, linear: bool
) -> None:
    p, z = law(V, seed=28), torch.arange(V + 1).repeat(ROWS // (4 * V))
    ratio = torch.randn(V + 1, generator=torch.Generator().manual_seed(29))
    logits, guide = (x.expand(len(z), V + 1) for x in (subs(p).float(), ratio))
    eye = torch.eye(V + 1)
    drawn = guidance.cbg_masked_step(
        LinearLogits(logits, eye) if linear else logits,
        LinearLogits(guide, eye) if linear else guide,
        z,
        alpha_t,
        alpha_s,
        MASK,
        gamma,
        temperature=temperature,
        key=dlcore.rng.key(30),
    )
    posterior = (
        torch.cat(
            [
                (alpha_s - alpha_t) * tempered(p, temperature),
                torch.tensor([1 - alpha_s], dtype=torch.float64),
            ]
        )
        * (gamma * ratio.double()).exp()
    )
    wanted = torch.eye(V + 1, dtype=torch.float64)
    wanted[MASK] = posterior / posterior.sum()
    assert fits_given(z, drawn, wanted)


@pytest.mark.parametrize("process", ["masked", "uniform"])
def test_the_exact_classifier_leads_to_the_class(process: str) -> None:
    """One token, γ = 1 and p(class | x_s = y) itself: any chain of steps ends in p(x | class), by Bayes."""
    data, likelihood, count = law(V, seed=31), law(V, seed=32), ROWS // 4
    z = torch.full((count,), MASK) if process == "masked" else torch.arange(V).repeat(count // V)
    if process == "uniform":
        # The prior given the class is uniform too: at α = 0 the token says nothing.
        count = len(z)
    for i, (t, s) in enumerate([(0.0, 0.2), (0.2, 0.7), (0.7, 1.0)]):
        key = dlcore.rng.key(33, i)
        if process == "masked":
            at_mask = (data * likelihood).sum().log().expand(1)
            guide = torch.cat([likelihood.log(), at_mask]).float().expand(count, V + 1)
            z = guidance.cbg_masked_step(
                subs(data).float().expand(count, V + 1), guide, z, t, s, MASK, 1.0, key=key
            )
        else:
            noisy = denoiser_of(data.expand(V, V), torch.arange(V), s) @ likelihood
            z = guidance.cbg_uniform_step(
                data.log().float().expand(count, V),
                noisy.log().float().expand(count, V),
                z,
                t,
                s,
                1.0,
                key=key,
            )
    posterior = data * likelihood
    assert fits(z, posterior / posterior.sum())
