"""Guidance by an autoregressive model against loops, plain torch and exact laws."""

import pytest
import torch
from oracles import check_compiled, fits
from torch import Tensor

import dlcore
from dlcore import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process import guidance, masked
from dlcore.testing.markov import MarkovChain, mask_emission


def logits_like(*shape: int, seed: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- guided diffusion --------------------------------------------------------------------------------------


def accepted(p: Tensor, tokens: list[int], candidates: list[bool], rule: str, value: float) -> list[bool]:
    """One sequence, token by token."""
    result, going, first = [False] * len(tokens), True, True
    for at, (token, candidate) in enumerate(zip(tokens, candidates, strict=True)):
        if not candidate:
            continue
        likeliest = p[at].topk(2).indices.tolist()
        agrees = {
            "argmax": token == likeliest[0],
            "relative": token in likeliest and bool(p[at, token] >= value * p[at].max()),
            "threshold": bool(p[at, token] >= value),
        }[rule]
        going = going and agrees
        result[at] = going or first
        first = False
    return result


@pytest.mark.parametrize(("rule", "value"), [("argmax", 0), ("relative", 0.5), ("threshold", 0.3)])
def test_verify_accepts_as_a_loop_does(rule: str, value: float) -> None:
    batch, length, vocab = 40, 8, 4
    ar_logits = logits_like(batch, length, vocab, seed=1)
    g = torch.Generator().manual_seed(2)
    likely = ar_logits.argmax(-1)
    other = torch.randint(vocab, likely.shape, generator=g)
    tokens = torch.where(torch.rand(likely.shape, generator=g) < 0.7, likely, other)
    candidates = torch.rand(likely.shape, generator=g) < 0.7
    options = {} if rule == "argmax" else {rule: value}
    found = guidance.verify(ar_logits, tokens, candidates, **options)
    p = torch.softmax(ar_logits, -1)
    wanted = [accepted(p[b], tokens[b].tolist(), candidates[b].tolist(), rule, value) for b in range(batch)]
    assert found.tolist() == wanted
    assert 0.2 < float(found[candidates].float().mean()) < 0.95
    head = LinearLogits(ar_logits, torch.eye(vocab))
    assert guidance.verify(head, tokens, candidates, **options).equal(found)


def test_verify_at_the_ends() -> None:
    ar_logits, tokens = torch.zeros(2, 3, 4), torch.tensor([[3, 2, 1], [0, 0, 0]])
    every = torch.ones(2, 3, dtype=torch.bool)
    # Ties with the argmax agree; an excluded token does not, but the first is taken.
    assert guidance.verify(ar_logits, tokens, every).all()
    assert guidance.verify(ar_logits, tokens, every, exclude=2).tolist() == [[True, False, False], [True] * 3]
    assert not guidance.verify(ar_logits, tokens, ~every).any()
    assert guidance.verify(ar_logits, tokens, every, threshold=1.0).sum(-1).tolist() == [1, 1]
    assert guidance.verify(ar_logits, tokens, every, threshold=0.0).all()
    # Every step takes at least one token, whatever the model says: broken rows agree with nothing.
    assert guidance.verify(torch.full_like(ar_logits, torch.nan), tokens, every).sum(-1).tolist() == [1, 1]
    per_sequence = torch.tensor([[1.0], [0.1]])
    assert guidance.verify(ar_logits, tokens, every, threshold=per_sequence).sum(-1).tolist() == [1, 3]


def test_relative_agreement_takes_the_two_likeliest_alone() -> None:
    ar_logits = torch.tensor([0.4, 0.3, 0.25, 0.05]).log().expand(1, 2, 4)
    every = torch.ones(1, 2, dtype=torch.bool)
    for token, agrees in ((0, True), (1, True), (2, False), (3, False)):
        found = guidance.verify(ar_logits, torch.full((1, 2), token), every, relative=0.5)
        assert found.tolist() == [[True, agrees]]


# --- the informed predictor-corrector ----------------------------------------------------------------------


#: What a score is of, beside which it takes nothing.
READS = {
    "kl": {"logits", "ar_logits"},
    "reverse_kl": {"logits", "ar_logits"},
    "tv": {"logits", "ar_logits"},
    "ar_nll": {"ar_logits", "tokens"},
    "ar_gap": {"ar_logits", "tokens"},
    "ar_entropy": {"ar_logits"},
    "entropy": {"logits"},
    "confidence": {"logits"},
    "margin": {"logits"},
}


def plain_scores(logits: Tensor, ar_logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    log_p, log_q = torch.log_softmax(logits.double(), -1), torch.log_softmax(ar_logits.double(), -1)
    p, q = log_p.exp(), log_q.exp()
    at = log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    two = p.topk(2).values
    return {
        "kl": torch.special.xlogy(q, q).sum(-1) - (q * log_p).nan_to_num(0).sum(-1),
        "reverse_kl": torch.special.xlogy(p, p).sum(-1) - (p * log_q).nan_to_num(0).sum(-1),
        "tv": (p - q).abs().sum(-1) / 2,
        "ar_nll": -at,
        "ar_gap": log_q.amax(-1) - at,
        "ar_entropy": torch.special.entr(q).sum(-1),
        "entropy": torch.special.entr(p).sum(-1),
        "confidence": -p.amax(-1),
        "margin": two[..., 1] - two[..., 0],
    }


@pytest.mark.parametrize("exclude", [None, 5])
@pytest.mark.parametrize("score", guidance.SCORES)
def test_scores_are_those_of_plain_torch(
    score: str, exclude: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, ar_logits = logits_like(3, 4, 9, seed=3), logits_like(3, 4, 9, seed=4)
    tokens = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(5))
    keep = [v for v in range(9) if v != exclude]
    wanted = plain_scores(logits[..., keep], ar_logits[..., keep], tokens)[score]
    for a, b in (
        (logits, ar_logits),
        (LinearLogits(logits, torch.eye(9)), LinearLogits(ar_logits, torch.eye(9))),
        (logits, LinearLogits(ar_logits, torch.eye(9))),
    ):
        for chunk in (rows.GRADIENT_CHUNK, 20):
            with monkeypatch.context() as patch:
                patch.setattr(rows, "GRADIENT_CHUNK", chunk)
                every = {"logits": a, "ar_logits": b, "tokens": tokens}
                given = {name: every[name] for name in READS[score]}
                found = guidance.arpc_score(**given, score=score, exclude=exclude)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert set(guidance.SCORES) == set(plain_scores(logits, ar_logits, tokens))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("score", ["kl", "reverse_kl"])
def test_divergence_without_the_last_token_is_one_read(
    score: str, linear: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, ar_logits = logits_like(3, 4, 9, seed=7), logits_like(3, 4, 9, seed=8)
    wanted = guidance.arpc_score(logits[..., :8], ar_logits[..., :8], score=score)
    pair = [LinearLogits(x, torch.eye(9)) for x in (logits, ar_logits)] if linear else [logits, ar_logits]
    monkeypatch.setattr(rows, "chunks", lambda *_: pytest.fail("by chunks"))
    torch.testing.assert_close(guidance.arpc_score(*pair, score=score, exclude=8), wanted)


@pytest.mark.parametrize("name", ["logits", "ar_logits", "tokens"])
@pytest.mark.parametrize("score", guidance.SCORES)
def test_a_score_takes_what_it_is_of_and_nothing_else(score: str, name: str) -> None:
    every = {"logits": LOGITS, "ar_logits": LOGITS, "tokens": Z}
    others = {n: every[n] for n in READS[score] - {name}}
    needs = name in READS[score]
    assert guidance.arpc_score(**others, **({name: every[name]} if needs else {}), score=score).shape == (
        2,
        3,
    )
    wrong = others if needs else {**others, name: every[name]}
    verb = "needs" if needs else "takes no"
    with pytest.raises(ValueError, match=f"^guidance.arpc_score: score '{score}' {verb} {name}$"):
        guidance.arpc_score(**wrong, score=score)


def test_renoise_takes_the_worst_candidates() -> None:
    score = torch.tensor([[0.1, 0.9, 0.3, 0.8, torch.nan], [5.0, 5.0, 5.0, 5.0, 5.0]])
    tokens = torch.arange(10).view(2, 5)
    block = torch.tensor([[True, False, True, True, True], [False, True, True, True, True]])
    found = guidance.renoise(tokens, score, 0.5, prior=99, candidates=block)
    assert found.tolist() == [[0, 1, 99, 99, 4], [5, 99, 99, 8, 9]]
    for alpha_s, count in ((0.0, 5), (0.2, 4), (0.49, 3), (0.9, 1), (0.999, 1), (1.0, 0)):
        assert int((guidance.renoise(tokens, score, alpha_s, prior=99) == 99).sum()) == 2 * count
    mixed = guidance.renoise(tokens, score, torch.tensor([1.0, 0.4]), prior=99)
    assert (mixed == 99).sum(-1).tolist() == [0, 3]
    none = torch.zeros_like(block)
    assert guidance.renoise(tokens, score, 0.0, prior=99, candidates=none).equal(tokens)


def test_uniform_noise_is_uniform_and_follows_the_key() -> None:
    tokens = torch.zeros(20_000, 2, dtype=torch.int64)
    score = torch.tensor([0.0, 1.0]).expand(20_000, 2)
    key = dlcore.rng.key(7)
    found = guidance.renoise(tokens, score, 0.5, prior="uniform", vocab_size=5, exclude=3, key=key)
    assert bool((found[:, 0] == 0).all())
    assert fits(found[:, 1], torch.tensor([1.0, 1, 1, 0, 1], dtype=torch.float64))
    again = guidance.renoise(
        tokens[:5],
        score[:5],
        0.5,
        prior="uniform",
        vocab_size=5,
        exclude=3,
        key=dlcore.rng.fold_in(key, torch.arange(10).view(5, 2)),
    )
    assert found[:5].equal(again)


def test_both_make_few_steps_likelier() -> None:
    """With the exact denoiser and the exact conditionals of a Markov chain, against plain ancestral steps."""
    chain = MarkovChain.fit("the cat sat on the mat and the rat sat on the hat while a dog ran", order=1)
    mask, batch, length = chain.vocab_size, 64, 16

    def padded(log_p: Tensor) -> Tensor:
        return torch.cat([log_p, torch.zeros_like(log_p[..., :1])], -1).float()

    def diffusion(z: Tensor) -> Tensor:
        return padded(chain.posterior(mask_emission(z, mask, mask)).leave_one_out)

    def autoregressive(x: Tensor) -> Tensor:
        first = chain.stationary.log().expand(batch, 1, mask)
        return padded(torch.cat([first, chain.transition.log()[x[:, :-1]]], 1))

    def loss(x: Tensor) -> float:
        return -float(chain.log_likelihood(x).mean()) / length

    plain = corrected = guided = torch.full((batch, length), mask)
    for i, (t, s) in enumerate([(0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0)]):
        key = dlcore.rng.key(12, i)
        plain = masked.step(diffusion(plain), plain, t, s, mask, key=key)
        logits = diffusion(corrected)
        draft = masked.step(logits, corrected, t, 1.0, mask, key=key)
        score = guidance.arpc_score(
            ar_logits=autoregressive(draft), tokens=draft, score="ar_nll", exclude=mask
        )
        corrected = guidance.renoise(draft, score, s, prior=mask)
    assert loss(corrected) < loss(plain) - 0.2
    for i in range(length):
        draws = dlcore.categorical.sample(diffusion(guided), exclude=mask, key=dlcore.rng.key(13, i)).tokens
        draft = torch.where(guided == mask, draws, guided)
        guided = torch.where(
            guidance.verify(autoregressive(draft), draft, guided == mask, exclude=mask), draft, guided
        )
    assert bool((guided != mask).all())
    assert loss(guided) < loss(plain) - 0.2


def test_compiles_whole_and_once() -> None:
    tokens = torch.randint(9, (2, 6), generator=torch.Generator().manual_seed(8))
    q = logits_like(2, 6, 9, seed=9)
    every = tokens >= 0

    def everything(p: Tensor, t: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        score = guidance.arpc_score(p, q)
        return (
            score,
            guidance.arpc_score(p, q, score="tv", exclude=2),
            guidance.arpc_score(ar_logits=q, tokens=tokens, score="ar_gap"),
            guidance.verify(p, tokens, every, relative=t),
            guidance.renoise(tokens, score, t, prior="uniform", vocab_size=9, key=k),
        )

    levels = torch.linspace(0.1, 0.8, 3, dtype=torch.float64).unbind()
    check_compiled(everything, [(logits_like(2, 6, 9, seed=10), t, dlcore.rng.key(11)) for t in levels])


Z, LOGITS, SCORE = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4), torch.zeros(2, 3)
EVERY = torch.ones(2, 3, dtype=torch.bool)
BAD = [
    (
        lambda: guidance.verify(LOGITS, Z, EVERY, relative=0.5, threshold=0.5),
        ValueError,
        "verify: give relative or threshold, not both",
    ),
    (
        lambda: guidance.verify(LOGITS, Z, EVERY, relative=1.5),
        ValueError,
        r"verify: relative must lie in \[0, 1\], got 1.5",
    ),
    (
        lambda: guidance.verify(LOGITS, Z, Z),
        TypeError,
        r"verify: candidates must be a bool Tensor, got int64 \(2, 3\)",
    ),
    (
        lambda: guidance.verify(LOGITS, Z, EVERY[:1]),
        ValueError,
        r"verify: candidates must have shape \(2, 3\), got \(1, 3\)",
    ),
    (
        lambda: guidance.verify(LOGITS, Z + 4, EVERY),
        ValueError,
        r"verify: tokens must lie in \[0, 4\), got 4",
    ),
    (
        lambda: guidance.arpc_score(ar_logits=LOGITS, tokens=Z + 4, score="ar_nll"),
        ValueError,
        r"arpc_score: tokens must lie in \[0, 4\), got 4",
    ),
    (
        lambda: guidance.arpc_score(LOGITS, LOGITS, score="best"),
        ValueError,
        "arpc_score: score must be one of 'kl'",
    ),
    (
        lambda: guidance.arpc_score(LOGITS, LOGITS[..., :3]),
        ValueError,
        "arpc_score: ar_logits must have the shape of logits",
    ),
    (
        lambda: guidance.arpc_score(LOGITS, LOGITS, exclude=4),
        ValueError,
        r"arpc_score: exclude must lie in \[0, 4\), got 4",
    ),
    (
        lambda: guidance.renoise(Z, SCORE, 0.5, prior="mask"),
        ValueError,
        "renoise: prior must be 'uniform' or a token id, got 'mask'",
    ),
    (
        lambda: guidance.renoise(Z, SCORE, 0.5, prior="uniform"),
        ValueError,
        "renoise: prior 'uniform' needs vocab_size",
    ),
    (
        lambda: guidance.renoise(Z, SCORE, 0.5, prior=3, vocab_size=4),
        ValueError,
        "renoise: vocab_size belongs to prior 'uniform', got prior 3",
    ),
    (
        lambda: guidance.renoise(Z, SCORE, 0.5, prior=-1),
        ValueError,
        "renoise: prior must be 'uniform' or a token id, got -1",
    ),
    (
        lambda: guidance.renoise(Z, SCORE[:1], 0.5, prior=3),
        ValueError,
        r"renoise: score must have shape \(2, 3\), got \(1, 3\)",
    ),
    (
        lambda: guidance.renoise(Z, SCORE, 1.5, prior=3),
        ValueError,
        r"renoise: alpha_s must lie in \[0, 1\], got 1.5",
    ),
    (
        lambda: guidance.renoise(Z[0], SCORE[0], 0.5, prior=3),
        ValueError,
        r"renoise: tokens must be \(B, L\), got \(3,\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"guidance.{message}"):
        call()
