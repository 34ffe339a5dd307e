"""A Markov chain over characters: a language model whose every posterior is known exactly.

Under per-token noise the denoiser, the leave-one-out posterior, the score and the likelihood of a stationary
order-k chain follow from forward-backward. No training, no download, no approximation: what a sampler
loses against this model is the sampler's own error.

    >>> chain = MarkovChain.fit("the cat sat on the mat and the rat sat on the hat", order=2)
    >>> x = chain.sample(batch=2, length=16)
    >>> posterior = chain.posterior(uniform_emission(x, alpha=0.5, vocab_size=chain.vocab_size))
    >>> posterior.denoiser.shape == (2, 16, chain.vocab_size)
    True
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

# A dense solve is exact for slowly mixing chains too; above this many contexts it costs more than it gives.
_DENSE_CONTEXTS = 2048
_MAX_ITERATIONS = 100_000


class Posterior(NamedTuple):
    """Per-position log-probabilities, each (B, L, V), in nats."""

    denoiser: Tensor
    """log q(x_l = v | all the evidence)."""
    leave_one_out: Tensor
    """log q(x_l = v | the evidence at every position but l)."""


class BigramStatistics(NamedTuple):
    """Entropy of the empirical bigram law and its KL divergence from the true one, in nats."""

    entropy: float
    kl: float


class MarkovChain:
    """Stationary order-k chain over V symbols.

    Args:
        transition: (V,)*k + (V,), floating; entry [a, ..., b, y] is p(y | a ... b), oldest first.
            Rows sum to one to 1e-6 and are then normalised to the last bit. k >= 1. Its dtype is the chain's.
        alphabet: V distinct characters, needed only by `encode` and `decode`.

    Attributes:
        transition: as given. stationary: (V,)*k, the law of k consecutive symbols.
        vocab_size, order, alphabet: V, k and the characters.

    Raises:
        TypeError: transition is not floating.
        ValueError: wrong shape, rows that are no distribution, or no unique stationary law.

    Example:
        >>> chain = MarkovChain(torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))
        >>> [round(p, 6) for p in chain.stationary.tolist()]
        [0.833333, 0.166667]
    """

    def __init__(self, transition: Tensor, alphabet: str | None = None) -> None:
        _check_transition(transition, alphabet)
        self.order = transition.dim() - 1
        self.vocab_size = transition.shape[-1]
        self.alphabet = alphabet
        exact = transition.double()
        exact = exact / exact.sum(-1, keepdim=True)
        self.transition = exact.to(transition.dtype)
        self.stationary = _stationary(exact).to(transition.dtype)

    @classmethod
    def fit(
        cls,
        text: str,
        order: int = 2,
        *,
        alphabet: str | None = None,
        smoothing: float = 0.01,
        dtype: torch.dtype = torch.float64,
    ) -> MarkovChain:
        """Fit by counts, every order smoothed towards the one below it.

        With n the counts of the normalised text and p_{-1} = 1/V,
        p_j(y | h) = (n(h y) + s V p_{j-1}(y | h without its oldest symbol)) / (n(h) + s V), j = 0 ... k
        (hierarchical Dirichlet, MacKay and Peto 1995). Any s > 0 makes every transition positive.

        Args:
            text: passed through `normalise_text` first.
            order: k >= 1.
            alphabet: the characters to keep; all that occur, sorted, when None.
            smoothing: s >= 0, pseudo-counts per symbol. At 0 an unseen context takes its shorter one's law.
            dtype: of the chain. The fit itself is float64.

        Raises:
            ValueError: order < 1, negative smoothing, or a normalised text of at most `order` characters.
        """
        if order < 1:
            raise ValueError(f"MarkovChain.fit: order must be at least 1, got {order}")
        if not (smoothing >= 0 and math.isfinite(smoothing)):
            raise ValueError(f"MarkovChain.fit: smoothing must be finite and not negative, got {smoothing}")
        text = normalise_text(text, alphabet)
        if len(text) <= order:
            raise ValueError(f"MarkovChain.fit: text must keep more than {order} characters, got {len(text)}")
        letters = "".join(sorted(set(text))) if alphabet is None else alphabet
        tokens = _encode(text, letters, "MarkovChain.fit")
        law = torch.full((len(letters),), 1.0 / len(letters), dtype=torch.float64)
        for length in range(1, order + 2):
            law = _shrink(_counts(tokens[None], length, len(letters)), law, smoothing * len(letters))
        return cls(law, letters).to(dtype)

    def __repr__(self) -> str:
        return f"MarkovChain(order={self.order}, vocab_size={self.vocab_size}, dtype={self.transition.dtype})"

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> MarkovChain:
        """The same chain in another dtype or on another device; its laws are rounded, not recomputed."""
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"MarkovChain.to: dtype must be floating, got {dtype}")
        other = copy.copy(self)
        other.transition = self.transition.to(device=device, dtype=dtype)
        other.stationary = self.stationary.to(device=device, dtype=dtype)
        return other

    def encode(self, text: str) -> Tensor:
        """Token ids (L,), int64. Raises ValueError at a character outside the alphabet."""
        return _encode(text, self._letters("encode"), "MarkovChain.encode").to(self.transition.device)

    def decode(self, tokens: Tensor, *, placeholder: str = "_") -> str:
        """Text of tokens (L,); an id outside [0, V), such as a mask, shows as `placeholder`."""
        letters = self._letters("decode")
        if tokens.dim() != 1:
            raise ValueError(f"MarkovChain.decode: tokens must be (L,), got {tuple(tokens.shape)}")
        return "".join(letters[i] if 0 <= i < len(letters) else placeholder for i in tokens.tolist())

    def sample(self, batch: int, length: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw (B, L) token ids, int64, from the stationary chain; inverse CDF in float64."""
        if batch < 0 or length < 0:
            raise ValueError(f"MarkovChain.sample: batch and length must be >= 0, got {batch}, {length}")
        device = self.transition.device
        steps = max(length - self.order, 0)
        uniform = torch.rand(steps + 1, batch, dtype=torch.float64, device=device, generator=generator)
        rows = _cdf(self.transition.reshape(-1, self.vocab_size))
        context = torch.searchsorted(_cdf(self.stationary.reshape(-1)), uniform[0], right=True)
        tokens = _digits(context, self.order, self.vocab_size)
        for draw in uniform[1:]:
            token = torch.searchsorted(rows[context], draw.unsqueeze(-1), right=True).squeeze(-1)
            context = (context * self.vocab_size + token) % self.stationary.numel()
            tokens.append(token)
        return torch.stack(tokens, dim=1)[:, :length]

    def log_likelihood(self, tokens: Tensor) -> Tensor:
        """Exact log p(tokens), (B,) nats, of tokens (B, L), any L >= 0; -inf where impossible."""
        _check_tokens("MarkovChain.log_likelihood", tokens, self.vocab_size)
        head = min(tokens.shape[1], self.order)
        start = self.ngram(head).reshape(-1)[_index(tokens[:, :head], self.vocab_size)].log()
        if tokens.shape[1] <= self.order:
            return start
        windows = _index(tokens.unfold(1, self.order + 1, 1), self.vocab_size)
        return start + self.transition.reshape(-1)[windows].log().sum(-1)

    def entropy_rate(self) -> float:
        """Nats per symbol: -sum over h, y of pi(h) p(y|h) log p(y|h)."""
        stationary, transition = self.stationary.double(), self.transition.double()
        return float((stationary * torch.special.entr(transition).sum(-1)).sum())

    def entropy(self, length: int) -> float:
        """Exact entropy, in nats, of a sequence of `length` symbols."""
        if length < 0:
            raise ValueError(f"MarkovChain.entropy: length must not be negative, got {length}")
        start = torch.special.entr(self.ngram(min(length, self.order)).double()).sum()
        return float(start) + max(length - self.order, 0) * self.entropy_rate()

    def ngram(self, n: int) -> Tensor:
        """Exact law of n consecutive symbols, (V,)*n, oldest first; a scalar 1 for n = 0."""
        if n < 0:
            raise ValueError(f"MarkovChain.ngram: n must not be negative, got {n}")
        law = self.stationary
        while law.dim() > n:
            law = law.sum(0)
        while law.dim() < n:
            law = law.unsqueeze(-1) * self.transition
        return law

    def posterior(self, log_emission: Tensor) -> Posterior:
        """Exact denoiser and leave-one-out posterior given independent evidence at each position.

        Forward-backward over contexts s_l = (x_{l-k+1} ... x_l), linear with a scale per step:
        P_1 = pi, P_{l+1}(s') = sum_s P_l(s) e_l(x_l) p(s'|s), forward and before the evidence at l;
        B_L = 1, B_l(s) = sum_s' p(s'|s) e_{l+1}(x_{l+1}) B_{l+1}(s'), backward;
        leave-one-out_l(v) is proportional to the sum of P_l B_l over contexts that end in v.
        Neither message at l has seen the evidence at l, so none is ever divided out. The k-1 symbols before
        the first carry no evidence, which is exact because the chain is stationary.

        Args:
            log_emission: (B, L, V), log p(observation at l | x_l = v), -inf allowed, up to a constant per
                position.

        Returns:
            Posterior of two normalised (B, L, V) log-probabilities in the chain's dtype. Time O(B L V^(k+1)),
            memory O(B L V^k). Probabilities that underflow the chain's dtype come out as -inf.

        Raises:
            ValueError: wrong shape, NaN or +inf, or evidence that no sequence can explain.

        Example:
            >>> chain = MarkovChain(torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))
            >>> evidence = mask_emission(torch.tensor([[0, 2, 1]]), mask_id=2, vocab_size=2)
            >>> chain.posterior(evidence).denoiser[0, 1].exp()
            tensor([0.6429, 0.3571], dtype=torch.float64)
        """
        self._check_emission(log_emission)
        log_emission = log_emission.to(self.transition.dtype)
        if log_emission.numel() == 0:
            return Posterior(log_emission, log_emission.clone())
        # A constant per position changes nothing and keeps exp in range; the clamp keeps rows of -inf so.
        peak = log_emission.amax(-1, keepdim=True).clamp_min(torch.finfo(log_emission.dtype).min)
        log_emission = log_emission - peak
        emission = log_emission.exp().permute(1, 2, 0).contiguous()
        joint = self._combine(emission, self._predict(emission))
        # Proportional to p(all the evidence) at every position; NaN, left by an impossible step, fails too.
        if not bool(((joint * emission).sum(1) > 0).all()):
            raise ValueError(
                "MarkovChain.posterior: log_emission has probability zero under every sequence "
                f"(or underflows {self.transition.dtype})"
            )
        leave_one_out = (joint / joint.sum(1, keepdim=True)).permute(2, 0, 1).log()
        return Posterior((leave_one_out + log_emission).log_softmax(-1), leave_one_out)

    def _predict(self, emission: Tensor) -> list[Tensor]:
        """Forward messages P_l, (C, V, B) with C = V^(k-1), of emission (L, V, B).

        With the batch innermost the (V, C, B) -> (C, V, B) view that bmm takes keeps a unit stride.
        """
        v, batch = emission.shape[1:]
        weights = self.transition.reshape(v, -1, v).permute(1, 2, 0).contiguous()
        message = self.stationary.reshape(-1, v, 1).expand(-1, -1, batch)
        messages = [message]
        for evidence in emission[:-1]:
            message = message * (evidence / (message.sum(0) * evidence).sum(0))
            message = torch.bmm(weights, message.reshape(v, -1, batch).transpose(0, 1))
            messages.append(message)
        return messages

    def _combine(self, emission: Tensor, predictive: list[Tensor]) -> Tensor:
        """Leave-one-out weights (L, V, B), unnormalised: backward messages met with the forward ones."""
        length, v, batch = emission.shape
        weights = self.transition.reshape(v, -1, v).transpose(0, 1).contiguous()
        joint = [predictive[-1].sum(0)]
        message = torch.ones_like(predictive[-1])
        for position in range(length - 2, -1, -1):
            message = torch.bmm(weights, message * emission[position + 1])
            message = message / message.sum((0, 1))
            message = message.transpose(0, 1).reshape(-1, v, batch)
            joint.append((predictive[position] * message).sum(0))
        return torch.stack(joint[::-1])

    def _letters(self, method: str) -> str:
        if self.alphabet is None:
            raise ValueError(f"MarkovChain.{method}: this chain has no alphabet")
        return self.alphabet

    def _check_emission(self, log_emission: Tensor) -> None:
        if log_emission.dim() != 3 or log_emission.shape[-1] != self.vocab_size:
            raise ValueError(
                f"MarkovChain.posterior: log_emission must be (B, L, {self.vocab_size}), "
                f"got {tuple(log_emission.shape)}"
            )
        if not log_emission.is_floating_point():
            raise TypeError(f"MarkovChain.posterior: log_emission must be floating, got {log_emission.dtype}")
        if not bool((log_emission < math.inf).all()):
            raise ValueError("MarkovChain.posterior: log_emission must hold neither NaN nor +inf")


