"""Guided draws."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._ops.declare import define

#: What stands in a row of coefficients: γ; the temperature, positive; what is added to both streams' logits
#: at z before it; α_s; what is added to the guided logarithm at z; whether z stays and nothing is read.
COEFFICIENTS = ("gamma", "temperature", "shift", "alpha_s", "bonus", "keep")


def _check_cfg_uniform_step(
    cond: Tensor, uncond: Tensor, z: Tensor, coefficients: Tensor, exclude: int | None, key: Tensor
) -> None:
    """What a kernel relies on, whoever calls it."""
    op, lead, count = "guidance.cfg_uniform_step", cond.shape[:-1], len(COEFFICIENTS)
    checks.floating(op, "cond", cond)
    if uncond.shape != cond.shape:
        got = tuple(uncond.shape)
        raise ValueError(f"{op}: uncond must have cond's shape {tuple(cond.shape)}, got {got}")
    double = torch.float64
    if uncond.dtype not in checks.FLOATING or (uncond.dtype == double) != (cond.dtype == double):
        raise TypeError(f"{op}: uncond must be float64 as cond is, or neither, got {uncond.dtype}")
    checks.tokens(op, "z", z, lead)
    if coefficients.dtype != double or coefficients.shape not in ((count,), (*lead, count)):
        wanted = f"float64 ({count},) or {(*lead, count)}"
        raise ValueError(f"{op}: coefficients must be {wanted}, got {checks.describe(coefficients)}")
    checks.token_id(op, "exclude", exclude, cond.shape[-1])
    if exclude is not None and cond.shape[-1] == 1:
        raise ValueError(f"{op}: exclude leaves no token in a vocabulary of 1")
    checks.key(op, key, None, lead)


define(
    "guidance.cfg_uniform_step",
    "(Tensor cond, Tensor uncond, Tensor z, Tensor coefficients, int? exclude, Tensor key) -> Tensor",
    lambda cond, uncond, z, *_: torch.empty_like(z, memory_format=torch.contiguous_format),
    _check_cfg_uniform_step,
)
