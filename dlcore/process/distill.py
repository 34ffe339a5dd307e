"""Distillation of a many-step teacher into a few-step student: SDTT's, Duo's and IDLM's targets and losses.

Logits are Tensors or `LinearLogits`; every loss is per row, (...), 0 where a row does not count, in nats but
for the total variation. A LinearLogits student and teacher never form (B, L, V); a dense pair adds nothing of
that size to what the two networks returned. None of these functions has a mean in it: sum, divide by the rows
that count, and weigh.

- SDTT: `rollout` runs the teacher and hands over, step by step, the rows that it unmasked and what it
  thought of them; `self_distillation_loss` holds a student's one forward pass against them.
- Discrete consistency distillation: `divergence` between two points of one trajectory of `duo`.
- IDLM: a fake model follows the student's samples (`masked_fake_loss`, `uniform_fake_loss`), the student
  descends on the teacher's loss less the fake's (`masked_inverse_loss`, `uniform_inverse_loss`).

Sources: SDTT, arXiv 2410.21035; The Diffusion Duality, arXiv 2506.10892; IDLM, arXiv 2602.19066.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import categorical, rng
from dlcore.linear_logits import LinearLogits
from dlcore.process import _divergences as divergences
from dlcore.process import _rows as rows
from dlcore.process import masked

__all__ = [
    "Target",
    "divergence",
    "gaussian_relaxation",
    "masked_fake_loss",
    "masked_inverse_loss",
    "rollout",
    "self_distillation_loss",
    "step_size",
    "uniform_fake_loss",
    "uniform_inverse_loss",
]

Logits = Tensor | LinearLogits


def _take(logits: Logits, index: Tensor) -> Logits:
    """Rows of the flattened leading dimensions."""
    return rows.over(rows.flat(logits), lambda x: x.index_select(0, index))


def divergence(
    student: Logits, teacher: Logits, *, kind: str = "forward", exclude: int | None = None
) -> Tensor:
    """How far a student's softmax is from a teacher's, per row: (...), differentiable in student.

    "forward": KL(teacher‖student). "reverse": KL(student‖teacher). "total_variation": ½ Σ|p - q|, not in
    nats, over chunks of rows. The teacher is a constant. (Published SDTT takes its "tvd" and "mse" between
    log-probabilities; this is the total variation of the laws.)

    Args:
        student, teacher: (..., V) logits of one dtype.
        kind: one of the three.
        exclude: a token id that has probability 0 under both, the mask's.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        SDTT, arXiv 2410.21035.

    Example:
        >>> import torch
        >>> from dlcore.process import distill
        >>> student, teacher = torch.zeros(2), torch.tensor([0.9, 0.1]).log()
        >>> distill.divergence(student, teacher), distill.divergence(student, teacher, kind="total_variation")
        (tensor(0.3681), tensor(0.4000))
    """
    return divergences.between("distill.divergence", student, teacher, kind, exclude)


# --- self-distillation through time ------------------------------------------------------------------------


class Target(NamedTuple):
    """The rows that one teacher step unmasked, and its logits at them."""

    rows: Tensor
    """(n,) int64, rows of the flattened (B, L)."""
    logits: Logits
    """(n, V), without a gradient."""


Network = Callable[[Tensor, float | Tensor], Logits]


def rollout(
    teacher: Network,
    z: Tensor,
    alphas: Sequence[float | Tensor],
    mask_id: int,
    *,
    temperature: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Target]:
    """SDTT: the teacher's ancestral steps from z, yielding each step's rows as they are unmasked.

    Every masked row is yielded once: with the logits of the step that unmasked it, or, still masked at the
    end, of the last step. So at most the masked rows' logits exist beside one step's, and none if each
    Target is used up (and its loss run backward) before the next is asked for. Finding the rows waits for
    the device.

    Args:
        teacher: (z, alpha) -> logits (B, L, V), called without gradient, once per step.
        z: (B, L) int64 at alphas[0], some of it masked.
        alphas: m + 1 rising levels for m steps, each in [0, 1], a number or broadcast to z.shape. In
            published training m = 2 and alphas are a student's step apart in halves: the student learns to
            do at once what the teacher does in m.
        mask_id: the mask token.
        temperature: of the teacher's draws.
        key: int64 (2,) or one per row (B, L, 2), see `dlcore.rng`; else drawn from `generator` or torch's
        own.

    Raises:
        TypeError, ValueError: what does not fit; at the call, or by `masked.step` in its step.

    Source:
        SDTT, arXiv 2410.21035.

    Example:
        >>> import torch
        >>> from dlcore.process import distill
        >>> z = torch.full((2, 8), 4)
        >>> teacher = lambda z, alpha: torch.zeros(2, 8, 5)
        >>> sum(len(target.rows) for target in distill.rollout(teacher, z, [0.0, 0.3, 0.6], mask_id=4))
        16
    """
    op = "distill.rollout"
    checks.tokens(op, "z", z)
    checks.integer(op, "mask_id", mask_id)
    if len(alphas) < 2:
        raise ValueError(f"{op}: alphas must be at least 2 levels, got {len(alphas)}")
    checks.unused_key(op, key, generator, z.shape)
    return _rollout(op, teacher, z, alphas, mask_id, temperature, key, generator)


def _rollout(
    op: str,
    teacher: Network,
    z: Tensor,
    alphas: Sequence[float | Tensor],
    mask_id: int,
    temperature: float | Tensor,
    key: Tensor | None,
    generator: torch.Generator | None,
) -> Iterator[Target]:
    last = len(alphas) - 2
    for i, (alpha_t, alpha_s) in enumerate(pairwise(alphas)):
        with torch.no_grad():
            logits = teacher(z, alpha_t)
            # Only the logits tell whether other ranks draw with it.
            key = rows.key(op, key, None if i else generator, logits)
            following = masked.step(
                logits, z, alpha_t, alpha_s, mask_id, temperature=temperature, key=rng.fold_in(key, i)
            )
            done = z == mask_id if i == last else (z == mask_id) & (following != mask_id)
            index = done.flatten().nonzero().squeeze(-1)
            target = Target(index, _take(logits, index))
        # The step's own logits are freed before the caller works with the rows.
        del logits
        yield target
        z = following


def self_distillation_loss(
    student: Logits, targets: Iterable[Target], *, kind: str = "forward", exclude: int | None = None
) -> Tensor:
    """SDTT's loss: `divergence` at the rows of every target, 0 at others: (B, L), differentiable in student.

    Args:
        student: (B, L, V) logits, of one forward pass at the rollout's first z.
        targets: of `rollout`, which this drives step by step.
        kind: of `divergence`; published training uses "forward".
        exclude: the mask token, which has probability 0 in masked diffusion.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        SDTT, arXiv 2410.21035.

    Example:
        >>> import torch
        >>> from dlcore.process import distill
        >>> z = torch.tensor([[4, 1, 4]])
        >>> teacher = lambda z, alpha: torch.tensor([2.0, 0, 0, 0, 0]).expand(1, 3, 5)
        >>> targets = distill.rollout(teacher, z, [0.3, 0.6], mask_id=4)
        >>> distill.self_distillation_loss(torch.zeros(1, 3, 5), targets, exclude=4)
        tensor([[0.4680, 0.0000, 0.4680]])
    """
    op = "distill.self_distillation_loss"
    lead = categorical.head(op, student, "student").lead
    loss: Tensor | None = None
    for target in targets:
        part = divergences.between(op, _take(student, target.rows), target.logits, kind, exclude)
        loss = part.new_zeros(lead.numel()) if loss is None else loss
        loss = loss.index_add(0, target.rows, part)
    if loss is None:
        raise ValueError(f"{op}: targets must hold at least one Target, got none")
    return loss.reshape(lead)


def step_size(step: int, *, first: float = 1 / 512, interval: int = 10_000, factor: float = 2.0) -> float:
    """dt of distillation in rounds: first·factor^⌊step/interval⌋, at most 1. The teacher is renewed with it.

    Discrete consistency distillation has the defaults; SDTT's student of m teacher steps has factor m from
    the teacher's own step on.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import distill
        >>> [distill.step_size(step) * 512 for step in (0, 9_999, 10_000, 49_999)]
        [1.0, 1.0, 2.0, 16.0]
    """
    op = "distill.step_size"
    checks.integer(op, "step", step)
    checks.integer(op, "interval", interval)
    if step < 0 or interval < 1:
        raise ValueError(f"{op}: step must be at least 0 and interval 1, got {step} and {interval}")
    checks.real(op, "first", first, 0, 1)
    checks.real(op, "factor", factor, 1, 1e9)
    dt = first
    for _ in range(step // interval):
        if dt >= 1:
            break
        dt *= factor
    return min(dt, 1.0)


# --- inverse distillation ----------------------------------------------------------------------------------


def _masked_weight(
    op: str, z: Tensor, alpha: float | Tensor, dalpha: float | Tensor, mask_id: int, h: categorical.Head
) -> tuple[Tensor, Tensor]:
    """Where z is masked, and -α'/(1-α)."""
    rows.tokens(op, "z", z, h)
    checks.integer(op, "mask_id", mask_id)
    divergences.excluded(op, "mask_id", mask_id, h.vocab)
    a = rows.level(op, "alpha", alpha, z.shape, z.device, "[)")
    return z == mask_id, -rows.slope(op, dalpha, z.shape, z.device) / (1 - a)


