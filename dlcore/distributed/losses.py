"""What has gradients over a vocabulary that lies over ranks.

The forward pass merges; the backward pass is the op's own on this rank's tokens, given the merged logsumexp.
Only a head's hidden states, which all ranks share, sum their gradients over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlcore import _dispatch
from dlcore._ops.categorical import given, vocab_size
from dlcore._ops.declare import as_asked, hand_on, result_dtype
from dlcore.distributed import groups
from dlcore.distributed.heads import ShardedHead, agree
from dlcore.distributed.summaries import Row, merged
from dlcore.reference import categorical as reference


def log_probs(
    h: ShardedHead,
    target: Tensor,
    index: Tensor | None,
    shift: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> Tensor:
    """(3, ...): log p[target], log p[index], logsumexp; 0 where target < 0."""
    asked = {"target": target, "index": index, "shift": shift, "softcap": softcap, "exclude": exclude}
    agree(h, asked, index="z")
    numbers: Tensor = _LogProbs.apply(h, *h.tensors, target, index, shift, softcap, exclude)
    return numbers


def kl(p: object, q: object, temperature: Tensor | None) -> Tensor:
    """(3, ...): KL(p || q), and the two logsumexps."""
    op = "categorical.kl"
    if not isinstance(p, ShardedHead) or not isinstance(q, ShardedHead):
        raise ValueError(f"{op}: p_logits and q_logits must both lie over ranks, got one that does not")
    if p.group.group_name != q.group.group_name:
        raise ValueError(f"{op}: q_logits must lie over the group of p_logits, got another group")
    if p.sizes != q.sizes:
        raise ValueError(f"{op}: q_logits must lie over ranks as p_logits do, by {p.sizes}, got {q.sizes}")
    agree(p, {"temperature": temperature, "q_dtype": q.logits.dtype}, q)
    numbers: Tensor = _KL.apply(p, temperature, *p.tensors, *q.tensors)
    return numbers


def expectation(
    h: ShardedHead,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """Σ_k softmax_k table[k] (..., E) and the logsumexp (...); `table` is this rank's tokens'."""
    row = {"temperature": temperature, "softcap": softcap, "exclude": exclude}
    agree(h, {**row, "width": table.shape[1]})
    result: tuple[Tensor, Tensor] = _Expectation.apply(h, *h.tensors, table, temperature, softcap, exclude)
    return result


def _once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """A backward pass on the backend of the forward one, differentiable no further.

    Where hidden states, which all ranks share, need gradients all ranks make it.
    """

    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.summed:
            with groups.agreement(f"{ctx.op} backward", ctx.group):
                pass
        with torch.no_grad(), as_asked(ctx.backend):
            results = backward(ctx, *grads)
        return hand_on(ctx.op, results, *ctx.saved_tensors, *grads)

    return run


def _remember(ctx: Any, h: ShardedHead, heads: dict[int, Tensor | None], *saved: Tensor | None) -> None:
    """`heads`: the inputs that are heads' first tensors, and their weights."""
    ctx.summed = any(w is not None and ctx.needs_input_grad[i] for i, w in heads.items())
    ctx.op, ctx.group, ctx.first, ctx.backend = h.op, h.group, h.first, _dispatch.asked_for()
    ctx.save_for_backward(*saved)


