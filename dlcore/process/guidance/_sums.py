"""Weighted sums of logits that stay linear heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore.linear_logits import LinearLogits

Logits = Tensor | LinearLogits


def weight(op: str, value: float | Tensor, lead: torch.Size, device: torch.device) -> Tensor:
    """γ per row, finite."""
    gamma = checks.number(op, "gamma", value, lead, device)
    return checks.within(op, "gamma", gamma, -torch.inf, torch.inf, "()")


def linear_sum(op: str, *summands: tuple[Tensor, LinearLogits]) -> LinearLogits:
    """Σ factor·logits as one head, factors per row: hidden vectors and weights side by side.

    Where all have the very same weight and no bias, the hidden vectors are added instead. A bias becomes one
    more column, for it too is scaled by row.
    """
    first = summands[0][1]
    dtype = first.dtype
    ranks: Any = {"group": first.group, "sizes": first.sizes}
    for _, x in summands:
        if {"group": x.group, "sizes": x.sizes} != ranks:
            got = f"{x.sizes} of {x.group} beside {first.sizes} of {first.group}"
            raise ValueError(
                f"{op}: all logits must lie over the same ranks alike, or none over any, got sizes {got}"
            )
    for _, x in summands:
        dtype = torch.promote_types(dtype, x.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    hidden: list[Tensor] = []
    weights: list[Tensor] = []
    for factor, x in summands:
        f = factor.to(wide).expand(x.hidden.shape[:-1]).unsqueeze(-1)
        hidden.append(f * x.hidden)
        weights.append(x.weight.to(dtype))
        if x.bias is not None:
            hidden.append(f)
            weights.append(x.bias.to(dtype).unsqueeze(-1))
    if all(x.weight is first.weight and x.bias is None for _, x in summands):
        return LinearLogits(torch.stack(hidden).sum(0).to(dtype), first.weight, **ranks)
    return LinearLogits(torch.cat(hidden, -1).to(dtype), torch.cat(weights, -1), **ranks)
