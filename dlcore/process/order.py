"""Order-expressive masked diffusion: every position masks on a schedule of its own, and the order is learned.

Position l is masked at time t with probability 1 - α_l(t); it masks at the rate of its velocity
v = -α̇/(1-α), seen from the masked side. A `Level` holds both, per position of z. The forward schedule may
depend on the clean tokens x, the reverse one on the observed z; where they are the same number everywhere
this is `masked`, where they are steps from one block of positions to the next it is block diffusion, and with
blocks of one token an autoregressive model (`block`).

GenMD4 lets the schedule depend on a position's own token alone, α_v(t) = 1 - (1-ε)·t^{w_v}: `token_nelbo` and
`token_step` give each token of the vocabulary its own reverse rate.

Times and levels are ``float | Tensor``, broadcast to z's shape, best in float64, and differentiable, so that
schedules can be trained. What a learned forward schedule does to the draw of z has its gradient from `rloo`.

Sources: OeMDM and LoMDM, arXiv 2602.02112; GenMD4, arXiv 2406.04329.

Example:
    A loss at a random t, whose mean bounds -log p(x), and a sample in eight steps, softly from left to right.

    >>> import torch
    >>> from dlcore.process import order
    >>> network = torch.nn.Sequential(torch.nn.Embedding(9, 16), torch.nn.Linear(16, 9))
    >>> x, at = torch.randint(8, (2, 6)), order.block(torch.rand(2, dtype=torch.float64), 6, overlap=0.5)
    >>> z = order.corrupt(x, at, mask_id=8)
    >>> order.nelbo(network(z), z, x, at, at, mask_id=8).mean().backward()
    >>> z, levels = torch.full((2, 6), 8), [order.block(1 - step / 8, 6, overlap=0.5) for step in range(9)]
    >>> for now, before in zip(levels, levels[1:]):
    ...     z = order.step(network(z), z, now, before, mask_id=8)
    >>> bool((z < 8).all())
    True
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows

__all__ = [
    "Level",
    "block",
    "corrupt",
    "level",
    "log_prob",
    "nelbo",
    "power",
    "rloo",
    "step",
    "token_nelbo",
    "token_step",
]

Logits = Tensor | LinearLogits


class Level(NamedTuple):
    """A schedule at one time; float64 tensors that broadcast together.

    Attributes:
        noise: 1 - α, the probability to be masked.
        velocity: v = -α̇/(1-α) >= 0, the rate at which a masked position unmasks, going back in time.
    """

    noise: Tensor
    velocity: Tensor


def level(alpha: float | Tensor, dalpha: float | Tensor) -> Level:
    """The level of any schedule, from α and dα/dt: numbers or tensors that broadcast together.

    Args:
        alpha: in [0, 1]; at 1 nothing is masked and the velocity is given as 0.
        dalpha: dα/dt <= 0.

    Returns:
        A `Level` of their shape.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import order
        >>> float(order.level(0.75, -1.0).velocity)
        4.0
    """
    op = "order.level"
    lead, device = rows.together(op, alpha=alpha, dalpha=dalpha)
    noise = 1 - rows.level(op, "alpha", alpha, lead, device)
    slope = rows.slope(op, dalpha, lead, device)
    some = noise > 0
    return Level(noise, torch.where(some, -slope / torch.where(some, noise, 1), 0))


def power(t: float | Tensor, exponent: float | Tensor, *, epsilon: float = 0.0) -> Level:
    """α = 1 - (1-ε)·t^w, v = w/t: the larger w, the earlier a position is unmasked in generation.

    Args:
        t: in [0, 1], a number or (...).
        exponent: w > 0, a number or a tensor that broadcasts with t: per position, per token (w[x]), or
            predicted from x or z, softplus of a network's output, say. Differentiable.
        epsilon: in [0, 1), what is left unmasked at t = 1.

    Returns:
        A `Level`; its velocity is infinite at t = 0.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        GenMD4, arXiv 2406.04329.

    Example:
        >>> import torch
        >>> from dlcore.process import order
        >>> order.power(0.5, torch.tensor([1.0, 2.0], dtype=torch.float64)).noise
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    op = "order.power"
    lead, device = rows.together(op, t=t, exponent=exponent)
    at = rows.level(op, "t", t, lead, device)
    w = rows.positive(op, "exponent", exponent, lead, device)
    kept = checks.within(
        op, "epsilon", checks.number(op, "epsilon", epsilon, torch.Size(), device), 0, 1, "[)"
    )
    some = at > 0
    inside = torch.where(some, at, 1)
    return Level(torch.where(some, (1 - kept) * inside**w, 0), torch.where(some, w / inside, torch.inf))


