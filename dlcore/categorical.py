"""Row statistics, draws and losses of softmax over the last dimension: one read of the logits each.

Throughout: logits is a Tensor (..., V) or a LinearLogits, and may lie over ranks (see `dlcore.distributed`);
``float | Tensor`` parameters broadcast to the leading dimensions; logs are natural. A row with NaN, +inf or
nothing but -inf gives token -1 and NaN numbers; ties go to the lowest id. Bad shapes and values raise
ValueError, bad dtypes TypeError.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import _registry  # noqa: F401  (stands the backends behind the ops)
from dlcore._beside import beside, keys_beside
from dlcore.linear_logits import LinearLogits

if TYPE_CHECKING:
    from dlcore.distributed.heads import ShardedHead

P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "Draw",
    "Stats",
    "cross_entropy",
    "expectation",
    "kl",
    "sample",
    "sample_expectation",
    "sample_mixture",
    "stats",
]


class Stats(NamedTuple):
    """What one read of a row tells. argmax is int64, all else float32, each of the leading shape."""

    logsumexp: Tensor
    argmax: Tensor
    argmax_logprob: Tensor
    margin: Tensor
    entropy: Tensor
    index_logprob: Tensor | None


class Draw:
    """A draw: `tokens` int64, `logprob`, their log-probability before truncation, and the row's `stats`.

    All three are views of what one call returned, made when asked for.
    """

    __slots__ = ("_has_index", "_numbers", "_tokens")

    def __init__(self, tokens: Tensor, numbers: Tensor, has_index: bool) -> None:
        self._tokens, self._numbers, self._has_index = tokens, numbers, has_index

    def __iter__(self) -> Iterator[Tensor | Stats]:
        return iter((self.tokens, self.logprob, self.stats))

    def __repr__(self) -> str:
        return f"Draw(tokens={self.tokens}, logprob={self.logprob}, stats={self.stats})"

    @property
    def tokens(self) -> Tensor:
        """(...) int64."""
        return self._tokens[0]

    @property
    def logprob(self) -> Tensor:
        """(...) float32, nats."""
        return self._numbers[6]

    @property
    def stats(self) -> Stats:
        """The statistics of the rows that were drawn from."""
        return _stats(self._tokens[1], self._numbers, self._has_index)


class Head(NamedTuple):
    """Logits as ops take them: dense (weight None) or a linear head's hidden, weight and bias."""

    logits: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @property
    def lead(self) -> torch.Size:
        return self.logits.shape[:-1]

    @property
    def vocab(self) -> int:
        return self.logits.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def held(self) -> int:
        """How many tokens are held here: fewer than `vocab` where it lies over ranks."""
        return self.vocab


def head(op: str, logits: Tensor | LinearLogits, name: str = "logits") -> Head:
    """Check logits and split them into the tensors that ops take.

    For logits over ranks a `ShardedHead` stands in, which has all that a Head has but can't be split.
    """
    if type(logits) is not Tensor and (getattr(logits, "group", None) or hasattr(logits, "placements")):
        from dlcore.distributed import heads

        found = heads.head(op, logits, name)
        if found is not None:
            return cast(Head, found)
    if isinstance(logits, LinearLogits):
        if logits.weight.shape[0] < 1:
            raise ValueError(f"{op}: {name} must have a vocabulary of at least 1, got weight of 0 rows")
        return Head(logits.hidden, logits.weight, logits.bias)
    checks.floating(op, name, logits)
    return Head(logits, None, None)


