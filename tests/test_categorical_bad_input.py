"""What draws and statistics say of bad input."""

from __future__ import annotations

import math

import pytest
import torch

from dlcore import categorical, rng

KEY = rng.key(20261121)
X, Z = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
C = torch.tensor([1.0, 0, 1, 0, 0, 0])
sample, stats, mixture = categorical.sample, categorical.stats, categorical.sample_mixture
BAD = [
    (lambda: stats([1, 2]), TypeError, r"categorical.stats: logits must be a Tensor, got list"),
    (lambda: stats(X.long()), TypeError, r"categorical.stats: logits must be float32, .* got torch.int64"),
    (lambda: stats(torch.zeros(3, 0)), ValueError, r"categorical.stats: logits must be .* got \(3, 0\)"),
    (lambda: stats([0] * 10**5), TypeError, r"logits must be a Tensor, got list \[[0, ]{76}\.\.\.$"),
    (lambda: stats(X, Z.to("meta")), ValueError, r"categorical.stats: index must be on cpu, got meta"),
    (lambda: stats(X, Z[0]), ValueError, r"categorical.stats: index must have shape \(2, 3\), got \(3,\)"),
    (lambda: stats(X, Z.int()), TypeError, r"categorical.stats: index must be an int64 Tensor"),
    (lambda: stats(X, Z + 5), ValueError, r"categorical.stats: index must lie in \[0, 5\), got 5"),
    (lambda: stats(X, Z - 1), ValueError, r"categorical.stats: index must lie in \[0, 5\), got -1"),
    (lambda: stats(X, shift=1.0), ValueError, r"categorical.stats: shift needs index"),
    (
        lambda: stats(X, temperature=0.0),
        ValueError,
        r"categorical.stats: temperature must lie in \[1.17549e-38, .*\], got 0",
    ),
    (lambda: stats(X, temperature=-1), ValueError, r"categorical.stats: temperature must lie in"),
    (lambda: stats(X, softcap=0.0), ValueError, r"categorical.stats: softcap must be positive and finite"),
    (lambda: stats(X, exclude=5), ValueError, r"categorical.stats: exclude must lie in \[0, 5\), got 5"),
    (lambda: stats(X, exclude=1.5), TypeError, r"categorical.stats: exclude must be an int"),
    (lambda: stats(X[..., :1], exclude=0), ValueError, r"categorical.stats: exclude leaves no token"),
    (
        lambda: sample(X, temperature=torch.ones(7)),
        ValueError,
        r"categorical.sample: temperature must broadcast to \(2, 3\), got \(7,\)",
    ),
    (lambda: sample(X, temperature="hot"), TypeError, r"categorical.sample: temperature must be a number"),
    (
        lambda: sample(X, temperature=None),
        TypeError,
        r"sample: temperature must be a number or a Tensor, got None",
    ),
    (
        lambda: sample(X, temperature=10**400),
        ValueError,
        r"sample: temperature is too large, got int 10+\.\.\.",
    ),
    (
        lambda: sample(X, temperature=1e300),
        ValueError,
        r"sample: temperature is too large, got float 1e\+300",
    ),
    (lambda: sample(X, top_k=2**70), ValueError, r"categorical.sample: top_k is too large, got int 11805"),
    (lambda: sample(X, generator=7), TypeError, r"sample: generator must be a torch.Generator, got int 7"),
    (lambda: sample(X, temperature=float("nan")), ValueError, r"categorical.sample: temperature must lie"),
    (
        lambda: sample(X, temperature=math.inf),
        ValueError,
        r"categorical.sample: temperature must lie in .* got inf",
    ),
    (lambda: sample(X, temperature=1e-40), ValueError, r"categorical.sample: temperature must lie in"),
    (
        lambda: sample(X, softcap=math.inf),
        ValueError,
        r"categorical.sample: softcap must be positive and finite",
    ),
    (lambda: sample(X, softcap="a"), TypeError, r"categorical.sample: softcap must be a number or None"),
    (lambda: sample(X, top_k=2.7), TypeError, r"categorical.sample: top_k must be an integer"),
    (lambda: sample(X, top_k=0), ValueError, r"categorical.sample: top_k must lie in \[1, inf\], got 0"),
    (lambda: sample(X, top_p=1.5), ValueError, r"categorical.sample: top_p must lie in \[0, 1\], got 1.5"),
    (lambda: sample(X, min_p=-0.5), ValueError, r"categorical.sample: min_p must lie in \[0, 1\]"),
    (lambda: sample(X, key=torch.zeros(2)), TypeError, r"categorical.sample: key must be an int64 Tensor"),
    (
        lambda: sample(X, key=Z),
        ValueError,
        r"categorical.sample: key must have shape \(2,\) or \(2, 3, 2\), got \(2, 3\)",
    ),
    (
        lambda: sample(X, key=KEY, generator=torch.Generator()),
        ValueError,
        r"categorical.sample: give key or generator, not both",
    ),
    (lambda: mixture(X, Z + 9, C), ValueError, r"categorical.sample_mixture: z must lie in \[0, 5\), got 9"),
    (
        lambda: mixture(X, Z, C[:5]),
        ValueError,
        r"sample_mixture: coefficients must have shape \(2, 3, 6\), got \(5,\)",
    ),
    (lambda: mixture(X, Z, C.long()), TypeError, r"sample_mixture: coefficients must be float32 or float64"),
    (
        lambda: mixture(X, Z, C * torch.inf),
        ValueError,
        r"sample_mixture: coefficients must be finite, got inf",
    ),
    (lambda: mixture(X, None, C), TypeError, r"sample_mixture: z must be an int64 Tensor, got NoneType None"),
    (
        lambda: mixture(X, Z, C, prior=None),
        TypeError,
        r"sample_mixture: prior must be 'uniform' or an int, a token id, got NoneType",
    ),
    (lambda: mixture(X, Z.to("meta"), C), ValueError, r"sample_mixture: z must be on cpu, got meta"),
    (
        lambda: mixture(X, Z, C, prior="mask"),
        ValueError,
        r"sample_mixture: prior must be 'uniform' or a token id",
    ),
    (lambda: mixture(X, Z, C, prior=5), ValueError, r"sample_mixture: prior must lie in \[0, 5\), got 5"),
    (
        lambda: mixture(X, Z, C.expand(4, 6)),
        ValueError,
        r"coefficients must broadcast to \(2, 3, 6\), got \(4, 6\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
