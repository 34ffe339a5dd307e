"""Vocabulary drifts on the sphere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._ops.categorical import HEAD, given, head_grads
from dlcore._ops.declare import autograd, define, result_dtype

#: Beyond, the vMF path's weight is that of its end, and float64 can't tell m from 1.
MAX_KAPPA = 1e8

_VELOCITY = f"{HEAD}, Tensor x, Tensor table, Tensor? kappa"


def _check_velocity(*args: Any) -> None:
    checks.value_range("sphere.velocity", "kappa", args[5], 0, MAX_KAPPA)


def _velocity_fake(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    lead, table = logits.shape[:-1], args[3]
    return (
        logits.new_empty((*lead, table.shape[1]), dtype=result_dtype(logits)),
        logits.new_empty(lead, dtype=result_dtype(logits)),
        logits.new_empty(lead, dtype=torch.float64),
    )


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    logits, weight, bias, x, table, _, with_x, with_table = args[4:]
    like = torch.contiguous_format
    return (
        *head_grads(logits, weight, bias),
        torch.empty_like(x, memory_format=like) if with_x else logits.new_empty(0),
        torch.empty_like(table, memory_format=like) if with_table else logits.new_empty(0),
    )


define(
    "sphere.velocity",
    f"({_VELOCITY}) -> (Tensor, Tensor, Tensor)",
    _velocity_fake,
    _check_velocity,
    differentiable=True,
)
define(
    "sphere.velocity_backward",
    f"(Tensor grad, Tensor output, Tensor along, Tensor logsumexp, {_VELOCITY}, bool with_x, bool with_table)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
define(
    "sphere.largest",
    f"({HEAD}, SymInt count) -> Tensor",
    lambda logits, weight, bias, count: logits.new_empty((*logits.shape[:-1], count), dtype=torch.int64),
)


def _setup_velocity(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output, *inputs)


def _backward_velocity(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    head, (with_x, with_table) = saved[3:6], ctx.needs_input_grad[3:5]
    grads = torch.ops.dlcore.sphere_velocity_backward(grad, *saved, with_x, with_table)
    return (
        *given(head, grads[:3]),
        grads[3] if with_x else None,
        grads[4] if with_table else None,
        None,
    )


autograd("sphere.velocity", _setup_velocity, _backward_velocity)
