"""Masked (absorbing-state) diffusion: q(z | x) = α·1[z = x] + (1-α)·1[z = mask].

A masked position has no observation of its own, so the denoiser is the leave-one-out posterior. The mask
token has probability 0 under the network (SUBS), and a row that keeps its token is not read. Noise levels
alpha are ``float | Tensor``, broadcast to z's shape, best in float64. A position with α = 1 is clean.

Sources: MDLM, arXiv 2406.07524; ReMDM, arXiv 2503.00307; first-hitting sampler, arXiv 2409.02908.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore._beside import beside
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows

__all__ = ["corrupt", "first_hitting", "nelbo", "remask_probability", "step"]

Logits = Tensor | LinearLogits

#: sigma may pass its bound by so much, the rounding of a float32 sigma.
_SLACK = 1e-6


def _observed(op: str, logits: Logits, z: Tensor, mask_id: int) -> Tensor:
    """Where z is masked, after checks of logits, z and mask_id."""
    h = categorical.head(op, logits)
    rows.tokens(op, "z", z, h)
    checks.integer(op, "mask_id", mask_id)
    checks.token_id(op, "mask_id", mask_id, h.vocab)
    return z == mask_id


def corrupt(
    x: Tensor,
    alpha: float | Tensor,
    mask_id: int,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep x with probability alpha, else mask. Returns z (...) int64.

    Args:
        x: (...) int64 clean tokens.
        alpha: in [0, 1], broadcast to x.shape.
        mask_id: the mask token, not negative.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Example:
        >>> import torch
        >>> from dlcore.process import masked
        >>> masked.corrupt(torch.tensor([1, 2, 3]), torch.tensor([1.0, 0.0, 1.0]), mask_id=9)
        tensor([1, 9, 3])
    """
    op = "masked.corrupt"
    rows.mask_token(op, mask_id)
    checks.tokens(op, "x", x)
    a = rows.level(op, "alpha", alpha, x.shape, x.device)
    (u,) = rows.uniforms(rows.row_keys(op, key, generator, x.shape, x.device), 1)
    return torch.where(u < a, x, mask_id)


