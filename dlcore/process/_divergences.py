"""Divergences between rows of logits, and functions of a few dense rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dlcore import _checks as checks
from dlcore import categorical
from dlcore.linear_logits import LinearLogits
from dlcore.process import _rows as rows

Logits = Tensor | LinearLogits
KINDS = ("forward", "reverse", "total_variation")


def between(op: str, student: Logits, teacher: Logits, kind: str, exclude: int | None = None) -> Tensor:
    """`distill.divergence`, checked in the name of op."""
    h = rows.alike(op, one_dtype=True, student=student, teacher=teacher)
    checks.option(op, "kind", kind, KINDS)
    excluded(op, "exclude", exclude, h.vocab)
    teacher = detach(teacher)
    if kind == "total_variation":
        return total_variation(student, teacher, exclude)
    return kl(teacher, student, exclude) if kind == "forward" else kl(student, teacher, exclude)


def kl(p: Logits, q: Logits, exclude: int | None = None) -> Tensor:
    """KL(p‖q) per row, by one read of both; a dense column that is not the last is dropped chunk by chunk."""
    dense = isinstance(p, Tensor) or isinstance(q, Tensor)
    if dense and exclude is not None and exclude != p.shape[-1] - 1:
        return by_chunks(lambda a, b: categorical.kl(_drop(a, exclude), _drop(b, exclude)), (p, q))
    return categorical.kl(dropped(p, exclude), dropped(q, exclude))


def total_variation(p: Logits, q: Logits, exclude: int | None = None) -> Tensor:
    """½ Σ|p - q| per row."""

    def distance(p: Tensor, q: Tensor) -> Tensor:
        return rows.total_variation(*(torch.softmax(_drop(x, exclude), -1) for x in (p, q)))

    return by_chunks(distance, (p, q))


def excluded(op: str, name: str, token: int | None, vocab: int) -> None:
    """A token that may have probability 0: there is another one."""
    checks.token_id(op, name, token, vocab)
    if token is not None and vocab == 1:
        raise ValueError(f"{op}: {name} leaves no token in a vocabulary of 1")


def detach(logits: Logits) -> Logits:
    """The logits as constants."""
    if not isinstance(logits, LinearLogits):
        return rows.over(logits, Tensor.detach)
    bias = None if logits.bias is None else logits.bias.detach()
    return replace(logits, hidden=logits.hidden.detach(), weight=logits.weight.detach(), bias=bias)


def _drop(x: Tensor, token: int | None, dim: int = -1) -> Tensor:
    if token is None:
        return x
    before, after = x.narrow(dim, 0, token), x.narrow(dim, token + 1, x.shape[dim] - token - 1)
    return torch.cat([before, after], dim) if after.shape[dim] else before


def dropped(logits: Logits, token: int | None) -> Logits:
    """The logits without one token's column: a view if it is the last one."""
    if token is None:
        return logits
    rows.whole("divergence", logits)
    if isinstance(logits, Tensor):
        return _drop(logits, token)
    bias = None if logits.bias is None else _drop(logits.bias, token, 0)
    return LinearLogits(logits.hidden, _drop(logits.weight, token, 0), bias)


def by_chunks(function: Callable[..., Tensor], heads: tuple[Logits, ...], *numbers: Tensor) -> Tensor:
    """function(dense rows (n, V) of each head, numbers (n,)) -> (n,), few rows at a time, also backward."""
    lead, flat = heads[0].shape[:-1], [rows.flat(h) for h in heads]

    def part(at: slice) -> Tensor:
        dense = [rows.dense("divergence", rows.take(h, at)) for h in flat]
        return function(*dense, *(n.expand(lead).reshape(-1)[at] for n in numbers))

    parts = [
        cast(Tensor, checkpoint(part, at, use_reentrant=False, preserve_rng_state=False))
        for at in rows.chunks(lead.numel(), heads[0].shape[-1], rows.GRADIENT_CHUNK)
    ]
    return torch.cat(parts).reshape(lead)
