"""Statistics, draws and losses of softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore._ops.declare import autograd, define, result_dtype
from dlcore.reference.categorical import GROUP

HEAD = "Tensor logits, Tensor? weight, Tensor? bias"
ROW = "Tensor? temperature, float? softcap, int? exclude"


def vocab_size(logits: Tensor, weight: Tensor | None) -> int:
    """V of logits or of a head."""
    return logits.shape[-1] if weight is None else weight.shape[0]


def _numbers(logits: Tensor, count: int) -> Tensor:
    return logits.new_empty((count, *logits.shape[:-1]), dtype=result_dtype(logits))


def _check_row(
    op: str,
    logits: Tensor,
    weight: Tensor | None,
    index: Tensor | None,
    temperature: Tensor | None,
    *,
    greedy: bool,
) -> None:
    if index is not None:
        checks.token_range(op, "z" if "mixture" in op else "index", index, vocab_size(logits, weight))
    if temperature is not None:
        check_temperature(op, temperature, greedy=greedy)


def check_temperature(op: str, temperature: Tensor | None, *, greedy: bool = False) -> None:
    """Positive, with a float32 inverse; 0 where that means the argmax."""
    if temperature is not None and greedy:
        temperature = torch.where(temperature == 0, 1, temperature)
    limits = torch.finfo(torch.float32)
    checks.value_range(op, "temperature", temperature, limits.tiny, limits.max)


def _check_stats(*args: Any) -> None:
    logits, weight, _, index, _, temperature, *_ = args
    _check_row("categorical.stats", logits, weight, index, temperature, greedy=False)


def _check_summary(*args: Any) -> None:
    logits, weight, _, first, *_, temperature, _, _, _, _ = args
    op, last = "categorical.summary", first + vocab_size(logits, weight) - 1
    if first < 0 or (first % GROUP and first // GROUP != last // GROUP):
        raise ValueError(
            f"{op}: first must be a multiple of {GROUP}, or all tokens lie in one group of as many, "
            f"got tokens {first} to {last}"
        )
    check_temperature(op, temperature, greedy=True)


def _check_sample(*args: Any) -> None:
    logits, weight, _, index, _, temperature, _, _, top_k, top_p, min_p, _ = args
    op = "categorical.sample"
    _check_row(op, logits, weight, index, temperature, greedy=True)
    if top_k is None and top_p is None and min_p is None:
        return
    checks.value_range(op, "top_k", top_k, 1)
    checks.value_range(op, "top_p", top_p, 0, 1)
    checks.value_range(op, "min_p", min_p, 0, 1)


def _check_mixture(*args: Any) -> None:
    logits, weight, _, z, coefficients, _, _, temperature, *_ = args
    op = "categorical.sample_mixture"
    _check_row(op, logits, weight, z, temperature, greedy=True)
    if checks.reads_data(coefficients):
        finite = torch.isfinite(coefficients)
        if not bool(finite.all()):
            raise ValueError(f"{op}: coefficients must be finite, got {coefficients[~finite][0].item()}")


define(
    "categorical.stats",
    f"({HEAD}, Tensor? index, Tensor? shift, {ROW}) -> (Tensor, Tensor)",
    lambda logits, *_: (logits.new_empty(logits.shape[:-1], dtype=torch.int64), _numbers(logits, 6)),
    _check_stats,
)
define(
    "categorical.summary",
    f"({HEAD}, int first, Tensor? index, Tensor? shift, Tensor? target, {ROW}, "
    "Tensor? skip, Tensor? key) -> (Tensor, Tensor)",
    lambda logits, *_: (
        logits.new_empty((2, *logits.shape[:-1]), dtype=torch.int64),
        logits.new_empty((8, *logits.shape[:-1]), dtype=torch.float64),
    ),
    _check_summary,
)
define(
    "categorical.sample",
    f"({HEAD}, Tensor? index, Tensor? shift, {ROW}, "
    "Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor key) -> (Tensor, Tensor)",
    lambda logits, *_: (logits.new_empty((2, *logits.shape[:-1]), dtype=torch.int64), _numbers(logits, 7)),
    _check_sample,
)
define(
    "categorical.sample_mixture",
    f"({HEAD}, Tensor z, Tensor coefficients, int prior, Tensor? shift, {ROW}, Tensor key) -> Tensor",
    lambda logits, weight, bias, z, *_: torch.empty_like(z, memory_format=torch.contiguous_format),
    _check_mixture,
)

# Differentiable ops come in pairs: the forward returns what its backward needs beside the inputs.


def head_grads(logits: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a head; for dense logits the last two are empty."""
    empty = logits.new_empty(0)
    like = torch.contiguous_format
    return (
        torch.empty_like(logits, memory_format=like),
        empty if weight is None else torch.empty_like(weight, memory_format=like),
        empty.clone() if bias is None else torch.empty_like(bias, memory_format=like),
    )


