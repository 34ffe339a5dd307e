"""The Markov chain against enumeration of every sequence, and its samples against its own laws."""

import doctest
import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from dlcore.testing import markov
from dlcore.testing.markov import (
    MarkovChain,
    bigram_statistics,
    log_score,
    mask_emission,
    normalise_text,
    perplexity,
    uniform_emission,
)

V = 3
ORDERS = [1, 2, 3]
INF = math.inf
assert_tight = functools.partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_chain(order: int, v: int = V, seed: int = 0, zeros: float = 0.2) -> MarkovChain:
    """Random transitions, a share of them zero, never the one to symbol 0: a single class recurs."""
    rng = generator(100 * order + seed)
    weight = torch.rand((v,) * (order + 1), dtype=torch.float64, generator=rng) ** 2 + 0.01
    dropped = torch.rand(weight.shape, generator=rng) < zeros
    dropped[..., 0] = False
    weight = weight.masked_fill(dropped, 0)
    return MarkovChain(weight / weight.sum(-1, keepdim=True))


def random_emission(length: int, v: int = V, batch: int = 16, seed: int = 0) -> Tensor:
    """Random log emissions; a third are -inf, never symbol 0, so that 0...0 explains every row."""
    rng = generator(seed)
    value = 3 * torch.randn(batch, length, v, dtype=torch.float64, generator=rng)
    impossible = torch.rand(value.shape, generator=rng) < 0.33
    impossible[..., 0] = False
    return value.masked_fill(impossible, -INF)


def sequences(length: int, v: int = V) -> list[tuple[int, ...]]:
    return list(itertools.product(range(v), repeat=length))


def enumerated_stationary(chain: MarkovChain) -> dict[tuple[int, ...], float]:
    """Left eigenvector of the explicit k-gram matrix: shares nothing with the module."""
    contexts = sequences(chain.order, chain.vocab_size)
    index = {context: i for i, context in enumerate(contexts)}
    matrix = np.zeros((len(contexts), len(contexts)))
    for context in contexts:
        for y in range(chain.vocab_size):
            matrix[index[context], index[(*context[1:], y)]] += float(chain.transition[(*context, y)])
    values, vectors = np.linalg.eig(matrix.T)
    law = np.real(vectors[:, np.argmin(np.abs(values - 1))])
    law = law / law.sum()
    return {context: law[i] for context, i in index.items()}


def enumerated_joint(chain: MarkovChain, length: int) -> Tensor:
    """p(x) of every sequence, (V,)*L; below the order, by summing out the later symbols."""
    start = enumerated_stationary(chain)
    law = torch.zeros((chain.vocab_size,) * length, dtype=torch.float64)
    for x in sequences(max(length, chain.order), chain.vocab_size):
        p = start[x[: chain.order]]
        for i in range(chain.order, len(x)):
            p *= float(chain.transition[x[i - chain.order : i + 1]])
        law[x[:length]] += p
    return law


