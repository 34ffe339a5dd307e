"""Corruption, and the reverse step by one read of the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.process import _rows as rows
from dlcore.process.uniform import _terms as terms
from dlcore.process.uniform._terms import Logits


def corrupt(
    x: Tensor,
    alpha: float | Tensor,
    vocab_size: int,
    *,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep x with probability alpha, else take a uniform token. Returns z (...) int64.

    Args:
        x: (...) int64 clean tokens.
        alpha: in [0, 1], broadcast to x.shape.
        vocab_size: V.
        exclude: a token id that noise never takes and that does not count in V (a mask token, say).
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Raises:
        TypeError: x is not int64. ValueError: shapes, ids or alpha do not fit.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import uniform
        >>> x = torch.arange(6).view(2, 3)
        >>> uniform.corrupt(x, 1.0, vocab_size=6).equal(x)
        True
    """
    op = "uniform.corrupt"
    size = rows.vocabulary(op, vocab_size, exclude)
    checks.tokens(op, "x", x)
    checks.token_range(op, "x", x, vocab_size)
    a = rows.level(op, "alpha", alpha, x.shape, x.device)
    route, which = rows.uniforms(rows.row_keys(op, key, generator, x.shape, x.device), 2)
    return torch.where(route < a, x, rows.uniform_tokens(which, size, exclude))


def _routes(
    alpha_t: rows.Number, alpha_s: rows.Number, kappa: rows.Number, size: int, device: torch.device
) -> Tensor:
    """(..., 8): the weights (constant, slope in p(z)) of all, keep z, take a draw of p, take the prior.

    The ψ-mixture κ·bridge + (1 - κ)·[α_s·D + (1 - α_s)/V] over the common denominator 1 - α_t + V·α_t·p(z).
    """
    r, noise_t, noise_s = rows.ratio(alpha_t, alpha_s), 1 - alpha_t, 1 - alpha_s
    seen = size * alpha_t
    settled = alpha_t == alpha_s
    if isinstance(kappa, float) and kappa == 1:  # as it mostly is: the bridge alone, in fewer launches
        keep, draw = (r * noise_s, seen), alpha_s - alpha_t
        prior: tuple[rows.Number, rows.Number] = noise_s * (1 - r), 0.0
    else:
        rest = 1 - kappa
        settled = settled & (rest == 0)
        keep = kappa * r * noise_s, seen * (kappa + rest * alpha_s)
        draw = kappa * (alpha_s - alpha_t) + rest * alpha_s * noise_t
        prior = noise_s * (kappa * (1 - r) + rest * noise_t), noise_s * rest * seen
    settled = (noise_t == 0) | settled
    return rows.coefficients(noise_t, seen, *keep, draw, 0.0, *prior, keep=settled, device=device)


def bridge_log_probs(
    logits: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    parameterization: str = "loo",
    kappa: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
) -> Tensor:
    """The law that `step` draws from, written out.

    With kappa = 1 the bridge q(z_s | z, x) averaged over the denoiser, which equals the bridge with the
    leave-one-out posterior p plugged in for x:
    q(y) = [α_s·p(y) + (1-α_s)/V]·[α_{t|s}·1[y=z] + (1-α_{t|s})/V] / [α_t·p(z) + (1-α_t)/V].
    With kappa < 1 the ψ-posterior κ·q + (1-κ)·[α_s·D + (1-α_s)/V].

    Args:
        logits, z, alpha_t, alpha_s, parameterization, kappa, exclude: as in `step`.
        temperature: positive, on the leave-one-out posterior before any conversion.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in logits.

    Example:
        >>> import torch
        >>> from dlcore.process import uniform
        >>> loo = torch.tensor([10.0, 15.0, 11.0]).log()
        >>> uniform.bridge_log_probs(loo, torch.tensor(0), 0.4, 0.7).exp()
        tensor([0.6760, 0.1798, 0.1441])
    """
    op = "uniform.bridge_log_probs"
    size = terms.observed(op, logits, z, exclude)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    x = rows.dense(op, logits)
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, x.device)
    k = rows.level(op, "kappa", kappa, z.shape, x.device)
    heat = checks.within(
        op,
        "temperature",
        checks.number(op, "temperature", temperature, z.shape, x.device),
        0,
        torch.inf,
        "(]",
    )
    shift = terms.shift(parameterization, t, size)
    if shift is not None:
        x = terms.add_at(x, z, shift)
    x = x / heat.to(x.dtype).unsqueeze(-1)
    if exclude is not None:
        x = x.index_fill(-1, rows.column(exclude, x), -torch.inf)
    log_p = torch.log_softmax(x, -1)
    log_pz = rows.gather(log_p, z).double()
    constant, slope = torch.unflatten(_routes(t, s, k, size, x.device).log(), -1, (4, 2)).unbind(-1)
    total, keep, draw, prior = rows.logaddexp(constant, slope + log_pz.unsqueeze(-1)).unbind(-1)
    keep, draw, prior = (
        w.to(log_p.dtype) for w in (keep - total, draw - total, prior - total - math.log(size))
    )
    moved = rows.logaddexp(draw.unsqueeze(-1) + log_p, prior.unsqueeze(-1).expand_as(log_p))
    if exclude is not None:
        moved = moved.index_fill(-1, rows.column(exclude, x), -torch.inf)
    return moved.scatter(-1, z.unsqueeze(-1), rows.logaddexp(rows.gather(moved, z), keep).unsqueeze(-1))


def step(
    logits: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    *,
    parameterization: str = "loo",
    kappa: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step from alpha_t to alpha_s: a draw from `bridge_log_probs`, by one read of the logits.

    The plug-in bridge is a mixture of three: keep z, take a draw of the leave-one-out posterior p, take a
    uniform token, with weights V·α_t·p(z) + α_{t|s} - α_t, α_s - α_t and (1-α_{t|s})·(1-α_s) over their sum.
    Rows that are clean (alpha_t = 1) or that do not move (alpha_s = alpha_t, kappa = 1) keep z, unread.

    Args:
        logits: (..., V).
        z: (...) int64 observed tokens.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape. At alpha_s = 1 this draws from
            the denoiser.
        parameterization: whether logits are the leave-one-out posterior's ("loo") or the "denoiser"'s.
        kappa: in [0, 1]; 1 is ancestral sampling, less is the ψ-sampler (predictor-corrector).
        temperature: non-negative, on the leave-one-out posterior, before any conversion; at 0 its argmax.
        exclude: a token id that has probability 0 and does not count in V.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels outside [0, 1], alpha_s below alpha_t.

    Source:
        arXiv 2605.22765 (bridge with the leave-one-out posterior); ψ-samplers: arXiv 2602.21185.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import uniform
        >>> z = torch.randint(1000, (2, 8))
        >>> uniform.step(torch.randn(2, 8, 1000), z, 0.4, 0.5, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "uniform.step"
    size = terms.observed(op, logits, z, exclude)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    t, s = rows.level_numbers(op, alpha_t, alpha_s, z.shape, z.device)
    k = checks.within(op, "kappa", rows.number(op, "kappa", kappa, z.shape, z.device), 0, 1)
    return categorical.sample_mixture(
        logits,
        z,
        _routes(t, s, k, size, z.device)[..., :6],
        shift=terms.shift(parameterization, t, size),
        temperature=temperature,
        exclude=exclude,
        key=rows.key(op, key, generator, logits),
    )
