"""What the processes share: noise levels per row, keyed draws per row, and the coefficients of a kept row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import rng
from dlcore._tensors import broadcast, constants
from dlcore.categorical import Head, fresh_key, head
from dlcore.linear_logits import LinearLogits

PARAMETERIZATIONS = ("loo", "denoiser")
#: A noise level or another parameter per row: a number of Python's as it is, where torch would launch a
#: kernel for each operation.
Number = float | Tensor
#: The coefficients of `categorical.sample_mixture` that are 1, the others being 0, where z is kept unread.
KEEP = slice(0, 3, 2)


def tokens(op: str, name: str, x: Tensor, h: Head) -> None:
    """int64 ids in h's vocabulary, one per row of h."""
    checks.tokens(op, name, x, h.lead, h.logits.device)
    checks.token_range(op, name, x, h.vocab)


def mask_token(op: str, mask_id: int) -> None:
    """A token to mask with; -1 marks a broken row."""
    checks.integer(op, "mask_id", mask_id)
    if mask_id < 0:
        raise ValueError(f"{op}: mask_id must not be negative, got {mask_id}")


def masked(op: str, logits: Tensor | LinearLogits, z: Tensor, mask_id: int) -> Tensor:
    """Where z is masked, after checks of logits, z and mask_id."""
    h = head(op, logits)
    tokens(op, "z", z, h)
    checks.integer(op, "mask_id", mask_id)
    vocabulary(op, h.vocab, mask_id)
    return z == mask_id


def alike(op: str, *, one_dtype: bool = False, **logits: Tensor | LinearLogits) -> Head:
    """Heads over the same rows and tokens; the first."""
    first, like = next(iter(logits.items()))
    wanted = head(op, like, first)
    shape = (*wanted.lead, wanted.vocab)
    for name, other in logits.items():
        h = head(op, other, name)
        if (h.lead, h.vocab) != (wanted.lead, wanted.vocab):
            got = (*h.lead, h.vocab)
            raise ValueError(f"{op}: {name} must have the shape of {first} {shape}, got {got}")
        if one_dtype and h.logits.dtype != wanted.logits.dtype:
            got_dtype = f"{wanted.logits.dtype}, got {h.logits.dtype}"
            raise TypeError(f"{op}: {name} must have the dtype of {first} {got_dtype}")
        checks.on_device(op, name, h.logits, wanted.logits.device)
    return wanted


def positive(op: str, name: str, value: float | Tensor, lead: torch.Size, device: torch.device) -> Tensor:
    """A positive finite number per row: a temperature."""
    return checks.within(op, name, checks.number(op, name, value, lead, device), 0, torch.inf, "()")


def level(
    op: str, name: str, value: float | Tensor, lead: torch.Size, device: torch.device, ends: str = "[]"
) -> Tensor:
    """A probability per row: alpha, kappa."""
    return checks.within(op, name, checks.number(op, name, value, lead, device), 0, 1, ends)


def levels(
    op: str, alpha_t: float | Tensor, alpha_s: float | Tensor, lead: torch.Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """alpha_t and alpha_s of a reverse step from t to the earlier s, so alpha_s >= alpha_t."""
    t, s = level(op, "alpha_t", alpha_t, lead, device), level(op, "alpha_s", alpha_s, lead, device)
    _in_order(op, t, s)
    return t, s


def level_numbers(
    op: str, alpha_t: float | Tensor, alpha_s: float | Tensor, lead: torch.Size, device: torch.device
) -> tuple[Number, Number]:
    """The same, numbers of Python's as they are."""
    given = (("alpha_t", alpha_t), ("alpha_s", alpha_s))
    t, s = (checks.within(op, name, number(op, name, v, lead, device), 0, 1) for name, v in given)
    _in_order(op, t, s)
    return t, s


def _in_order(op: str, t: Number, s: Number) -> None:
    if isinstance(t, float) and isinstance(s, float) and t <= s:
        return
    if not all(checks.reads_data(x) for x in (t, s) if isinstance(x, Tensor)):
        return
    wrong = torch.as_tensor(s < t)
    if bool(wrong.any()):
        got_s, got_t = (
            checks.first(torch.as_tensor(x, dtype=torch.float64, device=wrong.device), wrong) for x in (s, t)
        )
        raise ValueError(
            f"{op}: alpha_s must be at least alpha_t, got alpha_s {got_s!r} below alpha_t {got_t!r}"
        )


def number(op: str, name: str, value: float | Tensor, lead: torch.Size, device: torch.device) -> Number:
    """A number per row, float64, broadcast over `lead` but not expanded; one of Python's as it is."""
    # A graph of torch.compile computes with tensors: it would be compiled for each number.
    if type(value) is float and not torch.compiler.is_compiling():
        return value
    return checks.number(op, name, value, lead, device)


def where(condition: bool | Tensor, x: Number, y: Number) -> Number:
    """torch.where, of numbers of Python's as well."""
    return torch.where(condition, x, y) if isinstance(condition, Tensor) else x if condition else y


def least(x: Number, y: Number) -> Number:
    """torch.minimum, of numbers of Python's as well."""
    if isinstance(x, Tensor):
        return torch.minimum(x, y) if isinstance(y, Tensor) else x.clamp(max=y)
    return y.clamp(max=x) if isinstance(y, Tensor) else min(x, y)


def slope(op: str, value: float | Tensor, lead: torch.Size, device: torch.device) -> Tensor:
    """dalpha = dα/dt <= 0 per row."""
    return checks.within(op, "dalpha", checks.number(op, "dalpha", value, lead, device), -torch.inf, 0, "(]")


def together(op: str, **values: float | Tensor | None) -> tuple[torch.Size, torch.device]:
    """The shape that the tensors among values broadcast to, and their device."""
    tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)}
    device = next((v.device for v in tensors.values()), torch.device("cpu"))
    try:
        shapes = (v.shape for v in tensors.values())
        return broadcast(*shapes), device
    except RuntimeError as error:
        got = ", ".join(f"{name} {tuple(v.shape)}" for name, v in tensors.items())
        raise ValueError(f"{op}: {', '.join(tensors)} must broadcast together, got {got}") from error


