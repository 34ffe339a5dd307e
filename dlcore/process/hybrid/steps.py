"""Corruption, the reverse step by one read of the logits, and self-correction."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process import unmask
from dlcore.process.hybrid.levels import Level, checked

Logits = Tensor | LinearLogits


def corrupt(
    x: Tensor,
    at: Level,
    vocab_size: int,
    mask_id: int,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep x with probability α, mask it with μ, else take a uniform token that is not the mask.

    Args:
        x: (...) int64 clean tokens.
        at: the level, broadcast to x.shape.
        vocab_size: V, the mask counted.
        mask_id: the mask token.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z (...) int64.

    Example:
        >>> import torch
        >>> from dlcore.process import hybrid
        >>> hybrid.corrupt(torch.tensor([1, 2, 3]), hybrid.schedule(1.0), vocab_size=10, mask_id=9)
        tensor([9, 9, 9])
    """
    op = "hybrid.corrupt"
    checks.integer(op, "mask_id", mask_id)
    size = rows.vocabulary(op, vocab_size, mask_id)
    checks.tokens(op, "x", x)
    checks.token_range(op, "x", x, vocab_size)
    noise = checked(op, "at", at, x.shape, x.device)
    route, which = rows.uniforms(rows.row_keys(op, key, generator, x.shape, x.device), 2)
    noisy = torch.where(route < noise.alpha + noise.mask, mask_id, rows.uniform_tokens(which, size, mask_id))
    return torch.where(route < noise.alpha, x, noisy)


class _Bridge(NamedTuple):
    """A reverse step's masses per row: of the transition from s into z, and of the level at s."""

    ratio: Tensor
    """α_t/α_s: nothing happened."""
    into: Tensor
    """The noise that came into z since s."""
    late: Level
    early: Level


def _bridge(op: str, z: Tensor, is_masked: Tensor, at_t: Level, at_s: Level, size: int) -> _Bridge:
    t, s = (checked(op, name, at, z.shape, z.device) for name, at in (("at_t", at_t), ("at_s", at_s)))
    rows.levels(op, t.alpha, s.alpha, z.shape, z.device)
    ratio = rows.ratio(t.alpha, s.alpha)
    into = torch.where(is_masked, t.mask - ratio * s.mask, (t.uniform - ratio * s.uniform) / size)
    return _Bridge(ratio, into.clamp(min=0), t, s)


