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
from dlcore.triton.launch import ceil_div, launch, power_of_two

#: Keys of a program of fold_in; pairs of draws of a program that fills, of one key or a fourth of several.
_BLOCK, _PAIRS = 256, 1024
_UNIFORM = tl.constexpr(0)
_NORMAL = tl.constexpr(1)
_GUMBEL = tl.constexpr(2)


@triton.jit
def _float(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _unit(low, high):
    """64 bits as float64 in (0, 1]: the words are the last bits of numbers that start at 2^20 and 2^-12."""
    rest = _float(low.to(tl.uint64) | 0x3F30000000000000) - 0.00024414062499999997
    return _float(high.to(tl.uint64) | 0x4130000000000000) - 1048576.0 + rest


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
def _radius(low, high):
    """√(-2 log1p(-u)): with 1 - u = 2^e·(1 + f) and s = f / (2 + f), log(1 + f) is 2·artanh(s).

    The polynomials here and below are Chebyshev interpolants, to 2^-52.
    """
    # Below 1 - √½ e is 0 and f = -u; above, 1 - u comes from the complemented bits.
    near = high < 0x4AFB0CCD
    flipped = tl.where(near, 0, 0xFFFFFFFF).to(tl.uint32)
    u = _unit(low ^ flipped, high ^ flipped)
    bits = u.to(tl.int64, bitcast=True)
    e = tl.where(near, 0, ((bits >> 32).to(tl.int32) - 0x3FE6A09E) >> 20)
    f = tl.where(near, -u, _float(bits - (e.to(tl.int64) << 52)) - 1.0)
    # 1 / (2 + f) and, below, 1 / √square: to 22 bits by the hardware, then by a series of what is missing.
    d = f + 2.0
    inverse = tl.rsqrt(d.to(tl.float32))
    inverse = (inverse * inverse).to(tl.float64)
    s, rest = f * inverse, 1.0 - d * inverse
    s += s * (rest + rest * rest)
    q = s * s
    p = q * -0.3367978135725748 - 0.3624350765438972
    p = q * p - 0.4444687996973996
    p = q * p - 0.5714283189284808
    p = q * p - 0.8000000012439893
    p = q * p - 1.3333333333310382
    p = q * p - 4.000000000000001
    square = s * p + e.to(tl.float64) * -1.3862943611198906
    inverse = tl.rsqrt(square.to(tl.float32)).to(tl.float64)
    root = square * inverse
    rest = 1.0 - root * inverse
    return root + root * (rest * (0.375 * rest + 0.5))


@triton.jit
def _cosine_sine(low, high):
    """Of 2π·(the upper 53 bits + ½) / 2^53: polynomials on an eighth of the circle either side of the nearest
    multiple of a quarter."""
    turned = high + 0x20000000
    # 1.5 + g is a number whose bits are g's, of the share g of a quarter.
    bits = (high.to(tl.uint64) << 32 | (low & 0xFFFFF800 | 0x400).to(tl.uint64)) << 2
    g = _float((bits.to(tl.int64) >> 12) + 0x3FF8000000000000) - 1.5
    q = g * g
    s = q * 5.633933781537854e-08 - 3.59864335298231e-06
    s = q * s + 0.0001604411507421909
    s = q * s - 0.004681754132340976
    s = q * s + 0.07969262624604301
    s = q * s - 0.6459640975062443
    s = (q * s + 1.5707963267948966) * g
    c = q * 4.6552961874867623e-07 - 2.520013526428479e-05
    c = q * c + 0.000919259950041661
    c = q * c - 0.02086348073494657
    c = q * c + 0.25366950789986475
    c = q * c - 1.2337005501361513
    c = q * c + 1.0
    swapped = (turned & 0x40000000) != 0
    return _signed(tl.where(swapped, s, c), turned + 0x40000000), _signed(tl.where(swapped, c, s), turned)


@triton.jit
def _signed(x, word):
    """x, or -x where the word's first bit is set."""
    sign = (word & 0x80000000).to(tl.int64) << 32
    return _float(x.to(tl.int64, bitcast=True) ^ sign)


@triton.jit
def _noise(KIND: tl.constexpr, even_low, even_high, odd_low, odd_high):
    if KIND == _UNIFORM:
        return noise.uniform(even_low, even_high), noise.uniform(odd_low, odd_high)
    elif KIND == _GUMBEL:
        even = -tl.log(_exponential(even_low, even_high))
        return even, -tl.log(_exponential(odd_low, odd_high))
    else:
        radius = _radius(even_low, even_high)
        cosine, sine = _cosine_sine(odd_low, odd_high)
        return radius * cosine, radius * sine


@triton.jit
def _rounded(x, out, KIND: tl.constexpr):
    rounded = x.to(out.dtype.element_ty)
    if KIND == _UNIFORM:
        # A number that rounds up to 1 becomes the largest one below it.
        below_one = 0.9999999403953552 if out.dtype.element_ty == tl.float32 else 0.9999999999999999
        rounded = tl.where(rounded >= 1.0, below_one, rounded).to(out.dtype.element_ty)
    return rounded


@triton.jit(do_not_specialize=["rows", "spans"])
def fill_kernel(keys, out, rows, count, spans, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS keys' draws, BLOCK of each: as pairs, which are a block of the stream."""
    program = tl.program_id(0)
    row = (program // spans).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    first = (program % spans).to(tl.int64) * BLOCK
    live = row < rows
    seed = tl.load(keys + 2 * row, live, 0)
    offset = tl.load(keys + 2 * row + 1, live, 0)
    pair = first // 2 + tl.arange(0, BLOCK // 2)[None, :]
    even_low, even_high, odd_low, odd_high = noise.block(seed, offset, noise.ELEMENT, pair)
    even, odd = _noise(KIND, even_low, even_high, odd_low, odd_high)
    drawn = tl.interleave(_rounded(even, out, KIND), _rounded(odd, out, KIND))
    at = first + tl.arange(0, BLOCK)[None, :]
    tl.store(out + row * count + at, drawn, live & (at < count))


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
    rows, count = key.numel() // 2, math.prod(shape)
    block = power_of_two(count, 2, 2 * _PAIRS)
    height, spans = max(1, _PAIRS // 2 // block), ceil_div(count, block)
    grid = ceil_div(rows, height) * spans
    launch(fill_kernel, grid, key, key, out, rows, count, spans, KIND=kind.value, ROWS=height, BLOCK=block)
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
            for count in (5000, 4096, 3):
                yield partial(draw, key, [count], dtype)