def enumerated_posterior(joint: Tensor, log_emission: Tensor, omit_own: bool) -> Tensor:
    """(B, L, V) probabilities by weighing every sequence with its emissions."""
    batch, length, v = log_emission.shape
    result = torch.zeros(batch, length, v, dtype=torch.float64)
    for x in sequences(length, v):
        for position in range(length):
            weight = joint[x].expand(batch).clone()
            for i in range(length):
                if not (omit_own and i == position):
                    weight *= log_emission[:, i, x[i]].exp()
            result[:, position, x[position]] += weight
    return result / result.sum(-1, keepdim=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_posterior_equals_enumeration(order: int, length: int) -> None:
    chain = random_chain(order)
    joint, emission = enumerated_joint(chain, length), random_emission(length)
    posterior = chain.posterior(emission)
    expected = enumerated_posterior(joint, emission, omit_own=False)
    assert_tight(posterior.denoiser.exp(), expected)
    expected = enumerated_posterior(joint, emission, omit_own=True)
    assert_tight(posterior.leave_one_out.exp(), expected)


@pytest.mark.parametrize("order", ORDERS)
def test_leave_one_out_of_a_certain_observation(order: int) -> None:
    """All revealed: the own emission rules out every other symbol, so nothing could be divided out."""
    chain = random_chain(order)
    x = chain.sample(8, 4, generator=generator(1))
    emission = mask_emission(x, mask_id=V, vocab_size=V)
    posterior = chain.posterior(emission)
    expected = enumerated_posterior(enumerated_joint(chain, 4), emission, omit_own=True)
    assert_tight(posterior.leave_one_out.exp(), expected)
    assert_tight(posterior.denoiser, emission)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_laws_equal_enumeration(order: int, length: int) -> None:
    chain = random_chain(order)
    joint = enumerated_joint(chain, length) if length else torch.ones((), dtype=torch.float64)
    assert_tight(chain.ngram(length), joint)
    assert chain.entropy(length) == pytest.approx(float(torch.special.entr(joint).sum()), abs=1e-12)
    every = torch.tensor(sequences(length), dtype=torch.int64)
    assert_tight(chain.log_likelihood(every).exp(), joint.reshape(-1))


@pytest.mark.parametrize("order", ORDERS)
def test_stationary_law_is_invariant(order: int) -> None:
    chain = random_chain(order)
    following = (chain.stationary.unsqueeze(-1) * chain.transition).sum(0)
    torch.testing.assert_close(following, chain.stationary, rtol=1e-12, atol=1e-15)
    assert float(chain.stationary.sum()) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_iterated_stationary_law_equals_solved(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = random_chain(order).stationary
    monkeypatch.setattr(markov, "_DENSE_CONTEXTS", 0)
    assert_tight(random_chain(order).stationary, solved)


@pytest.mark.parametrize("dense", [0, 2048])
def test_periodic_chain_has_a_stationary_law(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markov, "_DENSE_CONTEXTS", dense)
    cycle = torch.eye(V, dtype=torch.float64).roll(1, dims=1)
    uniform = torch.full((V,), 1 / V, dtype=torch.float64)
    assert_tight(MarkovChain(cycle).stationary, uniform)


@pytest.mark.parametrize("dense", [0, 2048])
@pytest.mark.parametrize("order", ORDERS)
def test_rare_contexts_have_full_relative_precision(
    order: int, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(markov, "_DENSE_CONTEXTS", dense)
    symbol = torch.tensor([0.6, 0.4 - 1e-9, 1e-9], dtype=torch.float64)
    chain = MarkovChain(symbol.expand((V,) * (order + 1)))  # independent symbols, so the law is a product
    expected = torch.ones((), dtype=torch.float64)
    for _ in range(order):
        expected = expected.unsqueeze(-1) * symbol
    torch.testing.assert_close(chain.stationary, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dense", [0, 2048])
def test_transient_contexts_have_probability_zero(dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markov, "_DENSE_CONTEXTS", dense)
    chain = MarkovChain(torch.tensor([[0.5, 0.5, 0], [0.3, 0.7, 0], [0.1, 0.2, 0.7]], dtype=torch.float64))
    assert_tight(chain.stationary, torch.tensor([3, 5, 0], dtype=torch.float64) / 8)
    assert chain.log_likelihood(torch.tensor([[2, 1, 0]])).item() == -INF
    with pytest.raises(ValueError, match="probability zero"):
        chain.posterior(mask_emission(torch.tensor([[2, V, V]]), V, V))


@pytest.mark.parametrize("order", ORDERS)
def test_entropy_rate_is_the_increment_of_entropy(order: int) -> None:
    chain = random_chain(order)
    for length in range(order, order + 3):
        block = [torch.special.entr(chain.ngram(n)).sum() for n in (length, length + 1)]
        assert chain.entropy_rate() == pytest.approx(float(block[1] - block[0]), abs=1e-12)
        increment = chain.entropy(length + 1) - chain.entropy(length)
        assert chain.entropy_rate() == pytest.approx(increment, abs=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_denoiser_follows_from_leave_one_out_under_uniform_noise(order: int) -> None:
    """log D = log p + 1[v = z] log1p(c), normalised; alpha differs from position to position."""
    chain = random_chain(order, v=5)
    z = torch.randint(5, (16, 9), generator=generator(2))
    alpha = torch.rand(16, 9, dtype=torch.float64, generator=generator(3))
    posterior = chain.posterior(uniform_emission(z, alpha, 5))
    bonus = torch.log1p(5 * alpha / (1 - alpha)).unsqueeze(-1) * torch.nn.functional.one_hot(z, 5)
    expected = (posterior.leave_one_out + bonus).log_softmax(-1)
    assert_tight(posterior.denoiser.exp(), expected.exp())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("alpha", [0.0, 1e-9, 0.4, 0.95])
def test_log_score_equals_ratio_of_enumerated_marginals(order: int, alpha: float) -> None:
    chain, length = random_chain(order), 4
    noise = alpha * torch.eye(V, dtype=torch.float64) + (1 - alpha) / V
    marginal = enumerated_joint(chain, length)
    for _ in range(length):  # contracts the first axis, appends it as the last
        marginal = torch.tensordot(marginal, noise, dims=([0], [0]))
    z = torch.tensor(sequences(length))
    score = log_score(chain.posterior(uniform_emission(z, alpha, V)).leave_one_out, z, alpha)
    for axis in range(length):
        for y in range(V):
            other = z.clone()
            other[:, axis] = y
            expected = (marginal[tuple(other.T)] / marginal[tuple(z.T)]).log()
            torch.testing.assert_close(score[:, axis, y], expected, rtol=1e-11, atol=1e-14)


def test_log_score_at_alpha_one_is_its_limit() -> None:
    leave_one_out = torch.tensor([[[0.2, 0.3, 0.5]]], dtype=torch.float64).log()
    z = torch.tensor([[1]])
    score = log_score(leave_one_out, z, torch.tensor([[1.0]], dtype=torch.float64))
    assert_tight(score, leave_one_out - leave_one_out[..., 1:2])


def test_uniform_emission_at_both_ends() -> None:
    z = torch.tensor([[0, 2]])
    nothing, everything = uniform_emission(z, torch.tensor([[0.0, 1.0]], dtype=torch.float64), V)[0]
    torch.testing.assert_close(nothing, torch.full((V,), -math.log(V), dtype=torch.float64))
    assert everything.tolist() == [-INF, -INF, 0.0]
    total = uniform_emission(z, 0.4, V).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones(1, 2, dtype=torch.float64))


def test_mask_emission_also_with_the_mask_inside_the_vocabulary() -> None:
    assert mask_emission(torch.tensor([3, 1]), 3, V).tolist() == [[0, 0, 0], [-INF, 0, -INF]]
    assert mask_emission(torch.tensor([0, 1]), 0, V).tolist() == [[0, 0, 0], [-INF, 0, -INF]]
    assert mask_emission(torch.tensor([-1]), -1, V).tolist() == [[0, 0, 0]]


def test_long_sharp_evidence_stays_finite_and_float32_follows_float64() -> None:
    chain = random_chain(2, v=8, zeros=0)
    z = torch.randint(8, (4, 600), generator=generator(4))  # as unlikely as noise can be, over 600 positions
    emission = uniform_emission(z, 0.9999, 8)
    exact, single = chain.posterior(emission), chain.to(torch.float32).posterior(emission)
    assert single.denoiser.dtype == torch.float32
    for a, b in zip(single, exact, strict=True):
        assert bool(b.isfinite().all())
        torch.testing.assert_close(a.double().exp(), b.exp(), rtol=1e-4, atol=1e-6)


def test_emissions_are_taken_up_to_a_constant_per_position() -> None:
    chain, emission = random_chain(2), random_emission(6)
    shifted = emission + 2000 * torch.randn(16, 6, 1, dtype=torch.float64, generator=generator(5))
    for a, b in zip(chain.posterior(emission), chain.posterior(shifted), strict=True):
        torch.testing.assert_close(a.exp(), b.exp(), rtol=1e-9, atol=1e-9)


def test_impossible_evidence_raises_wherever_it_stands() -> None:
    cycle = MarkovChain(torch.eye(V, dtype=torch.float64).roll(1, dims=1))
    for broken in range(1, 5):
        x = torch.arange(5) % V
        x[broken:] += 1
        with pytest.raises(ValueError, match=r"MarkovChain\.posterior: .* probability zero"):
            cycle.posterior(mask_emission(x[None] % V, V, V))
    nowhere = random_emission(4)
    nowhere[3, 3] = -INF
    with pytest.raises(ValueError, match=r"MarkovChain\.posterior: .* probability zero"):
        random_chain(2).posterior(nowhere)


@pytest.mark.parametrize("order", ORDERS)
def test_samples_follow_the_ngram_law(order: int) -> None:
    """One n-gram per sequence, first, middle or last: counts are multinomial and chi-square applies."""
    chain, batch = random_chain(order), 20_000
    tokens = chain.sample(batch, 9, generator=generator(6))
    for n, first in [(2, 0), (2, 4), (2, 7), (4, 0), (4, 5)]:
        index = sum(tokens[:, first + i] * V ** (n - 1 - i) for i in range(n))
        observed, law = torch.bincount(index, minlength=V**n), chain.ngram(n).reshape(-1)
        assert int(observed[law == 0].sum()) == 0
        likely = law * batch >= 5
        counts = [*observed[likely].tolist(), int(observed[~likely].sum())]
        expected = [*(law * batch)[likely].tolist(), float((law * batch)[~likely].sum())]
        keep = slice(None) if expected[-1] > 0 else slice(-1)
        assert chisquare(counts[keep], expected[keep], sum_check=False).pvalue > 1e-4, (n, first)


@pytest.mark.parametrize("order", ORDERS)
def test_sampled_perplexity_meets_the_entropy_within_five_standard_errors(order: int) -> None:
    chain, length = random_chain(order), 12
    tokens = chain.sample(20_000, length, generator=generator(7))
    score = -chain.log_likelihood(tokens)
    assert abs(float(score.mean()) - chain.entropy(length)) < 5 * float(score.std()) / math.sqrt(20_000)
    assert perplexity(tokens, chain) == pytest.approx(math.exp(float(score.mean()) / length), rel=1e-12)


@pytest.mark.parametrize("length", [0, 1, 2, 3, 7])
def test_sample_shape_and_seed(length: int) -> None:
    chain = random_chain(3)
    a, b = (chain.sample(5, length, generator=generator(8)) for _ in range(2))
    assert a.shape == (5, length)
    assert a.dtype == torch.int64
    assert torch.equal(a, b)


def test_bigram_statistics() -> None:
    chain = random_chain(2, zeros=0)
    statistics = bigram_statistics(torch.tensor([[0, 1, 0], [0, 1, 2]]), chain)
    counts = {(0, 1): 2, (1, 0): 1, (1, 2): 1}
    law = chain.ngram(2)
    assert statistics.entropy == pytest.approx(1.5 * math.log(2), abs=1e-12)
    expected = sum(n / 4 * math.log(n / 4 / float(law[bigram])) for bigram, n in counts.items())
    assert statistics.kl == pytest.approx(expected, abs=1e-12)
    many = bigram_statistics(chain.sample(4000, 50, generator=generator(9)), chain)
    assert 0 <= many.kl < 1e-3
    assert many.entropy == pytest.approx(chain.entropy(2), abs=0.02)
    cycle = MarkovChain(torch.eye(V, dtype=torch.float64).roll(1, dims=1))
    assert bigram_statistics(torch.tensor([[0, 0]]), cycle).kl == INF
    round_trip = bigram_statistics(torch.tensor([[0, 1, 2, 0]]), cycle)
    assert round_trip == pytest.approx((math.log(3), 0), abs=1e-12)


def test_fit_recovers_counts() -> None:
    chain = MarkovChain.fit("aab aab aab", order=1, smoothing=0, alphabet="ab ")
    expected = torch.tensor([[1 / 2, 1 / 2, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    assert_tight(chain.transition, expected)
    assert chain.alphabet == "ab "


def test_fit_smooths_towards_the_lower_order() -> None:
    chain = MarkovChain.fit("abaab", order=2, smoothing=0.5, alphabet="ab")  # pseudo-count mass s V = 1
    unigram = {"a": (3 + 0.5) / 6, "b": (2 + 0.5) / 6}
    after_a = (1 + unigram["a"]) / (3 + 1)  # a is followed by b, a, b
    after_b = (1 + unigram["a"]) / (1 + 1)  # b by a
    expected = {"aa": after_a / 2, "ab": (1 + after_b) / 2, "ba": (1 + after_a) / 2, "bb": after_b}
    for context, p in expected.items():
        assert chain.transition[tuple(chain.encode(context))][0] == pytest.approx(p, abs=1e-12), context


def test_fit_to_a_long_sample_finds_the_chain_again() -> None:
    chain = random_chain(2, zeros=0)
    text = "".join("abc"[i] for i in chain.sample(1, 40_000, generator=generator(10))[0].tolist())
    again = MarkovChain.fit(text, order=2)
    torch.testing.assert_close(again.transition, chain.transition, rtol=0, atol=0.05)
    assert again.entropy_rate() == pytest.approx(chain.entropy_rate(), abs=0.01)


def test_encode_decode_and_normalise() -> None:
    chain = MarkovChain.fit("Hello,\tHELLO  world!", order=1, alphabet="dehlorw ")
    tokens = chain.encode("hello world")
    assert chain.decode(tokens) == "hello world"
    tokens[[0, 5]] = torch.tensor([chain.vocab_size, -1])
    assert chain.decode(tokens) == "_ello_world"
    assert chain.decode(tokens, placeholder="?") == "?ello?world"
    assert normalise_text("  A - b\n\nC. ", "abc ") == "a b c"
    assert normalise_text("A b\nC.", "abc") == "abc"
    assert normalise_text(" A  b\nC. ") == "a b c."
    assert MarkovChain.fit("b a", order=1).alphabet == " ab"


def test_dtype_follows_the_chain() -> None:
    chain = MarkovChain.fit("abracadabra", dtype=torch.float32)
    assert chain.transition.dtype == chain.stationary.dtype == chain.ngram(3).dtype == torch.float32
    assert chain.to(torch.float64).posterior(torch.zeros(1, 4, 5)).denoiser.dtype == torch.float64
    assert chain.posterior(torch.zeros(0, 4, 5)).denoiser.shape == (0, 4, 5)
    assert chain.posterior(torch.zeros(2, 0, 5)).leave_one_out.shape == (2, 0, 5)
    assert chain.log_likelihood(torch.tensor([[0, 1]], dtype=torch.int32)).dtype == torch.float32


CHAIN = MarkovChain.fit("abcabbcacb", order=2)
Z = torch.tensor([[0, 1, 2]])
LOO = torch.zeros(1, 3, 3)
BAD = [
    (lambda: MarkovChain(torch.ones(3)), ValueError, r"MarkovChain: transition must be \(V,\)"),
    (lambda: MarkovChain(torch.ones(3, 2) / 2), ValueError, r"order >= 1, got \(3, 2\)"),
    (lambda: MarkovChain(torch.ones(2, 2, dtype=torch.int64)), TypeError, "must be floating, got"),
    (lambda: MarkovChain(torch.ones(2, 2)), ValueError, "rows must sum to one, worst error 1"),
    (lambda: MarkovChain(torch.tensor([[1.5, -0.5], [0, 1]])), ValueError, "negative numbers or NaN"),
    (lambda: MarkovChain(torch.full((2, 2), math.nan)), ValueError, "negative numbers or NaN"),
    (lambda: MarkovChain(torch.eye(2)), ValueError, "no unique stationary law"),
    (lambda: MarkovChain(torch.ones(2, 2) / 2, "aa"), ValueError, "alphabet must be 2 distinct characters"),
    (lambda: MarkovChain.fit("abc", order=0), ValueError, "MarkovChain.fit: order must be at least 1, got 0"),
    (lambda: MarkovChain.fit("ab", order=2), ValueError, "must keep more than 2 characters, got 2"),
    (lambda: MarkovChain.fit("abc", order=1, alphabet=""), ValueError, "more than 1 characters, got 0"),
    (lambda: MarkovChain.fit("abc", smoothing=-1), ValueError, "smoothing must be finite and not negative"),
    (lambda: MarkovChain.fit("abc", smoothing=INF), ValueError, "smoothing must be finite and not negative"),
    (lambda: CHAIN.to(torch.int64), TypeError, "MarkovChain.to: dtype must be floating"),
    (lambda: CHAIN.encode("abx"), ValueError, "MarkovChain.encode: .* outside the alphabet: 'x'"),
    (lambda: CHAIN.decode(Z), ValueError, r"MarkovChain.decode: tokens must be \(L,\), got \(1, 3\)"),
    (lambda: random_chain(1).encode("a"), ValueError, "MarkovChain.encode: this chain has no alphabet"),
    (lambda: CHAIN.sample(-1, 3), ValueError, "MarkovChain.sample: batch and length must be >= 0"),
    (lambda: CHAIN.ngram(-1), ValueError, "MarkovChain.ngram: n must not be negative, got -1"),
    (lambda: CHAIN.entropy(-1), ValueError, "MarkovChain.entropy: length must not be negative, got -1"),
    (lambda: CHAIN.log_likelihood(Z[0]), ValueError, r"log_likelihood: tokens must be \(B, L\), got \(3,\)"),
    (lambda: CHAIN.log_likelihood(Z + 1), ValueError, r"tokens must lie in \[0, 3\), got 1 to 3"),
    (lambda: CHAIN.log_likelihood(Z.float()), TypeError, "tokens must be integer, got torch.float32"),
    (
        lambda: CHAIN.posterior(torch.zeros(3, 4, 5)),
        ValueError,
        r"MarkovChain.posterior: log_emission must be \(B, L, 3\), got \(3, 4, 5\)",
    ),
    (lambda: CHAIN.posterior(torch.zeros(4, 3)), ValueError, r"must be \(B, L, 3\), got \(4, 3\)"),
    (lambda: CHAIN.posterior(torch.zeros(1, 4, 3, dtype=torch.int64)), TypeError, "must be floating"),
    (lambda: CHAIN.posterior(torch.full((1, 4, 3), INF)), ValueError, r"neither NaN nor \+inf"),
    (lambda: CHAIN.posterior(torch.full((1, 4, 3), math.nan)), ValueError, r"neither NaN nor \+inf"),
    (lambda: uniform_emission(Z, 1.5, 3), ValueError, r"alpha must lie in \[0, 1\], got 1.5"),
    (lambda: uniform_emission(Z, math.nan, 3), ValueError, r"alpha must lie in \[0, 1\]"),
    (lambda: uniform_emission(Z, torch.rand(7), 3), ValueError, r"z.shape \(1, 3\), got \(7,\)"),
    (lambda: uniform_emission(Z, torch.tensor([1]), 3), TypeError, "alpha must be floating"),
    (lambda: uniform_emission(Z, 0.5, 2), ValueError, r"uniform_emission: z must lie in \[0, 2\)"),
    (lambda: mask_emission(Z, 3, 2), ValueError, r"mask_emission: z must lie in \[0, 2\), got 0 to 2"),
    (lambda: log_score(LOO, Z[:, :2], 0.5), ValueError, r"log_score: leave_one_out must be z.shape"),
    (lambda: log_score(LOO, Z + 1, 0.5), ValueError, r"log_score: z must lie in \[0, 3\)"),
    (lambda: log_score(LOO, Z, -0.1), ValueError, r"log_score: alpha must lie in \[0, 1\]"),
    (lambda: bigram_statistics(Z[:, :1], CHAIN), ValueError, r"tokens must be \(B >= 1, L >= 2\)"),
    (lambda: perplexity(Z[:0], CHAIN), ValueError, "perplexity: tokens must not be empty"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_two_closed_classes_are_noticed_by_the_iteration_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markov, "_DENSE_CONTEXTS", 0)
    with pytest.raises(ValueError, match="no unique stationary law"):
        MarkovChain(torch.eye(2))


def test_examples() -> None:
    result = doctest.testmod(markov)
    assert result.attempted > 0
    assert result.failed == 0