def heard(function: Callable[P, T]) -> Callable[P, T]:
    """Where logits lie over ranks, under DLCORE_CHECK=1 all hear of what the call is refused for on one."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError, NotImplementedError) as error:
            if os.environ.get("DLCORE_CHECK") == "1" and "dlcore.distributed" in sys.modules:
                from dlcore.distributed import heads

                heads.refused(function.__name__, error, (*args, *kwargs.values()))
            raise

    return run


def _run(name: str, h: Head, *args: Any) -> Any:
    """The op of that name, or what stands for it where the vocabulary lies over ranks."""
    if type(h) is Head:
        return getattr(torch.ops.dlcore, "categorical_" + name)(*h, *args)
    from dlcore.distributed import categorical as sharded

    return sharded.run(getattr(sharded, name), h, *args)


def fresh_key(op: str, key: Tensor | None, generator: torch.Generator | None, h: Head) -> Tensor:
    """The key as given, or a fresh one from torch's generator, on every rank the same."""
    if type(h) is Head:
        return checks.key(op, key, generator, h.lead, h.logits.device)
    from dlcore.distributed import heads

    return heads.shared_key(op, key, generator, cast("ShardedHead", h))


def _ids(op: str, name: str, ids: Any, h: Head) -> Any:
    """Token ids as they are; beside logits over ranks a DTensor's own part, which must be all of it."""
    if type(h) is Head or ids is None:
        return ids
    from dlcore.distributed.logits import replicated

    return replicated(op, name, ids)


