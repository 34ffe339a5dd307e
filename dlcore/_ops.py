"""Every op, declared once: schema, value checks, dispatch, fake and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _dispatch

_library = torch.library.Library("dlcore", "DEF")

HEAD = "Tensor logits, Tensor? weight, Tensor? bias"
ROW = "Tensor? temperature, float? softcap, int? exclude"


def _define(
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
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
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


def _autograd(op: str, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Make an op differentiable once; `backward` takes ctx, the saved tensors and the gradients."""

    def once(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        with torch.no_grad():
            results: tuple[Tensor | None, ...] = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():
            return results
        handed: tuple[Tensor | None, ...] = _Once.apply(op, len(results), *results, *saved, *grads)
        return handed

    name = "dlcore::" + op.replace(".", "_")
    torch.library.register_autograd(name, once, setup_context=setup, lib=_library)


def result_dtype(x: Tensor) -> torch.dtype:
    """float32, or the input's dtype if wider."""
    return torch.promote_types(x.dtype, torch.float32)


def _vocab(logits: Tensor, weight: Tensor | None) -> int:
    return logits.shape[-1] if weight is None else weight.shape[0]


def _numbers(logits: Tensor, count: int) -> Tensor:
    return logits.new_empty((count, *logits.shape[:-1]), dtype=result_dtype(logits))


# --- rng ---------------------------------------------------------------------------------------------------


def _noise_fake(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return key.new_empty((*key.shape[:-1], *shape), dtype=dtype)


_define(
    "rng.fold_in", "(Tensor key, Tensor data) -> Tensor", lambda key, data: data.new_empty((*data.shape, 2))
)
for _name in ("uniform", "normal", "gumbel"):
    _define(f"rng.{_name}", "(Tensor key, SymInt[] shape, ScalarType dtype) -> Tensor", _noise_fake)

# --- categorical -------------------------------------------------------------------------------------------


def _check_row(
    op: str,
    logits: Tensor,
    weight: Tensor | None,
    index: Tensor | None,
    temperature: Tensor | None,
    *,
    greedy: bool,
) -> None:
    checks.token_range(op, "z" if "mixture" in op else "index", index, _vocab(logits, weight))
    _check_temperature(op, temperature, greedy=greedy)


def _check_temperature(op: str, temperature: Tensor | None, *, greedy: bool = False) -> None:
    """Positive, with a float32 inverse; 0 where that means the argmax."""
    if temperature is not None and greedy:
        temperature = torch.where(temperature == 0, 1, temperature)
    limits = torch.finfo(torch.float32)
    checks.value_range(op, "temperature", temperature, limits.tiny, limits.max)


def _check_stats(*args: Any) -> None:
    logits, weight, _, index, _, temperature, *_ = args
    _check_row("categorical.stats", logits, weight, index, temperature, greedy=False)


def _check_sample(*args: Any) -> None:
    logits, weight, _, index, _, temperature, _, _, top_k, top_p, min_p, _ = args
    op = "categorical.sample"
    _check_row(op, logits, weight, index, temperature, greedy=True)
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


_define(
    "categorical.stats",
    f"({HEAD}, Tensor? index, Tensor? shift, {ROW}) -> (Tensor, Tensor)",
    lambda logits, *_: (logits.new_empty(logits.shape[:-1], dtype=torch.int64), _numbers(logits, 6)),
    _check_stats,
)
_define(
    "categorical.sample",
    f"({HEAD}, Tensor? index, Tensor? shift, {ROW}, "
    "Tensor? top_k, Tensor? top_p, Tensor? min_p, Tensor key) -> (Tensor, Tensor)",
    lambda logits, *_: (logits.new_empty((2, *logits.shape[:-1]), dtype=torch.int64), _numbers(logits, 7)),
    _check_sample,
)
_define(
    "categorical.sample_mixture",
    f"({HEAD}, Tensor z, Tensor coefficients, int prior, Tensor? shift, {ROW}, Tensor key) -> Tensor",
    lambda logits, weight, bias, z, *_: torch.empty_like(z, memory_format=torch.contiguous_format),
    _check_mixture,
)

# Differentiable ops come in pairs: the forward returns what its backward needs beside the inputs.


def _head_grads(logits: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a head; for dense logits the last two are empty."""
    empty = logits.new_empty(0)
    like = torch.contiguous_format
    return (
        torch.empty_like(logits, memory_format=like),
        empty if weight is None else torch.empty_like(weight, memory_format=like),
        empty.clone() if bias is None else torch.empty_like(bias, memory_format=like),
    )


def _given(head: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if h is None else g for h, g in zip(head, grads, strict=True))


def _check_log_probs(*args: Any) -> None:
    logits, weight, _, target, index, *_ = args
    vocab = _vocab(logits, weight)
    checks.token_range("categorical.log_probs", "target", target, vocab, low=-1)
    checks.token_range("categorical.log_probs", "index", index, vocab)


_LOG_PROBS = f"{HEAD}, Tensor target, Tensor? index, Tensor? shift, float? softcap, int? exclude"
_define(
    "categorical.log_probs",
    f"({_LOG_PROBS}) -> Tensor",
    lambda logits, *_: logits.new_empty((3, *logits.shape[:-1]), dtype=torch.float64),
    _check_log_probs,
    differentiable=True,
)
_define(
    "categorical.log_probs_backward",
    f"(Tensor grad, Tensor numbers, {_LOG_PROBS}) -> (Tensor, Tensor, Tensor)",
    lambda grad, numbers, logits, weight, bias, *_: _head_grads(logits, weight, bias),
)


def _setup_log_probs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, weight, bias, target, index, shift, ctx.softcap, ctx.exclude = inputs
    ctx.save_for_backward(output, logits, weight, bias, target, index, shift)


def _backward_log_probs(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    numbers, logits, weight, bias, target, index, shift = saved
    grads = torch.ops.dlcore.categorical_log_probs_backward(
        grad, numbers, logits, weight, bias, target, index, shift, ctx.softcap, ctx.exclude
    )
    return (*_given((logits, weight, bias), grads), None, None, None, None, None)


_autograd("categorical.log_probs", _setup_log_probs, _backward_log_probs)

_KL = (
    "Tensor p_logits, Tensor? p_weight, Tensor? p_bias, "
    "Tensor q_logits, Tensor? q_weight, Tensor? q_bias, Tensor? temperature"
)


def _check_kl(*args: Any) -> None:
    _check_temperature("categorical.kl", args[-1])


_define(
    "categorical.kl",
    f"({_KL}) -> Tensor",
    lambda logits, *_: logits.new_empty((3, *logits.shape[:-1]), dtype=torch.float64),
    _check_kl,
    differentiable=True,
)
_define(
    "categorical.kl_backward",
    f"(Tensor grad, Tensor numbers, {_KL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda grad, numbers, p, p_weight, p_bias, q, q_weight, q_bias, temperature: (
        *_head_grads(p, p_weight, p_bias),
        *_head_grads(q, q_weight, q_bias),
    ),
)


def _setup_kl(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _backward_kl(_: Any, saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    numbers, *inputs = saved
    grads = torch.ops.dlcore.categorical_kl_backward(grad, numbers, *inputs)
    return (*_given(tuple(inputs[:6]), grads), None)


_autograd("categorical.kl", _setup_kl, _backward_kl)

_EXPECTATION = f"{HEAD}, Tensor table, {ROW}"


def _check_expectation(*args: Any) -> None:
    _check_temperature("categorical.expectation", args[4])


_define(
    "categorical.expectation",
    f"({_EXPECTATION}) -> (Tensor, Tensor)",
    lambda logits, weight, bias, table, *_: (
        logits.new_empty((*logits.shape[:-1], table.shape[1]), dtype=result_dtype(logits)),
        logits.new_empty(logits.shape[:-1], dtype=torch.float64),
    ),
    _check_expectation,
    differentiable=True,
)
_define(
    "categorical.expectation_backward",
    f"(Tensor grad, Tensor output, Tensor logsumexp, {_EXPECTATION}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, output, lse, logits, weight, bias, table, *_: (
        *_head_grads(logits, weight, bias),
        torch.empty_like(table, memory_format=torch.contiguous_format),
    ),
)


def _check_sample_expectation(*args: Any) -> None:
    logits, weight, _, _, temperature, _, _, index, _ = args
    _check_row("categorical.sample_expectation", logits, weight, index, temperature, greedy=False)


_define(
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
    return (*_given((logits, weight, bias), grads[:3]), grads[3], None, None, None)


def _backward_sample_expectation(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, lse_grad: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    return (*_backward_expectation(ctx, saved, grad, lse_grad), None, None)


_autograd("categorical.expectation", _setup_expectation, _backward_expectation)
_autograd("categorical.sample_expectation", _setup_sample_expectation, _backward_sample_expectation)

# --- uniform -----------------------------------------------------------------------------------------------

_NELBO = f"{HEAD}, Tensor z, Tensor x, Tensor alpha, Tensor dalpha, Tensor? shift"


def _check_nelbo(*args: Any) -> None:
    logits, weight, _, z, x, alpha, *_ = args
    op, vocab = "uniform.nelbo", _vocab(logits, weight)
    checks.token_range(op, "z", z, vocab)
    checks.token_range(op, "x", x, vocab)
    checks.value_range(op, "alpha", alpha, 0, 1)


_define(
    "uniform.nelbo",
    f"({_NELBO}) -> (Tensor, Tensor)",
    lambda logits, *_: (
        logits.new_empty(logits.shape[:-1], dtype=result_dtype(logits)),
        logits.new_empty((5, *logits.shape[:-1]), dtype=torch.float64),
    ),
    _check_nelbo,
    differentiable=True,
)
_define(
    "uniform.nelbo_backward",
    f"(Tensor grad, Tensor saved, {_NELBO}) -> (Tensor, Tensor, Tensor)",
    lambda grad, saved, logits, weight, bias, *_: _head_grads(logits, weight, bias),
)


def _setup_nelbo(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs)


def _backward_nelbo(_: Any, saved: tuple[Tensor, ...], grad: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
    numbers, *inputs = saved
    grads = torch.ops.dlcore.uniform_nelbo_backward(grad, numbers, *inputs)
    return (*_given(tuple(inputs[:3]), grads), None, None, None, None, None)


_autograd("uniform.nelbo", _setup_nelbo, _backward_nelbo)

# --- attention ---------------------------------------------------------------------------------------------

_ATTENTION = (
    "Tensor q, Tensor k, Tensor v, Tensor starts, Tensor stops, "
    "Tensor? page_table, float scale, float softcap"
)


MAX_HEAD_DIM = 512


def _check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, batch: int) -> None:
    """Shapes that a kernel relies on, whoever calls it; `batch` sequences, or pages, of k and v."""
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{op}: q, k and v must be (B, S, H, D), {shapes}")
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[3] != q.shape[3]:
        raise ValueError(
            f"{op}: k and v must have the same (B, T, H), q's batch and head dimension, {shapes}"
        )
    if k.shape[2] < 1 or q.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: q must have a multiple of k's heads, {shapes}")
    if not all(1 <= x.shape[3] <= MAX_HEAD_DIM for x in (q, v)):
        raise ValueError(f"{op}: head dimensions must lie in [1, {MAX_HEAD_DIM}], {shapes}")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"{op}: k and v must have q's dtype {q.dtype}, got {k.dtype} and {v.dtype}")


def _check_attention(*args: Any) -> None:
    q, k, v, starts, stops, page_table, *_ = args
    op = "attention.intervals"
    batch, rows = q.shape[0], q.shape[1]
    _check_heads(op, q, k, v, batch if page_table is None else k.shape[0])
    if page_table is not None and (page_table.dim() != 2 or page_table.shape[0] != batch):
        raise ValueError(f"{op}: page_table must be ({batch}, pages), got {tuple(page_table.shape)}")
    if starts.dim() != 3 or starts.shape[0] not in (1, batch) or starts.shape[1:] != (rows, 2):
        raise ValueError(f"{op}: starts must be ({batch} or 1, {rows}, 2), got {tuple(starts.shape)}")
    keys = k.shape[1] if page_table is None else page_table.shape[1] * k.shape[1]
    for name, x in (("starts", starts), ("stops", stops), ("page_table", page_table)):
        if x is not None and x.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be int32, got {x.dtype}")
    if starts.shape != stops.shape:
        wanted = tuple(starts.shape)
        raise ValueError(f"{op}: stops must have starts' shape {wanted}, got {tuple(stops.shape)}")
    checks.token_range(op, "starts", starts, keys + 1)
    checks.token_range(op, "stops", stops, keys + 1)
    checks.token_range(op, "page_table", page_table, k.shape[0])


def _check_attention_backward(*args: Any) -> None:
    grad, grad_lse, out, lse, q, k, v, starts, stops, *_ = args
    op = "attention.intervals_backward"
    _check_attention(q, k, v, starts, stops, None)
    shape, lse_shape = (*q.shape[:3], v.shape[3]), (q.shape[0], q.shape[2], q.shape[1])
    for name, x, wanted in (("grad", grad, shape), ("out", out, shape)):
        if x.shape != wanted or x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} must be {q.dtype} {wanted}, got {x.dtype} {tuple(x.shape)}")
    for name, x in (("grad_lse", grad_lse), ("lse", lse)):
        if x.shape != lse_shape or x.dtype != result_dtype(q):
            wanted_dtype = result_dtype(q)
            raise ValueError(
                f"{op}: {name} must be {wanted_dtype} {lse_shape}, got {x.dtype} {tuple(x.shape)}"
            )


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _d = q.shape
    return (
        q.new_empty((batch, rows, heads, v.shape[3])),
        q.new_empty((batch, heads, rows), dtype=result_dtype(q)),
    )


_define(
    "attention.intervals",
    f"({_ATTENTION}) -> (Tensor, Tensor)",
    _attention_fake,
    _check_attention,
    differentiable=True,
)
_define(
    "attention.intervals_backward",
    "(Tensor grad, Tensor grad_lse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    "Tensor starts, Tensor stops, float scale, float softcap) -> (Tensor, Tensor, Tensor)",
    lambda grad, grad_lse, out, lse, q, k, v, *_: tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    ),
    _check_attention_backward,
)


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, stops, page_table, ctx.scale, ctx.softcap = inputs
    ctx.paged = page_table is not None
    ctx.save_for_backward(*output, q, k, v, starts, stops)


def _backward_attention(
    ctx: Any, saved: tuple[Tensor, ...], grad: Tensor, grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    if ctx.paged:
        raise NotImplementedError("attention.intervals: a paged cache has no gradient")
    grads = torch.ops.dlcore.attention_intervals_backward(grad, grad_lse, *saved, ctx.scale, ctx.softcap)
    return (*grads, None, None, None, None, None)


_autograd("attention.intervals", _setup_attention, _backward_attention)
