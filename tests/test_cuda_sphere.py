"""The sphere's CUDA kernels: values, gradients and draws against float64, edges, strides, every way to share out
a row."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from sphere_points import normal, turned, unit
from test_sphere import MAPS, error, rounded, run
from torch import Tensor
from triton_calls import call

import dlcore
from dlcore import rng, sphere
from dlcore.sphere import cauchy, vmf

pytestmark = [
    pytest.mark.usefixtures("cuda_kernels", "guarded"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (rows, d): 16, 8 and 4 rows a warp, with rows left over; one; one for two warps or three; more than a tile.
SHAPES = [(21, 2), (13, 37), (9, 100), (3, 512), (2, 768), (2, 1301), (2, 4500), (2, 9001)]


def here(name: str, arguments: tuple[Tensor, ...], dtype: torch.dtype, given: torch.dtype | None = None):
    """`run` on the CUDA kernels, its results on the CPU."""
    with dlcore.use_backend("cuda"):
        got = run(MAPS[name][0], tuple(a.to(DEVICE) for a in arguments), dtype, given)
    return tuple(g.cpu() for g in got)


def worst(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest error of a row relative to the row, or to the gradient that came from above."""
    return max(error(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("rows", "d"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_and_gradients(name: str, rows: int, d: int, dtype: torch.dtype) -> None:
    function, arguments = MAPS[name]
    inputs = arguments(rows, d)
    got = here(name, inputs, dtype)
    assert dlcore.last_backend(f"sphere.{name}") == "cuda"
    assert dlcore.last_backend(f"sphere.{name}_backward") == "cuda"
    want = run(function, rounded(inputs, dtype), torch.float64, given=dtype)
    assert worst(got, want) < (2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)
    assert got[0].dtype == (torch.float32 if name == "angle" else dtype)
