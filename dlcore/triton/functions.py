"""Elementary functions of float32 to a few units in the last place: Triton's own are fast, or missing."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from dlcore.triton.noise import block, normal

PI = tl.constexpr(math.pi)


@triton.jit
def over(a, b):
    """a / b, and 0 where b is 0."""
    return tl.where(b == 0, 0.0, a / tl.where(b == 0, 1.0, b))


@triton.jit
def exponential(x):
    """e^x, as of the nearer end outside of [-87, 88]."""
    x = tl.where(x < -87.0, -87.0, tl.where(x > 88.0, 88.0, x))
    n = tl.floor(x * 1.44269504 + 0.5)
    # ln 2 in two parts: the first has zeros enough for its product with n to be exact.
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    scale = (tl.where(x == x, n, 0.0).to(tl.int32) + 127) << 23
    return tl.exp(r) * scale.to(tl.float32, bitcast=True)


@triton.jit
def one_minus_exponential(x):
    """1 - e^-x for x >= 0, without cancellation: Taylor's series where x is small."""
    s = tl.where(x < 0.5, x, 0.0)
    p = s * (-1 / 40320) + 1 / 5040
    p = s * p * -1.0 + 1 / 720
    p = s * p * -1.0 + 1 / 120
    p = s * p * -1.0 + 1 / 24
    p = s * p * -1.0 + 1 / 6
    p = s * p * -1.0 + 1 / 2
    p = s * p * -1.0 + 1.0
    return tl.where(x < 0.5, s * p, 1.0 - exponential(-x))


@triton.jit
def sine_cosine(x):
    """sin(πx) and cos(πx), exactly reduced: Taylor's series on an eighth of the circle either side."""
    n = tl.floor(2.0 * x + 0.5)
    r = (x - 0.5 * n) * PI
    s = r * r
    p = s * (-1 / 39916800) + 1 / 362880
    p = s * p - 1 / 5040
    p = s * p + 1 / 120
    p = s * p - 1 / 6
    sine = r * (s * p + 1.0)
    p = s * (-1 / 3628800) + 1 / 40320
    p = s * p - 1 / 720
    p = s * p + 1 / 24
    p = s * p - 1 / 2
    cosine = s * p + 1.0
    quarter = n - 4.0 * tl.floor(0.25 * n)
    odd = (quarter == 1.0) | (quarter == 3.0)
    a, b = tl.where(odd, cosine, sine), tl.where(odd, sine, cosine)
    negative = (quarter == 1.0) | (quarter == 2.0)
    return tl.where(quarter >= 2.0, -a, a), tl.where(negative, -b, b)


@triton.jit
def slerp_series(u):
    """ω / sin ω for u = 1 - cos ω in [0, 1], relative error 4e-10: the polynomial of the CPU's kernels."""
    p = u * 0.00478265621 - 0.0188173633
    p = u * p + 0.0365070887
    p = u * p - 0.0382547043
    p = u * p + 0.0297974534
    p = u * p - 0.00695693493
    p = u * p + 0.0151163144
    p = u * p + 0.0247469228
    p = u * p + 0.0572119094
    p = u * p + 0.13332957
    p = u * p + 0.333333403
    return u * p + 1.0


@triton.jit
def slerp_series_slope(u):
    """Its derivative in u."""
    p = u * (11 * 0.00478265621) - 10 * 0.0188173633
    p = u * p + 9 * 0.0365070887
    p = u * p - 8 * 0.0382547043
    p = u * p + 7 * 0.0297974534
    p = u * p - 6 * 0.00695693493
    p = u * p + 5 * 0.0151163144
    p = u * p + 4 * 0.0247469228
    p = u * p + 3 * 0.0572119094
    p = u * p + 2 * 0.13332957
    return u * p + 0.333333403


@triton.jit
def power_of_two_below(largest):
    """A power of two that brings numbers up to `largest`, of any size, next to 1."""
    exponent = 253 - (largest.to(tl.int32, bitcast=True) >> 23)
    exponent = tl.where(exponent < 1, 1, tl.where(exponent > 253, 253, exponent))
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def normals(seed, offset, DOMAIN: tl.constexpr, first, BLOCK: tl.constexpr):
    """Normal numbers [first, first + BLOCK) of a domain for keys (rows, 1): two to a block of random bits."""
    index = (first // 2 + tl.arange(0, BLOCK // 2)[None, :]).to(tl.int64)
    low, high, _, turn = block(seed, offset, DOMAIN, index)
    even, odd = normal(low, high, turn)
    return tl.interleave(even, odd)
