"""The Langevin corrector on the sphere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._ops.declare import autograd, define

_CORRECT = "Tensor x, Tensor score, Tensor step_size, Tensor key"


def _check_correct(*args: Any) -> None:
    checks.value_range("sphere.correct", "step_size", args[2], 0)


define(
    "sphere.correct",
    f"({_CORRECT}) -> Tensor",
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    _check_correct,
    differentiable=True,
)
define(
    "sphere.correct_backward",
    f"(Tensor grad, {_CORRECT}) -> (Tensor, Tensor, Tensor)",
    lambda _, x, score, step_size, key: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, score, step_size)
    ),
)


def _setup_correct(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_correct(_: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.dlcore.sphere_correct_backward(grad, *saved), None)


autograd("sphere.correct", _setup_correct, _backward_correct)
