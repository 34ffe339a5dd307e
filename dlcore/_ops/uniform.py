"""The uniform-state NELBO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._ops.categorical import HEAD, given, head_grads, vocab_size
from dlcore._ops.declare import autograd, define, result_dtype

_NELBO = f"{HEAD}, Tensor z, Tensor x, Tensor alpha, Tensor dalpha, Tensor? shift"


def _check_nelbo(*args: Any) -> None:
    logits, weight, _, z, x, alpha, *_ = args
    op, vocab = "uniform.nelbo", vocab_size(logits, weight)
    checks.token_range(op, "z", z, vocab)
    checks.token_range(op, "x", x, vocab)
    checks.value_range(op, "alpha", alpha, 0, 1)


define(
    "uniform.nelbo",
    f"({_NELBO}) -> (Tensor, Tensor)",
    lambda logits, *_: (
        logits.new_empty(logits.shape[:-1], dtype=result_dtype(logits)),
        logits.new_empty((5, *logits.shape[:-1]), dtype=torch.float64),
    ),
    _check_nelbo,
    differentiable=True,
)
define(
    "uniform.nelbo_backward",
    f"(Tensor grad, Tensor saved, {_NELBO}) -> (Tensor, Tensor, Tensor)",
    lambda grad, saved, logits, weight, bias, *_: head_grads(logits, weight, bias),
)


def _setup_nelbo(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs)


def _backward_nelbo(_: Any, saved: tuple[Tensor, ...], grad: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
    numbers, *inputs = saved
    grads = torch.ops.dlcore.uniform_nelbo_backward(grad, numbers, *inputs)
    return (*given(tuple(inputs[:3]), grads), None, None, None, None, None)


autograd("uniform.nelbo", _setup_nelbo, _backward_nelbo)