def normalise_text(text: str, alphabet: str | None = None) -> str:
    """Lower-case text with whitespace runs as one space, none at the ends, and nothing outside the alphabet.

    >>> normalise_text("One,  two -\\nTHREE!", "abcdefghijklmnopqrstuvwxyz ")
    'one two three'
    """
    text = text.lower()
    if alphabet is None:
        return " ".join(text.split())
    kept = "".join(c for c in text if c in alphabet or c.isspace())
    return (" " if " " in alphabet else "").join(kept.split())


def uniform_emission(z: Tensor, alpha: float | Tensor, vocab_size: int) -> Tensor:
    """log q(z | x = v) = log(alpha 1[v = z] + (1 - alpha) / V) of uniform noise.

    Args:
        z: (B, L) or any shape, observed ids. alpha: in [0, 1], broadcasts to z.shape. vocab_size: V.

    Returns:
        z.shape + (V,), nats, in alpha's dtype (float64 for a number).

    Raises:
        ValueError: an id outside [0, V), alpha outside [0, 1] or not broadcastable.

    Example:
        >>> uniform_emission(torch.tensor([[2]]), alpha=0.4, vocab_size=3).exp()
        tensor([[[0.2000, 0.2000, 0.6000]]], dtype=torch.float64)
    """
    _check_ids("uniform_emission", "z", z, vocab_size)
    alpha = _alpha("uniform_emission", alpha, z)
    noise = torch.log1p(-alpha) - math.log(vocab_size)
    signal = torch.logaddexp(alpha.log(), noise)
    agrees = z.unsqueeze(-1) == torch.arange(vocab_size, device=z.device)
    return torch.where(agrees, signal.unsqueeze(-1), noise.unsqueeze(-1))


