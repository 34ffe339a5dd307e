"""Sharding rules: dlcore's ops on DTensors whose rows (batch, sequence, heads) are spread over a mesh.

Each rank runs the op on its own rows; nothing is gathered. Rows are independent, so a rule says only which
dimensions of each argument and result are rows. What many rows share (a head's weight, a table) is
replicated, and its gradient a sum over the ranks (Partial). An op has no rule for rows that are themselves
cut (a vocabulary, a head dimension) and refuses them: `dlcore.distributed` merges such parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from dlcore import _ops

Placements = list[Placement | None]

#: Where a rank's rows are summed, and where nothing of a row is.
SUM, WHOLE = "sum", "whole"


class Rule(NamedTuple):
    """An op over rows.

    Args:
        rows: argument -> how many of its dimensions come before those of the rows, and how many after; they
            may broadcast. The first has all of them. Other arguments are the same for all rows.
        results: for each how many dimensions come before those of the rows, or SUM.
    """

    rows: dict[str, tuple[int, int]]
    results: tuple[int | str, ...]


PER_ROW, ROW, NUMBERS = (0, 0), (0, 1), (1, 0)

_HEAD = {"logits": ROW, "temperature": PER_ROW, "shift": PER_ROW, "index": PER_ROW, "key": ROW}
_HEADS = {"p_logits": ROW, "q_logits": ROW, "temperature": PER_ROW}
_LOG_PROBS = {"logits": ROW, "target": PER_ROW, "index": PER_ROW, "shift": PER_ROW}
_GUIDED = {"cond": ROW, "uncond": ROW, "z": PER_ROW, "coefficients": ROW, "key": ROW}
_EXPECTATION = {"logits": ROW, "temperature": PER_ROW}
_NELBO = {"logits": ROW, **dict.fromkeys(("z", "x", "alpha", "dalpha", "shift"), PER_ROW)}
_VELOCITY = {"logits": ROW, "x": ROW, "kappa": PER_ROW}
_CORRECT = {"x": ROW, "score": ROW, "step_size": PER_ROW, "key": ROW}
_BITS = {"x": ROW, "residual": ROW, "bits": ROW, "slope": ROW}
_SAVED = {"numbers": NUMBERS, "saved": NUMBERS, "output": ROW, "logsumexp": PER_ROW, "along": PER_ROW}
_GRAD, _GRAD_OF_ROWS, _GRAD_OF_NUMBERS = {"grad": PER_ROW}, {"grad": ROW}, {"grad": NUMBERS}

RULES: dict[str, Rule] = {
    "categorical.stats": Rule(_HEAD, (0, 1)),
    "categorical.sample": Rule(_HEAD | dict.fromkeys(("top_k", "top_p", "min_p"), PER_ROW), (1, 1)),
    "categorical.sample_mixture": Rule(_HEAD | {"z": PER_ROW, "coefficients": ROW}, (0,)),
    "categorical.log_probs": Rule(_LOG_PROBS, (1,)),
    "categorical.log_probs_backward": Rule(_LOG_PROBS | _SAVED | _GRAD_OF_NUMBERS, (0, SUM, SUM)),
    "categorical.kl": Rule(_HEADS, (1,)),
    "categorical.kl_backward": Rule(_HEADS | _SAVED | _GRAD_OF_NUMBERS, (0, SUM, SUM, 0, SUM, SUM)),
    "categorical.expectation": Rule(_EXPECTATION, (0, 0)),
    "categorical.expectation_backward": Rule(_EXPECTATION | _SAVED | _GRAD_OF_ROWS, (0, SUM, SUM, SUM)),
    "categorical.sample_expectation": Rule(_HEAD, (0, 0, 1, 1)),
    "guidance.cfg_uniform_step": Rule(_GUIDED, (0,)),
    "uniform.nelbo": Rule(_NELBO, (0, 1)),
    "uniform.nelbo_backward": Rule(_NELBO | _SAVED | _GRAD, (0, SUM, SUM)),
    "sphere.velocity": Rule(_VELOCITY, (0, 0, 0)),
    "sphere.velocity_backward": Rule(_VELOCITY | _SAVED | _GRAD_OF_ROWS, (0, SUM, SUM, 0, SUM)),
    "sphere.largest": Rule({"logits": ROW}, (0,)),
    "sphere.step": Rule({"x": ROW, "v": ROW, "t": PER_ROW}, (0,)),
    "sphere.sample": Rule({"mean": ROW, "kappa": PER_ROW, "key": ROW}, (0,)),
    "sphere.correct": Rule(_CORRECT, (0,)),
    "sphere.correct_backward": Rule(_CORRECT | _GRAD_OF_ROWS, (0, 0, 0)),
    "bits.encode": Rule({"tokens": PER_ROW}, (0,)),
    "bits.decode": Rule({"x": ROW}, (0,)),
    "bits.step": Rule(_BITS | {"coefficients": (1, 1), "key": ROW}, (0, 0)),
    "bits.perturb": Rule({"x": ROW, "spread": ROW, "key": ROW}, (0,)),
    "bits.matched_filter": Rule(dict.fromkeys(_BITS, PER_ROW), (0,)),
    "bits.posterior": Rule(dict.fromkeys(_BITS, PER_ROW), (0,)),
    "bits.loss": Rule(_BITS, (0,)),
    "bits.loss_backward": Rule(_BITS | _GRAD, (0, 0)),
    "rng.fold_in": Rule({"key": ROW, "data": PER_ROW}, (0,)),
    **{f"rng.{name}": Rule({"key": ROW}, (0,)) for name in ("uniform", "normal", "gumbel")},
}
for _name, _arguments in _ops.sphere.MAPS.items():
    _rows = {argument: PER_ROW if argument == "t" else ROW for argument in _arguments}
    _grad = _GRAD if _name == "angle" else _GRAD_OF_ROWS
    RULES[f"sphere.{_name}"] = Rule(_rows, (0,))
    RULES[f"sphere.{_name}_backward"] = Rule(_rows | _grad, (0,) * len(_arguments))


def _by_name(op: str, args: Sequence[Any]) -> dict[str, Any]:
    """Arguments by name; DTensor's stand-ins for tensors have shape, placements and mesh."""
    names = [a.name for a in _overload(op)._schema.arguments]
    return dict(zip(names, (*args, *[None] * (len(names) - len(args))), strict=True))