def block(t: float | Tensor, length: int, block_size: int = 1, *, overlap: float = 0.0) -> Level:
    """Left to right by blocks: block b masks along α = 1-τ within a window of time, the last block first.

    Without overlap the n windows tile [0, 1], and `nelbo`'s mean over t ~ U(0, 1) is the NELBO of block
    diffusion, of each block given the clean blocks before it; with block_size 1 the sum of next-token
    cross-entropies of an autoregressive model. With overlap the windows widen, all to [0, 1] at overlap 1,
    where this is `masked` with α = 1-t: in between blocks are generated from left to right, softly.

    Args:
        t: in [0, 1], a number or (...).
        length: L.
        block_size: of all blocks but the last, which may be shorter.
        overlap: in [0, 1].

    Returns:
        A `Level` of (..., L).

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import order
        >>> order.block(0.625, length=4).noise
        tensor([0.0000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
    """
    op = "order.block"
    for name, value in (("length", length), ("block_size", block_size)):
        checks.integer(op, name, value)
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    lead, device = rows.together(op, t=t)
    at = rows.level(op, "t", t, lead, device).unsqueeze(-1)
    soft = rows.level(op, "overlap", overlap, torch.Size(), device)
    count = -(-length // block_size)
    index = torch.arange(length, device=device) // block_size
    width = (1 + (count - 1) * soft) / count
    start = (1 - width) * (count - 1 - index) / max(count - 1, 1)
    local = (at - start) / width
    inside = (local > 0) & (local <= 1)
    return Level(local.clamp(0, 1), torch.where(inside, 1 / (width * torch.where(inside, local, 1)), 0))


def _part(op: str, name: str, value: Level, part: str, z: Tensor) -> Tensor:
    """One part of a level, checked and expanded to z's shape."""
    if not isinstance(value, Level):
        raise TypeError(f"{op}: {name} must be an order.Level, got {checks.describe(value)}")
    named = f"{name}.{part}"
    x = checks.number(op, named, getattr(value, part), z.shape, z.device)
    return checks.within(op, named, x, 0, 1 if part == "noise" else torch.inf).expand(z.shape)


def corrupt(
    x: Tensor,
    forward: Level,
    mask_id: int,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mask each position with its own probability. Returns z (...) int64.

    Args:
        x: (...) int64 clean tokens.
        forward: the schedule's level, broadcast to x.shape.
        mask_id: the mask token, not negative.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Example:
        >>> import torch
        >>> from dlcore.process import order
        >>> order.corrupt(torch.tensor([1, 2, 3, 4]), order.block(0.5, length=4), mask_id=9)
        tensor([1, 2, 9, 9])
    """
    op = "order.corrupt"
    rows.mask_token(op, mask_id)
    checks.tokens(op, "x", x)
    noise = _part(op, "forward", forward, "noise", x).detach()
    (u,) = rows.uniforms(rows.row_keys(op, key, generator, x.shape, x.device), 1)
    return torch.where(u < 1 - noise, x, mask_id)


def log_prob(z: Tensor, forward: Level, mask_id: int) -> Tensor:
    """log q(z | x) of the masks that were drawn: log(1-α) where z is masked, else log α.

    Args:
        z: (...) int64, drawn by `corrupt` with `forward`.
        forward: the level, broadcast to z.shape.
        mask_id: the mask token.

    Returns:
        (...) float64, nats per position; differentiable in forward.noise. Sum over positions for `rloo`.

    Example:
        >>> import torch
        >>> from dlcore.process import order
        >>> order.log_prob(torch.tensor([9, 1]), order.level(0.25, -1.0), mask_id=9).exp()
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    op = "order.log_prob"
    checks.tokens(op, "z", z)
    checks.integer(op, "mask_id", mask_id)
    noise = _part(op, "forward", forward, "noise", z)
    is_masked = z == mask_id
    return torch.where(
        is_masked, torch.where(is_masked, noise, 1).log(), torch.log1p(-torch.where(is_masked, 0, noise))
    )


def nelbo(logits: Logits, z: Tensor, x: Tensor, forward: Level, reverse: Level, mask_id: int) -> Tensor:
    """The continuous-time NELBO's integrand, in nats per token: velocity matching and weighted cross-entropy.

    Where z is masked v_R - v_F + v_F·log(v_F/v_R) - v_F·log p(x), v_F and v_R the velocities; 0 elsewhere.
    Its mean over t ~ U(0, 1) and z ~ q(z|x) bounds -log p(x). Only masked rows are read.

    Args:
        logits: (..., V).
        z, x: (...) int64 observed and clean tokens.
        forward: the schedule that drew z; may depend on x.
        reverse: the generating schedule, which may depend on z; give `forward` itself where it is fixed.
        mask_id: the mask token; it has probability 0.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias) and in
        both velocities, not through z: see `rloo`.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, a velocity that is negative, or infinite where masked.

    Source:
        OeMDM, arXiv 2602.02112.

    Example:
        >>> import torch
        >>> from dlcore.process import order
        >>> z, x = torch.tensor([4, 1]), torch.tensor([2, 1])
        >>> forward, reverse = order.power(0.5, 1.0), order.power(0.5, 2.0)
        >>> order.nelbo(torch.zeros(2, 5), z, x, forward, reverse, mask_id=4)
        tensor([3.3863, 0.0000])
    """
    op = "order.nelbo"
    is_masked = rows.masked(op, logits, z, mask_id)
    rows.tokens(op, "x", x, categorical.head(op, logits))
    v_f, v_r = (
        torch.where(is_masked, _part(op, name, at, "velocity", z), 1)
        for name, at in (("forward", forward), ("reverse", reverse))
    )
    for name, v in (("forward", v_f), ("reverse", v_r)):
        checks.within(op, f"{name}.velocity where z is masked", v, 0, torch.inf, "[)")
    log_p = categorical.log_probs(
        op, logits, torch.where(is_masked, x, -1), exclude=mask_id, target_name="x"
    )[0]
    runs = v_f > 0
    match = torch.where(runs, v_f, 1).log() - torch.where(runs, v_r, 1).log()
    matching = v_r - v_f + torch.where(runs, v_f * match, 0)
    evidence = v_f.to(log_p.dtype) * torch.where(runs, log_p, 0)
    return torch.where(is_masked, matching.to(log_p.dtype) - evidence, 0)


def step(
    logits: Logits,
    z: Tensor,
    reverse_t: Level,
    reverse_s: Level,
    mask_id: int,
    *,
    temperature: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One reverse step in the learned order: unmask each position with (α_s-α_t)/(1-α_t), by a draw.

    That probability is 1 - (1-α_s)/(1-α_t), exact also where 1-α is far below rounding. Rows that hold a
    token, and rows that stay masked, are not read.

    Args:
        logits: (..., V).
        z: (...) int64.
        reverse_t, reverse_s: the generating schedule, at this z, now and at the earlier time, broadcast to
            z.shape.
        mask_id: the mask token, excluded from the draw.
        temperature: non-negative; at 0 the argmax.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a row that had to be read is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, more noise at s than at t.

    Source:
        OeMDM, arXiv 2602.02112.

    Example:
        >>> import torch
        >>> from dlcore.process import order
        >>> z = torch.full((1, 4), 9)
        >>> logits = torch.zeros(1, 4, 10).index_fill(-1, torch.tensor([5]), 99.0)
        >>> order.step(logits, z, order.block(1.0, length=4), order.block(0.5, length=4), mask_id=9)
        tensor([[5, 5, 9, 9]])
    """
    op = "order.step"
    is_masked = rows.masked(op, logits, z, mask_id)
    stays = _survival(
        op, *(_part(op, *named, "noise", z) for named in (("reverse_t", reverse_t), ("reverse_s", reverse_s)))
    )
    return categorical.sample_mixture(
        logits,
        z,
        rows.coefficients(torch.ones_like(stays), 0.0, stays, 0.0, 1 - stays, 0.0, keep=~is_masked),
        prior=mask_id,
        temperature=temperature,
        exclude=mask_id,
        key=rows.key(op, key, generator, logits),
    )


def _survival(op: str, noise_t: Tensor, noise_s: Tensor) -> Tensor:
    """The probability (1-α_s)/(1-α_t) to stay masked; 0 where nothing is masked any more."""
    if checks.reads_data(noise_t) and checks.reads_data(noise_s):
        wrong = noise_s > noise_t
        if bool(wrong.any()):
            got = f"{checks.first(noise_s, wrong)!r} above {checks.first(noise_t, wrong)!r}"
            raise ValueError(f"{op}: reverse_s.noise must be at most reverse_t.noise, got {got}")
    return torch.where(noise_t > 0, noise_s / torch.where(noise_t > 0, noise_t, 1), 0)


def rloo(loss: Tensor, other_loss: Tensor, log_prob: Tensor, other_log_prob: Tensor) -> Tensor:
    """The mean of two losses whose gradient also runs through the draws they were taken at (RLOO with two).

    For z and z' drawn from the same q, losses f(z) and f(z'): the gradient is
    ½·(f(z) - f(z'))·∇(log q(z) - log q(z')) + ½·∇(f(z) + f(z')), unbiased for ∇ E_q[f].

    Args:
        loss, other_loss: (...) one per draw, summed over all positions that were drawn together.
        log_prob, other_log_prob: (...) log q(z | x), summed alike, see `log_prob`.

    Returns:
        (...) of the losses' dtype.

    Raises:
        TypeError: no floating tensors. ValueError: shapes that differ.

    Source:
        Kool et al. 2019 (leave-one-out baseline); as in GenMD4, arXiv 2406.04329.

    Example:
        >>> import torch
        >>> from dlcore.process import order
        >>> w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> q = order.power(0.5, w)
        >>> a, b = (order.log_prob(torch.tensor([z]), q, mask_id=9).sum() for z in (9, 1))
        >>> order.rloo(torch.tensor(3.0), torch.tensor(1.0), a, b).detach()
        tensor(2.)
    """
    op = "order.rloo"
    given = {"loss": loss, "other_loss": other_loss, "log_prob": log_prob, "other_log_prob": other_log_prob}
    for name, value in given.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{op}: {name} must be a floating Tensor, got {checks.describe(value)}")
        if value.shape != loss.shape:
            raise ValueError(
                f"{op}: {name} must have loss's shape {tuple(loss.shape)}, got {tuple(value.shape)}"
            )
    contrast = (loss - other_loss).detach() * (log_prob - other_log_prob).to(loss.dtype)
    return (loss + other_loss + contrast - contrast.detach()) / 2


def _exponents(op: str, logits: Logits, exponents: Tensor) -> Tensor:
    """w (V,) in the dtype of results."""
    h = categorical.head(op, logits)
    checks.floating(op, "exponents", exponents)
    if exponents.shape != (h.vocab,):
        raise ValueError(f"{op}: exponents must be ({h.vocab},), got {tuple(exponents.shape)}")
    checks.on_device(op, "exponents", exponents, h.logits.device)
    checks.within(op, "exponents", exponents, 0, torch.inf, "()")
    return exponents.to(torch.promote_types(logits.dtype, torch.float32))


def token_nelbo(
    logits: Logits, z: Tensor, x: Tensor, t: float | Tensor, exponents: Tensor, mask_id: int
) -> Tensor:
    """GenMD4's integrand where z is masked, -(1/t)·[w_x·(1 + log p(x)) - Σ_v w_v·p(v)], in nats per token.

    z is drawn with `power(t, exponents[x])`. Two reads of the logits, none kept.

    Args:
        logits: (..., V).
        z, x: (...) int64 observed and clean tokens.
        t: in (0, 1], broadcast to z.shape.
        exponents: w (V,), positive; softplus of a learned vector. The mask's does not count.
        mask_id: the mask token; it has probability 0.

    Returns:
        (...) float32 (float64 for float64 logits), 0 where z is not masked; differentiable in logits (or
        hidden, weight, bias) and exponents, not through z: see `rloo`.

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, t, exponents.

    Source:
        GenMD4, arXiv 2406.04329.

    Example:
        >>> import torch
        >>> from dlcore.process import order
        >>> z, x = torch.tensor([4, 1]), torch.tensor([2, 1])
        >>> order.token_nelbo(torch.zeros(2, 5), z, x, 0.5, torch.ones(5), mask_id=4)
        tensor([2.7726, 0.0000])
    """
    op = "order.token_nelbo"
    is_masked = rows.masked(op, logits, z, mask_id)
    rows.tokens(op, "x", x, categorical.head(op, logits))
    w = _exponents(op, logits, exponents)
    at = checks.within(op, "t", checks.number(op, "t", t, z.shape, z.device), 0, 1, "(]")
    log_p = categorical.log_probs(
        op, logits, torch.where(is_masked, x, -1), exclude=mask_id, target_name="x"
    )[0]
    mean = categorical.expectation(logits, w.unsqueeze(-1), exclude=mask_id).squeeze(-1)
    return torch.where(is_masked, (mean - w[x] * (1 + log_p)) / at.to(w.dtype), 0)


def token_step(
    logits: Logits,
    z: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    exponents: Tensor,
    mask_id: int,
    *,
    temperature: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """GenMD4's reverse step: a masked position draws v from the network and takes it with 1 - (s/t)^{w_v}.

    One read of the logits.

    Args:
        logits, z, exponents, mask_id: as in `token_nelbo`.
        t, s: now in (0, 1] and the earlier time in [0, t], broadcast to z.shape.
        temperature: non-negative; at 0 the argmax.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z_s (...) int64; -1 where a masked row is broken (see `dlcore.categorical`).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, times, exponents.

    Source:
        GenMD4, arXiv 2406.04329.

    Example:
        >>> import torch
        >>> from dlcore.process import order
        >>> z = torch.full((2, 8), 9)
        >>> order.token_step(torch.randn(2, 8, 10), z, 1.0, 0.0, torch.ones(10), mask_id=9).max() < 9
        tensor(True)
    """
    op = "order.token_step"
    is_masked = rows.masked(op, logits, z, mask_id)
    w = _exponents(op, logits, exponents).double()
    now = checks.within(op, "t", checks.number(op, "t", t, z.shape, z.device), 0, 1, "(]")
    before = rows.level(op, "s", s, z.shape, z.device)
    if checks.reads_data(now) and checks.reads_data(before) and bool((before > now).any()):
        raise ValueError(f"{op}: s must be at most t, got {checks.first(before, before > now)!r} above t")
    keys = rows.row_keys(op, key, generator, z.shape, z.device, logits)
    drawn = categorical.sample(logits, temperature=temperature, exclude=mask_id, key=keys).tokens
    (route,) = rows.uniforms(keys, 1)
    stays = (before / now) ** w[drawn.clamp(min=0)]
    return torch.where(is_masked & ((route >= stays) | (drawn < 0)), drawn, z)