def mask_emission(z: Tensor, mask_id: int, vocab_size: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """log q(z | x = v) of masking, up to a constant: zeros where z is the mask, else 0 at z and -inf off it.

    Args:
        z: (B, L) or any shape, ids below V or mask_id. mask_id: any id; one below V counts as the mask too.

    Returns:
        z.shape + (V,), nats.

    Raises:
        ValueError: an id that is neither the mask nor in [0, V).

    Example:
        >>> mask_emission(torch.tensor([[1, 3]]), mask_id=3, vocab_size=3)
        tensor([[[-inf, 0., -inf],
                 [0., 0., 0.]]], dtype=torch.float64)
    """
    masked = (z == mask_id).unsqueeze(-1)
    _check_ids("mask_emission", "z", z.masked_fill(z == mask_id, 0), vocab_size)
    agrees = z.unsqueeze(-1) == torch.arange(vocab_size, device=z.device)
    zeros = torch.zeros(agrees.shape, dtype=dtype, device=z.device)
    return zeros.masked_fill(~(agrees | masked), -math.inf)


def log_score(leave_one_out: Tensor, z: Tensor, alpha: float | Tensor) -> Tensor:
    """Exact log score log p_t(z with y at l) / p_t(z) under uniform noise, for every l and y.

    log1p(c p(y)) - log1p(c p(z)) with c = V alpha / (1 - alpha), p the leave-one-out posterior
    (arXiv:2605.22765; ratio of one-coordinate conditionals). At alpha = 1 its limit log p(y) - log p(z).

    Args:
        leave_one_out: (B, L, V) log-probabilities. z: (B, L), observed ids.
        alpha: in [0, 1], broadcasts to z.shape.

    Returns:
        (B, L, V), nats, 0 at y = z.

    Raises:
        ValueError: shapes that disagree, an id outside [0, V), alpha outside [0, 1] or not broadcastable.
    """
    if leave_one_out.shape[:-1] != z.shape:
        raise ValueError(
            f"log_score: leave_one_out must be z.shape + (V,) with z {tuple(z.shape)}, "
            f"got {tuple(leave_one_out.shape)}"
        )
    vocab_size = leave_one_out.shape[-1]
    _check_ids("log_score", "z", z, vocab_size)
    alpha = _alpha("log_score", alpha, z).to(leave_one_out.dtype).unsqueeze(-1)
    log_c = math.log(vocab_size) + alpha.log() - torch.log1p(-alpha)
    # log1p(c p) less max(log c, 0), which cancels in the difference: finite at c = 0 and at c = inf.
    raised = torch.logaddexp((-log_c).clamp(max=0), log_c.clamp(max=0) + leave_one_out)
    return raised - raised.gather(-1, z.long().unsqueeze(-1))


def bigram_statistics(tokens: Tensor, chain: MarkovChain) -> BigramStatistics:
    """Entropy of the bigrams of tokens (B, L >= 2), pooled, and KL(empirical || true), in nats.

    The KL is infinite when a bigram that the chain cannot produce occurs.
    """
    _check_tokens("bigram_statistics", tokens, chain.vocab_size)
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"bigram_statistics: tokens must be (B >= 1, L >= 2), got {tuple(tokens.shape)}")
    counts = _counts(tokens, 2, chain.vocab_size)
    empirical = counts / counts.sum()
    entropy = torch.special.entr(empirical).sum()
    # xlogy alone gives 0 log 0 = 0, where a product would give NaN.
    cross = torch.special.xlogy(empirical, chain.ngram(2).double()).sum()
    return BigramStatistics(float(entropy), float(-entropy - cross))