def _is_tensor(x: Any) -> bool:
    return hasattr(x, "placements")


def _own_dim(shape: Sequence[int], before: int, after: int, lead: Sequence[int], dim: int) -> int | None:
    """The dimension of a tensor that is dimension `dim` of the rows, unless it broadcasts there."""
    rows = shape[before : len(shape) - after]
    own = dim - (len(lead) - len(rows))
    return before + own if own >= 0 and (rows[own] != 1 or lead[dim] == 1) else None


def _shardings(op: str, rule: Rule, *args: Any) -> list[tuple[Placements, Placements]]:
    """What `register_sharding` takes: results' and arguments' placements over one mesh dimension."""
    given = _by_name(op, args)
    first, (before, after) = next(iter(rule.rows.items()))
    shape = given[first].shape
    lead = shape[before : len(shape) - after]
    refuse_cut(op, given, rule)
    accepted = [_everywhere(given, len(rule.results))]
    whole = accepted[0][1]
    if (key := given.get("key")) is not None and len(key.shape) == 1:
        return accepted  # a shared key numbers the rows of the whole
    for dim in range(len(lead)):
        places = list(whole)
        for place, (name, x) in enumerate(given.items()):
            if _is_tensor(x) and name in rule.rows:
                own = _own_dim(x.shape, *rule.rows[name], lead, dim)
                places[place] = Replicate() if own is None else Shard(own)
        accepted.append(([_result(r, dim) for r in rule.results], places))
    return accepted


def _everywhere(given: dict[str, Any], results: int) -> tuple[Placements, Placements]:
    """All of it on every rank."""
    return [Replicate()] * results, [Replicate() if _is_tensor(x) else None for x in given.values()]


def _result(before: int | str, dim: int) -> Placement:
    return Partial("sum") if before == SUM else Shard(int(before) + dim)