def step(
    logits: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    mask_id: int,
    *,
    remask: float | Tensor = 0.0,
    temperature: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step from alpha_t to alpha_s: unmask, and with remask > 0 also mask again (ReMDM).

    A masked position takes a draw of the network with probability (α_s - (1-σ)·α_t)/(1-α_t), else stays
    masked; another is masked with probability σ = remask. The marginal at s is exact for every σ up to
    min(1, (1-α_s)/α_t). Only rows that take a draw are read.

    Args:
        logits: (..., V).
        z: (...) int64.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape.
        mask_id: the mask token, excluded from the draw.
        remask: σ per position, see `remask_probability`. Where a prompt must stay, give alpha = 1 or σ = 0.
        temperature: non-negative; at 0 the argmax.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, alpha_s below alpha_t, remask above its bound.

    Source:
        MDLM, arXiv 2406.07524; ReMDM, arXiv 2503.00307.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import masked
        >>> z = torch.full((2, 8), 999)
        >>> masked.step(torch.randn(2, 8, 1000), z, 0.0, 0.5, 999, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "masked.step"
    is_masked = _observed(op, logits, z, mask_id)
    t, s = rows.level_numbers(op, alpha_t, alpha_s, z.shape, z.device)
    sigma = _remask(op, rows.number(op, "remask", remask, z.shape, z.device), t, s)
    if isinstance(sigma, float) and sigma == 0:  # as it mostly is: fewer launches
        stays, takes = 1 - s, s - t
    else:
        stays, takes = 1 - s - sigma * t, s - (1 - sigma) * t
    unmask = rows.coefficients(1 - t, 0.0, stays, 0.0, takes, 0.0, device=z.device)
    hold = rows.coefficients(1.0, 0.0, 1 - sigma, 0.0, 0.0, 0.0, device=z.device)
    return categorical.sample_mixture(
        logits,
        z,
        torch.where(is_masked.unsqueeze(-1), beside(z, unmask), beside(z, hold)),
        prior=mask_id,
        temperature=temperature,
        exclude=mask_id,
        key=rows.key(op, key, generator, logits),
    )


def _remask(op: str, sigma: rows.Number, alpha_t: rows.Number, alpha_s: rows.Number) -> rows.Number:
    """sigma, checked against its bound and clamped to it."""
    checks.within(op, "remask", sigma, 0, 1)
    if isinstance(sigma, float) and sigma == 0:
        return sigma
    bound = rows.largest_remask(alpha_t, alpha_s)
    if all(checks.reads_data(x) for x in (sigma, bound) if isinstance(x, Tensor)):
        wrong = torch.as_tensor(sigma > bound + _SLACK)
        if bool(wrong.any()):
            got, most = (
                checks.first(torch.as_tensor(x, dtype=torch.float64, device=wrong.device), wrong)
                for x in (sigma, bound)
            )
            raise ValueError(
                f"{op}: remask must be at most min(1, (1 - alpha_s)/alpha_t), got {got:g} above {most:g}"
            )
    return rows.least(sigma, bound)


RULES = ("cap", "rescale", "confidence", "max")


def remask_probability(
    rule: str,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    eta: float | Tensor | None = None,
    confidence: Tensor | None = None,
) -> Tensor:
    """σ for `step`, by a rule of ReMDM, with σ_max = min(1, (1-α_s)/α_t).

    "max": σ_max. "cap": min(eta, σ_max). "rescale": eta·σ_max. "confidence": σ_max times the softmax of
    -confidence over each sequence.

    Args:
        rule: one of the four.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t; broadcast to confidence's shape if that is given,
            else together.
        eta: in [0, 1], for "cap" and "rescale", which need it.
        confidence: (..., L) floating, for "confidence": each token's probability when it was drawn. Give
            masked positions (and a prompt) +inf or NaN: they get 0 and no share. A sequence of such alone
            gets zeros.

    Returns:
        float64, of the broadcast shape of the arguments.

    Raises:
        ValueError: an unknown rule; eta or confidence missing, or given to a rule that has no use for it.

    Source:
        ReMDM, arXiv 2503.00307.

    Example:
        >>> import torch
        >>> from dlcore.process import masked
        >>> masked.remask_probability("cap", 0.5, 0.6, eta=0.02)
        tensor(0.0200, dtype=torch.float64)
        >>> confidence = torch.tensor([[0.9, 0.9, torch.inf]])
        >>> masked.remask_probability("confidence", 0.5, 0.6, confidence=confidence)
        tensor([[0.4000, 0.4000, 0.0000]], dtype=torch.float64)
    """
    op = "masked.remask_probability"
    checks.option(op, "rule", rule, RULES)
    for name, value, users in (("eta", eta, ("cap", "rescale")), ("confidence", confidence, ("confidence",))):
        if (value is not None) != (rule in users):
            raise ValueError(f"{op}: rule {rule!r} {'needs' if value is None else 'takes no'} {name}")
    if confidence is not None:
        checks.floating(op, "confidence", confidence)
        lead, device = confidence.shape, confidence.device
    else:
        lead, device = rows.together(op, alpha_t=alpha_t, alpha_s=alpha_s, eta=eta)
    bound = rows.largest_remask(*rows.levels(op, alpha_t, alpha_s, lead, device))
    if confidence is not None:
        return bound * _shares(confidence.double())
    if eta is None:
        return bound
    share = rows.level(op, "eta", eta, lead, device)
    return share * bound if rule == "rescale" else torch.minimum(share, bound)


def _shares(confidence: Tensor) -> Tensor:
    """softmax of -confidence over the entries below +inf; zeros elsewhere."""
    counted = confidence < torch.inf
    share = torch.softmax((-confidence).masked_fill(~counted, -torch.inf), -1)
    return share.masked_fill(~counted, 0)


def nelbo(
    logits: Logits, z: Tensor, x: Tensor, alpha: float | Tensor, dalpha: float | Tensor, mask_id: int
) -> Tensor:
    """The continuous-time NELBO's integrand: -α'/(1-α)·(-log p(x)) at masked positions, 0 elsewhere, in nats.

    Only masked rows are read.

    Args:
        logits: (..., V).
        z, x: (...) int64 observed and clean tokens.
        alpha: in [0, 1], below 1 where masked, broadcast to z.shape.
        dalpha: dα/dt <= 0, broadcast to z.shape.
        mask_id: the mask token; it has probability 0.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias).

    Source:
        MDLM, arXiv 2406.07524.

    Example:
        >>> import torch
        >>> from dlcore.process import masked
        >>> masked.nelbo(torch.zeros(2, 5), torch.tensor([4, 1]), torch.tensor([2, 1]), 0.5, -1.0, mask_id=4)
        tensor([2.7726, 0.0000])
    """
    op = "masked.nelbo"
    is_masked = _observed(op, logits, z, mask_id)
    h = categorical.head(op, logits)
    rows.tokens(op, "x", x, h)
    a = rows.level(op, "alpha", alpha, z.shape, z.device)
    if checks.reads_data(a) and bool((is_masked & (a == 1)).any()):
        raise ValueError(f"{op}: alpha must be below 1 where z is masked, got 1")
    da = rows.slope(op, dalpha, z.shape, z.device)
    log_p = categorical.log_probs(
        op, logits, torch.where(is_masked, x, -1), exclude=mask_id, target_name="x"
    )[0]
    weight = (da / (1 - a)).to(log_p.dtype)
    return torch.where(is_masked, weight * log_p, 0)


def first_hitting(
    z: Tensor,
    alpha_t: float | Tensor,
    mask_id: int,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """When, and where, the next position of each sequence unmasks: one network row per evaluation.

    With n positions masked at alpha_t, the next noise level obeys 1 - α = (1 - α_t)·u^{1/n}, u uniform, and
    the position is uniform among the n.

    Args:
        z: (B, L) int64, L at least 1.
        alpha_t: in [0, 1], a number or (B,).
        mask_id: the mask token, not negative.
        key: int64 (2,) or one per sequence (B, 2), see `dlcore.rng`; else from `generator` or torch's own.

    Returns:
        next_alpha (B,) float64 and position (B,) int64; 1 and -1 where nothing is masked.

    Source:
        arXiv 2409.02908.

    Example:
        >>> import torch
        >>> from dlcore.process import masked
        >>> masked.first_hitting(torch.tensor([[1, 9, 2], [1, 2, 3]]), 0.5, mask_id=9)[1]
        tensor([ 1, -1])
    """
    op = "masked.first_hitting"
    rows.mask_token(op, mask_id)
    checks.tokens(op, "z", z)
    if z.dim() != 2 or z.shape[1] < 1:
        raise ValueError(f"{op}: z must be (B, L), L >= 1, got {tuple(z.shape)}")
    lead = z.shape[:-1]
    a = rows.level(op, "alpha_t", alpha_t, lead, z.device)
    when, where = rows.uniforms(rows.row_keys(op, key, generator, lead, z.device), 2)
    is_masked = z == mask_id
    order = is_masked.cumsum(-1)
    count = is_masked.sum(-1)
    some = count > 0
    next_alpha = 1 - (1 - a) * when ** (1 / count.clamp(min=1).double())
    chosen = is_masked & (order == (where * count).long().unsqueeze(-1) + 1)
    return torch.where(some, next_alpha, 1), torch.where(some, chosen.int().argmax(-1), -1)
