"""Classifier-based guidance: a noisy sequence's law times p(class | it)^γ, position by position."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process.guidance import _sums as sums
from dlcore.process.guidance._sums import Logits
from dlcore.process.uniform import _terms as terms


def exact_guide(
    classifier: Callable[[Tensor], Tensor],
    z: Tensor,
    vocab_size: int,
    *,
    where: Tensor | None = None,
    chunk: int = 1024,
) -> Tensor:
    """log p(class | z with y at l) for every position l and token y: B·L·V classifier calls, in chunks.

    For small vocabularies; `taylor_guide` needs one call and its gradient.

    Args:
        classifier: (n, L) int64 tokens -> (n,) log p(class | tokens), in nats.
        z: (B, L) int64 observed tokens.
        vocab_size: V; every token below it is tried, a mask token too.
        where: (B, L) bool, the positions to try, all if None; elsewhere the guide is 0.
        chunk: sequences per call, at least 1.

    Returns:
        (B, L, V) in the classifier's dtype (float32 where it tried nothing): a guide for `cbg` and its
        steps. Without gradient.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, chunk below 1, a classifier's result that is not (n,).

    Source:
        D-CBG, arXiv 2412.10193.

    Example:
        >>> import torch
        >>> from dlcore.process import guidance
        >>> z = torch.tensor([[0, 1]])
        >>> guidance.exact_guide(lambda tokens: tokens.sum(-1).float(), z, vocab_size=3)
        tensor([[[1., 2., 3.],
                 [0., 1., 2.]]])
    """
    op = "guidance.exact_guide"
    checks.tokens(op, "z", z)
    checks.sequences(op, "z", z)
    rows.vocabulary(op, vocab_size, None)
    checks.token_range(op, "z", z, vocab_size)
    checks.integer(op, "chunk", chunk)
    if chunk < 1:
        raise ValueError(f"{op}: chunk must be at least 1, got {chunk}")
    if where is not None:
        checks.mask(op, "where", where, z.shape, z.device)
    tried = torch.ones_like(z, dtype=torch.bool) if where is None else where
    sites = tried.flatten().nonzero().squeeze(-1)
    if not len(sites):
        return torch.zeros(*z.shape, vocab_size, device=z.device)
    found = []
    with torch.no_grad():
        for start in range(0, len(sites) * vocab_size, chunk):
            index = torch.arange(start, min(start + chunk, len(sites) * vocab_size), device=z.device)
            site = sites[index // vocab_size]
            changed = z[site // z.shape[1]].scatter(
                1, (site % z.shape[1]).unsqueeze(-1), (index % vocab_size).unsqueeze(-1)
            )
            value = classifier(changed)
            if value.shape != index.shape:
                got = tuple(value.shape)
                raise ValueError(f"{op}: classifier must return {tuple(index.shape)}, got {got}")
            found.append(value)
    values = torch.cat(found).view(-1, vocab_size)
    guide = values.new_zeros(z.numel(), vocab_size).index_copy(0, sites, values)
    return guide.view(*z.shape, vocab_size)


def taylor_guide(classifier: Callable[[Tensor], Tensor], z: Tensor, embedding: Tensor) -> LinearLogits:
    """The first-order guide (TAG): log p(class | z with y at l) - log p(class | z) ≈ (E_y - E_{z_l})·h_l.

    h = ∂ log p(class | z)/∂E[z], one call and one backward pass. The part that depends on y is the linear
    head of hidden h and weight E, which is what comes back: no (B, L, V) tensor. It is exact where
    log p is linear in the embeddings, and no better than the classifier is smooth between them.

    Public code exponentiates the ratio and clamps it at 80; here it stays a logit, and nothing is clamped.

    Args:
        classifier: (B, L, E) embedded tokens -> (B,) log p(class | tokens), in nats, differentiable.
        z: (B, L) int64 observed tokens.
        embedding: (V, E) floating, what the classifier looks tokens up in; torch.eye(V) for one of one-hots.

    Returns:
        `LinearLogits` (B, L, V) of hidden h, without gradient, and the very weight `embedding`.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, a classifier's result that is not (B,).

    Source:
        TAG, arXiv 2406.01572; D-CBG's first order, arXiv 2412.10193.

    Example:
        >>> import torch
        >>> from dlcore.process import guidance
        >>> guide = guidance.taylor_guide(lambda e: e[:, 0, 1], torch.tensor([[0, 1]]), torch.eye(3))
        >>> guide.materialize()
        tensor([[[0., 1., 0.],
                 [0., 0., 0.]]])
    """
    op = "guidance.taylor_guide"
    checks.tokens(op, "z", z)
    checks.sequences(op, "z", z)
    checks.floating(op, "embedding", embedding)
    if embedding.dim() != 2:
        raise ValueError(f"{op}: embedding must be (V, E), got {tuple(embedding.shape)}")
    checks.token_range(op, "z", z, embedding.shape[0])
    with torch.enable_grad():
        embedded = embedding.detach()[z].requires_grad_()
        value = classifier(embedded)
        if value.shape != z.shape[:1]:
            raise ValueError(f"{op}: classifier must return {tuple(z.shape[:1])}, got {tuple(value.shape)}")
        (h,) = torch.autograd.grad(value.sum(), embedded)
    return LinearLogits(h, embedding)


def cbg(logits: Logits, guide: Logits, gamma: float | Tensor) -> Logits:
    """logits + γ·guide: the predictor's law times p(class | z with y at l)^γ, up to normalisation.

    Read by `masked.step`, these logits guide which token a position takes and leave alone when it does;
    `cbg_masked_step` guides both.

    Args:
        logits: (..., V).
        guide: (..., V), log p(class | ·) up to a constant per row: of `exact_guide` or `taylor_guide`.
        gamma: γ, finite, broadcast to the leading dimensions (a guidance temperature is 1/γ).

    Returns:
        (..., V): `LinearLogits` where both are, [hidden, γ·h] on [weight, E] (where E is the very weight of
        bias-free logits, tied embeddings, hidden + γ·h on it, and no weight is copied); biases must be
        finite. Else a Tensor in float32 or wider. Differentiable. Give both in one dtype: the narrower is
        copied to the wider.

    Raises:
        TypeError: dtypes. ValueError: shapes that differ, a gamma that does not broadcast or is not finite.

    Source:
        D-CBG, arXiv 2412.10193.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import guidance
        >>> logits = dlcore.LinearLogits(torch.randn(2, 4, 8), torch.randn(100, 8))
        >>> guide = dlcore.LinearLogits(torch.randn(2, 4, 3), torch.randn(100, 3))
        >>> guidance.cbg(logits, guide, 2.0).weight.shape
        torch.Size([100, 11])
    """
    op = "guidance.cbg"
    rows.alike(op, logits=logits, guide=guide)
    g = sums.weight(op, gamma, logits.shape[:-1], logits.device)
    return _tilt(op, logits, guide, g)


def _tilt(op: str, logits: Logits, guide: Logits, gamma: Tensor) -> Logits:
    if isinstance(logits, LinearLogits) and isinstance(guide, LinearLogits):
        return sums.linear_sum(op, (torch.ones_like(gamma), logits), (gamma, guide))
    return rows.dense(op, logits) + _scaled(rows.dense(op, guide, "guide"), gamma)


def _scaled(guide: Tensor, gamma: Tensor) -> Tensor:
    """γ·guide, with 0·(-inf) as 0."""
    g = gamma.to(guide.dtype).unsqueeze(-1)
    return torch.where(g == 0, 0, g * guide)


def _at(op: str, guide: Logits, z: Tensor) -> Tensor:
    """The guide's entry at z, float64."""
    rows.whole(op, guide, "guide")
    if isinstance(guide, Tensor):
        return rows.gather(guide, z).double()
    value = (guide.hidden.double() * guide.weight[z].double()).sum(-1)
    return value if guide.bias is None else value + guide.bias[z].double()


