"""Absorbing-state reformulation of uniform diffusion: the state is (z, u).

Every position draws one noise token u, uniform over V; z is x with probability α, else u. The marginal of z
is uniform-state diffusion, but z ≠ u proves that z = x, so such a position is settled, as an unmasked one is
in masked diffusion. Where z = u the denoiser is D(v) ∝ p(v)·[1 - α + α·1[v = u]] with the leave-one-out
posterior p: again one shifted logit, by log(1 + α/(1-α)), without the factor V. `parameterization` says which
of the two the logits are. Noise levels alpha are ``float | Tensor``, broadcast to z's shape, best in float64.

Source: arXiv 2605.22765.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows

__all__ = ["corrupt", "nelbo", "remask_step", "step"]

Logits = Tensor | LinearLogits


def _observed(
    op: str, logits: Logits, z: Tensor, u: Tensor, parameterization: str, exclude: int | None = None
) -> int:
    """The number of tokens that noise may take, after the checks."""
    h = categorical.head(op, logits)
    rows.tokens(op, "z", z, h)
    rows.tokens(op, "u", u, h)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    return rows.vocabulary(op, h.vocab, exclude)


@overload
def _lift(alpha: Tensor) -> Tensor: ...


@overload
def _lift(alpha: rows.Number) -> rows.Number: ...


def _lift(alpha: rows.Number) -> rows.Number:
    """log(1 + α/(1-α)): what z = u adds to the logit at u; 0 where alpha = 1, which no shift expresses."""
    if isinstance(alpha, float):
        return -math.log1p(-alpha) if alpha < 1 else 0.0
    return torch.where(alpha < 1, -torch.log1p(-torch.where(alpha < 1, alpha, 0)), 0)


def _denoiser_shift(alpha: rows.Number, temperature: rows.Number, parameterization: str) -> rows.Number:
    """What makes logits the denoiser's at a temperature on the leave-one-out posterior.

    softmax((a + shift)/T) must be softmax(loo/T) lifted by log(1 + α/(1-α)) at u.
    """
    return _lift(alpha) * (temperature if parameterization == "loo" else temperature - 1)


def corrupt(
    x: Tensor,
    alpha: float | Tensor,
    vocab_size: int,
    *,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw u uniform; z is x with probability alpha, else u. Returns (z, u), each (...) int64.

    Args:
        x: (...) int64 clean tokens.
        alpha: in [0, 1], broadcast to x.shape.
        vocab_size: V.
        exclude: a token id that noise never takes and that does not count in V.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Example:
        >>> import torch
        >>> from dlcore.process import absorbing_uniform
        >>> x = torch.arange(6).view(2, 3)
        >>> z, u = absorbing_uniform.corrupt(x, 0.0, vocab_size=6)
        >>> z.equal(u)
        True
    """
    op = "absorbing_uniform.corrupt"
    size = rows.vocabulary(op, vocab_size, exclude)
    checks.tokens(op, "x", x)
    checks.token_range(op, "x", x, vocab_size)
    a = rows.level(op, "alpha", alpha, x.shape, x.device)
    route, which = rows.uniforms(rows.row_keys(op, key, generator, x.shape, x.device), 2)
    u = rows.uniform_tokens(which, size, exclude)
    return torch.where(route < a, x, u), u


