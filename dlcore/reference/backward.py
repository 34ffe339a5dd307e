"""Backward of any reference function: torch's own autograd through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Any, ...], wanted: tuple[int, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of sum(grad · function(*inputs)) in the inputs at `wanted`; empty for those that are None."""
    leaves = list(inputs)
    for i in wanted:
        leaves[i] = None if inputs[i] is None else inputs[i].detach().requires_grad_()
    with torch.enable_grad():
        output = function(*leaves)
    present = [leaves[i] for i in wanted if leaves[i] is not None]
    found = iter(torch.autograd.grad(output, present, grad, allow_unused=True, materialize_grads=True))
    empty = grad.new_empty(0)
    return tuple(empty.clone() if leaves[i] is None else next(found).contiguous() for i in wanted)
