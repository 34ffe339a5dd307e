"""Generalized interpolating discrete diffusion (GIDD): noise that masks and noise that replaces, together.

q(z | x) = α·1[z = x] + μ·1[z = mask] + υ/N·1[z ≠ mask], with α + μ + υ = 1 and N = V-1 tokens that are not
the mask. A `Level` holds these three masses and the two rates of one moment, from GIDD's `schedule` or from
`level`; each is a number or a tensor that broadcasts to z's shape. With υ = 0 everything here is `masked`,
with μ = 0 it is `uniform` over the N tokens.

The predictor p plays the part of the leave-one-out posterior: where a token stands, the bridge adds what
that token tells. The mask has probability 0 under it.

Source: GIDD, arXiv 2503.04482.

Example:
    A loss at a random t, and a sample in eight steps.

    >>> import torch
    >>> from dlcore.process import hybrid
    >>> network = torch.nn.Sequential(torch.nn.Embedding(9, 16), torch.nn.Linear(16, 9))
    >>> x, at = torch.randint(8, (2, 6)), hybrid.schedule(torch.rand(2, 1, dtype=torch.float64))
    >>> z = hybrid.corrupt(x, at, vocab_size=9, mask_id=8)
    >>> hybrid.loss(network(z), z, x, at, mask_id=8).mean().backward()
    >>> z, levels = torch.full((2, 6), 8), [hybrid.schedule(1 - step / 8) for step in range(9)]
    >>> for now, before in zip(levels, levels[1:]):
    ...     z = hybrid.step(network(z), z, now, before, mask_id=8)
    >>> bool((z < 8).all())
    True
"""

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

__all__ = ["Level", "bridge_log_probs", "correct", "corrupt", "level", "loss", "nelbo", "schedule", "step"]

Logits = Tensor | LinearLogits


class Level(NamedTuple):
    """The noise of one moment; float64 tensors that broadcast together.

    Attributes:
        alpha: the mass of the clean token.
        mask: μ, the mass of the mask.
        uniform: υ, the mass spread over the N other tokens.
        mask_rate: d log(μ/α)/dt, at least 0.
        uniform_rate: d log(υ/α)/dt, at least 0.
    """

    alpha: Tensor
    mask: Tensor
    uniform: Tensor
    mask_rate: Tensor
    uniform_rate: Tensor


def schedule(t: float | Tensor, *, p_uniform: float = 0.1, gamma: float = 1.0) -> Level:
    """GIDD's levels: μ/α = t/(1-t) and υ/α = c/(1-t), c = B·(t·(1-t))^{γ/2}, B = 2^γ·p_u/(1-p_u).

    At t = 1/2 the mass υ of uniform noise is p_u; both ends are pure.

    Args:
        t: in [0, 1], a number or (...); 0 is clean, 1 all masked.
        p_uniform: p_u in [0, 1); 0 is masked diffusion with α = 1-t.
        gamma: in (0, 2]; beyond 2 uniform noise would have to be undone near t = 1.

    Returns:
        A `Level` of tensors (...); its rates are infinite at the two ends.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import hybrid
        >>> at = hybrid.schedule(0.5, p_uniform=0.2)
        >>> [round(float(mass), 3) for mass in at[:3]]
        [0.4, 0.4, 0.2]
    """
    op = "hybrid.schedule"
    lead = t.shape if isinstance(t, Tensor) else torch.Size()
    device = t.device if isinstance(t, Tensor) else torch.device("cpu")
    t = rows.level(op, "t", t, lead, device)
    share, power = (
        checks.number(op, *named, torch.Size(), device)
        for named in (("p_uniform", p_uniform), ("gamma", gamma))
    )
    checks.within(op, "p_uniform", share, 0, 1, "[)")
    checks.within(op, "gamma", power, 0, 2, "(]")
    c = 2**power * share / (1 - share) * (t * (1 - t)) ** (power / 2)
    inside = (t > 0) & (t < 1)
    slope = 1 / (t * (1 - t)).where(inside, 1)
    return Level(
        (1 - t) / (1 + c),
        t / (1 + c),
        c / (1 + c),
        slope.where(inside, torch.inf),
        ((power / 2 * (1 - 2 * t) + t) * slope).where(inside, torch.inf),
    )


