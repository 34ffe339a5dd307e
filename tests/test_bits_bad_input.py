"""What dlcore.bits says of bad input."""

import math

import numpy as np
import pytest
import torch

from dlcore import bits, rng

X, T = torch.zeros(2, 8), torch.zeros(2, 3, dtype=torch.int64)
LEARNT = torch.ones(2, requires_grad=True)
KEY = rng.key(0)
BAD = [
    (lambda: bits.encode(T.int(), 4), TypeError, "bits.encode: tokens must be an int64 Tensor, got int32"),
    (lambda: bits.encode([1, 2], 4), TypeError, "bits.encode: tokens must be an int64 Tensor, got list"),
    (lambda: bits.encode(T + 16, 4), ValueError, r"bits.encode: tokens must lie in \[0, 16\), got 16"),
    (lambda: bits.encode(T - 1, 4), ValueError, r"bits.encode: tokens must lie in \[0, 16\), got -1"),
    (lambda: bits.encode(T, 0), ValueError, r"bits.encode: width must lie in \[1, 62\], got 0"),
    (
        lambda: torch.ops.dlcore.bits_encode(T, 110, True, False, 0.0, 1.0),
        ValueError,
        r"bits.encode: width must lie in \[1, 62\], got 110",
    ),
    (lambda: bits.encode(T, 63), ValueError, r"bits.encode: width must lie in \[1, 62\], got 63"),
    (lambda: bits.encode(T, 4.0), TypeError, "bits.encode: width must be an int, got float 4.0"),
    (lambda: bits.encode(T, 4, order="big"), ValueError, "order must be one of 'msb', 'lsb', got 'big'"),
    (lambda: bits.encode(T, 4, coding="-1"), ValueError, "coding must be one of '01', 'pm1', got '-1'"),
    (
        lambda: bits.encode(T, 1, ranking=torch.arange(3)),
        ValueError,
        r"bits.encode: ranking must be \(V,\) with V in \[1, 2\^1\], got \(3,\)",
    ),
    (
        lambda: bits.encode(T, 4, ranking=torch.tensor([0, 0, 2])),
        ValueError,
        "bits.encode: ranking must be a permutation, got a rank twice",
    ),
    (
        lambda: bits.encode(T, 4, ranking=torch.tensor([0, 5, 2])),
        ValueError,
        r"bits.encode: ranking must lie in \[0, 3\), got 5",
    ),
    (
        lambda: bits.encode(T + 3, 4, ranking=torch.arange(3)),
        ValueError,
        r"bits.encode: tokens must lie in \[0, 3\), got 3",
    ),
    (lambda: bits.encode(T, 4, ranking=X), TypeError, "ranking must be an int64 Tensor, got float32"),
    (lambda: bits.decode(T), TypeError, "bits.decode: bits_or_probs must be float32, bfloat16, float16"),
    (lambda: bits.decode(torch.zeros(2, 63)), ValueError, "bits_or_probs must be .* at most 62, got 63"),
    (lambda: bits.decode(torch.zeros(2, 0)), ValueError, r"bits_or_probs must be \(..., n\) with n >= 1"),
    (lambda: bits.decode(X, vocab_size=257), ValueError, r"vocab_size must lie in \[1, 2\^8\], got 257"),
    (lambda: bits.decode(X, vocab_size=0), ValueError, r"vocab_size must lie in \[1, 2\^8\], got 0"),
    (
        lambda: bits.decode(X, vocab_size=4, ranking=torch.arange(3)),
        ValueError,
        "bits.decode: vocab_size must be the ranking's 3, got 4",
    ),
    (lambda: bits.patch(X, 3), ValueError, "bits.patch: width must divide x's last dimension 8, got 3"),
    (lambda: bits.patch(3, 3), TypeError, "bits.patch: x must be a Tensor"),
    (lambda: bits.unpatch(X[0]), TypeError, r"bits.unpatch: x must be a Tensor \(..., L, w\), got float32"),
    (lambda: bits.matched_filter(X, -1.0), ValueError, r"matched_filter: sigma must lie in \[0, 3.4"),
    (lambda: bits.matched_filter(X, math.nan), ValueError, "matched_filter: sigma must lie in .* got nan"),
    (lambda: bits.matched_filter(X, None), TypeError, "matched_filter: sigma must be a number, got NoneType"),
    (lambda: bits.matched_filter(X, True), TypeError, "matched_filter: sigma must be a number, got bool"),
    (lambda: bits.matched_filter(X, 1.0, clip=-1), ValueError, r"clip must lie in \[0, inf\], got -1"),
    (lambda: bits.matched_filter(X, 1.0, clip=None), TypeError, "clip must be a number, got NoneType"),
    (lambda: bits.matched_filter(T, 1.0), TypeError, "matched_filter: x must be float32, bfloat16"),
    (
        lambda: bits.posterior(X, torch.ones(3)),
        ValueError,
        r"bits.posterior: sigma must broadcast to \(2,\), got \(3,\)",
    ),
    (
        lambda: bits.posterior(X, torch.ones(2, 3)),
        ValueError,
        r"bits.posterior: sigma must broadcast to \(2, 8\), got \(2, 3\)",
    ),
    (
        lambda: bits.posterior(X, 1.0, X[0]),
        ValueError,
        r"bits.posterior: residual must have x's shape \(2, 8\), got \(8,\)",
    ),
    (
        lambda: bits.posterior(X, 1.0, X.to("meta")),
        ValueError,
        "bits.posterior: residual must be on cpu, got meta",
    ),
    (
        lambda: bits.posterior(X, torch.tensor([1.0, -2.0])),
        ValueError,
        r"bits.posterior: sigma must lie in \[0, 3.40282e\+38\], got -2",
    ),
    (lambda: bits.step(X, None, 0.0, 0.5), ValueError, r"bits.step: sigma must lie in \[1.17549e-38"),
    (lambda: bits.step(X, None, 1.0, -0.5), ValueError, r"bits.step: sigma_next must lie in \[0"),
    (lambda: bits.step(X, None, 1.0, math.inf), ValueError, "bits.step: sigma_next must lie in .* got inf"),
    (lambda: bits.step(X, X.int(), 1.0, 0.5), TypeError, "bits.step: residual must be float32, bfloat16"),
    (lambda: bits.step(X, None, 1.0, 0.5, gamma_next=-0.1), ValueError, "gamma_next must lie in .* got -0.1"),
    (lambda: bits.step(X, None, 1.0, 0.5, gamma_next="a"), TypeError, "gamma_next must be a number, got str"),
    (
        lambda: bits.step(X, None, 1.0, 0.5, gamma_next=0.1, noise_scale=-1.0),
        ValueError,
        "bits.step: noise_scale must lie in",
    ),
    (
        lambda: bits.step(X, None, 1.0, 0.5, gamma_next=0.1, key=rng.split(KEY, 3)),
        ValueError,
        r"bits.step: key must have shape \(2,\) or \(2, 2\), got \(3, 2\)",
    ),
    (
        lambda: bits.step(X, None, 1.0, 0.5, gamma_next=0.1, key=KEY, generator=torch.Generator()),
        ValueError,
        "bits.step: give key or generator, not both",
    ),
    (lambda: bits.churn(X, 1.0, 0.1, key=KEY.float()), TypeError, "bits.churn: key must be an int64 Tensor"),
    (lambda: bits.churn(X, 1.0, -0.1), ValueError, r"bits.churn: gamma must lie in \[0"),
    (lambda: bits.corrupt(T, 1.0), TypeError, "bits.corrupt: bits must be float32, bfloat16"),
    (lambda: bits.loss(X, X, X[:1], 1.0), ValueError, r"bits.loss: bits must have residual's shape \(2, 8\)"),
    (lambda: bits.loss(X, X, X, 1.0, kind="mse"), ValueError, "kind must be one of 'squared', 'bce', got"),
    (lambda: bits.loss(None, X, X, 1.0), TypeError, "bits.loss: residual must be a Tensor, got NoneType"),
    (lambda: bits.euler_step(X, X, 0.0, 0.5), ValueError, "bits.euler_step: sigma must lie in"),
    (
        lambda: bits.heun_step(X, X, X[:, :4], 1.0, 0.5),
        ValueError,
        "heun_step: probs_next must have x_next's",
    ),
    (lambda: bits.churn_gamma(1.0, 5.0, 0), ValueError, "churn_gamma: num_steps must be at least 1, got 0"),
    (lambda: bits.churn_gamma(1.0, -5.0, 10), ValueError, "churn_gamma: s_churn must lie in"),
    (lambda: bits.churn_gamma("a", 5.0, 10), TypeError, "churn_gamma: sigma must be a number, got str 'a'"),
    (lambda: bits.churn_gamma(X - 1, 5.0, 10), ValueError, r"churn_gamma: sigma must lie in .* got -1"),
    (lambda: bits.churn_gamma(X * math.nan, 5.0, 10), ValueError, "churn_gamma: sigma must .* got nan"),
    (
        lambda: bits.churn_gamma(X > 0, 5.0, 10),
        TypeError,
        "churn_gamma: sigma must be a real Tensor, got bool",
    ),
    (
        lambda: bits.churn_gamma(1.0, 5.0, 10, window=3.0),
        TypeError,
        "window must be a pair of numbers, got f",
    ),
    (
        lambda: bits.churn_gamma(X, 5.0, 10, window=(1.0,)),
        ValueError,
        r"window must be a pair .* got \(1.0,\)",
    ),
    (
        lambda: bits.churn_gamma(X, 5.0, 10, window=("a", 1)),
        TypeError,
        "window must be a number, got str 'a'",
    ),
    (
        lambda: bits.churn_gamma(1.0, 5.0, 10, window=(2.0, 1.0)),
        ValueError,
        "window must be .lowest, highest",
    ),
    (
        lambda: bits.churn_gamma(1.0, 5.0, 10, window=(math.nan, 1.0)),
        ValueError,
        "window must lie .* got nan",
    ),
    (lambda: bits.matched_filter(X, LEARNT), NotImplementedError, "matched_filter: has no gradient in sigma"),
    (
        lambda: bits.posterior(X, LEARNT),
        NotImplementedError,
        "posterior: has no gradient in sigma: detach it",
    ),
    (lambda: bits.loss(X, X, X, LEARNT), NotImplementedError, "loss: has no gradient in sigma: detach it"),
    (
        lambda: bits.loss(X, X, X * LEARNT[:1], 1.0),
        NotImplementedError,
        "bits.loss: has no gradient in bits: detach it",
    ),
    (lambda: bits.edm_weight(torch.ones(1), coding="x"), ValueError, "edm_weight: coding must be one of"),
    (lambda: bits.edm_weight("a"), TypeError, "bits.edm_weight: sigma must be a number, got str 'a'"),
    (lambda: bits.edm_weight(None), TypeError, "bits.edm_weight: sigma must be a number, got NoneType"),
    (lambda: bits.edm_weight(X > 0), TypeError, "edm_weight: sigma must be a real Tensor, got bool"),
    (lambda: bits.edm_weight(-1.0), ValueError, "bits.edm_weight: sigma must lie in .* got -1"),
    (lambda: bits.edm_weight(X - 1), ValueError, "bits.edm_weight: sigma must lie in .* got -1"),
    (lambda: bits.edm_weight(X * math.nan), ValueError, "bits.edm_weight: sigma must lie in .* got nan"),
    (lambda: bits.scale_input(X, -1.0), ValueError, "bits.scale_input: sigma must lie in"),
    (
        lambda: bits.step(X, None, 1e-20, 1e20),
        ValueError,
        "bits.step: sigma_next / sigma must lie in .* got 1e",
    ),
    (
        lambda: bits.euler_step(X, X, torch.tensor(1e-20), torch.tensor(1e20)),
        ValueError,
        "bits.euler_step: sigma_next / sigma must lie in .* got 1.0",
    ),
    (lambda: bits.step(X, None, 0.5, 0.4, key=KEY[:1]), ValueError, "bits.step: key must have shape"),
    (lambda: bits.step(X, None, 0.5, 0.4, generator=7), TypeError, "generator must be a torch.Generator"),
    (lambda: bits.step(X, None, 0.5, 0.4, noise_scale=-1.0), ValueError, "noise_scale must lie in"),
    (
        lambda: bits.posterior(X, torch.ones(2, device="meta")),
        ValueError,
        "bits.posterior: sigma must be on cpu, got meta",
    ),
    (
        lambda: bits.posterior(X.to_sparse(), 0.5),
        TypeError,
        "bits.posterior: x must be dense, got torch.sparse",
    ),
    (
        lambda: bits.posterior(X, torch.ones(2).to_sparse()),
        TypeError,
        "bits.posterior: sigma must be dense, got torch.sparse",
    ),
    (lambda: bits.step(X, X.to_sparse(), 0.5, 0.4), TypeError, "bits.step: residual must be dense"),
    (lambda: bits.encode(T, np.int64(4)), TypeError, "bits.encode: width must be an int, got int64"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_levels_that_are_learnt_are_taken_where_no_gradient_is_asked():
    with torch.no_grad():
        kept = bits.posterior(X, LEARNT), bits.loss(X, X, X * LEARNT[:1], LEARNT)
    assert torch.equal(kept[0], bits.posterior(X, LEARNT.detach()))
    assert torch.equal(kept[1], bits.loss(X, X, X, LEARNT.detach()))
