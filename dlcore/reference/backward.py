"""Backward of any reference function: torch's own autograd through it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def _recording() -> AbstractContextManager[None]:
    """Autograd, also where a DTensor runs an op on its part: below autograd."""
    below = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
    return torch.overrides.enable_reentrant_dispatch() if below else nullcontext()


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Any, ...], wanted: tuple[int, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of sum(grad · function(*inputs)) in the inputs at `wanted`; empty for those that are None."""
    leaves = list(inputs)
    for i in wanted:
        leaves[i] = None if inputs[i] is None else inputs[i].detach().requires_grad_()
    present = [leaves[i] for i in wanted if leaves[i] is not None]
    with _recording(), torch.enable_grad():
        output = function(*leaves)
        found = iter(torch.autograd.grad(output, present, grad, allow_unused=True, materialize_grads=True))
    empty = grad.new_empty(0)
    return tuple(empty.clone() if leaves[i] is None else next(found).contiguous() for i in wanted)