def masked_inverse_loss(
    student: Logits,
    teacher: Logits,
    fake: Logits,
    z: Tensor,
    alpha: float | Tensor,
    dalpha: float | Tensor,
    mask_id: int,
) -> Tensor:
    """IDLM's loss of a masked student: -α'/(1-α)·Σ_v x̂_v·(log f̂_v - log f*_v) where z is masked.

    It is the masked NELBO of the teacher f* less that of the fake f̂, of a clean token that is the student's
    whole softmax x̂; two reads of two streams each (KL(x̂‖f*) - KL(x̂‖f̂)), nothing of size V kept. With f̂ the
    student's own denoiser its expectation is KL(f̂‖f*) summed over the noisy states, which is 0 only where the
    student's law is the teacher's. One round of training:

    1. x̂ = student(z', α'), z' data (or the student's last output) masked at a random level. A token that z'
       shows is itself: x = categorical.sample(x̂, exclude=mask_id).tokens where z' is masked, else z'.
    2. z = masked.corrupt(x, α, mask_id) at another random level.
    3. Several steps of the fake, then one of the student on this where z' is masked and on nothing elsewhere.
       The fake's loss is `masked_fake_loss` where z' is masked, elsewhere `masked.nelbo` of x.

    The relaxation is that x̂ enters the loss as a point of the simplex: gradients reach the student through x̂
    alone, not through the draw z, as in the published code. Freeze the networks of teacher and fake: their
    logits are not detached, and must be finite at unmasked rows as well (the networks' own, before any rule
    that carries tokens over), for a gradient of 0 there. Published code leaves unmasked rows in both losses,
    where they cancel; here they are 0.

    Args:
        student, teacher, fake: (..., V) logits of one dtype; student at z', the others at z.
        z: (...) int64, what the student wrote, masked.
        alpha: in [0, 1), of z; dalpha: dα/dt <= 0; broadcast to z.shape.
        mask_id: the mask token, of probability 0.

    Returns:
        (...) nats, of either sign; differentiable in all three logits.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        IDLM, arXiv 2602.19066.

    Example:
        >>> import torch
        >>> from dlcore.process import distill
        >>> law = torch.tensor([0.5, 0.5, 0.0]).log().expand(2, 3)
        >>> teacher = torch.tensor([0.9, 0.1, 0.0]).log().expand(2, 3)
        >>> distill.masked_inverse_loss(law, teacher, law, torch.tensor([2, 0]), 0.5, -1.0, mask_id=2)
        tensor([1.0217, 0.0000])
    """
    op = "distill.masked_inverse_loss"
    h = rows.alike(op, one_dtype=True, student=student, teacher=teacher, fake=fake)
    is_masked, weight = _masked_weight(op, z, alpha, dalpha, mask_id, h)
    x, first, second = (divergences.dropped(logits, mask_id) for logits in (student, teacher, fake))
    gap = categorical.kl(x, first) - categorical.kl(x, second)
    return torch.where(is_masked, weight.to(gap.dtype) * gap, 0)


