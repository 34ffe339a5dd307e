"""The sphere's ops under opcheck and torch.compile(fullgraph=True)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_compile import compiled
from torch import Tensor

from dlcore import LinearLogits, rng, sphere

LEAD, VOCAB, DIM = (2, 3), 300, 8


def unit(*shape: int, seed: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.norm(dim=-1, keepdim=True)


def arguments(dtype: torch.dtype, linear: bool, kappa: bool, grad: bool) -> tuple[Any, ...]:
    shapes = ((*LEAD, 4), (VOCAB, 4), (VOCAB,)) if linear else ((*LEAD, VOCAB),)
    head = [unit(*shape).to(dtype).requires_grad_(grad) for shape in shapes]
    points = [unit(*shape, seed=1).to(dtype).requires_grad_(grad) for shape in ((*LEAD, DIM), (VOCAB, DIM))]
    level = torch.full(LEAD, 3.0, dtype=torch.float64) if kappa else None
    return *head, *[None] * (3 - len(head)), *points, level


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("kappa", [False, True])
def test_opcheck(dtype, linear, kappa):
    op = torch.ops.dlcore.sphere_velocity.default
    torch.library.opcheck(op, arguments(dtype, linear, kappa, grad=True))
    if not kappa:
        largest = torch.ops.dlcore.sphere_largest.default
        torch.library.opcheck(largest, (*arguments(dtype, linear, kappa, grad=False)[:3], 5))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (False, False)])
def test_opcheck_backward(linear, wanted):
    args = arguments(torch.float32, linear, True, grad=False)
    outputs = torch.ops.dlcore.sphere_velocity(*args)
    backward = torch.ops.dlcore.sphere_velocity_backward.default
    torch.library.opcheck(backward, (torch.ones_like(outputs[0]), *outputs, *args, *wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_correct(dtype):
    x, score = (unit(*LEAD, DIM, seed=n).to(dtype).requires_grad_() for n in range(2))
    step = torch.full(LEAD, 0.1, requires_grad=True)
    torch.library.opcheck(torch.ops.dlcore.sphere_correct.default, (x, score, step, rng.key(3)))


X, E, A = unit(4, DIM), unit(VOCAB, DIM, seed=1), unit(4, VOCAB, seed=2)
HEAD = LinearLogits(X[:, :4], E[:, :4].contiguous())
V = E[:4] - (E[:4] * X).sum(-1, keepdim=True) * X
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "slerp": lambda t: sphere.velocity(X, A, E, noise=t),
    "vmf": lambda t: sphere.velocity(X, HEAD, E, path="vmf", kappa=t),
    "cauchy": lambda t: sphere.velocity(X, A * t, E, path="cauchy"),
    "top_k": lambda t: sphere.velocity(X, A * t, E, top_k=3),
    "top_k, vmf": lambda t: sphere.velocity(X, HEAD, E, path="vmf", kappa=t, top_k=3),
    "score": lambda t: sphere.posterior_score(X, A, E, t),
    "posterior logits": lambda t: sphere.posterior_logits(X, E, noise=t),
    "weight": lambda t: sphere.radial_weight(A, 9, path="vmf", kappa=t),
    "step": lambda t: sphere.step(X, V, t),
    "correct": lambda t: sphere.correct(X, V, t, key=rng.key(3)),
    "all of a step": lambda t: sphere.correct(
        sphere.step(X, sphere.velocity(X, A, E, path="vmf", kappa=t), 0.1, retraction="normalize"),
        sphere.posterior_score(X, A, E, t),
        0.01,
        key=rng.key(3),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_without_recompiling(name):
    function = CALLS[name]
    call, counter = compiled(function)
    for value in (0.3, 0.5, 0.7, 0.9, 1.0):
        t = torch.tensor(value)
        torch.testing.assert_close(call(t), function(t))
    assert counter.frame_count == 1


def test_gradients_under_compile():
    def loss(x: Tensor, a: Tensor, e: Tensor, t: Tensor) -> Tensor:
        return (sphere.velocity(x, a, e, path="vmf", kappa=t) * V).sum() + sphere.velocity(
            x, a, e, noise=t
        ).sum()

    leaves = [t.clone().requires_grad_() for t in (X, A, E)]
    call, counter = compiled(loss)
    for value in (0.3, 0.9):
        t = torch.tensor(value)
        got, wanted = (torch.autograd.grad(f(*leaves, t), leaves) for f in (call, loss))
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1
