"""Duo's curriculum: the tempered softmax of its Gaussian state as network input, by the k largest entries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import rng
from dlcore.process import _rows as rows

#: γ below this has T(γ) = 1 for every vocabulary: the clean token is e^40 above the noise.
_CLEAN = -80.0


class Relaxed(NamedTuple):
    """A row's token, and the k entries that stand for its tempered softmax."""

    z: Tensor
    """(...) int64: the argmax of the Gaussian state, uniform-state diffusion's observed token."""
    ids: Tensor
    """(..., k) int64, distinct."""
    weights: Tensor
    """(..., k) float32: softmax at ids. Their sum is below 1 by the mass of the entries left out."""


class Noise(NamedTuple):
    """What a row draws: the k largest of V-1 normals, falling, whose they are, and the clean token's own."""

    others: Tensor
    ids: Tensor
    own: Tensor


def _largest_normals(key: Tensor, count: int, total: int) -> Tensor:
    """The `count` largest of `total` independent normals, falling: (..., count) float32.

    log U_(i) = log U_(i-1) - E_i/(total - i + 1) with exponentials E, and Φ^{-1}(U) = -Φ^{-1}(-expm1(log
    U)), so that U near 1 costs no precision.
    """
    # exp(-Gumbel) is an exponential whose small values, which make large normals, are exact.
    gaps = rng.gumbel(key, (count,)).neg().exp()
    left = torch.arange(total, total - count, -1, device=key.device, dtype=gaps.dtype)
    log_cdf = -(gaps / left).cumsum(-1)
    upper = -torch.special.ndtri(-torch.expm1(log_cdf))
    lower = torch.special.ndtri(log_cdf.exp())
    return torch.where(log_cdf > -math.log(2), upper, lower)


def _distinct(key: Tensor, count: int, total: int) -> Tensor:
    """`count` distinct numbers below `total`, every ordered choice as likely: (..., count) int64.

    Fisher and Yates' shuffle, cut after `count` swaps, of which only the places touched are remembered.
    """
    u = rng.uniform(key, (count,), dtype=torch.float64)
    place = torch.arange(count, device=key.device)
    target = (place + (u * (total - place)).long()).clamp(max=total - 1)
    picked: list[Tensor] = []
    left: list[Tensor] = []

    def standing(at: Tensor) -> Tensor:
        """What stands at a place: the number that the last swap into it left there."""
        value = at
        for swap, number in enumerate(left):
            value = torch.where(target[..., swap] == at, number, value)
        return value

    for swap in range(count):
        picked.append(standing(target[..., swap]))
        left.append(standing(place[swap].expand(target.shape[:-1])))
    return torch.stack(picked, -1)


def draw(keys: Tensor, count: int, vocab_size: int, x: Tensor) -> Noise:
    """The noise of every row, by its key; the first of `count` is the same for any count."""
    values, names, own = (rng.fold_in(keys, stream) for stream in range(3))
    ids = _distinct(names, count, vocab_size - 1)
    return Noise(
        _largest_normals(values, count, vocab_size - 1),
        ids + (ids >= x.unsqueeze(-1)).long(),
        rng.normal(own, ()),
    )


def noise_level(op: str, x: Tensor, gamma: float | Tensor, vocab_size: int) -> Tensor:
    """gamma per row, after checks of the three."""
    checks.integer(op, "vocab_size", vocab_size)
    if vocab_size < 2:
        raise ValueError(f"{op}: vocab_size must be at least 2, got {vocab_size}")
    checks.tokens(op, "x", x)
    checks.token_range(op, "x", x, vocab_size)
    g = checks.number(op, "gamma", gamma, x.shape, x.device)
    return checks.within(op, "gamma", g, -torch.inf, torch.inf, "()").clamp(min=_CLEAN)


def _height(gamma: Tensor, noise: Noise) -> Tensor:
    """The clean token's entry over σ̄: e^{-γ/2} + ε."""
    return (-gamma / 2).exp().float() + noise.own


def argmax(x: Tensor, gamma: Tensor, noise: Noise) -> Tensor:
    """The token whose entry is the largest at this level."""
    return torch.where(_height(gamma, noise) > noise.others[..., 0], x, noise.ids[..., 0])


