"""What a linear head takes on Triton beside what it is given and gives back, by the shapes of a model.

Host functions run on tensors of the meta device, which hold no data, and their launches are not made: what
they allocate is what they would on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dlcore.triton import (
    categorical,
    categorical_expectation,
    categorical_losses,
    launch,
    linear_logits,
    sphere_velocity,
    uniform,
)

VOCAB, DEPTH, WIDTH = 126_464, 64, 32
Call = Callable[[], Any]


class Memory(TorchDispatchMode):
    """Bytes that tensors made inside hold now, and held at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self._take(x.untyped_storage())
        return out

    def _take(self, storage: Any) -> None:
        name, size = id(storage), storage.nbytes()
        if name in self.seen:
            return

        def free(_: Any) -> None:
            del self.seen[name]
            self.now -= size

        self.seen[name] = weakref.ref(storage, free)
        self.now += size
        self.peak = max(self.peak, self.now)


class Forgetting(list):
    """Launches that are not made, and whose arguments nothing keeps."""

    def append(self, _: Any) -> None:
        pass


def extra(call: Call, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes that a call holds at most, without those of its results."""
    monkeypatch.setattr(launch, "_recorded", Forgetting())
    with Memory() as memory:
        results = call()
    held = {id(x.untyped_storage()): x.untyped_storage() for x in results if isinstance(x, Tensor)}
    return memory.peak - sum(s.nbytes() for s in held.values())


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls(rows: int) -> dict[str, tuple[int, Call]]:
    """How many tiles each function of a head may have at once, and a call of it."""
    head: tuple[Any, ...] = (meta(rows, DEPTH), meta(VOCAB, DEPTH), meta(VOCAB))
    table, mean = meta(VOCAB, WIDTH), meta(rows, WIDTH)
    token, key = meta(rows, dtype=torch.int64), meta(2, dtype=torch.int64)
    lse, three = meta(rows, dtype=torch.float64), meta(3, rows, dtype=torch.float64)
    level, five = meta(dtype=torch.float64), meta(5, rows, dtype=torch.float64)
    k, p = meta(dtype=torch.int64), meta()
    coefficients = meta(6, dtype=torch.float64)
    none = (None,) * 5
    return {
        "stats": (1, lambda: categorical.stats(*head, *none)),
        "sample": (1, lambda: categorical.sample(*head, *none, None, None, None, key)),
        "truncated": (1, lambda: categorical.sample(*head, *none, k, p, p, key)),
        "sample_mixture": (
            1,
            lambda: (categorical.sample_mixture(*head, token, coefficients, -1, *(None,) * 4, key),),
        ),
        "log_probs": (1, lambda: (categorical_losses.log_probs(*head, token, *(None,) * 4),)),
        "log_probs_backward": (
            2,
            lambda: categorical_losses.log_probs_backward(three, three, *head, token, *(None,) * 4),
        ),
        "kl": (2, lambda: (categorical_losses.kl(*head, *head, None),)),
        "kl_backward": (4, lambda: categorical_losses.kl_backward(three, three, *head, *head, None)),
        "expectation": (2, lambda: categorical_expectation.expectation(*head, table, None, None, None)),
        "expectation_backward": (
            4,
            lambda: categorical_expectation.expectation_backward(mean, mean, lse, *head, table, *(None,) * 3),
        ),
        "nelbo": (1, lambda: uniform.nelbo(*head, token, token, level, level, None)),
        "nelbo_backward": (
            2,
            lambda: uniform.nelbo_backward(lse, five, *head, token, token, level, level, None),
        ),
        "velocity": (2, lambda: sphere_velocity.velocity(*head, mean, table, None)),
        "velocity_backward": (
            4,
            lambda: sphere_velocity.velocity_backward(
                mean, mean, lse, lse, *head, mean, table, None, True, True
            ),
        ),
    }


@pytest.mark.parametrize("rows", [65, 256, 2600, 8192])
def test_tiles_are_a_twentieth_of_the_logits(rows, monkeypatch):
    """Over a gradient's own sums in float32, which these are here. A truncated draw counts, too."""
    logits = rows * VOCAB * 4
    counts = rows * 4096 + logits // 256
    for name, (tiles, call) in calls(rows).items():
        small = rows * (DEPTH + WIDTH + 32) * 4 * 4
        allowed = tiles * logits // 20 + small + (counts if name == "truncated" else 0)
        took = extra(call, monkeypatch)
        assert took <= allowed, (name, took / logits)
        assert took >= tiles * logits // 25, "something is not counted"


@pytest.mark.parametrize(
    ("rows", "vocab", "width"),
    [
        *((65, 126_464, 6144), (8192, 126_464, 6144), (16_384, 126_464, 4096), (100_000, 126_464, 512)),
        *((1, 30_000, 1280), (1, 3000, 1024), (1, 100, 1024), (0, 100, 1024)),
    ],
)
def test_the_width_of_a_tile(rows, vocab, width):
    assert linear_logits.tile_width((meta(rows, 8), meta(vocab, 8), None)) == width
    dense = (meta(rows, vocab), None, None)
    assert linear_logits.tile_width(dense) == max(256, (1 << 24) // max(rows, 1) // 256 * 256)