def level(
    alpha: float | Tensor, mask: float | Tensor, dalpha: float | Tensor, dmask: float | Tensor
) -> Level:
    """Any hybrid level, from the masses of the clean token and of the mask and their slopes in time.

    Args:
        alpha, mask: α and μ in [0, 1], α + μ <= 1; the rest is uniform. Numbers or tensors (...).
        dalpha, dmask: dα/dt <= 0 and dμ/dt.

    Returns:
        A `Level`. A noise without mass has rate 0.

    Raises:
        TypeError: dtypes. ValueError: values, shapes that do not broadcast, a noise that would be undone.

    Example:
        >>> from dlcore.process import hybrid
        >>> float(hybrid.level(0.5, 0.25, -1.0, 0.5).uniform)
        0.25
    """
    op = "hybrid.level"
    given = {"alpha": alpha, "mask": mask, "dalpha": dalpha, "dmask": dmask}
    lead, device = rows.together(op, **given)
    a, m = rows.level(op, "alpha", alpha, lead, device), rows.level(op, "mask", mask, lead, device)
    da = rows.slope(op, dalpha, lead, device)
    dm = checks.number(op, "dmask", dmask, lead, device)
    rest = (1 - a) - m
    checks.within(op, "1 - alpha - mask", rest, -1e-12, 1)
    rest = rest.clamp(min=0)

    def rate(mass: Tensor, slope: Tensor) -> Tensor:
        some = (mass > 0) & (a > 0)
        return torch.where(some, slope / mass.where(some, 1) - da / a.where(some, 1), 0)

    rates = rate(m, dm), rate(rest, -da - dm)
    for name, value in zip(("mask", "uniform"), rates, strict=True):
        checks.within(op, f"d log({name}/alpha)/dt", value, 0, torch.inf)
    return Level(a, m, rest, *rates)


def _level(op: str, name: str, value: Level, lead: torch.Size, device: torch.device) -> Level:
    """A level whose parts broadcast to `lead`."""
    if not isinstance(value, Level):
        raise TypeError(f"{op}: {name} must be a hybrid.Level, got {checks.describe(value)}")
    masses = (
        rows.level(op, f"{name}.{part}", getattr(value, part), lead, device) for part in Level._fields[:3]
    )
    rates = (
        checks.within(
            op,
            f"{name}.{part}",
            checks.number(op, f"{name}.{part}", getattr(value, part), lead, device),
            0,
            torch.inf,
        )
        for part in Level._fields[3:]
    )
    return Level(*masses, *rates)


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
    noise = _level(op, "at", at, x.shape, x.device)
    route, which = rows.uniforms(rows.row_keys(op, key, generator, x.shape, x.device), 2)
    noisy = torch.where(route < noise.alpha + noise.mask, mask_id, rows.uniform_tokens(which, size, mask_id))
    return torch.where(route < noise.alpha, x, noisy)


def nelbo(logits: Logits, z: Tensor, x: Tensor, at: Level, mask_id: int) -> Tensor:
    """The continuous-time NELBO's integrand, w·[KL(q(·|x) || q(·|p)) + r - log r - 1], in nats per token.

    r = q(z|x)/q(z|p), and w, the rate of noise into z over q(z|x), is `mask_rate` where z is masked,
    `uniform_rate` where it is another token, and uniform_rate·u/(α + u), u = υ/N, where it is x. With c = α/u
    and ℓ(y) = log1p(c·p(y)), KL = α·[log1p(c) - ℓ(x)] + u·[log1p(c) - Σ_y ℓ(y)]: one sum over the vocabulary,
    in plain torch over logits that a `LinearLogits` is multiplied out to.

    Args:
        logits: (..., V).
        z, x: (...) int64 observed and clean tokens; x is never the mask.
        at: the level, broadcast to z.shape, with a finite rate into z.
        mask_id: the mask token; it has probability 0.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, an infinite rate.

    Source:
        GIDD, arXiv 2503.04482.

    Example:
        >>> import torch
        >>> from dlcore.process import hybrid
        >>> z, x = torch.tensor([4, 1, 1]), torch.tensor([2, 1, 0])
        >>> hybrid.nelbo(torch.zeros(3, 5), z, x, hybrid.schedule(0.5, p_uniform=0.2), mask_id=4)
        tensor([1.3183, 0.2735, 1.5231])
    """
    op = "hybrid.nelbo"
    weight, divergence, _ = _elbo(op, logits, z, x, at, mask_id)
    checks.within(op, "at's rate into z", weight, 0, torch.inf, "[)")
    return (weight * divergence).to(_dtype(logits))


WEIGHTINGS = ("clip", "dynamic")


