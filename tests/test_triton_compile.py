"""Triton behind torch: schemas, fakes, autograd and compiled graphs."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE, ON_DEVICE, device_runs_cpu_tensors
from test_compile import arguments
from triton_calls import moved, quiet

import dlcore
from dlcore import attention, categorical, rng
from dlcore.process import uniform

pytestmark = quiet

OPS = [
    "categorical.stats",
    "categorical.sample",
    "categorical.sample_mixture",
    "categorical.log_probs",
    "categorical.kl",
    "categorical.expectation",
    "categorical.sample_expectation",
    "uniform.nelbo",
]


@pytest.mark.slow
@pytest.mark.parametrize("op", [*OPS, "rng.fold_in", "rng.normal"])
@pytest.mark.parametrize("linear", [False, True])
def test_results_are_as_the_fake_says(op, linear):
    function = getattr(torch.ops.dlcore, op.replace(".", "_")).default
    args = moved(arguments(op, torch.bfloat16, linear, grad=False), DEVICE)
    with dlcore.use_backend("triton"):
        torch.library.opcheck(function, tuple(args), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(ON_DEVICE != "triton", reason="the tables walk on other kernels")
def test_case_tables_that_walk_on_a_gpu():
    """What is on the CPU goes to Triton's kernels and comes back, and so does what they write."""
    x, rows = torch.randn(2, 300), torch.randn(3, 1, 2, 2, 16).unbind(0)
    caches = [attention.KVCache(1, 1, 8, 2, 16) for _ in range(2)]
    expected = categorical.sample(x, key=rng.key(1)).tokens, attention.decode(*rows, caches[0], 0)
    with device_runs_cpu_tensors(), dlcore.use_backend("triton"):
        found = categorical.sample(x, key=rng.key(1)).tokens, attention.decode(*rows, caches[1], 0)
    assert dlcore.last_backend("categorical.sample") == dlcore.last_backend("attention.decode") == "triton"
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])
    for a, b in zip(caches[0].view(0), caches[1].view(0), strict=True):
        assert torch.equal(a[:, :2], b[:, :2])


def _step(x: torch.Tensor, head: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, ...]:
    key = rng.key(3, device=x.device)
    logits = dlcore.LinearLogits(x, head)
    draw = categorical.sample(logits, temperature=temperature, key=key)
    z = uniform.step(logits, draw.tokens, 0.3, 0.6, key=rng.fold_in(key, 1))
    loss = uniform.nelbo(logits, z, draw.tokens, 0.5, -1.0) + categorical.cross_entropy(logits, z)
    return draw.tokens, z, loss


def test_a_compiled_step_and_its_gradients():
    """Those of the CPU kernels; a new temperature compiles nothing anew."""
    generator = torch.Generator().manual_seed(0)
    x, head = torch.randn(2, 3, 8, generator=generator), torch.randn(700, 8, generator=generator)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(_step, fullgraph=True, backend=counter)
    for value in (0.7, 1.1):
        temperature = torch.tensor(value)
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in (x, head)]
        with dlcore.use_backend("triton"):
            *tokens, loss = compiled(*leaves, temperature.to(DEVICE))
            grads = torch.autograd.grad(loss.sum(), leaves)
        assert dlcore.last_backend("uniform.nelbo_backward") == "triton"
        expected = [t.clone().requires_grad_() for t in (x, head)]
        *drawn, want = _step(*expected, temperature)
        for a, b in zip(tokens, drawn, strict=True):
            assert torch.equal(a.cpu(), b)
        torch.testing.assert_close(loss.cpu(), want, rtol=1e-4, atol=1e-4)
        for a, b in zip(grads, torch.autograd.grad(want.sum(), expected), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
