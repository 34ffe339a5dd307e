"""Sharded calls in one graph of torch.compile, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import dlcore
from dlcore import categorical, distributed

B, V, D = 4, 700, 8
KEY = dlcore.rng.key(20261126)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


HIDDEN, WEIGHT = normal(B, D), normal(V, D, seed=1)
TARGET = torch.randint(0, V, (B,), generator=torch.Generator().manual_seed(2))
#: Of a head and a temperature.
CALLS: dict[str, Callable[..., Any]] = {
    "stats": lambda head, t: categorical.stats(head, temperature=t).entropy,
    "sample": lambda head, t: categorical.sample(head, temperature=t, key=KEY).tokens,
    "sample top_k": lambda head, t: categorical.sample(head, temperature=t, top_k=5, key=KEY).tokens,
    "cross_entropy": lambda head, t: categorical.cross_entropy(head, TARGET),
}


def compiled(group: dist.ProcessGroup, name: str) -> None:
    torch.compiler.reset()
    size = V // 2
    here = slice(dist.get_rank(group) * size, (dist.get_rank(group) + 1) * size)

    def step(hidden: Tensor, weight: Tensor, t: Tensor) -> Any:
        return CALLS[name](dlcore.LinearLogits(hidden, weight, group=group), t)

    whole = [x.clone().requires_grad_() for x in (HIDDEN, WEIGHT)]
    mine = [whole[0].detach().clone().requires_grad_(), WEIGHT[here].clone().requires_grad_()]
    # Whether a row keeps more than was sent is read: a break.
    function = torch.compile(step, backend="aot_eager", fullgraph=name != "sample top_k")
    for t in (0.7, 1.3):
        temperature = torch.tensor(t)
        want = CALLS[name](dlcore.LinearLogits(*whole), temperature)
        got = function(*mine, temperature)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        if name == "cross_entropy":
            grads = torch.autograd.grad(got.sum(), mine)
            expected = torch.autograd.grad(want.sum(), whole)
            torch.testing.assert_close(grads, (expected[0], expected[1][here]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_sharded_heads(ranks4: ranks.Ranks, name: str) -> None:
    ranks4.run(2, compiled, name)


def compiled_dtensor(group: dist.ProcessGroup) -> None:
    torch.compiler.reset()
    mesh = DeviceMesh.from_group(group, "cpu")
    logits = normal(B, V, seed=3)
    spread, target = (distribute_tensor(x, mesh, [Shard(0)]) for x in (logits, TARGET))
    keys = distribute_tensor(dlcore.rng.split(KEY, B), mesh, [Shard(0)])
    spread.requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return categorical.cross_entropy(x, y)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def draw(x: Tensor, k: Tensor) -> Tensor:
        return torch.ops.dlcore.categorical_sample(x, *[None] * 10, k)[0]

    plain = logits.clone().requires_grad_()
    want = categorical.cross_entropy(plain, TARGET)
    got = loss(spread, target)
    torch.testing.assert_close(got.full_tensor(), want)
    grad = torch.autograd.grad(got.sum(), spread)[0].full_tensor()
    torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), plain)[0])
    tokens = draw(spread.detach(), keys)[0].full_tensor()
    assert torch.equal(tokens, categorical.sample(logits, key=KEY).tokens)


def test_dtensors_over_rows(ranks4: ranks.Ranks) -> None:
    ranks4.run(2, compiled_dtensor)


def test_keys_of_a_part() -> None:
    function = torch.compile(
        lambda key: distributed.row_keys(key, (6, 3), slice(2, 5)), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(function(KEY), distributed.row_keys(KEY, (6, 3), slice(2, 5)))