def corrupt(
    x: Tensor,
    gamma: float | Tensor,
    vocab_size: int,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """z = argmax(ᾱ·x + σ̄·ε) without V noises: (...) int64, x with probability T + (1 - T)/V at T = T(γ).

    Under one key the noise ε is the same for every gamma: levels of one key are points of one trajectory, on
    which a token that has become x stays x as γ falls. (`uniform.corrupt` draws the same law without one.)

    Args:
        x: (...) int64 clean tokens.
        gamma: finite, broadcast to x.shape.
        vocab_size: V >= 2.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> import torch
        >>> from dlcore.process import duo
        >>> x = torch.arange(6).view(2, 3)
        >>> duo.corrupt(x, -20.0, vocab_size=6).equal(x)
        True
    """
    op = "duo.corrupt"
    g = noise_level(op, x, gamma, vocab_size)
    return argmax(x, g, draw(rows.row_keys(op, key, generator, x.shape, x.device), 1, vocab_size, x))


def curriculum(
    x: Tensor,
    gamma: float | Tensor,
    tau: float | Tensor,
    vocab_size: int,
    *,
    top_k: int = 2,
    published: bool = False,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Relaxed:
    """The k largest entries of softmax((ᾱ·x + σ̄·ε)/tau), ε normal in V dimensions, and its argmax z.

    O(k) per row: the k largest of the V-1 wrong entries are drawn as order statistics, their owners as
    distinct tokens; the V-1-k below them enter the softmax's sum as their mean. With top_k = V-1 nothing
    is left to it, and the weights are the softmax's exactly. x takes the last place of the k if its entry
    is above that one. Feed `embed` of ids and weights to the network in place of z's embedding, z to
    `uniform.nelbo`. Under one key z is `corrupt`'s.

    z is x exactly where x's entry is the largest, so P(z = x) = T + (1 - T)/V at every top_k. Published code
    sets z = x wherever x is among the k, which is too often (V = 50,257, γ = -2.5, k = 5: .397 for .238);
    `published` reproduces this for comparison. Three departures from that code otherwise: the entry that x
    displaces still counts in the sum, as itself; top_k = 1 works; every token is in every place alike.

    Args:
        x: (...) int64 clean tokens.
        gamma: finite, broadcast to x.shape.
        tau: positive temperature, broadcast to x.shape; as it falls the weights tend to a point mass at z.
        vocab_size: V >= 2.
        top_k: k, from 1 to V-1. Work grows as k².
        published: whether z follows the published rule.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        Relaxed(z, ids, weights). None has a gradient.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        The Diffusion Duality, arXiv 2506.10892; by order statistics: 2602.21185.

    Example:
        >>> import torch, dlcore
        >>> from dlcore.process import duo
        >>> x = torch.randint(50_257, (2, 8))
        >>> z, ids, weights = duo.curriculum(x, -2.5, 1e-3, 50_257, top_k=2, key=dlcore.rng.key(7))
        >>> ids.shape, bool((weights.sum(-1) <= 1).all())
        (torch.Size([2, 8, 2]), True)
    """
    op = "duo.curriculum"
    g = noise_level(op, x, gamma, vocab_size)
    checks.integer(op, "top_k", top_k)
    if not 1 <= top_k < vocab_size:
        raise ValueError(f"{op}: top_k must lie in [1, {vocab_size}), got {top_k}")
    heat = rows.positive(op, "tau", tau, x.shape, x.device)
    noise = draw(rows.row_keys(op, key, generator, x.shape, x.device), top_k, vocab_size, x)
    height, least = _height(g, noise), noise.others[..., -1]
    inside = height > least
    last = torch.where(inside, x, noise.ids[..., -1]).unsqueeze(-1)
    weights = _softmax(noise.others, height, (torch.sigmoid(g).sqrt() / heat).float(), vocab_size - 1 - top_k)
    z = torch.where(inside, x, noise.ids[..., 0]) if published else argmax(x, g, noise)
    return Relaxed(z, torch.cat([noise.ids[..., :-1], last], -1), weights)


def _softmax(others: Tensor, height: Tensor, sharpness: Tensor, rest: int) -> Tensor:
    """softmax(sharpness·entries) at the first k-1 of `others` and the larger of its last and `height`.

    Entries are in units of σ̄ and sharpness is σ̄/tau. Everything is taken relative to the largest entry.
    """
    least = others[..., -1]
    top = torch.maximum(others[..., 0], height)
    scale = sharpness.expand(height.shape).unsqueeze(-1)
    known = scale * (torch.cat([others, height.unsqueeze(-1)], -1) - top.unsqueeze(-1))
    total = torch.logsumexp(known, -1)
    if rest > 0:
        total = torch.logaddexp(total, math.log(rest) + _log_mean_below(least, sharpness, top))
    shown = torch.cat([others[..., :-1], torch.maximum(least, height).unsqueeze(-1)], -1)
    return (scale * (shown - top.unsqueeze(-1)) - total.unsqueeze(-1)).exp()


def _log_mean_below(bound: Tensor, sharpness: Tensor, top: Tensor) -> Tensor:
    """log E[e^{s(X - top)} | X < bound] of a standard normal X: s²/2 + logΦ(bound - s) - logΦ(bound) - s·top.

    For s past the bound the squares cancel: with erfcx they never appear.
    """
    beyond = sharpness - bound
    near = sharpness.square() / 2 - sharpness * top + torch.special.log_ndtr(-beyond)
    scaled = torch.special.erfcx(beyond.clamp(min=0) / math.sqrt(2)) / 2
    far = sharpness * (bound - top) - bound.square() / 2 + scaled.log()
    mean: Tensor = torch.where(beyond > 0, far, near) - torch.special.log_ndtr(bound)
    return mean


def embed(ids: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Σ_i weights_i·table[ids_i], the soft embedding of a `Relaxed` row: (..., E) in table's dtype.

    One pass over k rows of the table per position; nothing of shape (..., k, E) or (..., V) is kept.

    Args:
        ids: (..., k) int64.
        weights: (..., k) floating, taken in table's dtype.
        table: (V, E) floating.

    Returns:
        (..., E), differentiable in table and weights.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> import torch
        >>> from dlcore.process import duo
        >>> duo.embed(torch.tensor([[0, 2]]), torch.tensor([[0.75, 0.25]]), torch.eye(3))
        tensor([[0.7500, 0.0000, 0.2500]])
    """
    op = "duo.embed"
    checks.floating(op, "table", table)
    checks.floating(op, "weights", weights)
    if table.dim() != 2:
        raise ValueError(f"{op}: table must be (V, E), got {tuple(table.shape)}")
    checks.tokens(op, "ids", ids, weights.shape, weights.device)
    checks.on_device(op, "weights", weights, table.device)
    checks.token_range(op, "ids", ids, table.shape[0])
    lead, k = ids.shape[:-1], ids.shape[-1]
    bag: Tensor = torch.nn.functional.embedding_bag(
        ids.reshape(-1, k), table, per_sample_weights=weights.reshape(-1, k).to(table.dtype), mode="sum"
    )
    return bag.reshape(*lead, table.shape[1])


def curriculum_temperature(
    step: float, *, start: float, stop: float, tau_start: float, tau_stop: float, settled: float = 1e-10
) -> float:
    """τ at a training step: tau_start until `start`, then geometric to tau_stop at `stop`, then `settled`.

    Steps are real: counted, or shares of the training.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import duo
        >>> schedule = dict(start=0, stop=100, tau_start=1e-2, tau_stop=1e-4)
        >>> [round(duo.curriculum_temperature(i, **schedule), 6) for i in (0, 50, 100)]
        [0.01, 0.001, 0.0]
    """
    op = "duo.curriculum_temperature"
    for name, at in (("step", step), ("start", start), ("stop", stop)):
        checks.real(op, name, at, -1e30, 1e30)
    for name, value in (("tau_start", tau_start), ("tau_stop", tau_stop), ("settled", settled)):
        if checks.real(op, name, value, 0, 1e30) == 0:
            raise ValueError(f"{op}: {name} must be positive, got 0")
    if stop < start:
        raise ValueError(f"{op}: stop must be at least start {start:g}, got {stop:g}")
    if step >= stop:
        return settled
    share = (step - start) / (stop - start) if step > start else 0.0
    return float(tau_start ** (1 - share) * tau_stop**share)