@overload
def ratio(alpha_t: Tensor, alpha_s: Tensor) -> Tensor: ...


@overload
def ratio(alpha_t: Number, alpha_s: Number) -> Number: ...


def ratio(alpha_t: Number, alpha_s: Number) -> Number:
    """alpha_{t|s} = alpha_t / alpha_s, and 1 where both are 0: nothing changes between two pure noises."""
    some = alpha_s > 0
    return where(some, alpha_t / where(some, alpha_s, 1.0), 1.0)


@overload
def largest_remask(alpha_t: Tensor, alpha_s: Tensor) -> Tensor: ...


@overload
def largest_remask(alpha_t: Number, alpha_s: Number) -> Number: ...


def largest_remask(alpha_t: Number, alpha_s: Number) -> Number:
    """σ_max = min(1, (1-α_s)/α_t): more would leave too few tokens for the marginal at s."""
    some = alpha_t > 0
    return where(some, least((1 - alpha_s) / where(some, alpha_t, 1.0), 1.0), 1.0)


def log_odds(alpha: Tensor, size: int) -> Tensor:
    """log c = log(size·α/(1-α)), for alpha below 1."""
    return alpha.log() + math.log(size) - torch.log1p(-alpha)


def log1p_scaled(x: Tensor) -> Tensor:
    """log1p(exp(x)); of log c + log p that is log1p(c·p)."""
    return torch.logaddexp(x, x.new_zeros(()))


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """torch.logaddexp whose gradient is 0, not NaN, where both are -inf."""
    empty = torch.isneginf(a) & torch.isneginf(b)
    return torch.logaddexp(torch.where(empty, 0, a), torch.where(empty, 0, b)).masked_fill(empty, -torch.inf)


def coefficients(*columns: Number, keep: bool | Tensor = False, device: torch.device | None = None) -> Tensor:
    """Columns stacked last, on `device` if none is a tensor; rows in `keep` keep z and are not read."""
    numbers = [c for c in columns if not isinstance(c, Tensor)]
    if len(numbers) == len(columns):
        return _of_numbers(numbers, keep, device)
    like = next(c for c in columns if isinstance(c, Tensor))
    whole = [c if isinstance(c, Tensor) else like.new_full((), c) for c in columns]
    if not isinstance(keep, Tensor):
        return torch.stack(torch.broadcast_tensors(*whole), -1)
    *shared, kept = torch.broadcast_tensors(*whole, keep)
    stacked = torch.stack(shared, -1).masked_fill(kept.unsqueeze(-1), 0)
    stacked[..., KEEP].masked_fill_(kept.unsqueeze(-1), 1)
    return stacked


def _of_numbers(columns: list[float], keep: bool | Tensor, device: torch.device | None) -> Tensor:
    """The same of numbers alone: one copy to the device."""
    kept = [float(i in range(len(columns))[KEEP]) for i in range(len(columns))]
    if isinstance(keep, Tensor):
        both = constants([*kept, *columns], torch.float64, keep.device).view(2, -1)
        return torch.where(keep.unsqueeze(-1), both[0], both[1])
    return constants(kept if keep else columns, torch.float64, device or torch.device("cpu"))


def column(token: int, like: Tensor) -> Tensor:
    """A token's index, for index_fill; filled on the device, where a copy would wait."""
    return torch.full((1,), token, device=like.device)