def loss(
    logits: Logits,
    z: Tensor,
    x: Tensor,
    at: Level,
    mask_id: int,
    *,
    weighting: str = "dynamic",
    max_weight: float | Tensor = 2.0,
) -> Tensor:
    """The training loss: `nelbo` with the weights that train better than the NELBO's own.

    "clip": min(w, max_weight). "dynamic": min(w', max_weight) with w' = 2 where z is masked, 1 where it is
    another token and υ/(N·α) where it is x; for gamma = 1 that is GIDD's (B/N)·exp(-λ/2), λ = log((1-t)/t).

    Args:
        logits, z, x, at, mask_id: as in `nelbo`.
        weighting: "clip" or "dynamic".
        max_weight: positive.

    Returns:
        (...) float32 (float64 for float64 logits), differentiable in logits (or hidden, weight, bias).

    Raises:
        TypeError: dtypes. ValueError: shapes, ids, levels, an unknown weighting.

    Source:
        GIDD, arXiv 2503.04482. (Its code has sigmoid(-t) where λ should stand.)

    Example:
        >>> import torch
        >>> from dlcore.process import hybrid
        >>> z, x = torch.tensor([4, 1, 1]), torch.tensor([2, 1, 0])
        >>> hybrid.loss(torch.zeros(3, 5), z, x, hybrid.schedule(0.5, p_uniform=0.2), mask_id=4)
        tensor([0.6592, 0.1539, 0.7615])
    """
    op = "hybrid.loss"
    checks.option(op, "weighting", weighting, WEIGHTINGS)
    weight, divergence, odds = _elbo(op, logits, z, x, at, mask_id)
    most = checks.within(
        op, "max_weight", checks.number(op, "max_weight", max_weight, z.shape, z.device), 0, torch.inf, "(]"
    )
    if weighting == "dynamic":
        weight = torch.where(z == x, odds, torch.where(z == mask_id, 2.0, 1.0).double())
    else:
        checks.within(op, "at's rate into z", weight, 0, torch.inf)
    return (torch.minimum(weight, most) * divergence).to(_dtype(logits))


def _dtype(logits: Logits) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _elbo(
    op: str, logits: Logits, z: Tensor, x: Tensor, at: Level, mask_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """w, KL + r - log r - 1, and 1/c = υ/(N·α), each float64 per token."""
    is_masked = rows.masked(op, logits, z, mask_id)
    h = categorical.head(op, logits)
    rows.tokens(op, "x", x, h)
    if checks.reads_data(x) and bool((x == mask_id).any()):
        raise ValueError(f"{op}: x must not be the mask token {mask_id}")
    noise = _level(op, "at", at, z.shape, z.device)
    alpha, each = noise.alpha, noise.uniform / (h.vocab - 1)
    log_p = _log_probs(logits, mask_id)
    log_px, log_pz = (rows.gather(log_p, torch.where(is_masked, x, i)).double() for i in (x, z))
    log_alpha, log_each = alpha.log(), each.log()

    def against(log_q: Tensor, log_p: Tensor) -> Tensor:
        """log of q over α·p + υ/N; without α both are the noise alone."""
        return torch.where(alpha > 0, log_q - rows.logaddexp(log_alpha + log_p, log_each), 0)

    gain = against((alpha + each).log(), log_px)
    spread = each > 0
    log_c = torch.where(spread, log_alpha - torch.where(spread, each, 1).log(), 0)
    total = rows.log1p_scaled(log_c.to(log_p.dtype).unsqueeze(-1) + log_p).sum(-1).double()
    kl = alpha * gain + torch.where(spread, each * (rows.log1p_scaled(log_c) - total), 0)
    log_r = torch.where(z == x, gain, against(log_each, log_pz))
    log_r = torch.where(is_masked, 0, log_r)
    share = torch.where(z == x, each / torch.where(alpha + each > 0, alpha + each, 1), 1)
    weight = torch.where(is_masked, noise.mask_rate, noise.uniform_rate * share)
    odds = torch.where(alpha > 0, each / torch.where(alpha > 0, alpha, 1), torch.inf)
    return weight, kl + torch.expm1(log_r) - log_r, odds


def _log_probs(logits: Logits, mask_id: int) -> Tensor:
    """log softmax without the mask, (..., V) in float32 or wider."""
    x = logits.materialize() if isinstance(logits, LinearLogits) else logits.to(_dtype(logits))
    return torch.log_softmax(x.index_fill(-1, torch.tensor([mask_id], device=x.device), -torch.inf), -1)


class _Bridge(NamedTuple):
    """A reverse step's masses per row: of the transition from s into z, and of the level at s."""

    ratio: Tensor
    """α_t/α_s: nothing happened."""
    into: Tensor
    """The noise that came into z since s."""
    late: Level
    early: Level


def _bridge(op: str, z: Tensor, is_masked: Tensor, at_t: Level, at_s: Level, size: int) -> _Bridge:
    t, s = (_level(op, name, at, z.shape, z.device) for name, at in (("at_t", at_t), ("at_s", at_s)))
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
    log_p = _log_probs(logits, mask_id)
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
    keys = rows.row_keys(op, key, generator, z.shape, z.device)
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
        logits, temperature=temperature, exclude=mask_id, key=checks.key(op, key, generator, z.shape)
    )
    other = (draw.tokens != z) & (draw.tokens >= 0)
    chosen = unmask.largest(op, "num_positions", num_positions, draw.logprob, other)
    return torch.where(chosen, draw.tokens, z)