def step(
    logits: Logits,
    z: Tensor,
    u: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    parameterization: str = "loo",
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step from alpha_t to alpha_s; u stays. Positions with z ≠ u are settled and not read.

    Where z = u: a draw of the denoiser with probability (α_s-α_t)/(1-α_t), else z.

    Args:
        logits: (..., V) at (z, u).
        z, u: (...) int64.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape.
        parameterization: whether logits are the leave-one-out posterior's ("loo") or the "denoiser"'s.
        temperature: non-negative, on the leave-one-out posterior, before any conversion; at 0 its argmax.
        exclude: a token id that has probability 0.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, alpha_s below alpha_t.

    Example:
        >>> import torch
        >>> from dlcore.process import absorbing_uniform
        >>> z, u = torch.tensor([3, 4]), torch.tensor([5, 4])
        >>> absorbing_uniform.step(torch.zeros(2, 6), z, u, 0.4, 0.7)[0]
        tensor(3)
    """
    op = "absorbing_uniform.step"
    _observed(op, logits, z, u, parameterization, exclude)
    t, s = rows.level_numbers(op, alpha_t, alpha_s, z.shape, z.device)
    heat = rows.number(op, "temperature", temperature, z.shape, z.device)
    return categorical.sample_mixture(
        logits,
        z,
        rows.coefficients(1 - t, 0.0, 1 - s, 0.0, s - t, 0.0, keep=(z != u) | (t == 1)),
        shift=_denoiser_shift(t, heat, parameterization),
        temperature=temperature,
        exclude=exclude,
        key=rows.key(op, key, generator, logits),
    )


def remask_step(
    logits: Logits,
    z: Tensor,
    u: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    parameterization: str = "loo",
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """One reverse step that may unsettle positions again. Returns (z_s, u_s), each (...) int64.

    y is a draw of the denoiser (z itself where z ≠ u), z_s one of the uniform-state bridge q(z_s | z, y), and
    u_s one of its law given z_s and y: z_s where z_s ≠ y, else z_s with probability 1/(1 + (V-1)·α_s) and
    uniform over the others. Given x, (z_s, u_s) has the law of `corrupt` at alpha_s.

    Arguments, raises and source: as in `step`; exclude also leaves the noise tokens.

    Example:
        >>> import torch
        >>> from dlcore.process import absorbing_uniform
        >>> z, u = torch.tensor([3, 4]), torch.tensor([5, 4])
        >>> z_s, u_s = absorbing_uniform.remask_step(torch.zeros(2, 6), z, u, 0.4, 0.7)
        >>> z_s.shape, u_s.shape
        (torch.Size([2]), torch.Size([2]))
    """
    op = "absorbing_uniform.remask_step"
    size = _observed(op, logits, z, u, parameterization, exclude)
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, z.device)
    heat = checks.number(op, "temperature", temperature, z.shape, z.device)
    keys = rows.row_keys(op, key, generator, z.shape, z.device, logits)
    clean = categorical.sample_mixture(
        logits,
        z,
        rows.coefficients(torch.ones_like(t), 0.0, 0.0, 0.0, 1.0, 0.0, keep=(z != u) | (t == 1)),
        shift=_denoiser_shift(t, heat, parameterization),
        temperature=temperature,
        exclude=exclude,
        key=keys,
    )
    route, which, renew, other = rows.uniforms(keys, 4)
    r = rows.ratio(t, s)
    agree = size * t * (clean == z)
    mark = route * (agree + 1 - t)
    keep = agree + r * (1 - s)
    noise = rows.uniform_tokens(which, size, exclude)
    z_s = torch.where(mark < keep, z, torch.where(mark < keep + s - t, clean, noise))
    # The other size - 1 tokens, cyclically after z_s.
    hop = 1 + (other * (size - 1)).long()
    others = rows.expand_ids((rows.compact_ids(z_s, exclude) + hop) % size, exclude)
    same = (z_s != clean) | (renew * (1 + (size - 1) * s) < 1)
    # A broken row yields -1 for both.
    bad = clean < 0
    return torch.where(bad, -1, z_s), torch.where(bad, -1, torch.where(same, z_s, others))


def nelbo(
    logits: Logits,
    z: Tensor,
    u: Tensor,
    x: Tensor,
    alpha: float | Tensor,
    dalpha: float | Tensor,
    *,
    parameterization: str = "loo",
) -> Tensor:
    """The continuous-time NELBO's integrand, in nats per token: (...), differentiable.

    1[z = u]·r·(1 - D(z) - 1[x ≠ u]·(1 + log D(x))) with r = -α'/(1-α). Rows with z ≠ u are not read. It is
    evaluated through the leave-one-out posterior, where r·(1 - D(z)) = -α'·(1 - p(z))/(1 - α + α·p(z))
    loses nothing as alpha nears 1.

    Args:
        logits: (..., V) at (z, u).
        z, u, x: (...) int64 observed, noise and clean tokens.
        alpha: in [0, 1), broadcast to z.shape.
        dalpha: dα/dt <= 0, broadcast to z.shape.
        parameterization: as in `step`.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, alpha outside [0, 1), positive dalpha.

    Example:
        >>> import torch
        >>> from dlcore.process import absorbing_uniform
        >>> z, u, x = torch.tensor([3, 4]), torch.tensor([5, 4]), torch.tensor([3, 0])
        >>> absorbing_uniform.nelbo(torch.zeros(2, 6), z, u, x, 0.5, -1.0)
        tensor([0.0000, 3.3204])
    """
    op = "absorbing_uniform.nelbo"
    _observed(op, logits, z, u, parameterization)
    h = categorical.head(op, logits)
    rows.tokens(op, "x", x, h)
    a = rows.level(op, "alpha", alpha, z.shape, z.device, "[)")
    da = rows.slope(op, dalpha, z.shape, z.device)
    open_ = z == u
    dtype = torch.promote_types(h.logits.dtype, torch.float32)
    shift = None if parameterization == "loo" else (-_lift(a)).to(dtype)
    log_px, log_pz, _ = categorical.log_probs(
        op, logits, torch.where(open_, x, -1), index=z, shift=shift, target_name="x"
    ).unbind(0)
    # Rows that are not read come with log p = 0, so that nothing below is NaN, nor its gradient.
    noise, miss = (1 - a).to(dtype), -torch.expm1(log_pz)
    total = noise + a.to(dtype) * log_pz.exp()
    settled = torch.where(x != u, 1 + log_px + noise.log() - total.log(), 0)
    rate = -da.to(dtype)
    return torch.where(open_, rate * miss / total - rate / noise * settled, 0)
