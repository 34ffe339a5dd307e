"""The ops of bits under opcheck and torch.compile(fullgraph=True)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from dlcore import _dispatch, bits, rng

KEY = rng.key(5)
SHAPE = (2, 3, 33)
DIFFERENTIABLE = ("bits.matched_filter", "bits.posterior", "bits.loss")
OPS = [op for op in _dispatch.ops() if op.startswith("bits.")]


def arguments(op: str, dtype: torch.dtype) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    grad = op in DIFFERENTIABLE
    x, residual, clean = (torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(3))
    x, residual = x.requires_grad_(grad), residual.requires_grad_(grad)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    per_row, per_bit = (torch.rand(*s, generator=generator).to(wide) + 0.5 for s in ((2, 1, 1), SHAPE))
    coefficients = torch.stack([per_bit, per_bit / 2, per_bit / 3])
    loss = (residual, x, clean, per_row, 0.0, 1.0, 30.0, True)
    packs: dict[str, tuple[Any, ...]] = {
        "bits.encode": (torch.arange(6).view(2, 3), 5, True, True, -1.0, 1.0),
        "bits.decode": (x, True, False, 0.5, 9),
        "bits.matched_filter": (x, per_row, 0.5, 30.0),
        "bits.posterior": (x, residual, per_bit, 0.5, 30.0),
        "bits.step": (x, residual, coefficients, 0.0, 1.0, 30.0, KEY),
        "bits.perturb": (x, per_row, rng.split(KEY, (2, 3))),
        "bits.loss": loss,
        "bits.loss_backward": (torch.ones(2, 3, dtype=wide), *loss, True),
    }
    return packs[op]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(op, dtype):
    if op == "bits.loss_backward" and dtype == torch.float64:
        pytest.skip("the reference calls autograd, which does not run below opcheck's dispatch modes")
    function = getattr(torch.ops.dlcore, op.replace(".", "_")).default
    torch.library.opcheck(function, arguments(op, dtype))


def test_opcheck_without_optional_arguments():
    x, slope = torch.randn(SHAPE, requires_grad=True), torch.ones(1)
    torch.library.opcheck(torch.ops.dlcore.bits_posterior.default, (x, None, slope, 0.5, 30.0))
    coefficients = torch.ones(3, 1)
    step = torch.ops.dlcore.bits_step.default
    torch.library.opcheck(step, (x.detach(), None, coefficients, -1.0, 1.0, 30.0, None))


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=counter), counter


X, R = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
B = (X > 0).float()
ROWS = torch.linspace(1, 2, 4)
RANKING = torch.randperm(200, generator=torch.Generator().manual_seed(2))
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "step": lambda s: bits.step(X, R, s, 0.5 * s),
    "step with numbers": lambda s: bits.step(X * s, R, 0.5, 0.25, gamma_next=0.1, key=KEY),
    "churned step": lambda s: bits.step(X, R, s * ROWS, s, gamma_next=0.1 * s, noise_scale=s, key=KEY),
    "step per bit": lambda s: bits.step(X, None, s * B + 1, 0.5 * s * B, coding="pm1"),
    "posterior": lambda s: bits.posterior(X, s, R),
    "matched filter": lambda s: bits.matched_filter(X, s),
    "churn": lambda s: bits.churn(X, s, 0.2 * s, key=KEY),
    "corrupt": lambda s: bits.corrupt(B, s, key=rng.split(KEY, 4)),
    "squared": lambda s: bits.loss(R, X, B, s),
    "bce": lambda s: bits.loss(R, X, B, s, kind="bce"),
    "euler and heun": lambda s: bits.heun_step(bits.euler_step(X, B, s, 0.5 * s), B, R, s, 0.5 * s),
    "gamma": lambda s: bits.churn_gamma(s, 5.0, 50, window=(0.6, 1.5)),
    "inputs": lambda s: bits.scale_input(X, s) * bits.edm_weight(s),
    "codes": lambda s: bits.decode(
        bits.encode(torch.arange(200), 8, gray=True, ranking=RANKING) * s, gray=True, ranking=RANKING
    ),
    "patch": lambda s: bits.unpatch(bits.patch(X * s, 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_without_recompiling(name):
    function = CALLS[name]
    call, counter = compiled(function)
    for value in (0.5, 0.7, 1.0, 1.3, 2.0):
        s = torch.tensor(value)
        torch.testing.assert_close(call(s), function(s))
    assert counter.frame_count == 1


def test_python_floats_recompile_at_most_once_more():
    call, counter = compiled(lambda x, s: bits.step(x, R, s, 0.5 * s))
    for value in (0.5, 0.7, 0.9, 1.3, 2.0):
        torch.testing.assert_close(call(X, value), bits.step(X, R, value, 0.5 * value))
    assert counter.frame_count <= 2


def test_dynamic_batches_compile_twice_at_most():
    call, counter = compiled(lambda x: bits.step(x, None, 0.5, 0.4)[0])
    for batch in (2, 3, 4, 7, 9):
        assert call(torch.randn(batch, 8)).shape == (batch, 8)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", ["squared", "bce"])
def test_training_step_compiles(kind):
    def total(residual: Tensor, x: Tensor, s: Tensor) -> Tensor:
        return (bits.edm_weight(s) * bits.loss(residual * s, x, B, s, kind=kind)).sum()

    call, counter = compiled(total)
    for value in (0.5, 0.8):
        found = []
        for function in (call, total):
            leaves = [t.clone().requires_grad_() for t in (R, X)]
            found.append(torch.autograd.grad(function(*leaves, torch.tensor(value)), leaves))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_meta_device_gives_shapes():
    big = torch.empty(2**17, 2**18, device="meta", dtype=torch.bfloat16)
    assert bits.step(big, big, 0.5, 0.4)[0].shape == big.shape
    assert bits.loss(big, big, big, 0.5).shape == (2**17,)
    assert bits.decode(torch.empty(2**30, 16, device="meta")).shape == (2**30,)


def test_autocast_leaves_the_precision_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moved, probs = bits.step(X, R, 0.5, 0.4)
    assert moved.dtype == probs.dtype == torch.float32
    assert torch.equal(probs, bits.posterior(X, 0.5, R))
