"""Noise stream v1 on the GPU; in float64, as everywhere, and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlcore._tensors import empty
from dlcore.triton import noise
from dlcore.triton.launch import ceil_div, launch

_BLOCK = 256
_UNIFORM = tl.constexpr(0)
_NORMAL = tl.constexpr(1)
_GUMBEL = tl.constexpr(2)


@triton.jit
def _unit(low, high):
    return high.to(tl.float64) * 2.3283064365386963e-10 + (low.to(tl.float64) + 0.5) * 5.421010862427522e-20


@triton.jit
def _exponential(low, high):
    """-log1p(-u) in float64; where u is large, 1 - u comes from the complemented bits."""
    large = high >= 0x80000000
    flipped = tl.where(large, 0xFFFFFFFF, 0).to(tl.uint32)
    lesser = _unit(low ^ flipped, high ^ flipped)
    w = tl.where(large, lesser, 1.0 - lesser)
    residual = tl.where(large, 0.0, (1.0 - w) - lesser)
    return -(tl.log(w) + residual / w)


@triton.jit
def _noise(KIND: tl.constexpr, even_low, even_high, odd_low, odd_high):
    if KIND == _UNIFORM:
        return noise.uniform(even_low, even_high), noise.uniform(odd_low, odd_high)
    elif KIND == _GUMBEL:
        even = -tl.log(_exponential(even_low, even_high))
        return even, -tl.log(_exponential(odd_low, odd_high))
    else:
        radius = tl.sqrt(2.0 * _exponential(even_low, even_high))
        angle = 6.283185307179586 * noise.uniform(odd_low, odd_high)
        return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _store(out, x, mask, KIND: tl.constexpr):
    rounded = x.to(out.dtype.element_ty)
    if KIND == _UNIFORM:
        # A number that rounds up to 1 becomes the largest one below it.
        below_one = 0.9999999403953552 if out.dtype.element_ty == tl.float32 else 0.9999999999999999
        rounded = tl.where(rounded >= 1.0, below_one, rounded).to(out.dtype.element_ty)
    tl.store(out, rounded, mask)


@triton.jit(do_not_specialize=["count", "pairs", "total"])
def fill_kernel(keys, out, count, pairs, total, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Each lane makes one block of one key: draws 2i and 2i + 1 of its `count`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = at // pairs
    pair = at % pairs
    inside = at < total
    seed = tl.load(keys + 2 * row, inside, 0)
    offset = tl.load(keys + 2 * row + 1, inside, 0)
    even_low, even_high, odd_low, odd_high = noise.block(seed, offset, noise.ELEMENT, pair)
    even, odd = _noise(KIND, even_low, even_high, odd_low, odd_high)
    to = out + row * count + 2 * pair
    _store(to, even, inside, KIND)
    _store(to + 1, odd, inside & (2 * pair + 1 < count), KIND)


@triton.jit(do_not_specialize=["total"])
def fold_in_kernel(keys, data, out, total, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < total
    seed = tl.load(keys + 2 * at, inside, 0)
    offset = tl.load(keys + 2 * at + 1, inside, 0)
    folded = noise.fold_in(seed, offset, tl.load(data + at, inside, 0))
    tl.store(out + 2 * at, seed, inside)
    tl.store(out + 2 * at + 1, folded, inside)


def _fill(kind: tl.constexpr, key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    key = key.contiguous()
    out = empty((*key.shape[:-1], *shape), dtype, key.device)
    count = math.prod(shape)
    pairs = ceil_div(count, 2)
    total = key.numel() // 2 * pairs
    grid = ceil_div(total, _BLOCK)
    launch(fill_kernel, grid, key, key, out, count, pairs, total, KIND=kind.value, BLOCK=_BLOCK)
    return out


def uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) in [0, 1)."""
    return _fill(_UNIFORM, key, shape, dtype)


def normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) standard normal."""
    return _fill(_NORMAL, key, shape, dtype)


def gumbel(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) standard Gumbel."""
    return _fill(_GUMBEL, key, shape, dtype)


def fold_in(key: Tensor, data: Tensor) -> Tensor:
    """Keys (..., 2) with data (...) hashed into their offsets."""
    key, data = key.contiguous(), data.contiguous()
    out = empty((*data.shape, 2), torch.int64, key.device)
    total = data.numel()
    launch(fold_in_kernel, ceil_div(total, _BLOCK), key, key, data, out, total, BLOCK=_BLOCK)
    return out


def examples(device: str) -> Iterator[Callable[[], object]]:
    """Calls that launch every variant of every kernel."""
    key = torch.zeros(2, dtype=torch.int64, device=device)
    yield partial(fold_in, key, key[0])
    for draw in (uniform, normal, gumbel):
        for dtype in (torch.float32, torch.float64):
            yield partial(draw, key, [1001], dtype)
