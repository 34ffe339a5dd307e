"""What the sphere's functions say to input that they can't take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlcore import LinearLogits, rng, sphere

X, E = torch.eye(5)[:2], torch.eye(5)[[0, 1, 2]]
A, V = torch.zeros(2, 3), torch.zeros(2, 5)
H = LinearLogits(torch.zeros(2, 4), torch.zeros(3, 4))
KAPPA = torch.ones(2, requires_grad=True)
velocity, score, correct = sphere.velocity, sphere.posterior_score, sphere.correct
posterior_logits = sphere.posterior_logits
BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: velocity([1], A, E), TypeError, r"sphere.velocity: x must be a Tensor, got list \[1\]"),
    (lambda: velocity(X, A, E.long()), TypeError, r"sphere.velocity: table must be float32"),
    (lambda: velocity(X, A.long(), E), TypeError, r"sphere.velocity: logits must be float32"),
    (
        lambda: velocity(X, A.double(), E),
        TypeError,
        r"velocity: x, logits and table must all be float64 or none",
    ),
    (lambda: velocity(X.double(), A, E), TypeError, r"velocity: x and table must both be float64 or none"),
    (
        lambda: velocity(X, A[:, :2], E),
        ValueError,
        r"table must be \(2, d\) for logits \(..., 2\), got \(3, 5\)",
    ),
    (
        lambda: velocity(X, A, E[:, :4]),
        ValueError,
        r"table must be \(V, d\) for x \(..., d\), d >= 2, got \(3, 4\)",
    ),
    (lambda: velocity(X, A, E[0]), ValueError, r"table must be \(V, d\) for x"),
    (lambda: velocity(torch.ones(2, 1), A, torch.ones(3, 1)), ValueError, r"d >= 2, got \(3, 1\)"),
    (lambda: velocity(X[:1], A, E), ValueError, r"sphere.velocity: x must be \(2, 5\), got \(1, 5\)"),
    (lambda: velocity(X[:1], H, E), ValueError, r"sphere.velocity: x must be \(2, 5\), got \(1, 5\)"),
    (lambda: velocity(X, A, E.to("meta")), ValueError, r"sphere.velocity: table must be on cpu, got meta"),
    (
        lambda: velocity(2 * X, A, E),
        ValueError,
        r"sphere.velocity: x must hold unit vectors, got one of norm 2",
    ),
    (lambda: velocity(X, A, 0.98 * E), ValueError, r"table must hold unit vectors, got one of norm 0.98"),
    (lambda: velocity(X, A, 0 * E), ValueError, r"table must hold unit vectors, got one of norm 0"),
    (lambda: velocity(X, A, E, path="geodesic"), ValueError, r"path must be one of 'slerp', 'vmf', 'cauchy'"),
    (lambda: velocity(X, A, E, path="vmf"), ValueError, r"kappa is needed with path='vmf'"),
    (lambda: velocity(X, A, E, kappa=3), ValueError, r"kappa is a parameter of path='vmf' alone"),
    (
        lambda: velocity(X, A, E, path="cauchy", noise=1),
        ValueError,
        r"noise is a parameter of path='slerp' alone",
    ),
    (
        lambda: velocity(X, A, E, path="vmf", kappa=-1.0),
        ValueError,
        r"kappa must lie in \[0, 1e\+08\], got -1",
    ),
    (
        lambda: velocity(X, A, E, path="vmf", kappa=1e9),
        ValueError,
        r"kappa must lie in \[0, 1e\+08\], got 1e\+09",
    ),
    (lambda: velocity(X, A, E, path="vmf", kappa=-1.0, top_k=1), ValueError, r"kappa must lie in"),
    (
        lambda: velocity(X, A, E, path="vmf", kappa=torch.ones(3)),
        ValueError,
        r"kappa must broadcast to \(2,\)",
    ),
    (lambda: velocity(X, A, E, path="vmf", kappa="1"), TypeError, r"kappa must be a number or a Tensor"),
    (
        lambda: velocity(X, A, E, path="vmf", kappa=KAPPA),
        NotImplementedError,
        r"has no gradient in kappa, detach it",
    ),
    (lambda: velocity(X, A, E, noise=0.0), ValueError, r"noise must lie in .*, got 0"),
    (lambda: velocity(X, A, E, noise=1.5), ValueError, r"noise must lie in .*, got 1.5"),
    (lambda: velocity(X, A, E, noise=torch.ones(3, 2)), ValueError, r"noise must broadcast to \(2,\)"),
    (lambda: velocity(X, A, E, top_k=0), ValueError, r"top_k must be at least 1, got 0"),
    (lambda: velocity(X, A, E, top_k=1.5), TypeError, r"top_k must be an int, got float 1.5"),
    (lambda: score(X, A, E, -1.0), ValueError, r"sphere.posterior_score: kappa must lie in \[0, .*, got -1"),
    (lambda: score(X, A, E, None), TypeError, r"sphere.posterior_score: kappa must be a number or a Tensor"),
    (lambda: score(X, A, E[:2], 1.0), ValueError, r"sphere.posterior_score: table must be \(3, d\)"),
    (lambda: posterior_logits(X, E), ValueError, r"posterior_logits: path='slerp' takes noise, not kappa"),
    (lambda: posterior_logits(X, E, noise=1, kappa=2), ValueError, r"path='slerp' takes noise, not kappa"),
    (lambda: posterior_logits(X, E, path="vmf", noise=1), ValueError, r"path='vmf' takes kappa, not noise"),
    (lambda: posterior_logits(X, E, noise=0), ValueError, r"noise must lie in .*, got 0"),
    (lambda: posterior_logits(X, E, path="cauchy", kappa=-1), ValueError, r"kappa must lie in \[0"),
    (lambda: sphere.radial_weight(A, 1), ValueError, r"sphere.radial_weight: dim must be at least 2, got 1"),
    (lambda: sphere.radial_weight(A, 2.0), TypeError, r"sphere.radial_weight: dim must be an int"),
    (lambda: sphere.radial_weight(A, 4, path="vmf"), ValueError, r"sphere.radial_weight: kappa is needed"),
    (
        lambda: sphere.radial_weight(3, 4),
        TypeError,
        r"sphere.radial_weight: cosine must be a Tensor, got int 3",
    ),
    (
        lambda: sphere.step(X, V[:, :4], 1.0),
        ValueError,
        r"sphere.step: x and velocity must have the same last",
    ),
    (lambda: sphere.step(X, V.long(), 1.0), TypeError, r"sphere.step: velocity must be float32"),
    (
        lambda: sphere.step(X, V, None),
        TypeError,
        r"sphere.step: delta must be a number or a Tensor, got NoneType",
    ),
    (lambda: sphere.step(X, V, torch.ones(5)), ValueError, r"sphere.step: delta must broadcast to \(2,\)"),
    (
        lambda: sphere.step(X, V, 1.0, retraction="qr"),
        ValueError,
        r"retraction must be one of 'exp', 'normalize'",
    ),
    (
        lambda: correct(X, V[:, :4], 0.1),
        ValueError,
        r"sphere.correct: x and score must have the same last dim",
    ),
    (lambda: correct(X, V, -0.1), ValueError, r"sphere.correct: step_size must lie in \[0, inf\], got -0.1"),
    (lambda: correct(X, V, None), TypeError, r"sphere.correct: step_size must be a number or a Tensor"),
    (
        lambda: correct(X, V, 0.1, key=rng.key(1).expand(3, 2)),
        ValueError,
        r"sphere.correct: key must have shape",
    ),
    (lambda: correct(X, V, 0.1, key=3), TypeError, r"sphere.correct: key must be an int64 Tensor"),
    (lambda: correct(X[:, :1], V[:, :1], 0.1), ValueError, r"d >= 2"),
    (
        lambda: sphere.slerp(X, X, float("nan")),
        ValueError,
        r"sphere.slerp: t must lie in \(-inf, inf\), got nan",
    ),
    (lambda: sphere.slerp(X[:, :1], X[:, :1], 0.5), ValueError, r"sphere.slerp: x must be .* d >= 2"),
    (lambda: sphere.log_map(X[:, :1], X[:, :1]), ValueError, r"sphere.log_map: x must be .* d >= 2"),
    (lambda: sphere.rotate(V[:, :1], X[:, :1], X[:, :1]), ValueError, r"sphere.rotate: x must be .* d >= 2"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_second_derivative_raises():
    x, logits = X.clone().requires_grad_(), A.clone().requires_grad_()
    (grad,) = torch.autograd.grad(velocity(x, logits, E).sum(), logits, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"sphere.velocity: has a first derivative only"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("path", "level"), [("slerp", {"noise": 0.6}), ("vmf", {"kappa": 9.0}), ("cauchy", {"kappa": 9.0})]
)
def test_autocast_leaves_the_logits_alone(path, level):
    x, table = torch.nn.functional.normalize(torch.randn(3, 33), dim=-1), torch.eye(33)
    plain = sphere.posterior_logits(x, table, path=path, **level)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sphere.posterior_logits(x, table, path=path, **level), plain)
