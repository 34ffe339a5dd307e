"""Maps of the unit sphere, and draws of its laws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlcore._ops.declare import autograd, define, result_dtype

#: What each map takes: vectors (..., d), and t (...).
MAPS = {
    "normalize": ("x",),
    "project": ("x", "u"),
    "angle": ("x", "y"),
    "slerp": ("x", "y", "t"),
    "log_map": ("x", "y"),
    "exp_map": ("x", "v"),
    "rotate": ("x", "source", "target"),
}


def _angle_fake(x: Tensor, _: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=result_dtype(x))


def _map_fake(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _backward_fake(_: Tensor, needed: Sequence[bool], *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape if n else 0) for x, n in zip(inputs, needed, strict=True))


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _declare(name: str, arguments: tuple[str, ...]) -> None:
    tensors = ", ".join(f"Tensor {a}" for a in arguments)
    define(
        f"sphere.{name}",
        f"({tensors}) -> Tensor",
        _angle_fake if name == "angle" else _map_fake,
        differentiable=True,
    )
    results = ", ".join("Tensor" for _ in arguments)
    returned = f"({results})" if len(arguments) > 1 else "Tensor"
    define(
        f"sphere.{name}_backward",
        f"(Tensor grad, bool[] needed, {tensors}) -> {returned}",
        _backward_fake if len(arguments) > 1 else lambda *a: _backward_fake(*a)[0],
    )

    def backward(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = list(ctx.needs_input_grad[: len(saved)])
        grads = getattr(torch.ops.dlcore, f"sphere_{name}_backward")(grad, needed, *saved)
        grads = grads if isinstance(grads, (tuple, list)) else (grads,)
        return tuple(g if n else None for g, n in zip(grads, needed, strict=True))

    autograd(f"sphere.{name}", _setup, backward)


for _name, _arguments in MAPS.items():
    _declare(_name, _arguments)


define("sphere.step", "(Tensor x, Tensor v, Tensor t, bool exponential) -> Tensor", _map_fake)
define(
    "sphere.sample",
    "(Tensor mean, Tensor kappa, Tensor key, bool reject) -> Tensor",
    lambda mean, *_: mean.new_empty(mean.shape),
)
