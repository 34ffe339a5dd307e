"""Flows under torch.compile(fullgraph=True): one graph, whatever the times are, agreeing with eager."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from oracles import check_compiled
from torch import Tensor

from dlcore import rng
from dlcore.process import flow

KEY = rng.key(5)
X, CLEAN = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))


def denoise(x: Tensor, t: Tensor) -> Tensor:
    return x / (1 + t.unsqueeze(-1) ** 2)


def every_step(x: Tensor, clean: Tensor, t: Tensor, t_next: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    return (
        flow.interpolate(clean, t, key=key),
        flow.velocity_from_clean(x, clean, t, floor=0.05),
        flow.step(x, clean, t, t_next),
        flow.step(x, clean, t, t_next, path="vp", refresh=0.3, key=key),
        flow.step(x, clean, t_next, t, path="edm"),
        flow.heun_step(x, denoise, t_next, t, path="edm"),
        flow.renoise(x, t, t_next, path="lognsr", key=key),
        flow.sde_step(x, denoise, t, t_next, t, key=key),
        flow.guide(clean, x, t),
        flow.matched_filter(x, clean[0], t).hidden,
        *flow.edm_precondition(t),
    )


def test_tensor_times_never_compile_again() -> None:
    check_compiled(
        every_step,
        [(X, CLEAN, torch.tensor(a), torch.tensor(b), KEY) for a, b in ((0.1, 0.2), (0.3, 0.9), (0.0, 0.5))],
    )


def test_numbers_as_times_compile_at_most_once_more() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, c, t: flow.step(x, c, t, t + 0.05), fullgraph=True, backend=counter)
    for t in (0.1, 0.2, 0.3, 0.4, 0.5):
        torch.testing.assert_close(compiled(X, CLEAN, t), flow.step(X, CLEAN, t, t + 0.05))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("path", ["linear", "vp", "edm"])
def test_gradients_under_compile(path: str) -> None:
    torch._dynamo.reset()
    t, t_next = torch.tensor(0.4), torch.tensor(0.7 if path != "edm" else 0.2)
    compiled = torch.compile(
        lambda x, c: flow.step(x, c, t, t_next, path=path), fullgraph=True, backend="aot_eager"
    )
    grads = []
    for function in (compiled, lambda x, c: flow.step(x, c, t, t_next, path=path)):
        x, clean = X.clone().requires_grad_(), CLEAN.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(x, clean).square().sum(), (x, clean)))
    torch.testing.assert_close(*grads)
