"""The parallel-decoding rules against their definitions."""

import pytest
import torch
from oracles import check_compiled
from torch import Tensor

from dlcore.process import unmask

T, F = True, False
ALL = [T, T, T, T]

# rule, its parameter, scores, candidates, accepted
TABLE = [
    ("top_k", 2, [0.1, 0.9, 0.5, 0.7], ALL, [F, T, F, T]),
    ("top_k", 2, [0.1, 0.9, 0.5, 0.7], [T, F, T, F], [T, F, T, F]),
    ("top_k", 1, [0.1, 0.9, 0.5, 0.7], [T, F, T, F], [F, F, T, F]),
    ("top_k", 9, [0.1, 0.9, 0.5, 0.7], [T, F, T, F], [T, F, T, F]),
    ("top_k", 0, [0.1, 0.9, 0.5, 0.7], ALL, [F, F, F, F]),
    ("top_k", 2, [0.5, 0.5, 0.5, 0.5], ALL, [T, T, F, F]),
    ("top_k", 2, [0.5, 0.7, 0.5, 0.5], [F, T, T, T], [F, T, T, F]),
    ("top_k", 2, [-torch.inf, 0.9, -torch.inf, 0.1], [T, F, T, F], [T, F, T, F]),
    ("top_k", 2, [torch.nan, 0.2, 0.1, 0.3], ALL, [F, T, F, T]),
    ("top_k", 1, [torch.nan, 0.2, torch.nan, 0.3], [T, F, T, F], [T, F, F, F]),
    ("threshold", 0.9, [0.95, 0.9, 0.89, 0.99], ALL, [T, T, F, T]),
    ("threshold", 0.9, [0.95, 0.9, 0.89, 0.99], [F, F, T, F], [F, F, T, F]),
    ("threshold", 0.9, [0.1, 0.3, 0.3, 0.2], ALL, [F, T, F, F]),
    ("threshold", 0.9, [0.95, 0.9, 0.89, 0.99], [F, F, F, F], [F, F, F, F]),
    # c_(n) >= 1 - f/(n + 1) with f = 1: 0.5, 0.667, 0.75, 0.8; here the second falls.
    ("factor", 1.0, [0.6, 0.95, 0.7, 0.5], ALL, [F, T, T, F]),
    ("factor", 1.0, [0.6, 0.95, 0.65, 0.5], ALL, [F, T, F, F]),
    ("factor", 2.0, [0.65, 0.7, 0.68, 0.66], ALL, [T, T, T, T]),
    ("factor", 0.5, [0.80, 0.81, 0.82, 0.99], ALL, [F, F, F, T]),
    # Only the last fails: it is left.
    ("factor", 1.0, [0.99, 0.98, 0.97, 0.79], ALL, [T, T, T, F]),
    ("factor", 1.0, [0.99, 0.98, 0.97, 0.81], ALL, [T, T, T, T]),
    ("factor", 1.0, [0.01, 0.98, 0.02, 0.97], [T, F, T, F], [F, F, T, F]),
    ("factor", 1.0, [0.9, 0.9, 0.9, 0.9], [F, F, F, F], [F, F, F, F]),
    ("factor", 0.0, [0.2, 0.2, 0.1, 0.1], ALL, [T, F, F, F]),
    ("entropy_bound", 0.1, [0.01, 0.02, 0.2, 0.5], ALL, [T, T, T, F]),
    ("entropy_bound", 0.1, [0.5, 0.2, 0.01, 0.02], ALL, [F, T, T, T]),
    ("entropy_bound", 0.0, [0.3, 0.2, 0.2, 0.5], ALL, [F, T, F, F]),
    ("entropy_bound", 0.2, [0.3, 0.2, 0.2, 0.5], ALL, [F, T, T, F]),
    ("entropy_bound", 0.1, [9.0, 8.0, 9.0, 9.0], ALL, [F, T, F, F]),
    ("entropy_bound", 0.1, [0.0, 8.0, 0.05, 9.0], [F, T, F, T], [F, T, F, F]),
    ("entropy_bound", 0.1, [0.0, torch.nan, 0.05, 9.0], [F, T, F, T], [F, F, F, T]),
    ("entropy_bound", 99.0, [0.0, 8.0, 0.05, 9.0], ALL, [T, T, T, T]),
    ("entropy_bound", 99.0, [0.0, 8.0, 0.05, 9.0], [F, F, F, F], [F, F, F, F]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rule", "value", "score", "candidates", "accepted"), TABLE)
def test_table(
    rule: str,
    value: float,
    score: list[float],
    candidates: list[bool],
    accepted: list[bool],
    dtype: torch.dtype,
) -> None:
    chosen = unmask.select(torch.tensor([score], dtype=dtype), torch.tensor([candidates]), **{rule: value})
    assert chosen.tolist() == [accepted]


def slowly(score: Tensor, candidates: Tensor, rule: str, value: float) -> Tensor:
    """The rules as a loop over the sorted candidates of one sequence."""
    ascending = rule == "entropy_bound"
    order = sorted(
        torch.nonzero(candidates).flatten().tolist(),
        key=lambda i: (float(score[i]) * (1 if ascending else -1), i),
    )
    out, spent = torch.zeros_like(candidates), 0.0
    for n, i in enumerate(order, start=1):
        c = float(score[i])
        ok = {
            "top_k": n <= value,
            "threshold": c >= value,
            "factor": c >= 1 - value / (n + 1),
            "entropy_bound": spent <= value,
        }
        if not ok[rule] and (n > 1 or rule == "top_k"):
            break
        out[i] = True
        spent += c
    return out


@pytest.mark.parametrize(
    ("rule", "low", "high"), [("top_k", 0, 9), ("threshold", 0, 1), ("factor", 0, 2), ("entropy_bound", 0, 1)]
)
def test_random_batches_with_a_value_per_sequence(rule: str, low: float, high: float) -> None:
    g = torch.Generator().manual_seed(1)
    # Few distinct scores: many ties.
    score = torch.randint(9, (200, 7), generator=g).double() / 8
    candidates = torch.rand(200, 7, generator=g) < 0.7
    value = torch.rand(200, generator=g, dtype=torch.float64) * (high - low) + low
    if rule == "top_k":
        value = value.long()
    chosen = unmask.select(score, candidates, **{rule: value})
    wanted = [slowly(s, c, rule, float(v)) for s, c, v in zip(score, candidates, value, strict=True)]
    assert chosen.equal(torch.stack(wanted))


def test_quota_schedule() -> None:
    """N = 10 in 4 steps: 3, 3, 2, 2, as LLaDA's ⌊N/steps⌋ + 1 for the first N mod steps."""
    left, g = torch.ones(1, 10, dtype=torch.bool), torch.Generator().manual_seed(2)
    sizes = []
    for n in (3, 3, 2, 2):
        chosen = unmask.select(torch.rand(1, 10, generator=g), left, top_k=n)
        sizes.append(int(chosen.sum()))
        assert not bool((chosen & ~left).any())
        left = left & ~chosen
    assert sizes == [3, 3, 2, 2]
    assert not bool(left.any())


def test_shapes() -> None:
    none = unmask.select(torch.zeros(2, 0 + 1), torch.zeros(2, 1, dtype=torch.bool), top_k=1)
    assert none.shape == (2, 1)
    assert not bool(none.any())
    assert unmask.select(torch.zeros(3), torch.ones(3, dtype=torch.bool), threshold=0.5).tolist() == [T, F, F]
    assert unmask.select(torch.zeros(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool), top_k=2).sum() == 12
    half = torch.tensor([[0.9, 0.8]], dtype=torch.bfloat16)
    assert unmask.select(half, torch.ones(1, 2, dtype=torch.bool), threshold=0.9).tolist() == [[T, F]]


def test_compiles_whole_and_once() -> None:
    g = torch.Generator().manual_seed(3)
    candidates = torch.rand(4, 7, generator=g) < 0.7

    def everything(score: Tensor, value: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            unmask.select(score, candidates, top_k=k),
            unmask.select(score, candidates, threshold=value),
            unmask.select(score, candidates, factor=value),
            unmask.select(score, candidates, entropy_bound=value),
        )

    calls = [(torch.rand(4, 7, generator=g), torch.tensor(0.2 * i), torch.tensor(i)) for i in range(5)]
    check_compiled(everything, calls)


S, C = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
BAD = [
    (
        lambda: unmask.select(S, C),
        ValueError,
        "give exactly one of top_k, threshold, factor, entropy_bound, got none",
    ),
    (
        lambda: unmask.select(S, C, top_k=1, factor=1.0),
        ValueError,
        "give exactly one of .*, got top_k, factor",
    ),
    (lambda: unmask.select(S.long(), C, top_k=1), TypeError, "score must be float32"),
    (lambda: unmask.select(S, C.int(), top_k=1), TypeError, "candidates must be a bool Tensor"),
    (lambda: unmask.select(S, C[0], top_k=1), ValueError, r"candidates must have shape \(2, 3\), got \(3,\)"),
    (lambda: unmask.select(S, C.to("meta"), top_k=1), ValueError, "candidates must be on cpu, got meta"),
    (lambda: unmask.select(S, C, top_k=2**70), ValueError, "top_k is too large, got int"),
    (lambda: unmask.select(S, C, top_k=-1), ValueError, r"top_k must lie in \[0, inf\], got -1"),
    (
        lambda: unmask.select(S, C, top_k=1.0),
        TypeError,
        "top_k must be an int or an integer Tensor, got float 1.0",
    ),
    (
        lambda: unmask.select(S, C, top_k=torch.ones(2)),
        TypeError,
        "top_k must be an int or an integer Tensor",
    ),
    (
        lambda: unmask.select(S, C, top_k=torch.ones(3).long()),
        ValueError,
        r"top_k must broadcast to \(2,\), got \(3,\)",
    ),
    (lambda: unmask.select(S, C, factor=-1.0), ValueError, r"factor must lie in \[0, inf\], got -1"),
    (
        lambda: unmask.select(S, C, entropy_bound=-1.0),
        ValueError,
        r"entropy_bound must lie in \[0, inf\], got -1",
    ),
    (lambda: unmask.select(S, C, threshold=torch.nan), ValueError, "threshold must lie in"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"unmask.select: {message}"):
        call()