def refuse_cut(op: str, given: dict[str, Any], rule: Rule) -> None:
    """Rows that are themselves spread over ranks, and rows whose number in the whole a shared key needs."""
    for name, x in given.items():
        if not _is_tensor(x):
            continue
        before, after = rule.rows.get(name, (len(x.shape), 0))
        rows = range(before, len(x.shape) - after)
        cut = [p for p in x.placements if isinstance(p, Shard)]
        if name not in rule.rows and cut:
            raise NotImplementedError(
                f"{op}: {name} must be replicated, got {tuple(x.placements)}{_elsewhere(op)}"
            )
        if any(p.dim % len(x.shape) not in rows for p in cut):
            raise NotImplementedError(
                f"{op}: {name} {tuple(x.shape)} must be sharded over its rows, got {tuple(x.placements)}"
                f"{_elsewhere(op)}"
            )
    key = given.get("key")
    first = given[next(iter(rule.rows))]
    if key is not None and len(key.shape) == 1 and any(isinstance(p, Shard) for p in first.placements):
        raise NotImplementedError(
            f"{op}: key must be one per row where rows are sharded, got {tuple(key.shape)}: "
            "dlcore.rng.split(key, lead) gives the same draws"
        )


def _elsewhere(op: str) -> str:
    family = op.split(".")[0]
    return (
        "; the functions of dlcore.categorical merge parts of a vocabulary" if family == "categorical" else ""
    )


def _attention(op: str, *args: Any) -> list[tuple[Placements, Placements]]:
    """Sequences, heads where every rank's are whole groups, and query rows."""
    given = _by_name(op, args)
    paged = given.get("page_table") is not None
    backward = op.endswith("_backward")
    heads = _whole_groups(given["k"].shape[2], given["k"].mesh.shape)
    for name in ("q", "k", "v"):
        rows = {0, 1, 2} if name == "q" else {0, 2}
        for p in given[name].placements:
            if isinstance(p, Shard) and (p.dim not in rows or (p.dim == 2 and not heads)):
                raise NotImplementedError(
                    f"{op}: {name} must be sharded over sequences, whole groups of heads or rows of q, got "
                    f"{tuple(given[name].placements)}; dlcore.distributed.attention takes keys over ranks"
                )

    def places(dim: int) -> tuple[Placements, Placements]:
        rows = {"q": dim, "grad": dim, "out": dim}
        of_heads = {"lse": (0, 2, 1)[dim], "grad_lse": (0, 2, 1)[dim]}
        keys = {} if dim == 1 or (paged and dim == 0) else {"k": dim, "v": dim}
        bounds = (
            {} if dim == 2 or (dim == 0 and given["starts"].shape[0] == 1) else {"starts": dim, "stops": dim}
        )
        pages = {"page_table": 0} if dim == 0 else {}
        at = rows | of_heads | keys | bounds | pages
        inputs: Placements = [
            (Shard(at[name]) if name in at else Replicate()) if _is_tensor(x) else None
            for name, x in given.items()
        ]
        if not backward:
            return [Shard(dim), Shard(of_heads["lse"])], inputs
        of_keys = Shard(dim) if keys else Partial("sum")
        return [Shard(dim), of_keys, of_keys], inputs

    return [_everywhere(given, 3 if backward else 2)] + [
        places(dim) for dim in (0, 1, *((2,) if heads else ()))
    ]


def _whole_groups(kv_heads: int, mesh: Sequence[int]) -> bool:
    """Whether heads can be cut over any dimensions of a mesh so that each rank's queries have their keys."""
    cuts = {1}
    for size in mesh:
        cuts |= {cut * size for cut in cuts}
    return all(kv_heads % cut == 0 for cut in cuts if cut <= kv_heads)


def _overload(op: str) -> torch._ops.OpOverload:
    overload: torch._ops.OpOverload = getattr(torch.ops.dlcore, op.replace(".", "_")).default
    return overload


def register() -> None:
    """Give DTensor the rules of dlcore's ops."""
    from torch.distributed.tensor.experimental import register_sharding

    rules = {op: partial(_shardings, op, rule) for op, rule in RULES.items()}
    rules |= {op: partial(_attention, op) for op in ("attention.intervals", "attention.intervals_backward")}
    for op, rule in rules.items():
        register_sharding(_overload(op))(rule)
