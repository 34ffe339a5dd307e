"""Triton's bits and sphere behind torch: results are as the fakes say, whatever the arguments' layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE
from sphere_points import normal, unit

import dlcore
from dlcore import rng

KEY = rng.key(3)
X, Y, T = unit(2, 3, 8, seed=1), unit(2, 3, 8, seed=2), torch.rand(2, 3)
TABLE, LOGITS, SLOPE = unit(40, 8, seed=3), normal(2, 3, 40), torch.ones(2, 3, 1)
HEAD = (LOGITS, None, None)
KAPPA = torch.tensor(4.0, dtype=torch.float64)
CODE = (0.0, 1.0, 30.0)

CALLS: dict[str, tuple[Any, ...]] = {
    "bits.encode": (torch.arange(6).view(2, 3), 5, True, False, 0.0, 1.0),
    "bits.decode": (X, True, False, 0.5, 0),
    "bits.matched_filter": (X, SLOPE, 0.5, 30.0),
    "bits.posterior": (X, Y, SLOPE, 0.5, 30.0),
    "bits.step": (X, Y, SLOPE.expand(3, 2, 3, 1), *CODE, KEY),
    "bits.perturb": (X, SLOPE, KEY),
    "bits.loss": (Y, X, X, SLOPE, *CODE, True),
    "bits.loss_backward": (T, Y, X, X, SLOPE, *CODE, True, True),
    "sphere.normalize": (X,),
    "sphere.normalize_backward": (Y, [True], X),
    "sphere.angle": (X, Y),
    "sphere.angle_backward": (T, [True, False], X, Y),
    "sphere.slerp": (X, Y, T),
    "sphere.slerp_backward": (Y, [True, False, True], X, Y, T),
    "sphere.rotate": (X, X, Y),
    "sphere.sample": (X, KAPPA, KEY, True),
    "sphere.correct": (X, Y, T, KEY),
    "sphere.correct_backward": (Y, X, Y, T, KEY),
    "sphere.largest": (*HEAD, 3),
    "sphere.velocity": (*HEAD, X, TABLE, KAPPA),
    "sphere.velocity_backward": (Y, Y, T, T.double(), *HEAD, X, TABLE, KAPPA, True, False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", CALLS)
def test_results_are_as_the_fake_says(op: str, dtype: torch.dtype) -> None:
    function = getattr(torch.ops.dlcore, op.replace(".", "_")).default

    def there(a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return a
        a = a.to(DEVICE)
        # Vectors and logits; transposed, so that results must not take over the strides.
        wide = a.dtype == torch.float32 and a.dim() == 3 and a.shape[-1] > 1
        return a.to(dtype).transpose(0, 1).contiguous().transpose(0, 1) if wide else a

    with dlcore.use_backend("triton"):
        arguments = tuple(there(a) for a in CALLS[op])
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))
        assert dlcore.last_backend(op) == "triton"