def _softcap(op: str, value: float | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: softcap must be a number or None, got {checks.describe(value)}")
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= value <= limits.max:
        raise ValueError(f"{op}: softcap must be positive and finite, got {checks.describe(value)}")


def _exclude(op: str, value: int | None, h: Head) -> None:
    if value is None:
        return
    checks.token_id(op, "exclude", value, h.vocab)
    if h.vocab == 1:
        raise ValueError(f"{op}: exclude leaves no token in a vocabulary of 1")


def _index(op: str, name: str, index: Tensor | None, shift: float | Tensor | None, h: Head) -> None:
    if index is not None:
        checks.tokens(op, name, index, h.lead, h.logits.device)
    elif shift is not None:
        raise ValueError(f"{op}: shift needs {name}, the token whose logit it is added to")


def _stats(argmax: Tensor, numbers: Tensor, has_index: bool) -> Stats:
    lse, top, margin, entropy, at = numbers.unbind(0)[:5]
    return Stats(lse, argmax, top, margin, entropy, at if has_index else None)


@heard
def row_numbers(
    op: str,
    logits: Tensor | LinearLogits,
    index: Tensor | None,
    shift: float | Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    exclude: int | None,
) -> tuple[Tensor, Tensor]:
    """argmax and the six numbers of `stats`, the runner-up's log-probability last."""
    h = head(op, logits)
    index = _ids(op, "index", index, h)
    _index(op, "index", index, shift, h)
    _softcap(op, softcap)
    _exclude(op, exclude, h)
    device = h.logits.device
    result: tuple[Tensor, Tensor] = _run(
        "stats",
        h,
        index,
        checks.per_row(op, "shift", shift, h.lead, device),
        _temperature(op, temperature, h),
        softcap,
        exclude,
    )
    return result


def _temperature(op: str, temperature: float | Tensor, h: Head) -> Tensor | None:
    if not torch.compiler.is_compiling() and isinstance(temperature, float) and temperature == 1.0:
        return None
    if temperature is None:
        raise TypeError(f"{op}: temperature must be a number or a Tensor, got NoneType None")
    return checks.per_row(op, "temperature", temperature, h.lead, h.logits.device)


def stats(
    logits: Tensor | LinearLogits,
    index: Tensor | None = None,
    *,
    shift: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    exclude: int | None = None,
) -> Stats:
    """Log-sum-exp, argmax, its log-probability, margin p1 - p2, entropy (nats) and the entry at `index`.

    All under softmax((softcap(logits) + shift·1[index]) / temperature), token `exclude` at probability 0,
    with softcap(a) = softcap·tanh(a / softcap). Not differentiable.

    Args:
        logits: (..., V).
        index: (...) int64 token ids to read the log-probability of.
        shift: added to the one logit at `index`, before the temperature.
        temperature: positive.
        softcap: positive, or None.
        exclude: a token id that has probability 0.

    Example:
        >>> import torch, dlcore
        >>> s = dlcore.categorical.stats(torch.zeros(2, 4))
        >>> s.entropy
        tensor([1.3863, 1.3863])
    """
    argmax, numbers = row_numbers("categorical.stats", logits, index, shift, temperature, softcap, exclude)
    return _stats(argmax, numbers, index is not None)


@heard
def sample(
    logits: Tensor | LinearLogits,
    index: Tensor | None = None,
    *,
    shift: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    exclude: int | None = None,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Draw:
    """Draw one token per row, with the statistics of `stats` from the same read.

    The draw is a two-level Gumbel-max whose winning tail is exact: an event of probability 1e-12 occurs as
    often as it should. Truncation keeps the top_k largest, of these the fewest that reach probability
    top_p (the token that crosses it is kept), of these the ones with at least min_p times the largest
    probability. Statistics and logprob are those before truncation.

    Args:
        logits, index, shift, softcap, exclude: as in `stats`.
        temperature: non-negative. At 0 the token is the argmax, and the statistics are those of
            temperature 1, so that confidences do not saturate.
        top_k: at least 1. top_p, min_p: in [0, 1].
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Example:
        >>> import torch, dlcore
        >>> draw = dlcore.categorical.sample(torch.randn(2, 3, 1000), temperature=0.8, key=dlcore.rng.key(7))
        >>> draw.tokens.shape, draw.stats.entropy.shape
        (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    op = "categorical.sample"
    h = head(op, logits)
    index = _ids(op, "index", index, h)
    _index(op, "index", index, shift, h)
    _softcap(op, softcap)
    _exclude(op, exclude, h)
    lead, device = h.lead, h.logits.device
    tokens, numbers = _run(
        "sample",
        h,
        index,
        checks.per_row(op, "shift", shift, lead, device),
        _temperature(op, temperature, h),
        softcap,
        exclude,
        checks.per_row(op, "top_k", top_k, lead, device, torch.int64),
        checks.per_row(op, "top_p", top_p, lead, device),
        checks.per_row(op, "min_p", min_p, lead, device),
        keys_beside(h.logits, fresh_key(op, key, generator, h), h.lead),
    )
    return Draw(tokens, numbers, index is not None)


@heard
def sample_mixture(
    logits: Tensor | LinearLogits,
    z: Tensor,
    coefficients: Tensor,
    *,
    prior: str | int = "uniform",
    shift: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep z, take a draw from softmax, or take the prior: the reverse step of every discrete diffusion.

    With p = softmax((softcap(logits) + shift·1[z]) / temperature) and den = d0 + d1·p(z): keep z with
    probability (k0 + k1·p(z)) / den, take a draw from p with (p0 + p1·p(z)) / den, else the prior.
    A row whose outcome does not depend on its logits is not read; where den is 0, z is kept.

    Args:
        logits: (..., V).
        z: (...) int64 observed tokens.
        coefficients: (..., 6) = (d0, d1, k0, k1, p0, p1), broadcast over the leading dimensions; float64
            keeps the three probabilities summing to one exactly.
        prior: "uniform" (over V, without `exclude`) or a token id.
        shift: added to the logit at z. Others as in `sample`.

    Example:
        >>> import torch, dlcore
        >>> z = torch.zeros(2, 3, dtype=torch.int64)
        >>> half = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.5, 0.0])
        >>> dlcore.categorical.sample_mixture(torch.randn(2, 3, 1000), z, half).shape
        torch.Size([2, 3])
    """
    op = "categorical.sample_mixture"
    h = head(op, logits)
    device = h.logits.device
    z = _ids(op, "z", z, h)
    checks.tokens(op, "z", z, h.lead, device)
    _softcap(op, softcap)
    _exclude(op, exclude, h)
    if prior is None:
        raise TypeError(f"{op}: prior must be 'uniform' or an int, a token id, got NoneType None")
    if prior != "uniform":
        if isinstance(prior, str):
            raise ValueError(f"{op}: prior must be 'uniform' or a token id, got {prior!r}")
        checks.token_id(op, "prior", prior, h.vocab)
    if not isinstance(coefficients, Tensor) or coefficients.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: coefficients must be float32 or float64, got {checks.describe(coefficients)}")
    wanted = torch.Size((*h.lead, 6))
    if coefficients.shape[-1:] != (6,):
        raise ValueError(
            f"{op}: coefficients must have shape {tuple(wanted)}, got {tuple(coefficients.shape)}"
        )
    expanded = checks.per_row(op, "coefficients", coefficients, wanted, device, torch.float64)
    assert expanded is not None
    result: Tensor = _run(
        "sample_mixture",
        h,
        z,
        beside(h.logits, expanded),
        -1 if isinstance(prior, str) else prior,
        checks.per_row(op, "shift", shift, h.lead, device),
        _temperature(op, temperature, h),
        softcap,
        exclude,
        keys_beside(h.logits, fresh_key(op, key, generator, h), h.lead),
    )
    return result


@heard
def log_probs(
    op: str,
    logits: Tensor | LinearLogits,
    target: Tensor,
    *,
    index: Tensor | None = None,
    shift: Tensor | None = None,
    softcap: float | None = None,
    exclude: int | None = None,
    target_name: str = "target",
) -> Tensor:
    """(3, ...): log p[target], log p[index], logsumexp, with a shift at `index`; 0 where target < 0."""
    h = head(op, logits)
    target, index = _ids(op, target_name, target, h), _ids(op, "z", index, h)
    checks.tokens(op, target_name, target, h.lead, h.logits.device)
    _index(op, "z", index, shift, h)
    _softcap(op, softcap)
    _exclude(op, exclude, h)
    result: Tensor = _run("log_probs", h, target, index, shift, softcap, exclude)
    return result if h.logits.dtype == torch.float64 else result.float()


@heard
def cross_entropy(
    logits: Tensor | LinearLogits,
    target: Tensor,
    *,
    softcap: float | None = None,
    exclude: int | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """-log softmax(softcap(logits))[target] in nats, (...); 0 where target is `ignore_index`.

    Differentiable, once, in logits (or hidden, weight and bias); the softmax is recomputed, never kept.
    Rows that are ignored are not read.

    Args:
        logits: (..., V).
        target: (...) int64.
        softcap, exclude: as in `stats`.

    Example:
        >>> import torch, dlcore
        >>> dlcore.categorical.cross_entropy(torch.zeros(2, 4), torch.tensor([1, -100]))
        tensor([1.3863, 0.0000])
    """
    op = "categorical.cross_entropy"
    h = head(op, logits)
    target = _ids(op, "target", target, h)
    checks.tokens(op, "target", target, h.lead, h.logits.device)
    checks.integer(op, "ignore_index", ignore_index)
    ignored = target == ignore_index
    if checks.reads_data(target):
        checks.token_range(op, "target", target.masked_fill(ignored, 0), h.vocab)
    read = target.masked_fill(ignored, -1)
    # A difference, as the negative of what an ignored row has would be -0.
    return 0 - log_probs(op, logits, read, softcap=softcap, exclude=exclude)[0]


@heard
def kl(
    p_logits: Tensor | LinearLogits, q_logits: Tensor | LinearLogits, *, temperature: float | Tensor = 1.0
) -> Tensor:
    """KL(softmax(p/temperature) || softmax(q/temperature)) in nats, (...); differentiable, once, in both.

    Example:
        >>> import torch, dlcore
        >>> dlcore.categorical.kl(torch.zeros(2, 4), torch.zeros(2, 4))
        tensor([0., 0.])
    """
    op = "categorical.kl"
    p, q = head(op, p_logits, "p_logits"), head(op, q_logits, "q_logits")
    if p.logits.dtype != q.logits.dtype:
        raise TypeError(f"{op}: q_logits must have p_logits' dtype {p.logits.dtype}, got {q.logits.dtype}")
    if (p.lead, p.vocab) != (q.lead, q.vocab):
        raise ValueError(
            f"{op}: q_logits must have p_logits' shape {(*p.lead, p.vocab)}, got {(*q.lead, q.vocab)}"
        )
    checks.on_device(op, "q_logits", q.logits, p.logits.device)
    scale = _temperature(op, temperature, p)
    if type(p) is Head and type(q) is Head:
        numbers: Tensor = torch.ops.dlcore.categorical_kl(*p, *q, scale)
    else:
        from dlcore.distributed import categorical as sharded

        numbers = sharded.run(sharded.kl, p, q, scale)
    result = numbers[0]
    return result.to(torch.promote_types(p.logits.dtype, torch.float32))


@heard
def expectation(
    logits: Tensor | LinearLogits,
    table: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    exclude: int | None = None,
) -> Tensor:
    """Σ_k softmax_k · table[k]: the soft embedding, (..., E), without the softmax ever existing.

    Differentiable, once, in logits (or hidden, weight and bias) and in table. Sums are float32. On a GPU a
    table of half precision is multiplied by probabilities, and by gradients, rounded to its dtype, as
    attention does it: the matrix units take no others.

    Args:
        logits: (..., V).
        table: (V, E), floating.
        temperature: positive. softcap, exclude: as in `stats`.

    Example:
        >>> import torch, dlcore
        >>> dlcore.categorical.expectation(torch.zeros(2, 4), torch.eye(4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    h, table = _with_table("categorical.expectation", logits, table, softcap, exclude)
    result: Tensor = _run(
        "expectation", h, table, _temperature("categorical.expectation", temperature, h), softcap, exclude
    )[0]
    return result


@heard
def sample_expectation(
    logits: Tensor | LinearLogits,
    table: Tensor,
    index: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    exclude: int | None = None,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Draw, Tensor]:
    """The draw of `sample` and the soft embedding of `expectation` from one sweep over the vocabulary.

    A whole step of a language model that feeds its own soft embedding back (DiffusionGemma's
    self-conditioning, flow language models): each logit is computed once, and none is kept. The draw equals
    that of `sample` under the same key. The soft embedding (..., E) is differentiable, once, in logits (or
    hidden, weight and bias) and in table; the draw is not.

    Args:
        logits: (..., V).
        table: (V, E), floating; with tied embeddings the very weight of the logits.
        temperature: positive, for both. index, softcap, exclude: as in `stats`.
        key: int64 (2,) or one per row (..., 2), see `dlcore.rng`; else drawn from `generator` or torch's own.

    Example:
        >>> import torch, dlcore
        >>> embeddings = torch.randn(1000, 16)
        >>> logits = dlcore.LinearLogits(torch.randn(2, 3, 16), embeddings)
        >>> draw, soft = dlcore.categorical.sample_expectation(logits, embeddings, key=dlcore.rng.key(7))
        >>> draw.tokens.shape, draw.stats.entropy.shape, soft.shape
        (torch.Size([2, 3]), torch.Size([2, 3]), torch.Size([2, 3, 16]))
    """
    op = "categorical.sample_expectation"
    h, table = _with_table(op, logits, table, softcap, exclude)
    index = _ids(op, "index", index, h)
    _index(op, "index", index, None, h)
    mean, _, tokens, numbers = _run(
        "sample_expectation",
        h,
        table,
        _temperature(op, temperature, h),
        softcap,
        exclude,
        index,
        keys_beside(h.logits, fresh_key(op, key, generator, h), h.lead),
    )
    return Draw(tokens, numbers, index is not None), mean


def _with_table(
    op: str, logits: Tensor | LinearLogits, table: Tensor, softcap: float | None, exclude: int | None
) -> tuple[Head, Tensor]:
    """Check logits and the table that they weigh."""
    h = head(op, logits)
    if type(h) is not Head:
        from dlcore.distributed import heads

        table = heads.table(op, table, cast("ShardedHead", h))
    checks.floating(op, "table", table)
    if table.dim() != 2 or table.shape[0] != h.held:
        raise ValueError(f"{op}: table must be ({h.held}, E), got {tuple(table.shape)}")
    if table.dtype == torch.float64 != h.logits.dtype:
        raise TypeError(f"{op}: table may be float64 only where logits are, got logits of {h.logits.dtype}")
    checks.on_device(op, "table", table, h.logits.device)
    _softcap(op, softcap)
    _exclude(op, exclude, h)
    return h, table
