"""Classifier-free guidance: two streams of one network, with and without the condition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _dispatch, rng
from dlcore._beside import beside, keys_beside
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows
from dlcore.process.guidance import _sums as sums
from dlcore.process.guidance._sums import Logits
from dlcore.process.uniform import _terms as terms
from dlcore.reference.guidance import blend

#: Entries of each stream that are held at once where one is linear, 32 MiB: a product of few rows is slow, as
#: it reads the whole weight.
_LINEAR_CHUNK = 2**23


def cfg(cond: Logits, uncond: Logits, gamma: float | Tensor) -> Logits:
    """The guided predictor's logits u + γ·(c - u): their softmax is p_c^γ · p_u^(1-γ), normalised.

    This is guidance of masked diffusion, whose step and confidences read these logits and nothing else:
    ``masked.step(guidance.cfg(cond, uncond, 1.5), z, alpha_t, alpha_s, mask_id)``. LLaDA's
    u + (s + 1)·(c - u) is γ = s + 1. A uniform process guides the bridge instead: see `cfg_uniform_step`.

    γ = 1 gives c and γ = 0 gives u to the last bit. A token that is impossible (-inf) in a stream of non-zero
    weight is impossible, so no γ makes NaN of -inf; an untruncated ratio would put all mass on tokens that u
    alone excludes when γ > 1. A row that is broken in either stream is broken.

    Args:
        cond, uncond: (..., V), of one shape.
        gamma: γ, finite, broadcast to the leading dimensions.

    Returns:
        (..., V): a Tensor in float32 or wider, or `LinearLogits` where both are: of one blended hidden vector
        where weight and bias are the very same tensors, as in one network; else of both side by side, with
        the weights concatenated, and then biases must be finite. Hidden vectors are blended in float32 and
        rounded to their dtype. Differentiable.

    Raises:
        TypeError: dtypes. ValueError: shapes that differ, a gamma that does not broadcast or is not finite.

    Source:
        D-CFG, arXiv 2412.10193; LLaDA, arXiv 2502.09992.

    Example:
        >>> import torch
        >>> from dlcore.process import guidance
        >>> cond, uncond = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0])
        >>> guidance.cfg(cond, uncond, 3.0)
        tensor([0., 4.])
    """
    op = "guidance.cfg"
    rows.alike(op, cond=cond, uncond=uncond)
    g = sums.weight(op, gamma, cond.shape[:-1], cond.device)
    if isinstance(cond, LinearLogits) and isinstance(uncond, LinearLogits):
        if cond.weight is uncond.weight and cond.bias is uncond.bias:
            return replace(cond, hidden=_blend_hidden(cond.hidden, uncond.hidden, g))
        return sums.linear_sum(op, (g, cond), (1 - g, uncond))
    return blend(rows.dense(op, cond, "cond"), rows.dense(op, uncond, "uncond"), g)


def _blend_hidden(c: Tensor, u: Tensor, gamma: Tensor) -> Tensor:
    wide = torch.promote_types(c.dtype, torch.float32)
    return torch.lerp(u.to(wide), c.to(wide), gamma.to(wide).unsqueeze(-1)).to(c.dtype)


class _Bridge(NamedTuple):
    """What a guided bridge needs of each row, broadcast over the rows but not expanded."""

    size: int
    alpha_s: Tensor
    gamma: Tensor
    heat: Tensor
    shift: Tensor | None
    """Makes leave-one-out logits of the network's."""
    bonus: Tensor
    """log1p(c_{t|s}), by which staying at z is likelier; γ + (1-γ) = 1, so it is not scaled."""
    settled: Tensor