def masked_fake_loss(
    fake: Logits,
    student: Logits,
    z: Tensor,
    alpha: float | Tensor,
    dalpha: float | Tensor,
    mask_id: int,
) -> Tensor:
    """The fake model's loss for `masked_inverse_loss`: its NELBO with the student's softmax as token.

    -α'/(1-α)·KL(x̂‖f̂) where z is masked: the soft NELBO less x̂'s own entropy, which f̂ does not move, so
    it is 0 where f̂ is x̂. The student is a constant. With hard tokens instead, of the same expectation
    and more noise: ``masked.nelbo(fake, z, x, alpha, dalpha, mask_id)`` of the draw x that z was made of.

    Args:
        fake, student: (..., V) logits of one dtype, at z and at z'.
        z, alpha, dalpha, mask_id: as in `masked_inverse_loss`.

    Returns:
        (...) nats, at least 0; differentiable in fake.

    Example:
        >>> import torch
        >>> from dlcore.process import distill
        >>> fake, student = torch.zeros(1, 3), torch.tensor([[0.9, 0.1, 0.0]]).log()
        >>> distill.masked_fake_loss(fake, student, torch.tensor([2]), 0.5, -1.0, mask_id=2)
        tensor([0.7361])
    """
    op = "distill.masked_fake_loss"
    h = rows.alike(op, one_dtype=True, fake=fake, student=student)
    is_masked, weight = _masked_weight(op, z, alpha, dalpha, mask_id, h)
    gap = categorical.kl(
        divergences.dropped(divergences.detach(student), mask_id), divergences.dropped(fake, mask_id)
    )
    return torch.where(is_masked, weight.to(gap.dtype) * gap, 0)


