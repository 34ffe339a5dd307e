"""dlcore.categorical's ops over a vocabulary that lies over ranks: they take a ShardedHead for the head.

A call sends one small message a rank and row, of numbers that `categorical.summary` gives; every rank merges
all of them alike. Noise belongs to the whole vocabulary's token ids, so the tokens are those of the unsharded
call, but where two scores differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlcore._ops.declare import result_dtype
from dlcore.distributed import truncation
from dlcore.distributed.heads import ShardedHead, agree
from dlcore.distributed.losses import expectation, kl, log_probs
from dlcore.distributed.summaries import Merged, Row, merged
from dlcore.reference import categorical as reference

__all__ = ["expectation", "kl", "log_probs", "sample", "sample_expectation", "sample_mixture", "stats"]


def run(function: Callable[..., Any], *args: Any) -> Any:
    """One of these functions, in its own precision."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return function(*args)


def _numbers(m: Merged, has_index: bool, dtype: torch.dtype) -> Tensor:
    """The six numbers of `stats`."""
    lse = m.logsumexp
    rest = m.second - lse
    margin = -torch.expm1(m.second - m.largest) / m.sum
    entropy = m.sum.log() - m.weighted / m.sum
    at = m.at_index - lse if has_index else torch.full_like(lse, torch.nan)
    numbers = torch.stack([lse, m.largest - lse, margin, entropy, at, rest])
    return numbers.masked_fill(m.invalid, torch.nan).to(dtype)


def stats(
    h: ShardedHead,
    index: Tensor | None,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """argmax (...) and its six numbers (6, ...)."""
    row = Row(index, shift, temperature, softcap, exclude)
    agree(h, vars(row))
    m = merged(h, row)
    return m.argmax.masked_fill(m.invalid, -1), _numbers(m, index is not None, result_dtype(h.logits))


def sample(
    h: ShardedHead,
    index: Tensor | None,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    key: Tensor,
) -> tuple[Tensor, Tensor]:
    """tokens (2, ...): drawn, argmax; numbers (7, ...)."""
    row, limits = Row(index, shift, temperature, softcap, exclude), truncation.Limits(top_k, top_p, min_p)
    agree(
        *(h, {**vars(row), **limits._asdict(), "key": key}),
        greedy=True,
        refuses=truncation.refuses(h, limits),
    )
    limits = truncation.limiting(limits)
    if all(limit is None for limit in limits):
        m = merged(h, row, key=key)
        tokens, logit = m.draw, m.draw_logit
    else:
        m = merged(h, row)
        tokens, logit = truncation.draw(h, row, limits, m, key)
    if temperature is not None:
        tokens = torch.where(temperature == 0, m.argmax, tokens)
        logit = torch.where(temperature == 0, m.largest, logit)
    dtype = result_dtype(h.logits)
    logprob = (logit - m.logsumexp).masked_fill(m.invalid, torch.nan).to(dtype)
    return (
        torch.stack([tokens, m.argmax]).masked_fill(m.invalid, -1),
        torch.cat([_numbers(m, index is not None, dtype), logprob.unsqueeze(0)]),
    )


def sample_mixture(
    h: ShardedHead,
    z: Tensor,
    coefficients: Tensor,
    prior: int,
    shift: Tensor | None,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    key: Tensor,
) -> Tensor:
    """Tokens (...); rows that are settled without their logits are not read."""
    row = Row(z, shift, temperature, softcap, exclude)
    facts = {**vars(row), "coefficients": coefficients, "prior": prior, "key": key}
    agree(h, facts, index="z", greedy=True)
    m = merged(h, row, skip=reference.settled(coefficients, key, h.lead), key=key)
    tokens, p_z = m.draw, (m.at_index - m.logsumexp).exp()
    if temperature is not None:
        tokens = torch.where(temperature == 0, m.argmax, tokens)
        p_z = torch.where(temperature == 0, (m.argmax == z).double(), p_z)
    return reference.mix(z, coefficients, prior, h.vocab, exclude, key, tokens, p_z, m.invalid)


def sample_expectation(
    h: ShardedHead,
    table: Tensor,
    temperature: Tensor | None,
    softcap: float | None,
    exclude: int | None,
    index: Tensor | None,
    key: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`expectation`'s mean and logsumexp, `sample`'s tokens and numbers, by a read each."""
    mean, lse = expectation(h, table, temperature, softcap, exclude)
    with torch.no_grad():
        drawn = sample(h, index, None, temperature, softcap, exclude, None, None, None, key)
    return mean, lse, *drawn