def _bridge(
    op: str,
    cond: Logits,
    uncond: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    gamma: float | Tensor,
    parameterization: str,
    temperature: float | Tensor,
    exclude: int | None,
) -> _Bridge:
    """The checks, and the row-wise terms."""
    size = terms.observed(op, cond, z, exclude)
    rows.alike(op, cond=cond, uncond=uncond)
    checks.option(op, "parameterization", parameterization, rows.PARAMETERIZATIONS)
    t, s = rows.levels(op, alpha_t, alpha_s, z.shape, z.device)
    g = sums.weight(op, gamma, z.shape, z.device)
    heat = rows.positive(op, "temperature", temperature, z.shape, z.device)
    shift, bonus = terms.shift(parameterization, t, size), terms.lift(rows.ratio(t, s), size)
    return _Bridge(size, s, g, heat, shift, bonus, t == s)


def _log_mass(op: str, name: str, logits: Logits, z: Tensor, b: _Bridge, exclude: int | None) -> Tensor:
    """log(α_s·p(y) + (1-α_s)/V) of one stream (..., V), finite at either end of α_s."""
    x = rows.without(op, logits, exclude, name)
    if b.shift is not None:
        x = terms.add_at(x, z, b.shift)
    x = x / b.heat.to(x.dtype).unsqueeze(-1)
    signal = b.alpha_s.log() - torch.logsumexp(x, -1).double()
    noise = torch.log1p(-b.alpha_s) - math.log(b.size)
    return rows.logaddexp(x + signal.to(x.dtype).unsqueeze(-1), noise.to(x.dtype).unsqueeze(-1).expand_as(x))


def cfg_uniform_log_probs(
    cond: Logits,
    uncond: Logits,
    z: Tensor,
    alpha_t: float | Tensor,
    alpha_s: float | Tensor,
    gamma: float | Tensor,
    *,
    parameterization: str = "loo",
    temperature: float | Tensor = 1.0,
    exclude: int | None = None,
) -> Tensor:
    """The law that `cfg_uniform_step` draws from: q_c(z_s | z)^γ · q_u(z_s | z)^(1-γ), normalised.

    q_c and q_u are the bridges of `uniform.bridge_log_probs`. Up to a constant per row log q is
    γ·log(α_s·p_c(y) + (1-α_s)/V) + (1-γ)·log(α_s·p_u(y) + (1-α_s)/V) + 1[y = z]·log1p(c_{t|s}), with
    c_{t|s} = V·α_{t|s}/(1-α_{t|s}). At α_s = 1 it is guidance of the denoisers.

    Args, raises, source:
        as in `cfg_uniform_step`.

    Returns:
        (..., V) in nats, float32 or wider. Differentiable in cond and uncond.

    Example:
        >>> import torch
        >>> from dlcore.process import guidance
        >>> cond, uncond = torch.tensor([10.0, 15.0, 11.0]).log(), torch.zeros(3)
        >>> guidance.cfg_uniform_log_probs(cond, uncond, torch.tensor(0), 0.4, 0.7, 1.0).exp()
        tensor([0.6760, 0.1798, 0.1441])
    """
    op = "guidance.cfg_uniform_log_probs"
    b = _bridge(op, cond, uncond, z, alpha_t, alpha_s, gamma, parameterization, temperature, exclude)
    c, u = (_log_mass(op, name, x, z, b, exclude) for name, x in (("cond", cond), ("uncond", uncond)))
    law = terms.add_at(blend(c, u, b.gamma), z, b.bonus)
    if exclude is not None:
        law = law.index_fill(-1, rows.column(exclude, law), -torch.inf)
    log_q = torch.log_softmax(law, -1)
    return torch.where(b.settled.unsqueeze(-1), rows.point(log_q, z), log_q)


