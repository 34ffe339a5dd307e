"""Every op under opcheck, torch.compile(fullgraph=True), the meta device and vmap-free tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import dlcore
from dlcore import LinearLogits, _dispatch, categorical, rng

KEY = rng.key(5)
LEAD, VOCAB = (2, 3), 300


def arguments(op: str, dtype: torch.dtype, linear: bool, grad: bool) -> tuple[Any, ...]:
    """A call of the registered op with every optional argument that it has."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)

    def head() -> tuple[Tensor | None, ...]:
        return (
            (normal(*LEAD, 8), normal(VOCAB, 8), normal(VOCAB))
            if linear
            else (normal(*LEAD, VOCAB), None, None)
        )

    z = torch.randint(0, VOCAB, LEAD, generator=generator)
    shift, temperature = torch.tensor(0.5), torch.full(LEAD, 0.7)
    level, slope = torch.full(LEAD, 0.4, dtype=torch.float64), torch.full((), -1.0, dtype=torch.float64)
    row = (z, shift, temperature, 5.0, 2)
    coefficients = torch.tensor([1.0, 1, 0.2, 1, 0.5, 0], dtype=torch.float64)
    packs: dict[str, tuple[Any, ...]] = {
        "rng.fold_in": (KEY.expand(3, 2), torch.arange(3)),
        "rng.uniform": (KEY, [4, 5], torch.float32),
        "rng.normal": (rng.split(KEY, 3), [5], torch.float64),
        "rng.gumbel": (KEY, [], torch.float32),
        "categorical.stats": (*head(), *row),
        "categorical.sample": (*head(), *row, torch.tensor(20), torch.tensor(0.9), torch.tensor(0.01), KEY),
        "categorical.sample_mixture": (*head(), z, coefficients, -1, shift, temperature, 5.0, 2, KEY),
        "categorical.log_probs": (*head(), z, z, shift, 5.0, 2),
        "categorical.kl": (*head(), *head(), temperature),
        "categorical.expectation": (*head(), normal(VOCAB, 4), temperature, 5.0, 2),
        "uniform.nelbo": (*head(), z, (z + 1) % VOCAB, level, slope, shift),
    }
    return packs[op]


FORWARD = [op for op in _dispatch.ops() if not op.endswith("_backward")]
NOISE = [op for op in FORWARD if op.startswith("rng.")]
LOSSES = ["categorical.log_probs", "categorical.kl", "categorical.expectation", "uniform.nelbo"]


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("linear", [False, True])
def test_opcheck(op, dtype, linear):
    if op in NOISE and (linear or dtype != torch.float32):
        pytest.skip("has no logits")
    function = getattr(torch.ops.dlcore, op.replace(".", "_")).default
    torch.library.opcheck(function, arguments(op, dtype, linear, grad=op in LOSSES))


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("linear", [False, True])
def test_opcheck_backward(op, linear):
    """The backward ops, on what a forward pass saves."""
    args = arguments(op, torch.float32, linear, grad=False)
    name = op.replace(".", "_")
    result = getattr(torch.ops.dlcore, name)(*args)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    saved = outputs if op == "categorical.expectation" else outputs[-1:]
    grad = torch.ones_like(outputs[0])
    torch.library.opcheck(getattr(torch.ops.dlcore, f"{name}_backward").default, (grad, *saved, *args))


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=counter), counter


X, Z = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1)), torch.arange(4)
HEAD = LinearLogits(X[:, :4], X.T)
MIX = torch.tensor([1.0, 1, 0.2, 1, 0.5, 0], dtype=torch.float64)
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "stats": lambda t: categorical.stats(X, Z, temperature=t).entropy,
    "sample": lambda t: categorical.sample(X, temperature=t, key=KEY).tokens,
    "draw": lambda t: categorical.sample(X, Z, temperature=t, top_k=5, key=KEY).logprob,
    "mixture": lambda t: categorical.sample_mixture(X, Z, MIX, temperature=t, key=KEY),
    "kl": lambda t: categorical.kl(X, X.flip(0), temperature=t),
    "expectation": lambda t: categorical.expectation(X, X.T, temperature=t),
    "cross_entropy": lambda t: categorical.cross_entropy(X * t, Z),
    "linear": lambda t: categorical.sample(HEAD, temperature=t, key=KEY).tokens,
    "noise": lambda t: rng.normal(rng.fold_in(KEY, 3), (4,)) * t,
}


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph_without_recompiling(name):
    function = CALLS[name]
    call, counter = compiled(function)
    for value in (0.5, 0.7, 1.0, 1.3, 2.0):
        t = torch.tensor(value)
        torch.testing.assert_close(call(t), function(t))
    assert counter.frame_count == 1


def test_python_floats_recompile_at_most_once_more():
    """A float is specialised on first sight, then a symbol."""
    call, counter = compiled(lambda x, t: categorical.sample(x, temperature=t, key=KEY).tokens)
    for value in (0.5, 0.7, 0.9, 1.3, 2.0):
        assert torch.equal(call(X, value), categorical.sample(X, temperature=value, key=KEY).tokens)
    assert counter.frame_count <= 2


def test_a_fresh_key_in_the_graph_follows_manual_seed():
    call, _ = compiled(lambda x: categorical.sample(x).tokens)
    torch.manual_seed(3)
    eager = categorical.sample(X).tokens
    torch.manual_seed(3)
    first = call(X)
    assert torch.equal(first, eager)
    assert not torch.equal(first, call(X))


def test_dynamic_batches_compile_twice_at_most():
    call, counter = compiled(lambda x: categorical.sample(x, key=KEY).tokens)
    for batch in (2, 3, 4, 7, 9):
        assert call(torch.randn(batch, VOCAB)).shape == (batch,)
    assert counter.frame_count <= 2


def test_training_step_compiles():
    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return categorical.cross_entropy(LinearLogits(x, weight), Z).sum()

    weight = torch.randn(50, VOCAB, generator=torch.Generator().manual_seed(2)).requires_grad_()
    call, _ = compiled(loss)
    call(X, weight).backward()
    got, weight.grad = weight.grad, None
    loss(X, weight).backward()
    torch.testing.assert_close(got, weight.grad)


def test_meta_device_gives_shapes():
    big = torch.empty(2**17, 2**18, device="meta", dtype=torch.bfloat16)
    key = torch.empty(2, dtype=torch.int64, device="meta")
    draw = torch.ops.dlcore.categorical_sample(big, *(None,) * 10, key)
    assert draw[0].shape == (2, 2**17)
    assert dlcore.categorical.stats(big).entropy.shape == (2**17,)
