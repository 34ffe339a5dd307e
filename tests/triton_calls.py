"""One op on Triton and on another backend, with the tensors where each wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, on_device
from torch import Tensor

import dlcore

#: numpy, under the interpreter, warns of infinities that the kernels mean.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def moved(args: tuple[Any, ...], device: str, wide: bool = False) -> list[Any]:
    """Arguments on a device, strides kept; floating ones in float64 if `wide`."""
    found: list[Any] = []
    for x in args:
        if isinstance(x, Tensor):
            x = on_device(x, device)
            x = x.double() if wide and x.is_floating_point() else x
        found.append(x)
    return found


def call(op: str, backend: str, *args: Any, wide: bool = False) -> tuple[Tensor, ...]:
    """What the op gives on a backend, on the CPU."""
    function = getattr(torch.ops.dlcore, op.replace(".", "_"))
    with dlcore.use_backend(backend):
        result = function(*moved(args, DEVICE if backend in ("triton", "cuda") else "cpu", wide))
    return tuple(x.cpu() for x in (result if isinstance(result, (tuple, list)) else (result,)))


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def captured(call: Callable[[], tuple[Tensor, ...]], warm: bool = True) -> Callable[[], tuple[Tensor, ...]]:
    """Replays of a CUDA graph of the call, which give what it gave, anew; without a GPU, the call.

    `warm`: the call is made once before, for what is compiled or looked up at first.
    """
    if DEVICE == "cpu":
        return call
    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float, atol: float) -> None:
    """Tokens equal, numbers close, NaN in the same places."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if a.is_floating_point():
            torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol, equal_nan=True)
        else:
            assert torch.equal(a, b)
