"""The sphere's ops under opcheck and torch.compile(fullgraph=True)."""

from __future__ import annotations

import pytest
import torch
from oracles import check_compiled
from sphere_points import normal, unit
from torch import Tensor

from dlcore import rng, sphere
from dlcore._ops.sphere import MAPS
from dlcore.sphere import cauchy, vmf

KEY = rng.key(5)


def arguments(name: str, dtype: torch.dtype, grad: bool) -> tuple[Tensor, ...]:
    wide = torch.promote_types(dtype, torch.float32)
    found = [
        torch.rand(2, 3, generator=torch.Generator().manual_seed(i)).to(wide)
        if a == "t"
        else unit(2, 3, 5, seed=i).to(dtype)
        for i, a in enumerate(MAPS[name])
    ]
    return tuple(x.requires_grad_(grad) for x in found)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.dlcore, f"sphere_{name}").default
    torch.library.opcheck(op, arguments(name, dtype, grad=True))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("every", [True, False])
def test_opcheck_backward(name: str, every: bool) -> None:
    """Not float64: the reference calls autograd, which does not run below opcheck's dispatch modes."""
    inputs = arguments(name, torch.float32, grad=False)
    grad = torch.ones_like(getattr(torch.ops.dlcore, f"sphere_{name}")(*inputs))
    op = getattr(torch.ops.dlcore, f"sphere_{name}_backward").default
    needed = [every or i == len(inputs) - 1 for i in range(len(inputs))]
    torch.library.opcheck(op, (grad, needed, *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reject", [True, False])
def test_opcheck_sample(dtype: torch.dtype, reject: bool) -> None:
    op = torch.ops.dlcore.sphere_sample.default
    torch.library.opcheck(op, (unit(2, 3, 5).to(dtype), torch.tensor(3.0).double(), KEY, reject))


@pytest.mark.slow
def test_fullgraph_without_recompiling() -> None:
    x, y = unit(3, 7, seed=1), unit(3, 7, seed=2)

    def everything(t: Tensor, kappa: Tensor) -> tuple[Tensor, ...]:
        return (
            sphere.slerp(x, y, t),
            sphere.exp_map(x, t * sphere.log_map(x, y)),
            sphere.rotate(y, x, sphere.normalize(x + t * y)),
            sphere.angle(x, sphere.project(y, x)),
            vmf.sample(x, kappa, key=KEY),
            vmf.log_prob(x, y, kappa),
            vmf.score(x, y, kappa),
            cauchy.sample(x, kappa, key=KEY),
            cauchy.log_prob(x, y, kappa),
            cauchy.score(x, y, kappa),
            cauchy.posterior_logits(x, y, kappa),
            cauchy.rapidity(kappa, 7),
            vmf.mean_resultant(kappa, 7, complement=True),
            vmf.variance(kappa, 7),
            vmf.entropy(kappa, 7),
            vmf.kl_to_uniform(kappa, 7),
        )

    check_compiled(everything, [(torch.tensor(t), torch.tensor(9 * t)) for t in (0.1, 0.2, 0.5, 0.7, 1.0)])


def test_numbers_compile_twice_at_most() -> None:
    """A float is specialised on first sight, then a symbol."""
    x, y = unit(3, 7, seed=1), unit(3, 7, seed=2)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(t: float) -> Tensor:
        return sphere.slerp(x, y, t) + vmf.sample(x, 9 * t, key=KEY) + vmf.entropy(t, 7)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for t in (0.1, 0.2, 0.5, 0.7):
        torch.testing.assert_close(compiled(t), step(t))
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_gradients_compile() -> None:
    kappa, t = torch.rand(3, generator=torch.Generator().manual_seed(3)), torch.tensor(0.3)
    leaves = [normal(3, 7, seed=1), normal(3, 7, seed=2), kappa, t]

    def loss(x: Tensor, y: Tensor, k: Tensor, t: Tensor) -> Tensor:
        x, y = sphere.normalize(x), sphere.normalize(y)
        moved = sphere.rotate(sphere.slerp(x, y, t), x, y) + sphere.exp_map(x, 0.1 * sphere.log_map(x, y))
        law = vmf.log_prob(moved, y, k) + vmf.kl_to_uniform(k, 7) + sphere.angle(x, y)
        return (law + vmf.mean_resultant(k, 7) + cauchy.log_prob(x, y, k)).sum()

    wanted = [x.requires_grad_() for x in leaves]
    eager = torch.autograd.grad(loss(*wanted), wanted)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*wanted), wanted), eager, strict=True):
        torch.testing.assert_close(got, want)