def vocabulary(op: str, vocab_size: int, exclude: int | None) -> int:
    """The number of tokens that noise may take."""
    checks.integer(op, "vocab_size", vocab_size)
    if vocab_size < 1:
        raise ValueError(f"{op}: vocab_size must be at least 1, got {vocab_size}")
    checks.token_id(op, "exclude", exclude, vocab_size)
    if exclude is not None and vocab_size == 1:
        raise ValueError(f"{op}: exclude leaves no token in a vocabulary of 1")
    return vocab_size - (exclude is not None)


def key(
    op: str, given: Tensor | None, generator: torch.Generator | None, logits: Tensor | LinearLogits
) -> Tensor:
    """The key as given, or a fresh one; where logits lie over ranks the same on all of them."""
    return fresh_key(op, given, generator, head(op, logits))


def row_keys(
    op: str,
    key: Tensor | None,
    generator: torch.Generator | None,
    lead: torch.Size,
    device: torch.device,
    logits: Tensor | LinearLogits | None = None,
) -> Tensor:
    """One key per row (*lead, 2): a shared key is folded with the flattened row, so chunked calls agree.

    Where `logits` lie over ranks, a fresh key is the same on all of them.
    """
    if key is None and logits is not None:
        key = fresh_key(op, key, generator, head(op, logits))
    else:
        key = checks.key(op, key, generator, lead)
    return rng.row_keys(key.to(device), lead)


def uniforms(keys: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` float64 uniform numbers in (0, 1) per row, each of the rows' shape."""
    return rng.uniform(keys, (count,), dtype=torch.float64).unbind(-1)


def uniform_tokens(u: Tensor, size: int, exclude: int | None) -> Tensor:
    """Of `size` noise tokens, the one that u in [0, 1) falls to; biased by less than size / 2^53."""
    return expand_ids((u * size).long(), exclude)


def expand_ids(index: Tensor, exclude: int | None) -> Tensor:
    """The index-th token that is not `exclude`."""
    return index if exclude is None else index + (index >= exclude).long()


def compact_ids(token: Tensor, exclude: int | None) -> Tensor:
    """The inverse of `expand_ids`."""
    return token if exclude is None else token - (token > exclude).long()


def dense(op: str, logits: Tensor | LinearLogits, name: str = "logits") -> Tensor:
    """Logits (..., V) in float32 or wider, a linear head's multiplied out."""
    whole(op, logits, name)
    if isinstance(logits, LinearLogits):
        return logits.materialize()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def whole(op: str, logits: Tensor | LinearLogits, name: str = "logits") -> None:
    """Logits whose columns are all here: those over ranks refuse to be split into tensors."""
    tuple(head(op, logits, name))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x (..., V) at index (...)."""
    return x.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def point(like: Tensor, z: Tensor) -> Tensor:
    """log of the point mass at z, in the shape of `like`."""
    return torch.full_like(like, -torch.inf).scatter(-1, z.unsqueeze(-1), 0)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """½ Σ|p - q| of two laws (..., V)."""
    return (p - q).abs().sum(-1) / 2


def without(op: str, logits: Tensor | LinearLogits, exclude: int | None, name: str = "logits") -> Tensor:
    """Dense logits with -inf at `exclude`."""
    x = dense(op, logits, name)
    return x if exclude is None else x.index_fill(-1, column(exclude, x), -torch.inf)


def over(logits: Tensor | LinearLogits, change: Callable[[Tensor], Tensor]) -> Tensor | LinearLogits:
    """The logits after a change of their rows alone."""
    if isinstance(logits, Tensor):
        return change(logits)
    if isinstance(logits, LinearLogits):
        return replace(logits, hidden=change(logits.hidden))
    # Of logits over ranks their columns here.
    return replace(logits, logits=change(logits.logits))


def take(logits: Tensor | LinearLogits, index: tuple[Tensor | slice, ...] | slice) -> Tensor | LinearLogits:
    """Rows of logits, by an index into their leading dimensions."""
    return over(logits, lambda x: x[index])


def flat(logits: Tensor | LinearLogits) -> Tensor | LinearLogits:
    """Logits with one leading dimension."""
    return over(logits, lambda x: x.reshape(x.shape[:-1].numel(), x.shape[-1]))


#: Entries of the dense rows that a pass of several operations holds at once: 4 MiB of float32.
CHUNK = 2**20


#: The same where there is a backward pass: each chunk then adds a gradient of the weight's size.
GRADIENT_CHUNK = 2**22


def chunks(count: int, vocab: int, entries: int | None = None) -> Iterator[slice]:
    """Slices of rows that together hold about so many entries, CHUNK if None; an empty one for no rows."""
    size = max(1, (CHUNK if entries is None else entries) // vocab)
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))
