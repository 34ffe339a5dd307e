"""What a continuous state says of its token: log-likelihoods (..., V) for `MarkovChain.posterior`.

With them the chain is an exact network for every continuous family: bits and embeddings under Gaussian
noise here, points of a sphere by `dlcore.sphere.posterior_logits`. Each is a matched filter, up to a constant
per position; `bit_logits` and `log_probs.exp() @ table` read the denoised state off the posterior.

    >>> from dlcore.testing.markov import MarkovChain
    >>> chain = MarkovChain(torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64))
    >>> x = torch.tensor([[[0.2], [0.9], [0.4]]], dtype=torch.float64)  # three noisy bits, σ = 0.5
    >>> codes = torch.tensor([[0.0], [1.0]])
    >>> posterior = chain.posterior(gaussian_emission(x, codes, sigma=0.5))
    >>> bit_logits(posterior.denoiser, codes).sigmoid().flatten()
    tensor([0.1069, 0.3744, 0.1936], dtype=torch.float64)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks

__all__ = ["bit_logits", "gaussian_emission"]


def gaussian_emission(
    x: Tensor, table: Tensor, sigma: float | Tensor, *, alpha: float | Tensor = 1.0
) -> Tensor:
    """log N(x; α·table_v, σ²) for every token v: (α⟨x, E_v⟩ - α²‖E_v‖²/2)/σ².

    Args:
        x: (..., d) floating. For bits (B, L·w) the w of a token: x.unflatten(-1, (-1, w)).
        table: (V, d), the clean states: embeddings, or codes of bits, whatever their levels.
        sigma, alpha: > 0 and >= 0, broadcast to x.shape[:-1].

    Returns:
        (..., V), nats, in x's dtype.

    Raises:
        TypeError, ValueError: dtypes, shapes or values that do not fit.

    Example:
        >>> gaussian_emission(torch.tensor([2.0]), torch.tensor([[-1.0], [1.0]]), sigma=2.0)
        tensor([-0.6250,  0.3750])
    """
    op = "gaussian_emission"
    table = _table(op, x, table)
    lead, device = x.shape[:-1], x.device
    noise = checks.within(op, "sigma", checks.number(op, "sigma", sigma, lead, device), 0, torch.inf, "(]")
    signal = checks.within(op, "alpha", checks.number(op, "alpha", alpha, lead, device), 0, torch.inf, "[)")
    gain = (signal / noise / noise).unsqueeze(-1).to(x.dtype)
    bias = (signal / noise).square().unsqueeze(-1).to(x.dtype) / 2
    return (gain * x) @ table.T - bias * table.square().sum(-1)


def bit_logits(log_probs: Tensor, codes: Tensor) -> Tensor:
    """log-odds of every bit of the token: log P(bit = high) - log P(bit = low).

    Args:
        log_probs: (..., V), of tokens. codes: (V, w) of two levels; the higher counts as one.

    Returns:
        (..., w), nats, infinite where the tokens in question leave no choice.

    Raises:
        ValueError: codes is not (V, w) or of more than two levels.

    Example:
        >>> bit_logits(torch.tensor([0.2, 0.3, 0.5]).log(), torch.tensor([[0, 0], [0, 1], [1, 0]])).exp()
        tensor([1.0000, 0.4286])
    """
    op = "bit_logits"
    if codes.dim() != 2 or codes.shape[0] != log_probs.shape[-1]:
        raise ValueError(f"{op}: codes must be ({log_probs.shape[-1]}, w), got {tuple(codes.shape)}")
    low, high = codes.amin(), codes.amax()
    if not bool(((codes == low) | (codes == high)).all()):
        raise ValueError(f"{op}: codes must have two levels, got {codes.unique().tolist()[:8]}")
    one, spread = codes == high, log_probs.unsqueeze(-1)
    odds = (spread.masked_fill(~one, -torch.inf), spread.masked_fill(one, -torch.inf))
    with_one, with_none = (x.logsumexp(-2) for x in odds)
    return with_one - with_none


def _table(op: str, x: Tensor, table: Tensor) -> Tensor:
    """The table in x's dtype."""
    checks.floating(op, "x", x)
    if not isinstance(table, Tensor) or table.dim() != 2 or table.shape[-1] != x.shape[-1]:
        raise ValueError(f"{op}: table must be (V, {x.shape[-1]}), got {checks.describe(table)}")
    return table.to(x.dtype)