def _head_grads(
    ctx: Any, first_input: int, tensors: tuple[Tensor | None, ...], grads: tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """A head's gradients as inputs from `first_input` on have them."""
    logits, *rest = given(tensors, grads)
    if logits is not None and tensors[1] is not None and ctx.needs_input_grad[first_input]:
        logits = groups.total(reference.wide(logits), ctx.group).to(logits.dtype)
    return (logits, *rest)


def _zeros(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients of a rank that holds no token."""
    return tuple(torch.zeros(0) if x is None else torch.zeros_like(x) for x in tensors)


def _place(ids: Tensor, first: int, held: int) -> tuple[Tensor, Tensor]:
    """Which ids are among the tokens held, and their columns, 0 for others."""
    here = (ids >= first) & (ids < first + held)
    return here, torch.where(here, ids - first, 0)


def _column(exclude: int | None, first: int, held: int) -> int | None:
    return exclude - first if exclude is not None and first <= exclude < first + held else None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: ShardedHead,
        logits: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
        index: Tensor | None,
        shift: Tensor | None,
        softcap: float | None,
        exclude: int | None,
    ) -> Tensor:
        ignored = target < 0
        row = Row(index, shift, None, softcap, exclude)
        m = merged(h, row, target=target, skip=ignored)
        lse = m.logsumexp.masked_fill(m.invalid, torch.nan)
        at_index = torch.zeros_like(lse) if index is None else m.at_index - lse
        numbers = torch.stack([m.at_target - lse, at_index, lse]).masked_fill(ignored, 0)
        ctx.softcap, ctx.exclude = softcap, exclude
        _remember(ctx, h, {1: weight}, numbers, logits, weight, bias, target, index, shift)
        return numbers

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        numbers, logits, weight, bias, target, index, shift = ctx.saved_tensors
        held, head = vocab_size(logits, weight), (logits, weight, bias)
        if not held:
            return (None, *_head_grads(ctx, 1, head, _zeros(*head)), *[None] * 5)
        here, column = _place(target, ctx.first, held)
        at_target, at_index, at_lse = grad
        at_lse = at_lse - at_target - (0 if index is None else at_index)
        at_target, column = torch.where(here, at_target, 0), torch.where(target < 0, -1, column)
        if index is not None:
            here, index = _place(index, ctx.first, held)
            at_index = torch.where(here, at_index, 0)
            shift = None if shift is None else torch.where(here, shift, 0)
            at_lse = at_lse + at_index
        # A target or index of another rank's leaves its share of the logsumexp's gradient.
        grads = torch.ops.dlcore.categorical_log_probs_backward(
            torch.stack([at_target, at_index, at_lse + at_target]),
            *(numbers, *head, column, index, shift, ctx.softcap, _column(ctx.exclude, ctx.first, held)),
        )
        return (None, *_head_grads(ctx, 1, head, grads), *[None] * 5)


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: ShardedHead, temperature: Tensor | None, *heads: Tensor | None) -> Tensor:
        if h.held:
            own = torch.ops.dlcore.categorical_kl(*heads, temperature)
        else:
            own = torch.full((3, *h.lead), -torch.inf, dtype=torch.float64, device=h.logits.device)
        divergence, p_part, q_part = groups.gather(own, h.group).unbind(1)
        p_lse, q_lse = torch.logsumexp(p_part, 0), torch.logsumexp(q_part, 0)
        term = divergence + (p_part - p_lse) - (q_part - q_lse)
        # Where p has mass and a part of q none, KL is infinite; a part that p has nothing in costs nothing.
        term = term.masked_fill(torch.isneginf(q_part), torch.inf)
        mass = (p_part - p_lse).exp()
        term = torch.where(mass == 0, 0, mass * term).sum(0)
        nothing = torch.isneginf(p_lse) | ~torch.isfinite(q_lse)
        numbers = torch.stack([term.masked_fill(nothing, torch.nan), p_lse, q_lse])
        _remember(ctx, h, {2: heads[1], 5: heads[4]}, numbers, temperature, *heads)
        return numbers

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        numbers, temperature, *heads = ctx.saved_tensors
        if vocab_size(heads[0], heads[1]):
            grads = torch.ops.dlcore.categorical_kl_backward(grad, numbers, *heads, temperature)
        else:
            grads = _zeros(*heads)
        p, q = tuple(heads[:3]), tuple(heads[3:])
        return (None, None, *_head_grads(ctx, 2, p, grads[:3]), *_head_grads(ctx, 5, q, grads[3:]))


class _Expectation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: ShardedHead,
        logits: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        table: Tensor,
        temperature: Tensor | None,
        softcap: float | None,
        exclude: int | None,
    ) -> tuple[Tensor, Tensor]:
        if h.held:
            local = _column(exclude, h.first, h.held)
            own, part = torch.ops.dlcore.categorical_expectation(
                logits, weight, bias, table, temperature, softcap, local
            )
        else:
            own = logits.new_zeros((*h.lead, table.shape[1]), dtype=result_dtype(logits))
            part = torch.full(h.lead, -torch.inf, dtype=torch.float64, device=logits.device)
        lse = torch.logsumexp(groups.gather(part, h.group), 0)
        share = (part - lse).exp().to(own.dtype).unsqueeze(-1) * own
        mean = groups.total(share.masked_fill(torch.isneginf(part).unsqueeze(-1), 0), h.group)
        mean = mean.masked_fill(torch.isneginf(lse).unsqueeze(-1), torch.nan)
        ctx.softcap, ctx.exclude = softcap, exclude
        _remember(ctx, h, {1: weight}, mean, lse, logits, weight, bias, table, temperature)
        ctx.mark_non_differentiable(lse)
        return mean, lse

    @staticmethod
    @_once
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        mean, lse, logits, weight, bias, table, temperature = ctx.saved_tensors
        held, head = vocab_size(logits, weight), (logits, weight, bias)
        if held:
            grads = torch.ops.dlcore.categorical_expectation_backward(
                *(grad, mean, lse, *head, table, temperature, ctx.softcap),
                _column(ctx.exclude, ctx.first, held),
            )
        else:
            grads = _zeros(*head, table)
        return (None, *_head_grads(ctx, 1, head, grads[:3]), grads[3], None, None, None)