def uniform_inverse_loss(
    student: Logits,
    teacher: Logits,
    fake: Logits,
    z: Tensor,
    alpha: float | Tensor,
    dalpha: float | Tensor,
) -> Tensor:
    """IDLM's loss of a uniform-state student (Duo): the difference of two NELBOs with a soft token.

    With x̄ = V·α·x̂ + 1 - α of the student's softmax x̂, and so of teacher f* and fake f̂ (leave-one-out
    networks, as `uniform.nelbo` has them by default), the generator KLs' difference is
    |α'|/(Vα)·{Σ_j (x̄_j/x̄_z)·[log(f̄̂_j/f̄̂_z) - log(f̄*_j/f̄*_z)] + V/f̄*_z - V/f̄̂_z}: the terms without a model
    cancel and are never formed. Softmaxes are formed a chunk of rows at a time.

    The published relaxation makes z differentiable too: see `gaussian_relaxation`, whose soft input carries a
    gradient from the logits of teacher and fake back to the student. So neither is detached: freeze their
    networks. Published code takes dα/dt by a finite difference of its table; give
    `duo.Transformation.levels`'.

    Args:
        student, teacher, fake: (..., V) logits of one dtype; student at z', the others at z or its
        relaxation.
        z: (...) int64.
        alpha: in (0, 1); dalpha: dα/dt <= 0; broadcast to z.shape.

    Returns:
        (...) nats, of either sign; differentiable in all three logits.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        IDLM, arXiv 2602.19066.

    Example:
        >>> import torch
        >>> from dlcore.process import distill
        >>> law, teacher = torch.zeros(1, 3), torch.tensor([[0.8, 0.1, 0.1]]).log()
        >>> distill.uniform_inverse_loss(law, teacher, law, torch.tensor([1]), 0.5, -1.0)
        tensor([0.4360])
    """
    op = "distill.uniform_inverse_loss"
    h = rows.alike(op, one_dtype=True, student=student, teacher=teacher, fake=fake)
    return _uniform_gap(op, (student, teacher, fake), z, alpha, dalpha, h)


def uniform_fake_loss(
    fake: Logits, student: Logits, z: Tensor, alpha: float | Tensor, dalpha: float | Tensor
) -> Tensor:
    """The fake model's loss for `uniform_inverse_loss`: the generator KL from the soft token x̂ to f̂.

    The student is a constant. Where x̂ is a point this is `uniform.nelbo` of that token. With hard tokens:
    ``uniform.nelbo(fake, z, x, alpha, dalpha)``.

    Args:
        fake, student: (..., V) logits of one dtype, at z (or its relaxation) and at z'.
        z, alpha, dalpha: as in `uniform_inverse_loss`.

    Returns:
        (...) nats, at least 0; differentiable in fake.

    Example:
        >>> import torch
        >>> from dlcore.process import distill
        >>> fake, student = torch.zeros(1, 4), torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
        >>> distill.uniform_fake_loss(fake, student, torch.tensor([1]), 0.5, -1.0)
        tensor([2.0236])
    """
    op = "distill.uniform_fake_loss"
    h = rows.alike(op, one_dtype=True, fake=fake, student=student)
    fixed = divergences.detach(student)
    return _uniform_gap(op, (fixed, fake, fixed), z, alpha, dalpha, h)


