"""What the tests of the C library's functions give them: rows with gaps, heads, states, points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
from c_library import Library
from torch import Tensor

import dlcore
from dlcore import _C, LinearLogits, _ops, rng, sphere
from dlcore.cpu import choose_capability

KEY = rng.key(-7, 11)
#: How many vectors each map of the sphere takes.
MAPS = {name: len(set(given) - {"t"}) for name, given in _ops.sphere.MAPS.items()}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 5


@contextmanager
def python_at_baseline() -> Iterator[None]:
    """Python's CPU kernels at the level of the library under test."""
    before = _C.capability()
    choose_capability("baseline")
    with dlcore.use_backend("cpu"):
        yield
    choose_capability(before)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return rng.normal(rng.key(seed), shape).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same rows with gaps that hold NaN, which no kernel may read."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


#: Bytes before and after what a function writes, and what they hold; all there are of the test that runs.
_MARGIN, _UNTOUCHED = 256, 0xA5
_margins: list[Tensor] = []


def between_margins(size: int) -> Tensor:
    """So many bytes, aligned to 256 as a device's are, between bytes that nothing may write."""
    room = torch.full((size + 3 * _MARGIN,), _UNTOUCHED, dtype=torch.uint8)
    start = _MARGIN + -room.data_ptr() % 256
    _margins.extend((room[:start], room[start + size :]))
    return room[start : start + size]


@contextmanager
def margins_kept() -> Iterator[None]:
    """Fails where one is written inside."""
    _margins.clear()
    yield
    assert all(bool((x == _UNTOUCHED).all()) for x in _margins), "a function wrote beside its results"


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Results that would show if they were not written, between margins."""
    fill = torch.nan if dtype.is_floating_point else -(2**31)
    return between_margins(prod(shape) * dtype.itemsize).view(dtype).view(shape).fill_(fill)


def same(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype
    assert got.shape == wanted.shape
    assert torch.equal(got.nan_to_num(nan=-1e9), wanted.nan_to_num(nan=-1e9))


Head = Tensor | LinearLogits


def dense(vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return strided(3 * normal(1, ROWS, vocab).to(dtype))


def linear(vocab: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> LinearLogits:
    hidden, weight = strided(normal(2, ROWS, 24, dtype=dtype)), strided(normal(3, vocab, 24, dtype=dtype))
    return LinearLogits(hidden, weight, normal(4, vocab, dtype=dtype) if bias else None)


HEADS: dict[str, Callable[[], Head]] = {
    "float32": lambda: dense(1000),
    "bfloat16": lambda: dense(1000, torch.bfloat16),
    "float16": lambda: dense(1000, torch.float16),
    "several segments": lambda: dense(140_001),
    "one token": lambda: dense(1),
    "linear": lambda: linear(1000),
    "linear, several tiles": lambda: linear(420_000, torch.bfloat16),
    "linear, float16, no bias": lambda: linear(700, torch.float16, bias=False),
}
heads = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def logits_of(c: Library, head: Head) -> Any:
    if isinstance(head, Tensor):
        return c.logits(values=c.matrix_of(head))
    return c.logits(values=c.matrix_of(head.hidden), weight=c.matrix_of(head.weight), bias=head.bias)


def softmax_of(c: Library, head: Head, index: Tensor | None = None, **given: Any) -> Any:
    members = {name: c.row_numbers(given.get(name)) for name in ("shift", "temperature")}
    exclude = given.get("exclude")
    return c.categorical(
        logits=logits_of(c, head),
        index=index,
        softcap=given.get("softcap") or 0.0,
        exclude=None if exclude is None else torch.tensor(exclude),
        threads=given.get("threads", 0),
        **members,
    )


def index_of(head: Head) -> Tensor:
    return torch.arange(ROWS) * 37 % head.shape[-1]


LEVELS: dict[str, float | Tensor] = {"shared": 0.7, "per row": torch.linspace(0.3, 2, ROWS).double()}
levels = pytest.mark.parametrize("sigma", LEVELS.values(), ids=LEVELS)


def bits_of(
    c: Library, x: Tensor, residual: Tensor | None, sigma: float | Tensor, coding: str, clip: float
) -> Any:
    return c.bits(
        x=c.matrix_of(x),
        residual=c.matrix_of(residual),
        sigma=c.doubles_of(sigma),
        coding=["01", "pm1"].index(coding),
        clip=clip,
    )


def points(seed: int, dtype: torch.dtype, columns: int = 70) -> Tensor:
    return strided(sphere.normalize(normal(seed, ROWS, columns)).to(dtype))


def _heads(c: Library, x: Tensor) -> Any:
    strides = dict(zip(("batch_stride", "row_stride", "head_stride"), x.stride(), strict=False))
    return c.heads(data=x, **({} if x.is_contiguous() else strides))


def attention_of(c: Library, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Any:
    return c.attention(
        dtype=DTYPES.index(q.dtype),
        batch=q.shape[0],
        rows=q.shape[1],
        heads=q.shape[2],
        keys=k.shape[1],
        kv_heads=k.shape[2],
        head_dim=q.shape[3],
        value_dim=v.shape[3],
        q=_heads(c, q),
        k=_heads(c, k),
        v=_heads(c, v),
        **given,
    )


#: Rows of coefficients of a guided step: one without noise, one that keeps z, one that guides away.
GUIDED = torch.tensor([[2.0, 0.7, -1, 0.4, 3, 0]], dtype=torch.float64).repeat(ROWS, 1)
GUIDED[0, 3], GUIDED[1, 5], GUIDED[2, 0] = 1, 1, -0.5


def guided_step_of(
    c: Library,
    cond: Tensor,
    uncond: Tensor,
    z: Tensor,
    coefficients: Tensor,
    exclude: int | None,
    key: Tensor,
) -> Any:
    return c.guided_step(
        cond=c.matrix_of(cond),
        uncond=c.matrix_of(uncond),
        z=z,
        coefficients=c.doubles(data=coefficients, stride=6 if coefficients.dim() > 1 else 0),
        exclude=None if exclude is None else torch.tensor(exclude),
        keys=c.keys_of(key),
    )