def perplexity(tokens: Tensor, chain: MarkovChain) -> float:
    """exp of the mean negative log-likelihood per token of tokens (B, L) under the chain."""
    if tokens.numel() == 0:
        raise ValueError(f"perplexity: tokens must not be empty, got {tuple(tokens.shape)}")
    return math.exp(-float(chain.log_likelihood(tokens).double().sum()) / tokens.numel())


def _stationary(transition: Tensor) -> Tensor:
    """The law pi of k-grams with pi = pi P, (V,)*k, from float64 transitions."""
    v = transition.shape[-1]
    weights = transition.reshape(v, -1, v)
    contexts = weights.shape[0] * weights.shape[1]
    law = _solve(weights) if contexts <= _DENSE_CONTEXTS else _iterate(weights)
    law = law.clamp_min(0) * _recurrent(weights, law)
    for _ in range(transition.dim()):
        # Sums of non-negative terms: steps of the chain give small entries full relative precision.
        law = _step(weights, law)
    return (law / law.sum()).reshape(transition.shape[:-1])


def _step(weights: Tensor, law: Tensor) -> Tensor:
    """One step of the chain on laws over contexts (..., V^k), weights (V, C, V)."""
    v, c, _ = weights.shape
    return torch.einsum("...ac,acy->...cy", law.reshape(*law.shape[:-1], v, c), weights).reshape(law.shape)


