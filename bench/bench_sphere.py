"""The unit sphere: maps with and without their gradients, and draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers_sphere as peers
from bench.case import COMPARED, Case, Function, Shape, Work, close, name, nbytes, normal, rows, rows_agree
from dlcore import rng, sphere
from dlcore.sphere import cauchy, vmf

SHAPE, TINY = (8192, 768), (6, 33)
KAPPA = 200.0


def _points(shape: Shape, count: int) -> list[Tensor]:
    return [sphere.normalize(normal(shape, seed=i)) for i in range(count)]


def _agree(peer: Function, gradients: bool, points: tuple[int, ...]) -> Callable[..., None]:
    """A check against `peer` in float64; gradients at points count across them only, as formulas differ off
    the sphere."""

    def across(result: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        grads = list(result[1:])
        for i in points:
            x = inputs[i].detach().to(grads[i].dtype)[: len(grads[i])]
            grads[i] = grads[i] - (grads[i] * x).sum(-1, keepdim=True) * x
        return (result[0], *grads)

    def check(result: Any, *inputs: Tensor) -> None:
        if not gradients:
            return rows_agree(peer)(result, *inputs)
        few = [x.detach()[:COMPARED].double().requires_grad_() for x in inputs]
        out = peer(*few)
        want = (out.detach(), *torch.autograd.grad(out.sum(), few))
        got = tuple(x[:COMPARED] for x in result)
        for a, b in zip(across(got, inputs), across(want, tuple(few)), strict=True):
            close(a, b)

    return check


def _map(
    function: Function,
    peer: Function,
    arguments: Callable[[Shape], tuple[Tensor, ...]],
    points: tuple[int, ...],
) -> Function:
    """A builder of work, with gradients of all arguments or none; those at `points` are unit vectors."""

    def build(shape: Shape, gradients: bool) -> Work:
        inputs = arguments(shape)
        vectors = [x for x in inputs if x.dim() == 2]
        moved = nbytes(*vectors, vectors[0])
        # Backward reads the arguments and what comes from above, and writes a gradient of each.
        backward = nbytes(*vectors, *vectors, vectors[0]) if gradients else 0
        return Work(
            inputs=inputs,
            functions={"dlcore": function, "eager": peer, "copies": _copies(len(vectors))},
            check=_agree(peer, gradients, points),
            bytes=moved + backward,
            differentiate=len(inputs) if gradients else 0,
            unlike=("copies",),
        )

    return build


def _copies(vectors: int) -> Function:
    """Copies into fresh memory that move as much as a map of so many vectors: the ceiling."""

    def copies(x: Tensor, *_: Tensor) -> Tensor:
        out = torch.empty_like(x)
        whole, half = divmod(vectors + 1, 2)
        for _round in range(whole):
            out.copy_(x)
        if half:
            out[: len(x) // 2].copy_(x[: len(x) // 2])
        return out

    return copies


MAPS = {
    "slerp": _map(
        sphere.slerp,
        peers.slerp,
        lambda s: (*_points(s, 2), torch.linspace(0.05, 0.95, s[0])),
        points=(0, 1),
    ),
    "log_map": _map(sphere.log_map, peers.log_map, lambda s: tuple(_points(s, 2)), points=(0, 1)),
    "exp_map": _map(
        sphere.exp_map, peers.exp_map, lambda s: (_points(s, 1)[0], 0.03 * normal(s, seed=5)), points=()
    ),
    "rotate": _map(sphere.rotate, peers.rotate, lambda s: (normal(s, seed=5), *_points(s, 2)), points=(1, 2)),
}


def _sample(shape: Shape, law: str) -> Work:
    (mean,), kappa = _points(shape, 1), torch.full(shape[:1], KAPPA)
    key = rng.key(7)
    module = {"vmf": vmf, "cauchy": cauchy}[law]

    def check(result: Tensor, mean: Tensor, _: Tensor) -> None:
        torch.testing.assert_close(result.norm(dim=-1), torch.ones(len(result)), rtol=0, atol=1e-5)
        if law == "vmf" and len(result) > 1000:
            wanted = peers.mean_cosine(KAPPA, shape[1])
            assert abs(float((result * mean).sum(-1).mean()) - wanted) < 0.01

    return Work(
        inputs=(mean, kappa),
        functions={
            "dlcore": lambda m, k: module.sample(m, k, key=key),
            "masked loop": peers.sample_vmf,
            "masked loop, reflection": peers.sample_von_mises_fisher,
            "normals alone": lambda m, _: torch.randn_like(m),
        },
        check=check,
        bytes=0,
        unlike=("normals alone",),
    )


def _case(op: str, gradients: bool) -> Case:
    return Case(
        f"sphere.{op}",
        SHAPE,
        TINY,
        lambda shape: MAPS[op](shape, gradients),
        "forward, backward" if gradients else "",
        providers=("dlcore", "eager", "compile", *(() if gradients else ("copies",))),
    )


LOOPS = ("dlcore", "masked loop", "masked loop, reflection", "normals alone")
CASES = (
    *(_case(op, gradients) for op in MAPS for gradients in (False, True)),
    Case("vmf.sample", SHAPE, TINY, lambda s: _sample(s, "vmf"), f"κ={KAPPA:g}", "sphere.sample", LOOPS),
    Case("cauchy.sample", SHAPE, TINY, lambda s: _sample(s, "cauchy"), "", "sphere.sample", ("dlcore",)),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_sphere(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
