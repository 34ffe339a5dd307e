"""Discrete consistency distillation: two points of one Gaussian trajectory, and the loss between them."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore.linear_logits import LinearLogits
from dlcore.process import _divergences as divergences
from dlcore.process import _rows as rows
from dlcore.process.duo.relaxation import argmax, draw, noise_level


def consistency_pair(
    x: Tensor,
    gamma_t: float | Tensor,
    gamma_s: float | Tensor,
    vocab_size: int,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """(z_t, z_s), two points of one trajectory: `corrupt` at both levels with one noise.

    Discrete consistency distillation: `consistency_loss` of the student at z_t against the teacher at z_s,
    with t uniform in [dt, 1], s = t - dt and dt = `distill.step_size`.

    Args:
        x, gamma_t, gamma_s, vocab_size, key: as in `corrupt`; gamma_s <= gamma_t, s being the cleaner.

    Returns:
        Two (...) int64.

    Source:
        The Diffusion Duality, arXiv 2506.10892.

    Example:
        >>> import torch
        >>> from dlcore.process import duo
        >>> x = torch.arange(1000)
        >>> z_t, z_s = duo.consistency_pair(x, -2.5, -3.0, vocab_size=1000)
        >>> bool((z_s == x)[z_t == x].all())
        True
    """
    op = "duo.consistency_pair"
    t, s = noise_level(op, x, gamma_t, vocab_size), noise_level(op, x, gamma_s, vocab_size)
    if checks.reads_data(t) and checks.reads_data(s) and bool((wrong := s > t).any()):
        got = f"{checks.first(s, wrong)!r} above {checks.first(t, wrong)!r}"
        raise ValueError(f"{op}: gamma_s must be at most gamma_t, got {got}")
    noise = draw(rows.row_keys(op, key, generator, x.shape, x.device), 1, vocab_size, x)
    return argmax(x, t, noise), argmax(x, s, noise)


def consistency_loss(
    student: Tensor | LinearLogits, teacher: Tensor | LinearLogits, *, kind: str = "reverse"
) -> Tensor:
    """Divergence of a student at z_t from a teacher at z_s, at every position: (...).

    Args:
        student, teacher: (..., V) logits, the networks' own outputs as in published code; the teacher (a copy
            of the student, renewed when dt grows) is a constant.
        kind: "reverse", KL(student‖teacher), as published by default; or another of `distill.divergence`.

    Returns:
        (...), differentiable in student. Sum over positions.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        The Diffusion Duality, arXiv 2506.10892.

    Example:
        >>> import torch
        >>> from dlcore.process import duo
        >>> duo.consistency_loss(torch.zeros(2, 4), torch.zeros(2, 4))
        tensor([0., 0.])
    """
    return divergences.between("duo.consistency_loss", student, teacher, kind)