def bridge_log_probs(
    logits: Logits,
    z: Tensor,
    at_t: Level,
    at_s: Level,
    mask_id: int,
    *,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """The law that `step` draws from, written out: q(y) ∝ q(z | z_s = y)·q_s(y | p).

    q(z | y) = α_t/α_s·1[y = z] + (noise into z since s), and q_s(y | p) = α_s·p(y) + μ_s·1[y = mask]
    + υ_s/N·1[y ≠ mask]. A state of mass 0 stays what it is.

    Args:
        logits, z, at_t, at_s, mask_id: as in `step`.
        temperature: positive.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in logits.

    Example:
        >>> import torch
        >>> from dlcore.process import hybrid
        >>> at_t, at_s = (hybrid.schedule(t, p_uniform=0.2) for t in (0.5, 0.25))
        >>> hybrid.bridge_log_probs(torch.zeros(3), torch.tensor(0), at_t, at_s, mask_id=2).exp()
        tensor([0.9151, 0.0560, 0.0290])
    """
    op = "hybrid.bridge_log_probs"
    is_masked = rows.masked(op, logits, z, mask_id)
    heat = checks.number(op, "temperature", temperature, z.shape, z.device)
    return _law(
        op,
        logits,
        z,
        is_masked,
        at_t,
        at_s,
        mask_id,
        checks.within(op, "temperature", heat, 0, torch.inf, "(]"),
    )


def _law(
    op: str,
    logits: Logits,
    z: Tensor,
    is_masked: Tensor,
    at_t: Level,
    at_s: Level,
    mask_id: int,
    heat: Tensor,
) -> Tensor:
    vocab = categorical.head(op, logits).vocab
    step = _bridge(op, z, is_masked, at_t, at_s, vocab - 1)
    log_p = torch.log_softmax(rows.without(op, logits, mask_id), -1)
    log_p = torch.log_softmax(log_p / heat.to(log_p.dtype).unsqueeze(-1), -1)

    def column(mass: Tensor) -> Tensor:
        return mass.log().to(log_p.dtype).unsqueeze(-1)

    ids = torch.arange(vocab, device=z.device)
    noise = torch.where(ids == mask_id, column(step.early.mask), column(step.early.uniform / (vocab - 1)))
    before = rows.logaddexp(column(step.early.alpha) + log_p, noise)
    at_z = z.unsqueeze(-1) == ids
    law = before + torch.where(at_z, column(step.ratio + step.into), column(step.into))
    possible = (law > -torch.inf).any(-1, keepdim=True)
    return torch.log_softmax(torch.where(possible, law, rows.point(law, z)), -1)


def step(
    logits: Logits,
    z: Tensor,
    at_t: Level,
    at_s: Level,
    mask_id: int,
    *,
    temperature: float | Tensor = 1.0,
    min_p: float | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step from at_t to at_s: a draw from `bridge_log_probs`, by one read of the logits.

    The bridge is a mixture of four: keep z, take a draw of p, take a uniform token, mask; the weights of the
    last three are α_s, υ_s and μ_s times the noise into z since s.

    Args:
        logits: (..., V).
        z: (...) int64 observed tokens.
        at_t, at_s: the levels of now and of the earlier moment, broadcast to z.shape.
        mask_id: the mask token; it has probability 0 under the network.
        temperature: non-negative (positive with min_p), on p, before the bridge.
        min_p: in [0, 1]: tokens with less than this probability under the bridge are not drawn, but for the
            likeliest (GIDD's filter: an absolute bound, unlike that of `categorical.sample`). It writes the
            law (..., V) out.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, at_s with a smaller alpha than at_t.

    Source:
        GIDD, arXiv 2503.04482.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import hybrid
        >>> z = torch.full((2, 8), 999)
        >>> at_t, at_s = hybrid.schedule(1.0), hybrid.schedule(0.9)
        >>> hybrid.step(torch.randn(2, 8, 1000), z, at_t, at_s, mask_id=999, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "hybrid.step"
    is_masked = rows.masked(op, logits, z, mask_id)
    heat = checks.number(op, "temperature", temperature, z.shape, z.device)
    keys = rows.row_keys(op, key, generator, z.shape, z.device, logits)
    if min_p is not None:
        checks.within(op, "temperature", heat, 0, torch.inf, "(]")
        bar = math.log(bound) if (bound := checks.real(op, "min_p", min_p, 0, 1)) > 0 else -math.inf
        law = _law(op, logits, z, is_masked, at_t, at_s, mask_id, heat)
        small = (law < bar) & (law < law.amax(-1, keepdim=True))
        return categorical.sample(law.masked_fill(small, -torch.inf), key=keys).tokens
    size = categorical.head(op, logits).vocab - 1
    bridge = _bridge(op, z, is_masked, at_t, at_s, size)
    t, s, into = bridge.late, bridge.early, bridge.into
    stay = bridge.ratio * s.uniform / size
    draw = into * s.alpha
    token = rows.coefficients(stay + into, t.alpha, stay, t.alpha, draw, 0.0, keep=into == 0)
    masked = rows.coefficients(bridge.ratio * s.mask + into, 0.0, 0.0, 0.0, draw, 0.0)
    drawn = categorical.sample_mixture(
        logits,
        z,
        torch.where(is_masked.unsqueeze(-1), masked, token),
        prior=mask_id,
        temperature=heat,
        exclude=mask_id,
        key=keys,
    )
    # The prior stands for both noises; which of the two it was is drawn here.
    spread = into * s.uniform
    both = spread + into * s.mask + torch.where(is_masked, bridge.ratio * s.mask, 0)
    route, which = rows.uniforms(keys, 2)
    replaced = (drawn == mask_id) & (route * both < spread)
    return torch.where(replaced, rows.uniform_tokens(which, size, mask_id), drawn)


def correct(
    logits: Logits,
    z: Tensor,
    mask_id: int,
    num_positions: int | Tensor = 1,
    *,
    temperature: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Self-correction of a finished sample: change the tokens that the network would most surely change.

    Every position draws y from softmax(logits/temperature); of those with y ≠ z the num_positions with the
    largest probability of y take it. Repeated until the sample stays as it is, or agrees with the network's
    argmax no more often for some rounds (GIDD's patience).

    Args:
        logits: (B, L, V) at z and a small noise level.
        z: (B, L) int64 tokens.
        mask_id: the mask token; it has probability 0.
        num_positions: how many per sequence, an int or (B,); sequences with fewer y ≠ z change all of them.
        temperature: non-negative; at 0 the argmax, ranked by its probability at temperature 1.
        key: int64 (2,) or one per row (B, L, 2), see `dlcore.rng`; else from `generator` or torch's own.

    Returns:
        (B, L) int64. A broken row keeps its token.

    Raises:
        TypeError: dtypes. ValueError: z is not (B, L), other shapes, ids.

    Source:
        GIDD, arXiv 2503.04482 (self-correction).

    Example:
        >>> import torch
        >>> from dlcore.process import hybrid
        >>> logits = torch.tensor([[[0.0, 9.0, 0.0], [0.0, 5.0, 0.0], [9.0, 0.0, 0.0]]])
        >>> hybrid.correct(logits, torch.tensor([[0, 0, 0]]), mask_id=2, temperature=0.0)
        tensor([[1, 0, 0]])
    """
    op = "hybrid.correct"
    rows.masked(op, logits, z, mask_id)
    checks.sequences(op, "z", z)
    draw = categorical.sample(
        logits, temperature=temperature, exclude=mask_id, key=rows.key(op, key, generator, logits)
    )
    other = (draw.tokens != z) & (draw.tokens >= 0)
    chosen = unmask.largest(op, "num_positions", num_positions, draw.logprob, other)
    return torch.where(chosen, draw.tokens, z)