def _solve(weights: Tensor) -> Tensor:
    """pi from (I - P^T + 1 1^T) pi = 1, regular exactly when the stationary law is unique."""
    v, c, _ = weights.shape
    eye = torch.eye(v * c, dtype=weights.dtype, device=weights.device)
    system = eye - _step(weights, eye).T + 1.0
    lu, pivots, _ = torch.linalg.lu_factor_ex(system)
    if float(lu.diagonal().abs().min()) < torch.finfo(lu.dtype).eps * v * c:
        raise ValueError("MarkovChain: transition has no unique stationary law")
    solution: Tensor = torch.linalg.lu_solve(lu, pivots, torch.ones_like(system[:, :1]))
    return solution.squeeze(-1)


def _iterate(weights: Tensor) -> Tensor:
    """pi as the limit of the lazy chain (P + I) / 2, from two starts that must agree."""
    v, c, _ = weights.shape
    law = torch.zeros(2, v * c, dtype=weights.dtype, device=weights.device)
    law[0], law[1, 0] = 1.0 / (v * c), 1.0
    for _ in range(_MAX_ITERATIONS):
        new = (law + _step(weights, law)) / 2
        change = float((new - law).abs().sum())
        law = new
        if change < 1e-14:
            break
    if float((law[0] - law[1]).abs().sum()) > 1e-9:
        raise ValueError("MarkovChain: transition has no unique stationary law, or mixes too slowly")
    return law.mean(0)


def _recurrent(weights: Tensor, law: Tensor) -> Tensor:
    """1 on the closed class, all that the likeliest context reaches; 0 elsewhere, as the law must be."""
    reached = torch.zeros_like(law)
    reached[law.argmax()] = 1
    while True:
        grown = ((reached + _step(weights, reached)) > 0).to(law.dtype)
        if torch.equal(grown, reached):
            return reached
        reached = grown


