"""Sample metrics against naive loops and numbers known by hand."""

import math

import pytest
import torch
from torch import Tensor

from dlcore import LinearLogits
from dlcore.process import metrics

EOS = 0


def naive(logits: Tensor, tokens: Tensor, eos_id: int | None, average: str) -> float:
    """Token by token."""
    log_p = torch.log_softmax(logits.double(), -1)
    sums, weights = [], []
    for b in range(len(tokens)):
        ended, lost, counted = bool(tokens[b, 0] == eos_id), 0.0, 0
        for i in range(1, tokens.shape[1]):
            token = int(tokens[b, i])
            if token != eos_id or not ended:
                lost -= float(log_p[b, i - 1, token])
                counted += 1
            ended = ended or token == eos_id
        sums.append(lost)
        weights.append(counted)
    if average == "token":
        return math.exp(sum(sums) / sum(weights))
    rows = [s / w for s, w in zip(sums, weights, strict=True) if w]
    return math.exp(sum(rows) / len(rows))


def samples(batch: int, length: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (batch, length), generator=g)
    # Rows that end early and go on, that start with the end, and that are nothing else.
    tokens[0, 3:] = EOS
    tokens[1, 4:6] = EOS
    tokens[2, 0] = EOS
    tokens[3] = EOS
    return torch.randn(batch, length, vocab, generator=g), tokens


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("average", metrics.AVERAGES)
@pytest.mark.parametrize("eos_id", [None, EOS])
def test_perplexity_is_the_naive_loops(eos_id: int | None, average: str, linear: bool) -> None:
    logits, tokens = samples(7, 9, 6, seed=1)
    judge = metrics.GenerativePerplexity(eos_id, average=average)
    for at in (slice(0, 3), slice(3, 7)):
        judge.update(LinearLogits(logits[at], torch.eye(6)) if linear else logits[at], tokens[at])
    assert judge.compute() == pytest.approx(naive(logits, tokens, eos_id, average), rel=1e-6)


def test_weights_by_hand() -> None:
    """a, eos, b, eos with p(token) = 1/2, 1/4, 1/8: the second eos does not count, the b after eos does."""
    tokens = torch.tensor([[1, EOS, 2, EOS]])
    p = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [1 / 3, 1 / 3, 1 / 3]])
    judge = metrics.GenerativePerplexity(EOS)
    judge.update(p.log()[None], tokens)
    assert judge.compute() == pytest.approx((2 * 4) ** (1 / 2))
    plain = metrics.GenerativePerplexity()
    plain.update(p.log()[None], tokens)
    assert plain.compute() == pytest.approx((2 * 4 * 8) ** (1 / 3))


def test_averages_differ_as_defined() -> None:
    """Rows of 1 and 3 scored tokens, at 1/2 and 1/8 each."""
    tokens = torch.tensor([[1, EOS, EOS, EOS], [1, 1, 1, 1]])
    p = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.125, 0.375]])
    logits = p.log().unsqueeze(1).expand(2, 4, 3)
    for average, wanted in (("token", (2 * 8**3) ** (1 / 4)), ("sequence", (2 * 8) ** (1 / 2))):
        judge = metrics.GenerativePerplexity(EOS, average=average)
        judge.update(logits, tokens)
        assert judge.compute() == pytest.approx(wanted)


def test_function_batches_and_cuts() -> None:
    table, tokens = torch.randn(6, 6, generator=torch.Generator().manual_seed(2)), samples(7, 9, 6, seed=3)[1]
    seen: list[tuple[int, ...]] = []

    def model(x: Tensor) -> LinearLogits:
        assert not torch.is_grad_enabled()
        seen.append(tuple(x.shape))
        return LinearLogits(torch.nn.functional.one_hot(x, 6).float(), table)

    whole = metrics.generative_perplexity(model, tokens, eos_id=EOS, batch_size=3)
    assert seen == [(3, 9), (3, 9), (1, 9)]
    assert whole == pytest.approx(naive(table.T[tokens], tokens, EOS, "token"), rel=1e-6)
    seen.clear()
    cut = metrics.generative_perplexity(model, tokens, eos_id=EOS, context=4)
    # Pieces of 4, 4 and 1: the last has nothing to score.
    assert seen == [(7, 4), (7, 4)]
    pieces = torch.cat([tokens[:, :4], tokens[:, 4:8]])
    assert cut == pytest.approx(naive(table.T[pieces], pieces, EOS, "token"), rel=1e-6)


