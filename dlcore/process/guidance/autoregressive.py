"""Guidance by an autoregressive model that reads a draft in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.process import _divergences as divergences
from dlcore.process import _rows as rows
from dlcore.process import unmask
from dlcore.process.guidance._sums import Logits


def _candidates(op: str, candidates: Tensor | None, tokens: Tensor) -> Tensor:
    """Where it may choose, all positions if None."""
    checks.sequences(op, "tokens", tokens)
    if candidates is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    checks.mask(op, "candidates", candidates, tokens.shape, tokens.device)
    return candidates


def verify(
    ar_logits: Logits,
    tokens: Tensor,
    candidates: Tensor,
    *,
    relative: float | Tensor | None = None,
    threshold: float | Tensor | None = None,
    exclude: int | None = None,
) -> Tensor:
    """Guided diffusion (FlashDLM): which drafted tokens to unmask, as far as an autoregressive model agrees.

    The diffusion model drafts all masked positions at once (its argmax); the autoregressive model reads the
    draft in one call. From left to right candidates are accepted while it agrees, and the first one always
    is, so that every step moves. It never writes a token of its own. It agrees where, with q = its law,

    - by default the token is its argmax (its ties included);
    - relative r: q(token) >= r·max q and the token is among its two likeliest (published: r = 0.5);
    - threshold θ: q(token) >= θ.

    Departures from the public code: sequences come in batches; positions that are no candidates may lie
    between candidates and are passed over; the threshold rule stops at the first refusal, where the code
    goes on after a token that the autoregressive model drew, and that this never takes; stopping at an
    end-of-sequence token is the caller's.

    Args:
        ar_logits: (B, L, V), at l those of token l given the tokens before l (models give them one late).
        tokens: (B, L) int64, the draft at candidates, what stands elsewhere.
        candidates: (B, L) bool, the masked positions.
        relative: in [0, 1]; threshold: in [0, 1]. At most one; a number or (B, 1).
        exclude: a token id that has probability 0.

    Returns:
        (B, L) bool, a subset of candidates; unmask these.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, both relative and threshold.

    Source:
        FlashDLM, arXiv 2505.21467, and its experimental code.

    Example:
        >>> import torch
        >>> from dlcore.process import guidance
        >>> ar_logits = torch.eye(4)[None]
        >>> draft = torch.tensor([[3, 1, 2, 0]])
        >>> guidance.verify(ar_logits, draft, draft < 3)
        tensor([[False,  True,  True, False]])
    """
    op = "guidance.verify"
    h = categorical.head(op, ar_logits, "ar_logits")
    rows.tokens(op, "tokens", tokens, h)
    candidates = _candidates(op, candidates, tokens)
    if relative is not None and threshold is not None:
        raise ValueError(f"{op}: give relative or threshold, not both")
    argmax, numbers = categorical.row_numbers(op, ar_logits, tokens, None, 1.0, None, exclude)
    _, top, _, _, at, runner_up = numbers.unbind(0)
    if threshold is not None:
        agrees = at >= rows.level(op, "threshold", threshold, tokens.shape, tokens.device).log()
    elif relative is not None:
        share = rows.level(op, "relative", relative, tokens.shape, tokens.device)
        agrees = (argmax == tokens) | ((at >= runner_up) & (at >= top + share.log()))
    else:
        agrees = (argmax == tokens) | (at >= top)
    together = (agrees | ~candidates).int().cumprod(-1).bool()
    return candidates & (together | (candidates.cumsum(-1) == 1))


#: What each score reads.
_READS = {
    "kl": ("logits", "ar_logits"),
    "reverse_kl": ("logits", "ar_logits"),
    "tv": ("logits", "ar_logits"),
    "ar_nll": ("ar_logits", "tokens"),
    "ar_gap": ("ar_logits", "tokens"),
    "ar_entropy": ("ar_logits",),
    "entropy": ("logits",),
    "confidence": ("logits",),
    "margin": ("logits",),
}
SCORES = tuple(_READS)


def arpc_score(
    logits: Logits | None = None,
    ar_logits: Logits | None = None,
    tokens: Tensor | None = None,
    *,
    score: str = "kl",
    exclude: int | None = None,
) -> Tensor:
    """How little a drafted position is to be trusted, larger is worse: ARPC's choice of what to noise again.

    With p the diffusion model's law and q the autoregressive one's (given the draft before the position):

    - of logits and ar_logits: "kl", KL(q‖p); "reverse_kl", KL(p‖q); "tv", total variation; one read of both;
    - of ar_logits and tokens: "ar_nll", -log q(token); "ar_gap", log max q - log q(token);
    - of ar_logits: "ar_entropy", of q;
    - of logits: "entropy", of p; "confidence", -max p; "margin", -(p1 - p2).

    Where a network of masked diffusion carries tokens over, p is a point mass at those already unmasked, and
    their "kl" is infinite: take "reverse_kl" (-log q(token) there), "tv" or a score of q.

    Args:
        logits: (..., V), the diffusion model's that the draft came from, as the network gave them.
        ar_logits: (..., V), at l those of token l given the draft before l.
        tokens: (...) int64, the draft.
        score: one of the nine. It takes what it is said to be of, and nothing else.
        exclude: a token id (the mask) that has probability 0 under both.

    Returns:
        (...) float32 or wider; NaN where a row is broken.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, an unknown score, one without its arguments or with
        another's.

    Source:
        BlockGen, arXiv 2606.02241 (its code adds 1e-12 to probabilities inside logarithms; here they are
        exact, and a KL may be infinite).

    Example:
        >>> import torch
        >>> from dlcore.process import guidance
        >>> logits, ar_logits = torch.zeros(1, 2, 4), torch.tensor([[[0.0, 0, 0, 0], [3, 0, 0, 0]]])
        >>> guidance.arpc_score(logits, ar_logits, score="tv")
        tensor([[0.0000, 0.6200]])
        >>> guidance.arpc_score(ar_logits=ar_logits, tokens=torch.tensor([[0, 0]]), score="ar_nll")
        tensor([[1.3863, 0.1392]])
    """
    op = "guidance.arpc_score"
    checks.option(op, "score", score, SCORES)
    for name, value in (("logits", logits), ("ar_logits", ar_logits), ("tokens", tokens)):
        if (value is not None) != (name in _READS[score]):
            raise ValueError(f"{op}: score {score!r} {'needs' if value is None else 'takes no'} {name}")
    given = {name: x for name, x in (("logits", logits), ("ar_logits", ar_logits)) if x is not None}
    h = rows.alike(op, one_dtype=False, **given)
    divergences.excluded(op, "exclude", exclude, h.vocab)
    if logits is not None and ar_logits is not None:
        return _between(logits, ar_logits, score, exclude)
    if tokens is not None:
        rows.tokens(op, "tokens", tokens, h)
    (law,) = given.values()
    return _of_one(categorical.stats(law, tokens, exclude=exclude), score)


def _between(logits: Logits, ar_logits: Logits, score: str, exclude: int | None) -> Tensor:
    if score == "tv":
        return divergences.total_variation(logits, ar_logits, exclude)
    p, q = (ar_logits, logits) if score == "kl" else (logits, ar_logits)
    return divergences.kl(p, q, exclude)


def _of_one(s: categorical.Stats, score: str) -> Tensor:
    if score == "confidence":
        return -s.argmax_logprob.exp()
    if score == "margin":
        return -s.margin
    if s.index_logprob is None:
        return s.entropy
    return -s.index_logprob if score == "ar_nll" else s.argmax_logprob - s.index_logprob


def renoise(
    tokens: Tensor,
    score: Tensor,
    alpha_s: float | Tensor,
    *,
    prior: str | int,
    vocab_size: int | None = None,
    candidates: Tensor | None = None,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """ARPC's corrector: noise the max(1, round((1-α_s)·n)) positions of a clean draft of largest score again.

    n is the number of candidates of a sequence, its block. A step is: draw the whole block at α_s = 1 (with
    `masked.step` or `uniform.step`), score it (`arpc_score`), noise it back to α_s; two network calls. The
    last step, α_s = 1, noises nothing (the public code takes a plain step there). Chosen are candidates
    alone, fewer if there are fewer; ties go to the lowest position, a NaN score is the smallest.

    Args:
        tokens: (B, L) int64, the draft.
        score: (B, L) floating.
        alpha_s: in [0, 1], a number or (B,).
        prior: what noise is: "uniform", or a mask's token id.
        vocab_size: V, for "uniform" alone.
        candidates: (B, L) bool: the block, without a prompt; all positions if None.
        exclude: a token id that uniform noise never takes.
        key: int64 (2,) or one per row (B, L, 2), see `dlcore.rng`; else from `generator` or torch's own.

    Returns:
        z_s (B, L) int64.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, alpha_s, a vocab_size missing or given beside a mask.

    Source:
        BlockGen, arXiv 2606.02241.

    Example:
        >>> import torch
        >>> from dlcore.process import guidance
        >>> draft, score = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[0.1, 0.9, 0.3, 0.2]])
        >>> guidance.renoise(draft, score, 0.5, prior=9)
        tensor([[4, 9, 9, 7]])
    """
    op = "guidance.renoise"
    checks.tokens(op, "tokens", tokens)
    candidates = _candidates(op, candidates, tokens)
    checks.floating(op, "score", score)
    if score.shape != tokens.shape:
        raise ValueError(f"{op}: score must have shape {tuple(tokens.shape)}, got {tuple(score.shape)}")
    a = rows.level(op, "alpha_s", alpha_s, tokens.shape[:1], tokens.device)
    count = ((1 - a) * candidates.sum(-1)).round().clamp(min=1).masked_fill(a == 1, 0)
    chosen = unmask.largest(op, "alpha_s", count.long(), score, candidates)
    if isinstance(prior, str):
        noise = _uniform_noise(op, prior, vocab_size, exclude, tokens, key, generator)
        return torch.where(chosen, noise, tokens)
    checks.integer(op, "prior", prior)
    if prior < 0:
        raise ValueError(f"{op}: prior must be 'uniform' or a token id, got {prior}")
    for name, value in (("vocab_size", vocab_size), ("exclude", exclude)):
        if value is not None:
            raise ValueError(f"{op}: {name} belongs to prior 'uniform', got prior {prior}")
    checks.unused_key(op, key, generator, tokens.shape)
    return torch.where(chosen, prior, tokens)


def _uniform_noise(
    op: str,
    prior: str,
    vocab_size: int | None,
    exclude: int | None,
    like: Tensor,
    key: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    if prior != "uniform":
        raise ValueError(f"{op}: prior must be 'uniform' or a token id, got {prior!r}")
    if vocab_size is None:
        raise ValueError(f"{op}: prior 'uniform' needs vocab_size")
    size = rows.vocabulary(op, vocab_size, exclude)
    checks.token_range(op, "tokens", like, vocab_size)
    (which,) = rows.uniforms(rows.row_keys(op, key, generator, like.shape, like.device), 1)
    return rows.uniform_tokens(which, size, exclude)
