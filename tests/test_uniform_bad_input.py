"""What dlcore.process.uniform says of bad input."""

import math

import pytest
import torch

import dlcore
from dlcore.process import uniform

Z, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 4)
BAD = [
    (
        lambda: uniform.step(LOGITS, Z, 0.4, torch.zeros(7)),
        ValueError,
        r"uniform.step: alpha_s must broadcast to \(2, 3\), got \(7,\)",
    ),
    (
        lambda: uniform.step(LOGITS, Z, 0.4, 0.3),
        ValueError,
        "uniform.step: alpha_s must be at least alpha_t, got alpha_s 0.3 below alpha_t 0.4",
    ),
    (
        lambda: uniform.step(LOGITS, Z, torch.tensor(0.1), 0.1),
        ValueError,
        "got alpha_s 0.1 below alpha_t 0.10000000149011612",
    ),
    (
        lambda: uniform.step(LOGITS, Z.to("meta"), 0.1, 0.3),
        ValueError,
        "uniform.step: z must be on cpu, got meta",
    ),
    (
        lambda: uniform.step(LOGITS, Z, 0.1, 0.3, temperature=None),
        TypeError,
        "temperature must be a number or a Tensor, got None",
    ),
    (lambda: uniform.step(LOGITS, Z, 2**70, 0.3), ValueError, "uniform.step: alpha_t is too large, got int"),
    (
        lambda: uniform.correct(LOGITS, Z, 0.5, 1, temperature=0.0),
        ValueError,
        r"uniform.correct: temperature must lie in \(0, inf\), got 0.0",
    ),
    (
        lambda: uniform.step(LOGITS, Z, -0.1, 0.3),
        ValueError,
        r"uniform.step: alpha_t must lie in \[0, 1\], got -0.1",
    ),
    (
        lambda: uniform.step(LOGITS, Z, 0.1, 1.5),
        ValueError,
        r"uniform.step: alpha_s must lie in \[0, 1\], got 1.5",
    ),
    (
        lambda: uniform.step(LOGITS, Z, 0.1, math.nan),
        ValueError,
        r"uniform.step: alpha_s must lie in \[0, 1\], got nan",
    ),
    (
        lambda: uniform.step(LOGITS, Z, 0.1, 0.5, kappa=2),
        ValueError,
        r"uniform.step: kappa must lie in \[0, 1\], got 2",
    ),
    (
        lambda: uniform.step(LOGITS, Z, 0.1, 0.5, parameterization="mean"),
        ValueError,
        "uniform.step: parameterization must be one of 'loo', 'denoiser', got 'mean'",
    ),
    (
        lambda: uniform.step(LOGITS, Z + 4, 0.1, 0.5),
        ValueError,
        r"uniform.step: z must lie in \[0, 4\), got 4",
    ),
    (
        lambda: uniform.step(LOGITS, Z[0], 0.1, 0.5),
        ValueError,
        r"uniform.step: z must have shape \(2, 3\), got \(3,\)",
    ),
    (
        lambda: uniform.step(LOGITS, Z.int(), 0.1, 0.5),
        TypeError,
        "uniform.step: z must be an int64 Tensor, got int32",
    ),
    (lambda: uniform.step(LOGITS.long(), Z, 0.1, 0.5), TypeError, "uniform.step: logits must be float32"),
    (
        lambda: uniform.step(LOGITS, Z, "a", 0.5),
        TypeError,
        "uniform.step: alpha_t must be a number or a Tensor",
    ),
    (
        lambda: uniform.step(LOGITS, Z, None, 0.5),
        TypeError,
        "uniform.step: alpha_t must be a number or a Tensor",
    ),
    (lambda: uniform.step(LOGITS, Z, 0.1, 0.5, temperature=-1.0), ValueError, "temperature must lie in"),
    (
        lambda: uniform.step(LOGITS, Z, 0.1, 0.5, exclude=4),
        ValueError,
        r"uniform.step: exclude must lie in \[0, 4\), got 4",
    ),
    (
        lambda: uniform.step(LOGITS, Z, 0.1, 0.5, key=torch.zeros(3)),
        TypeError,
        "uniform.step: key must be an int64",
    ),
    (
        lambda: uniform.step(LOGITS, Z, 0.1, 0.5, key=dlcore.rng.key(0), generator=torch.Generator()),
        ValueError,
        "uniform.step: give key or generator",
    ),
    (
        lambda: uniform.bridge_log_probs(LOGITS, Z, 0.1, 0.5, temperature=0),
        ValueError,
        r"uniform.bridge_log_probs: temperature must lie in \(0, inf\]",
    ),
    (lambda: uniform.corrupt(Z + 9, 0.1, 4), ValueError, r"uniform.corrupt: x must lie in \[0, 4\), got 9"),
    (lambda: uniform.corrupt([1], 0.1, 4), TypeError, "uniform.corrupt: x must be an int64 Tensor"),
    (lambda: uniform.corrupt(Z, 0.1, 0), ValueError, "uniform.corrupt: vocab_size must be at least 1, got 0"),
    (lambda: uniform.corrupt(Z, 0.1, 4.0), TypeError, "uniform.corrupt: vocab_size must be an int"),
    (lambda: uniform.corrupt(Z, 0.1, 1, exclude=0), ValueError, "uniform.corrupt: exclude leaves no token"),
    (
        lambda: uniform.nelbo(LOGITS, Z, Z, 1.0, -1.0),
        ValueError,
        r"uniform.nelbo: alpha must lie in \(0, 1\), got 1",
    ),
    (
        lambda: uniform.nelbo(LOGITS, Z, Z, 0.0, -1.0),
        ValueError,
        r"uniform.nelbo: alpha must lie in \(0, 1\), got 0",
    ),
    (
        lambda: uniform.nelbo(LOGITS, Z, Z, 0.5, 1.0),
        ValueError,
        r"uniform.nelbo: dalpha must lie in \(-inf, 0\], got 1",
    ),
    (
        lambda: uniform.nelbo(LOGITS, Z, Z - 1, 0.5, -1.0),
        ValueError,
        r"uniform.nelbo: x must lie in \[0, 4\), got -1",
    ),
    (
        lambda: uniform.cross_entropy(LOGITS, Z, Z - 1, 0.5),
        ValueError,
        r"uniform.cross_entropy: x must lie in \[0, 4\), got -1",
    ),
    (
        lambda: uniform.log_score_to_loo(LOGITS, Z, 0.0),
        ValueError,
        r"uniform.log_score_to_loo: alpha must lie in \(0, 1\], got 0",
    ),
    (
        lambda: uniform.log_score_to_loo(Z, Z, 0.5),
        TypeError,
        "uniform.log_score_to_loo: log_score must be float32",
    ),
    (
        lambda: uniform.correct(LOGITS[0], Z[0], 0.5, 1),
        ValueError,
        r"uniform.correct: z must be \(B, L\), got \(3,\)",
    ),
    (
        lambda: uniform.correct(LOGITS, Z, 0.5, 1, score="best"),
        ValueError,
        "uniform.correct: score must be one of",
    ),
    (
        lambda: uniform.correct(LOGITS, Z, 0.5, 1, tau=0),
        ValueError,
        r"uniform.correct: tau must lie in \(0, inf\)",
    ),
    (
        lambda: uniform.correct(LOGITS, Z, 0.5, -1),
        ValueError,
        r"uniform.correct: num_positions must lie in \[0, inf\], got -1",
    ),
    (
        lambda: uniform.correct(LOGITS, Z, 0.5, torch.ones(3).long()),
        ValueError,
        r"uniform.correct: num_positions must broadcast to \(2,\)",
    ),
    (
        lambda: uniform.correct(LOGITS, Z, 0.5, 1.5),
        TypeError,
        "uniform.correct: num_positions must be an int",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