def cfg_uniform_step(
    cond: Logits,
    uncond: Logits,
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
    """One guided reverse step of a uniform process: a draw from `cfg_uniform_log_probs`.

    One read of both streams; nothing of their size is made. `LinearLogits` are multiplied out once, some rows
    at a time. Rows with alpha_s = alpha_t keep z, unread.

    Args:
        cond, uncond: (..., V), of one shape: the network with and without the condition.
        z: (...) int64 observed tokens.
        alpha_t, alpha_s: in [0, 1], alpha_s >= alpha_t, broadcast to z.shape. The last step has alpha_s = 1.
        gamma: γ, finite, broadcast to z.shape; 1 is `uniform.step` of cond in law, 0 that of uncond.
        parameterization: whether logits are the leave-one-out posterior's ("loo") or the "denoiser"'s.
        temperature: positive, on both leave-one-out posteriors, before any conversion.
        exclude: a token id that has probability 0 and does not count in V.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken in either stream.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, alpha_s below alpha_t, gamma not finite.

    Source:
        D-CFG, arXiv 2412.10193, on posteriors; in one expression that is finite also at alpha_s = 1.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import guidance
        >>> z, cond, uncond = torch.randint(100, (2, 8)), torch.randn(2, 8, 100), torch.randn(2, 8, 100)
        >>> guidance.cfg_uniform_step(cond, uncond, z, 0.4, 0.5, 2.0, key=dlcore.rng.key(7)).shape
        torch.Size([2, 8])
    """
    op = "guidance.cfg_uniform_step"
    b = _bridge(op, cond, uncond, z, alpha_t, alpha_s, gamma, parameterization, temperature, exclude)
    shift = 0.0 if b.shift is None else b.shift
    k = rows.coefficients(b.gamma, b.heat, shift, b.alpha_s, b.bonus, b.settled.double())
    k = k if k.dim() == 1 else k.expand(*z.shape, -1)
    key = checks.key(op, key, generator, z.shape, z.device)
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        return _draw(cond, uncond, z, k, exclude, key)
    rows.whole(op, cond, "cond")
    rows.whole(op, uncond, "uncond")
    lead, z, keys = z.shape, z.flatten(), rng.row_keys(key, z.shape).reshape(-1, 2)
    k = k if k.dim() == 1 else k.flatten(0, -2)
    parts = list(rows.chunks(z.numel(), cond.shape[-1], _LINEAR_CHUNK))
    c, u = (_dense_rows(rows.flat(x), parts[0].stop) for x in (cond, uncond))
    drawn = (_draw(c(at), u(at), z[at], k if k.dim() == 1 else k[at], exclude, keys[at]) for at in parts)
    return torch.cat(list(drawn)).view(lead)


def _dense_rows(logits: Logits, most: int) -> Callable[[slice], Tensor]:
    """What gives so many rows of logits (n, V) at most at a time, of linear ones multiplied out.

    The CPU's own product takes half of torch's time, and reads a weight of half precision as it is.
    """
    if isinstance(logits, Tensor):
        return lambda at: logits[at]
    hidden, weight, bias = logits.hidden, logits.weight, logits.bias
    plain = {type(hidden), type(weight)} <= {Tensor, torch.nn.Parameter}
    compiling = torch.compiler.is_compiling()
    if (
        compiling
        or not plain
        or _dispatch.choose("guidance.cfg_uniform_step", (hidden, weight, bias)) != "cpu"
    ):
        return torch.no_grad()(lambda at: replace(logits, hidden=hidden[at]).materialize())
    from dlcore.cpu.linear_logits import multiply_out

    room = torch.empty(most, logits.shape[-1], dtype=torch.float32)
    return lambda at: multiply_out((hidden[at], weight, bias), room[: at.stop - at.start])


def _draw(cond: Tensor, uncond: Tensor, z: Tensor, k: Tensor, exclude: int | None, key: Tensor) -> Tensor:
    if cond.dtype != uncond.dtype and torch.float64 in (cond.dtype, uncond.dtype):
        cond, uncond = cond.double(), uncond.double()
    tokens: Tensor = torch.ops.dlcore.guidance_cfg_uniform_step(
        cond, uncond, beside(cond, z), beside(cond, k), exclude, keys_beside(cond, key, z.shape)
    )
    return tokens