def cbg_masked_step(
    logits: Logits,
    guide: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    mask_id: int,
    gamma: float | Tensor,
    *,
    temperature: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One guided reverse step of masked diffusion: q(y) · p(class | z with y at l)^γ, y the mask included.

    Per masked position q is the posterior, so the classifier also says whether now is the time to unmask:
    the mask has weight (1-α_s)·e^{γ·g(mask)} against (α_s-α_t)·Σ_y p(y)·e^{γ·g(y)} of all tokens. For a
    guide that is the same for all tokens and the mask, or γ = 0, it is `masked.step`. The two
    normalisers are one read each, the draw another; nothing of size (B, L, V) is made of linear heads.

    Args:
        logits: (..., V).
        guide: (..., V), log p(class | z with y at l) up to a constant per row.
        z: (...) int64.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape.
        mask_id: the mask token, excluded from the draw.
        gamma: γ, finite, broadcast to z.shape.
        temperature: positive, on the predictor, before guidance.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a masked row that moves is broken.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, alpha_s below alpha_t, gamma not finite.

    Source:
        D-CBG for absorbing states, arXiv 2412.10193.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import guidance
        >>> z, guide = torch.full((2, 8), 99), torch.zeros(2, 8, 100)
        >>> logits, key = torch.randn(2, 8, 100), dlcore.rng.key(7)
        >>> guidance.cbg_masked_step(logits, guide, z, 0.0, 0.5, 99, 1.0, key=key).shape
        torch.Size([2, 8])
    """
    op = "guidance.cbg_masked_step"
    rows.alike(op, logits=logits, guide=guide)
    h = categorical.head(op, logits)
    rows.tokens(op, "z", z, h)
    checks.integer(op, "mask_id", mask_id)
    checks.token_id(op, "mask_id", mask_id, h.vocab)
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, z.device)
    g = sums.weight(op, gamma, z.shape, z.device)
    heat = rows.positive(op, "temperature", temperature, z.shape, z.device)
    guided = _tilt(op, logits, guide, g * heat)
    lse, guided_lse = (
        categorical.stats(x, temperature=heat, exclude=mask_id).logsumexp.double() for x in (logits, guided)
    )
    at_mask = torch.where(g == 0, 0, g * _at(op, guide, z))
    odds = (s - t).log() - (1 - s).log() + guided_lse - lse - at_mask
    # A broken row has none; reading it for a draw says so.
    unmask = torch.sigmoid(odds).nan_to_num(1.0)
    return categorical.sample_mixture(
        guided,
        z,
        rows.coefficients(1.0, 0.0, 1 - unmask, 0.0, unmask, 0.0, keep=(z != mask_id) | (t == s)),
        prior=mask_id,
        temperature=heat,
        exclude=mask_id,
        key=rows.key(op, key, generator, logits),
    )


def cbg_uniform_step(
    logits: Logits,
    guide: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    gamma: float | Tensor,
    *,
    parameterization: str = "loo",
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One guided reverse step of a uniform process: bridge(y) · p(class | z with y at l)^γ, normalised.

    The law is log_softmax(`uniform.bridge_log_probs` + γ·guide). The bridge is α_s·p(y) + (1-α_s)/V, times
    1 + c_{t|s} at y = z, so the guided one is a mixture of two softmaxes, of a/T + γ·guide and of γ·guide,
    each with the logit at z raised by log1p(c_{t|s}). One read of the logits for p's normaliser and one draw
    of each suffice, and with linear heads nothing of size (B, L, V) is made.

    Args:
        logits: (..., V).
        guide: (..., V), log p(class | z with y at l) up to a constant per row.
        z: (...) int64 observed tokens.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape.
        gamma: γ, finite, broadcast to z.shape.
        parameterization, exclude: as in `uniform.step`.
        temperature: positive, on the leave-one-out posterior, before any conversion and guidance.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that moves is broken in the logits or the guide. Rows with
        alpha_s = alpha_t keep z.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, alpha_s below alpha_t, gamma not finite.

    Source:
        D-CBG, arXiv 2412.10193; the mixture is derived here.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import guidance
        >>> z, logits, guide = torch.randint(9, (2, 8)), torch.randn(2, 8, 9), torch.randn(2, 8, 9)
        >>> guidance.cbg_uniform_step(logits, guide, z, 0.4, 0.5, 2.0, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "guidance.cbg_uniform_step"
    size = terms.observed(op, logits, z, exclude)
    rows.alike(op, logits=logits, guide=guide)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, z.device)
    g = sums.weight(op, gamma, z.shape, z.device)
    heat = rows.positive(op, "temperature", temperature, z.shape, z.device)
    keys = rows.row_keys(op, key, generator, z.shape, z.device, logits)
    shift, bonus = terms.shift(parameterization, t, size), terms.lift(rows.ratio(t, s), size)
    lse = categorical.stats(logits, z, shift=shift, temperature=heat, exclude=exclude).logsumexp
    signal = categorical.sample(
        _tilt(op, logits, guide, g * heat),
        z,
        shift=heat * bonus if shift is None else heat * bonus + shift,
        temperature=heat,
        exclude=exclude,
        key=keys,
    )
    if isinstance(guide, LinearLogits):
        scaled: Logits = sums.linear_sum(op, (g, guide))
    else:
        scaled = _scaled(rows.dense(op, guide, "guide"), g)
    noise = categorical.sample(scaled, z, shift=bonus, exclude=exclude, key=keys)
    odds = s.log() - (1 - s).log() + math.log(size)
    odds = odds + (signal.stats.logsumexp - lse).double() - noise.stats.logsumexp.double()
    # Of the two draws one is taken, by a number of its own: they may share their noise.
    (route,) = rows.uniforms(keys, 1)
    drawn = torch.where(route < torch.sigmoid(odds), signal.tokens, noise.tokens)
    broken = (signal.tokens < 0) | (noise.tokens < 0)
    return torch.where(t == s, z, torch.where(broken, -1, drawn))
