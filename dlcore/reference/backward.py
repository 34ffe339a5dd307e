"""Backward of any reference function: torch's own autograd through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

_AUTOGRAD = ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd, also below it: where a DTensor has an op run on this rank's part."""
    keys = [getattr(torch._C.DispatchKey, name) for name in _AUTOGRAD]
    with ExitStack() as stack:
        for key in keys:
            if torch._C._dispatch_tls_is_dispatch_key_excluded(key):
                stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        stack.enter_context(torch.enable_grad())
        yield


def gradients(
    function: Callable[..., Tensor], inputs: tuple[Any, ...], wanted: tuple[int, ...], grad: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of sum(grad · function(*inputs)) in the inputs at `wanted`; empty for those that are None."""
    leaves = list(inputs)
    for i in wanted:
        leaves[i] = None if inputs[i] is None else inputs[i].detach().requires_grad_()
    present = [leaves[i] for i in wanted if leaves[i] is not None]
    with _recording():
        output = function(*leaves)
        found = iter(torch.autograd.grad(output, present, grad, allow_unused=True, materialize_grads=True))
    empty = grad.new_empty(0)
    return tuple(empty.clone() if leaves[i] is None else next(found).contiguous() for i in wanted)