def test_sums_are_float64() -> None:
    """A float32 sum of 2^25 ones stops at 2^24."""
    judge = metrics.GenerativePerplexity()
    judge._total, judge._weight = torch.tensor(2.0**25).double(), torch.tensor(2.0**25).double()
    judge.update(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64))
    assert isinstance(judge._weight, Tensor)
    assert judge._weight.dtype == torch.float64
    assert float(judge._weight) == 2**25 + 1


def test_perplexity_at_the_ends() -> None:
    assert math.isnan(metrics.GenerativePerplexity().compute())
    judge = metrics.GenerativePerplexity(EOS)
    judge.update(torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64))
    assert math.isnan(judge.compute())
    # A token that the judge excludes: infinite where it counts, nothing where it does not.
    logits = torch.tensor([[-torch.inf, 0.0, 0.0]]).expand(1, 3, 3)
    judge.update(logits, torch.tensor([[EOS, EOS, 1]]))
    assert judge.compute() == pytest.approx(2.0)
    judge.update(logits, torch.tensor([[1, EOS, 1]]))
    assert judge.compute() == math.inf


def test_token_entropy() -> None:
    found = metrics.token_entropy(torch.tensor([[0, 0, 1, 2], [7, 7, 7, 7], [4, 3, 2, 1]]))
    wanted = torch.tensor([1.0397207708, 0.0, math.log(4)], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    tokens = torch.randint(20, (3, 5, 64), generator=torch.Generator().manual_seed(4))
    tokens[0, 0] += 2**40
    for at, sequence in zip(metrics.token_entropy(tokens).flatten(), tokens.flatten(0, 1), strict=True):
        share = torch.unique(sequence, return_counts=True)[1].double() / 64
        assert float(at) == pytest.approx(float(-(share * share.log()).sum()), abs=1e-12)
    assert metrics.token_entropy(torch.tensor([3])) == 0
    assert metrics.token_entropy(torch.zeros(0, 4, dtype=torch.int64)).shape == (0,)


TOKENS, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)
BAD = [
    (
        lambda: metrics.GenerativePerplexity(average="mean"),
        ValueError,
        "GenerativePerplexity: average must be one of 'token', 'sequence', got 'mean'",
    ),
    (
        lambda: metrics.GenerativePerplexity("</s>"),
        TypeError,
        "GenerativePerplexity: eos_id must be an int, got str '</s>'",
    ),
    (
        lambda: metrics.GenerativePerplexity().update(LOGITS, TOKENS[:, :2]),
        ValueError,
        r"GenerativePerplexity.update: tokens must have shape \(2, 3\), got \(2, 2\)",
    ),
    (
        lambda: metrics.GenerativePerplexity().update(LOGITS[:, :1], TOKENS[:, :1]),
        ValueError,
        r"GenerativePerplexity.update: tokens must be \(B, L\), L >= 2, got \(2, 1\)",
    ),
    (
        lambda: metrics.GenerativePerplexity().update(LOGITS, TOKENS + 4),
        ValueError,
        r"GenerativePerplexity.update: tokens must lie in \[0, 4\), got 4",
    ),
    (
        lambda: metrics.generative_perplexity(lambda x: LOGITS, TOKENS, context=1),
        ValueError,
        "generative_perplexity: context must be at least 2, got 1",
    ),
    (
        lambda: metrics.generative_perplexity(lambda x: LOGITS, TOKENS[0]),
        ValueError,
        r"generative_perplexity: tokens must be \(B, L\), got \(3,\)",
    ),
    (
        lambda: metrics.token_entropy(TOKENS[:, :0]),
        ValueError,
        r"token_entropy: tokens must be \(..., L\), L >= 1, got \(2, 0\)",
    ),
    (lambda: metrics.token_entropy(LOGITS), TypeError, "token_entropy: tokens must be an int64 Tensor"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"metrics.{message}"):
        call()