def given(head: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of those parts of a head that there are."""
    return tuple(None if h is None else g for h, g in zip(head, grads, strict=True))


def _check_log_probs(*args: Any) -> None:
    logits, weight, _, target, index, *_ = args
    vocab = vocab_size(logits, weight)
    checks.token_range("categorical.log_probs", "target", target, vocab, low=-1)
    checks.token_range("categorical.log_probs", "index", index, vocab)


_LOG_PROBS = f"{HEAD}, Tensor target, Tensor? index, Tensor? shift, float? softcap, int? exclude"
define(
    "categorical.log_probs",
    f"({_LOG_PROBS}) -> Tensor",
    lambda logits, *_: logits.new_empty((3, *logits.shape[:-1]), dtype=torch.float64),
    _check_log_probs,
    differentiable=True,
)
define(
    "categorical.log_probs_backward",
    f"(Tensor grad, Tensor numbers, {_LOG_PROBS}) -> (Tensor, Tensor, Tensor)",
    lambda grad, numbers, logits, weight, bias, *_: head_grads(logits, weight, bias),
)


def _setup_log_probs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, weight, bias, target, index, shift, ctx.softcap, ctx.exclude = inputs
    ctx.save_for_backward(output, logits, weight, bias, target, index, shift)


def _backward_log_probs(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    numbers, logits, weight, bias, target, index, shift = saved
    grads = torch.ops.dlcore.categorical_log_probs_backward(
        grad, numbers, logits, weight, bias, target, index, shift, ctx.softcap, ctx.exclude
    )
    return (*given((logits, weight, bias), grads), None, None, None, None, None)


autograd("categorical.log_probs", _setup_log_probs, _backward_log_probs)

_KL = (
    "Tensor p_logits, Tensor? p_weight, Tensor? p_bias, "
    "Tensor q_logits, Tensor? q_weight, Tensor? q_bias, Tensor? temperature"
)


def _check_kl(*args: Any) -> None:
    check_temperature("categorical.kl", args[-1])


define(
    "categorical.kl",
    f"({_KL}) -> Tensor",
    lambda logits, *_: logits.new_empty((3, *logits.shape[:-1]), dtype=torch.float64),
    _check_kl,
    differentiable=True,
)
define(
    "categorical.kl_backward",
    f"(Tensor grad, Tensor numbers, {_KL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad, numbers, p, p_weight, p_bias, q, q_weight, q_bias, temperature: (
        *head_grads(p, p_weight, p_bias),
        *head_grads(q, q_weight, q_bias),
    ),
)


def _setup_kl(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _backward_kl(_: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    numbers, *inputs = saved
    grads = torch.ops.dlcore.categorical_kl_backward(grad, numbers, *inputs)
    return (*given(tuple(inputs[:6]), grads), None)


autograd("categorical.kl", _setup_kl, _backward_kl)

_EXPECTATION = f"{HEAD}, Tensor table, {ROW}"


def _check_expectation(*args: Any) -> None:
    check_temperature("categorical.expectation", args[4])


define(
    "categorical.expectation",
    f"({_EXPECTATION}) -> (Tensor, Tensor)",
    lambda logits, weight, bias, table, *_: (
        logits.new_empty((*logits.shape[:-1], table.shape[1]), dtype=result_dtype(logits)),
        logits.new_empty(logits.shape[:-1], dtype=torch.float64),
    ),
    _check_expectation,
    differentiable=True,
)
define(
    "categorical.expectation_backward",
    f"(Tensor grad, Tensor output, Tensor logsumexp, {_EXPECTATION}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, output, lse, logits, weight, bias, table, *_: (
        *head_grads(logits, weight, bias),
        torch.empty_like(table, memory_format=torch.contiguous_format),
    ),
)


def _check_sample_expectation(*args: Any) -> None:
    logits, weight, _, _, temperature, _, _, index, _ = args
    _check_row("categorical.sample_expectation", logits, weight, index, temperature, greedy=False)


define(
    "categorical.sample_expectation",
    f"({_EXPECTATION}, Tensor? index, Tensor key) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda logits, weight, bias, table, *_: (
        logits.new_empty((*logits.shape[:-1], table.shape[1]), dtype=result_dtype(logits)),
        logits.new_empty(logits.shape[:-1], dtype=torch.float64),
        logits.new_empty((2, *logits.shape[:-1]), dtype=torch.int64),
        _numbers(logits, 7),
    ),
    _check_sample_expectation,
    differentiable=True,
)


def _save_expectation(ctx: Any, inputs: tuple[Any, ...], mean: Tensor, lse: Tensor) -> None:
    *tensors, ctx.softcap, ctx.exclude = inputs
    ctx.save_for_backward(mean, lse, *tensors)


def _setup_expectation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _save_expectation(ctx, inputs, *output)


def _setup_sample_expectation(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    mean, lse, tokens, numbers = output
    ctx.mark_non_differentiable(lse, tokens, numbers)
    _save_expectation(ctx, inputs[:-2], mean, lse)


def _backward_expectation(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    output, lse, logits, weight, bias, table, temperature = saved
    grads = torch.ops.dlcore.categorical_expectation_backward(
        grad, output, lse, logits, weight, bias, table, temperature, ctx.softcap, ctx.exclude
    )
    return (*given((logits, weight, bias), grads[:3]), grads[3], None, None, None)


def _backward_sample_expectation(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, lse_grad: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    return (*_backward_expectation(ctx, saved, grad, lse_grad), None, None)


autograd("categorical.expectation", _setup_expectation, _backward_expectation)
autograd("categorical.sample_expectation", _setup_sample_expectation, _backward_sample_expectation)
