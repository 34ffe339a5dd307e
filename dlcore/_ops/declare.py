"""How an op is declared: schema, value checks, dispatch, fake and autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dlcore import _dispatch

_library = torch.library.Library("dlcore", "DEF")


def define(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    *,
    differentiable: bool = False,
) -> None:
    """Declare dlcore::family_name; eager calls check their values, then run the chosen backend."""
    name = op.replace(".", "_")
    _library.define(f"{name}{schema}")

    def run(*args: Any) -> Any:
        if check is not None:
            check(*args)
        if not torch.is_autocast_enabled() and not torch.is_autocast_enabled("cpu"):
            return _dispatch.run(op, *args)
        # Precision is the kernels' own.
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return _dispatch.run(op, *args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    if not differentiable:
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"dlcore::{name}", fake, lib=_library)


class _Once(torch.autograd.Function):
    """Hands gradients on, hung on all that they come from, so that a second derivative raises."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(None if x is None else x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(f"{ctx.op}: has a first derivative only, a second one was asked for")


def hand_on(
    op: str, results: tuple[Tensor | None, ...], *sources: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The results of a backward pass; a further derivative of them raises."""
    if not torch.is_grad_enabled():
        return results
    handed: tuple[Tensor | None, ...] = _Once.apply(op, len(results), *results, *sources)
    return handed


def as_asked(backend: str | None) -> AbstractContextManager[None]:
    """The backend that was asked for around a forward pass, if one was."""
    return nullcontext() if backend is None else _dispatch.use_backend(backend)


def autograd(op: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Make an op differentiable once; `backward` takes ctx, the saved tensors and the gradients.

    What was asked for around the forward pass holds for the backward one, which may run in another thread.
    As torch.library.register_autograd would, but without a search of every call for arguments left out: it
    takes longer than a launch, and no schema here has defaults.
    """
    name = op.replace(".", "_")
    overload = getattr(torch.ops.dlcore, name).default

    def below(keyset: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    class Derived(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            *args, keyset = inputs
            output = below(keyset, *args)
            ctx.backend = _dispatch.asked_for()
            setup(ctx, tuple(args), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors
            with torch.no_grad(), as_asked(ctx.backend):
                results: tuple[Tensor | None, ...] = backward(ctx, saved, *grads)
            return (*hand_on(op, results, *saved, *grads), None)

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return Derived.apply(*args, keyset)
        return below(keyset, *args)

    _library.impl(name, run, "Autograd", with_keyset=True)


def result_dtype(x: Tensor) -> torch.dtype:
    """float32, or the input's dtype if wider."""
    return torch.promote_types(x.dtype, torch.float32)