def _shrink(counts: Tensor, prior: Tensor, mass: float) -> Tensor:
    """Mean given counts of a Dirichlet with `mass` pseudo-counts spread as `prior`; `prior` if total is 0."""
    total = counts.sum(-1, keepdim=True) + mass
    return torch.where(total > 0, (counts + mass * prior) / total, prior.expand(counts.shape))


def _counts(tokens: Tensor, n: int, vocab_size: int) -> Tensor:
    """How often each n-gram occurs in the rows of tokens (B, L): (V,)*n, float64."""
    index = _index(tokens.unfold(1, n, 1), vocab_size).reshape(-1)
    return torch.bincount(index, minlength=vocab_size**n).reshape((vocab_size,) * n).double()


def _index(tokens: Tensor, vocab_size: int) -> Tensor:
    """Row-major index of n-grams (..., n)."""
    powers = [vocab_size**i for i in reversed(range(tokens.shape[-1]))]
    return (tokens * torch.tensor(powers, dtype=torch.int64, device=tokens.device)).sum(-1)


def _digits(index: Tensor, n: int, vocab_size: int) -> list[Tensor]:
    """The n symbols of row-major indices, oldest first."""
    return [index // vocab_size**i % vocab_size for i in reversed(range(n))]


def _cdf(rows: Tensor) -> Tensor:
    """Cumulative rows in float64 that end in exactly one: a symbol of probability zero is never drawn."""
    cumulative = rows.double().cumsum(-1)
    return cumulative / cumulative[..., -1:]


def _encode(text: str, letters: str, where: str) -> Tensor:
    ids = {letter: i for i, letter in enumerate(letters)}
    unknown = sorted(set(text) - ids.keys())
    if unknown:
        raise ValueError(f"{where}: text has characters outside the alphabet: {''.join(unknown)!r}")
    return torch.tensor([ids[letter] for letter in text], dtype=torch.int64)


def _alpha(where: str, alpha: float | Tensor, z: Tensor) -> Tensor:
    """alpha as a floating tensor of z's shape and device, checked."""
    if not isinstance(alpha, Tensor):
        alpha = torch.tensor(alpha, dtype=torch.float64)
    if not alpha.is_floating_point():
        raise TypeError(f"{where}: alpha must be floating, got {alpha.dtype}")
    try:
        expanded = alpha.to(z.device).expand(z.shape)
    except RuntimeError:
        shapes = f"{tuple(z.shape)}, got {tuple(alpha.shape)}"
        raise ValueError(f"{where}: alpha must broadcast to z.shape {shapes}") from None
    if not bool(((alpha >= 0) & (alpha <= 1)).all()):
        found = f"{alpha.min().item()} to {alpha.max().item()}"
        raise ValueError(f"{where}: alpha must lie in [0, 1], got {found}")
    return expanded


def _check_tokens(where: str, tokens: Tensor, vocab_size: int) -> None:
    if tokens.dim() != 2:
        raise ValueError(f"{where}: tokens must be (B, L), got {tuple(tokens.shape)}")
    _check_ids(where, "tokens", tokens, vocab_size)


def _check_ids(where: str, name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must be integer, got {ids.dtype}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        found = f"{int(ids.min())} to {int(ids.max())}"
        raise ValueError(f"{where}: {name} must lie in [0, {vocab_size}), got {found}")


def _check_transition(transition: Tensor, alphabet: str | None) -> None:
    shape = tuple(transition.shape)
    if len(shape) < 2 or len(set(shape)) != 1 or shape[0] < 1:
        raise ValueError(f"MarkovChain: transition must be (V,) * order + (V,) with order >= 1, got {shape}")
    if not transition.is_floating_point():
        raise TypeError(f"MarkovChain: transition must be floating, got {transition.dtype}")
    if not bool((transition >= 0).all()):
        raise ValueError("MarkovChain: transition must not hold negative numbers or NaN")
    error = float((transition.double().sum(-1) - 1).abs().max())
    if not error <= 1e-6:
        raise ValueError(f"MarkovChain: transition rows must sum to one, worst error {error:.2g}")
    if alphabet is not None and (len(alphabet) != shape[0] or len(set(alphabet)) != shape[0]):
        raise ValueError(f"MarkovChain: alphabet must be {shape[0]} distinct characters, got {alphabet!r}")