def _uniform_gap(
    op: str,
    heads: tuple[Logits, ...],
    z: Tensor,
    alpha: float | Tensor,
    dalpha: float | Tensor,
    h: categorical.Head,
) -> Tensor:
    """The generator KL from heads[0] to heads[1], less that to heads[2]."""
    rows.tokens(op, "z", z, h)
    a = rows.level(op, "alpha", alpha, z.shape, z.device, "()")
    da = rows.slope(op, dalpha, z.shape, z.device)
    odds = h.vocab * a / (1 - a)
    return divergences.by_chunks(_rate_gap, heads, z, odds, -da / (h.vocab * a), h.vocab / (1 - a))


def _rate_gap(
    student: Tensor, first: Tensor, second: Tensor, z: Tensor, odds: Tensor, weight: Tensor, scale: Tensor
) -> Tensor:
    """weight·[R(first) - R(second)] with R(f) = Σ_j (x̄_j/x̄_z)·log(f̄_z/f̄_j) + scale/(1 + odds·f_z)."""
    dtype = student.dtype
    log_odds, odds = odds.log().to(dtype).unsqueeze(-1), odds.to(dtype).unsqueeze(-1)
    mass = 1 + odds * torch.softmax(student, -1)

    def lift(logits: Tensor) -> Tensor:
        return torch.nn.functional.softplus(log_odds + torch.log_softmax(logits, -1), threshold=60)

    a, b = lift(first), lift(second)
    at_z = z.unsqueeze(-1)
    a_z, b_z = a.gather(-1, at_z), b.gather(-1, at_z)
    moved = (mass * ((a_z - b_z) - (a - b))).sum(-1) / mass.gather(-1, at_z).squeeze(-1)
    stayed = scale.to(dtype) * ((-a_z).exp() - (-b_z).exp()).squeeze(-1)
    return weight.to(dtype) * (moved + stayed)


def gaussian_relaxation(
    student: Logits,
    gamma: float | Tensor,
    tau: float | Tensor,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """IDLM's relaxation for Duo: z = argmax w and softmax(w/tau) of w = ᾱ·x̂ + σ̄·ε, x̂ the student's softmax.

    The soft input (times a table of embeddings) goes to teacher and fake, and carries their gradient to the
    student. x̂ is not one-hot, so z is only nearly a draw at level T(γ) of a token of x̂; the nearer x̂ is to a
    point, the nearer. Forms (..., V): of x̂ every entry counts, so `duo.curriculum`'s k will not do.

    Args:
        student: (..., V) logits.
        gamma: finite; tau: positive; broadcast to the leading dimensions.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Returns:
        z (...) int64 and (..., V) float32 or wider, differentiable in student.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        IDLM, arXiv 2602.19066.

    Example:
        >>> import torch
        >>> from dlcore.process import distill
        >>> z, soft = distill.gaussian_relaxation(torch.zeros(2, 8, 30), -2.0, 0.1)
        >>> z.shape, bool((soft.argmax(-1) == z).all())
        (torch.Size([2, 8]), True)
    """
    op = "distill.gaussian_relaxation"
    h = categorical.head(op, student, "student")
    device = h.logits.device
    g = checks.within(
        op, "gamma", checks.number(op, "gamma", gamma, h.lead, device), -torch.inf, torch.inf, "()"
    )
    heat = rows.positive(op, "tau", tau, h.lead, device)
    x = torch.softmax(rows.dense(op, student, "student"), -1)
    noise = rng.normal(rows.row_keys(op, key, generator, h.lead, device), (h.vocab,), dtype=x.dtype)
    signal, spread = (torch.sigmoid(s).sqrt().to(x.dtype).unsqueeze(-1) for s in (-g, g))
    state = signal * x + spread * noise
    return state.detach().argmax(-1), torch.softmax(state / heat.to(x.dtype).unsqueeze(-1), -1)
