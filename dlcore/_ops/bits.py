"""Bitstream diffusion."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcore._ops.declare import autograd, define, result_dtype

#: Bits of a token, so that a sum of their places is an int64.
MAX_WIDTH = 62


def _like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=result_dtype(x))


def _check_encode(_: Tensor, width: int, *__: Any) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"bits.encode: width must lie in [1, {MAX_WIDTH}], got {width}")


define(
    "bits.encode",
    "(Tensor tokens, int width, bool msb, bool gray, float low, float high) -> Tensor",
    lambda tokens, width, *_: tokens.new_empty((*tokens.shape, width), dtype=torch.float32),
    _check_encode,
)
define(
    "bits.decode",
    "(Tensor x, bool msb, bool gray, float threshold, int vocab) -> Tensor",
    lambda x, *_: x.new_empty(x.shape[:-1], dtype=torch.int64),
)
define(
    "bits.step",
    "(Tensor x, Tensor? residual, Tensor coefficients, float low, float high, float clip, Tensor? key) "
    "-> (Tensor, Tensor)",
    lambda x, *_: (_like(x), _like(x)),
)
define("bits.perturb", "(Tensor x, Tensor spread, Tensor key) -> Tensor", _like)
define(
    "bits.matched_filter",
    "(Tensor x, Tensor slope, float center, float clip) -> Tensor",
    _like,
    differentiable=True,
)
define(
    "bits.posterior",
    "(Tensor x, Tensor? residual, Tensor slope, float center, float clip) -> Tensor",
    _like,
    differentiable=True,
)


def _through_filter(
    grad: Tensor, x: Tensor, slope: Tensor, center: float, clip: float, wanted: bool
) -> Tensor | None:
    """The gradient in x of a matched filter; 0 where the clip binds."""
    if not wanted:
        return None
    inside = ((x.to(grad.dtype) - center) * slope).abs() <= clip
    return torch.where(inside, grad * slope, 0).to(x.dtype)


def _setup_matched_filter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slope, ctx.center, ctx.clip = inputs
    ctx.save_for_backward(x, slope)


def _backward_matched_filter(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    x, slope = saved
    return _through_filter(grad, x, slope, ctx.center, ctx.clip, True), None, None, None


def _setup_posterior(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, residual, slope, ctx.center, ctx.clip = inputs
    ctx.save_for_backward(output, x, residual, slope)


def _backward_posterior(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    probs, x, residual, slope = saved
    logits = grad * probs * (1 - probs)
    through = _through_filter(logits, x, slope, ctx.center, ctx.clip, ctx.needs_input_grad[0])
    return through, None if residual is None else logits.to(residual.dtype), None, None, None


autograd("bits.matched_filter", _setup_matched_filter, _backward_matched_filter)
autograd("bits.posterior", _setup_posterior, _backward_posterior)

_LOSS = (
    "Tensor residual, Tensor x, Tensor bits, Tensor slope, float low, float high, float clip, bool squared"
)
define(
    "bits.loss",
    f"({_LOSS}) -> Tensor",
    lambda residual, x, *_: x.new_empty(x.shape[:-1], dtype=result_dtype(x)),
    differentiable=True,
)


def _loss_backward_fake(grad: Tensor, residual: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), x.new_empty(x.shape if args[-1] else (0,))


define(
    "bits.loss_backward",
    f"(Tensor grad, {_LOSS}, bool with_x) -> (Tensor, Tensor)",
    _loss_backward_fake,
)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.low, ctx.high, ctx.clip, ctx.squared = inputs
    ctx.save_for_backward(*tensors)


def _backward_loss(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    with_x = ctx.needs_input_grad[1]
    residual_grad, x_grad = torch.ops.dlcore.bits_loss_backward(
        grad, *saved, ctx.low, ctx.high, ctx.clip, ctx.squared, with_x
    )
    return residual_grad, x_grad if with_x else None, None, None, None, None, None, None


autograd("bits.loss", _setup_loss, _backward_loss)
