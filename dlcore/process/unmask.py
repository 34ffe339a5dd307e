"""Parallel decoding: which positions of a sequence to commit at once."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks

__all__ = ["select"]


def _per_sequence(op: str, name: str, value: float | Tensor, score: Tensor, dtype: torch.dtype) -> Tensor:
    x = checks.per_row(op, name, value, score.shape[:-1], score.device, dtype)
    assert x is not None
    if checks.reads_data(x):
        checks.value_range(op, name, x, -torch.inf if name == "threshold" else 0)
    return x.unsqueeze(-1)


def _ranked(score: Tensor, candidates: Tensor, *, descending: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in order, whether each is a candidate's, and its position; ties by position, NaN last."""
    worst = -torch.inf if descending else torch.inf
    whole = score.nan_to_num(worst, torch.inf, -torch.inf)
    ranked, order = torch.sort(whole, stable=True, dim=-1, descending=descending)
    return ranked, candidates.gather(-1, order), order


def _back(accepted: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(accepted).scatter(-1, order, accepted)


def largest(op: str, name: str, count: int | Tensor, score: Tensor, candidates: Tensor) -> Tensor:
    """The `count` candidates of largest score, all if there are fewer; errors name `op` and `name`."""
    floating = isinstance(count, Tensor) and count.is_floating_point()
    if floating or isinstance(count, bool) or not isinstance(count, (int, torch.SymInt, Tensor)):
        got = checks.describe(count)
        raise TypeError(f"{op}: {name} must be an int or an integer Tensor, got {got}")
    most = _per_sequence(op, name, count, score, torch.int64)
    _, among, order = _ranked(score, candidates, descending=True)
    return _back(among & (among.cumsum(-1) <= most), order)


def select(
    score: Tensor,
    candidates: Tensor,
    *,
    top_k: int | Tensor | None = None,
    threshold: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    entropy_bound: float | Tensor | None = None,
) -> Tensor:
    """The positions to commit, by exactly one of four rules; ties go to the lowest position.

    - top_k: the k candidates of largest score, all where there are fewer than k.
    - threshold θ: every candidate with score >= θ, and the best one always (Fast-dLLM, arXiv 2505.22618).
    - factor f: with scores in descending order, the n-th while c_(n) >= 1 - f/(n + 1), the first always
      (dInfer; the sequence ends at the first that fails, also if that is the last one).
    - entropy_bound γ: score is the entropy; the longest run of ascending entropies whose sum without the
      largest is at most γ, the first always (EB-sampler, arXiv 2505.24857).

    Sequences without candidates commit nothing. A NaN score counts as the worst. Comparisons are made in
    score's dtype, so that a float32 confidence of 0.9 reaches a threshold of 0.9.

    Args:
        score: (..., L) floating: confidences, or entropies in nats for entropy_bound.
        candidates: (..., L) bool.
        top_k, threshold, factor, entropy_bound: a number, or a tensor that broadcasts to the leading
            dimensions, one per sequence.

    Returns:
        (..., L) bool, a subset of candidates.

    Raises:
        TypeError: score is not floating, candidates not bool, top_k not whole.
        ValueError: shapes; not exactly one rule; a negative top_k, factor or bound.

    Example:
        >>> import torch
        >>> from dlcore.process import unmask
        >>> masked = torch.tensor([[True, True, False, True]])
        >>> unmask.select(torch.tensor([[0.5, 0.9, 1.0, 0.8]]), masked, top_k=2)
        tensor([[False,  True, False,  True]])
        >>> entropy = torch.tensor([[0.01, 0.02, 0.2, 0.5]])
        >>> unmask.select(entropy, torch.ones(1, 4, dtype=torch.bool), entropy_bound=0.1)
        tensor([[ True,  True,  True, False]])
    """
    op = "unmask.select"
    checks.floating(op, "score", score)
    if not isinstance(candidates, Tensor) or candidates.dtype != torch.bool:
        raise TypeError(f"{op}: candidates must be a bool Tensor, got {checks.describe(candidates)}")
    if candidates.shape != score.shape:
        raise ValueError(
            f"{op}: candidates must have shape {tuple(score.shape)}, got {tuple(candidates.shape)}"
        )
    checks.on_device(op, "candidates", candidates, score.device)
    rules = {"top_k": top_k, "threshold": threshold, "factor": factor, "entropy_bound": entropy_bound}
    given = [name for name, value in rules.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"{op}: give exactly one of {', '.join(rules)}, got {', '.join(given) or 'none'}")
    if top_k is not None:
        return largest(op, "top_k", top_k, score, candidates)
    ranked, among, order = _ranked(score, candidates, descending=entropy_bound is None)
    rank = among.cumsum(-1)
    # Along the order scores fall against a level or rising bar, or sums rise: what fails, fails for good.
    if threshold is not None:
        passes = ranked >= _per_sequence(op, "threshold", threshold, score, score.dtype)
    elif factor is not None:
        needed = 1 - _per_sequence(op, "factor", factor, score, torch.float64) / (rank + 1)
        passes = ranked >= needed.to(score.dtype)
    else:
        assert entropy_bound is not None
        sums = torch.where(among, ranked, 0).double().cumsum(-1)
        before = torch.nn.functional.pad(sums[..., :-1], (1, 0))
        passes = before.to(score.dtype) <= _per_sequence(
            op, "entropy_bound", entropy_bound, score, score.dtype
        )
    return _back(among & (passes | (rank == 1)), order)
