"""Device functions of noise stream v1: what csrc/common/philox.h and csrc/cpu/vector_math.h do on the CPU."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from dlcore.triton.launch import interpreting

_ON_DEVICE = tl.constexpr(not interpreting())
ELEMENT = tl.constexpr(0)
GROUP = tl.constexpr(1)
TOKEN = tl.constexpr(2)
ROUTE = tl.constexpr(3)
DIRECTION = tl.constexpr(8)
COSINE = tl.constexpr(9)


@triton.jit
def words(x):
    """The (low, high) words of 64 bits."""
    wide = x.to(tl.uint64)
    return (wide & 0xFFFFFFFF).to(tl.uint32), (wide >> 32).to(tl.uint32)


@triton.jit
def _philox(seed, c0, c1, c2, c3):
    """Philox4x32-10 of counters under the 64 bits of a seed. (tl.philox takes two instructions a product.)"""
    k0, k1 = words(seed)
    for _ in tl.static_range(10):
        even, odd = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        even_low, even_high = words(even)
        odd_low, odd_high = words(odd)
        c0, c1, c2, c3 = odd_high ^ c1 ^ k0, odd_low, even_high ^ c3 ^ k1, even_low
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def fold_in(seed, offset, data):
    """The offset of the key (seed, offset) with `data` hashed into it."""
    offset_low, offset_high = words(offset)
    data_low, data_high = words(data)
    tweaked = seed.to(tl.uint64) ^ 0x85A308D3243F6A88
    low, high, _, _ = _philox(tweaked, offset_low, offset_high, data_low, data_high)
    return (high.to(tl.uint64) << 32 | low.to(tl.uint64)).to(tl.int64)


@triton.jit
def row_key(keys, row, PER_ROW: tl.constexpr):
    """(seed, offset) of a row: its own, or the shared key with the row folded in."""
    if PER_ROW:
        return tl.load(keys + 2 * row), tl.load(keys + 2 * row + 1)
    else:
        seed = tl.load(keys)
        return seed, fold_in(seed, tl.load(keys + 1), row)


@triton.jit
def block(seed, offset, DOMAIN: tl.constexpr, index):
    """Block i: (low, high) of draw 2i, then (low, high) of draw 2i + 1."""
    index_low, index_high = words(index)
    offset_low, offset_high = words(offset)
    return _philox(seed, index_low, index_high | (DOMAIN << 24), offset_low, offset_high)


@triton.jit
def log(x):
    """log(x) of positive normal float32, relative error 2^-22 also next to 1 (which tl.log has not)."""
    bits = x.to(tl.int32, bitcast=True)
    # The exponent of x / sqrt(1/2), so that the mantissa falls in [sqrt(1/2), sqrt(2)).
    exponent = (bits - 0x3F3504F3) >> 23
    e = exponent.to(tl.float32)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    p = tl.fma(f, -0.07634510844945908, 0.127615824341774)
    p = tl.fma(p, f, -0.13160179555416107)
    p = tl.fma(p, f, 0.14201757311820984)
    p = tl.fma(p, f, -0.16623356938362122)
    p = tl.fma(p, f, 0.20001226663589478)
    p = tl.fma(p, f, -0.2500081956386566)
    p = tl.fma(p, f, 0.3333333134651184)
    # ln 2 in two parts: the first has zeros enough for its product with e to be exact.
    tail = tl.fma(p * f, square, tl.fma(e, -2.12194440e-4, square * -0.5))
    return tl.fma(e, 0.693359375, f + tail)


@triton.jit
def log1p(x):
    """log1p(x) for x >= 0: the rounding of 1 + x is given back to first order."""
    w = x + 1.0
    return log(w) + (x - (w - 1.0)) / w


@triton.jit
def unit(low, high):
    """64 bits as float32 in (0, 1]."""
    rest = tl.fma(low.to(tl.float32), 5.421010862427522e-20, 2.710505431213761e-20)
    return tl.fma(high.to(tl.float32), 2.3283064365386963e-10, rest)


@triton.jit
def _lesser(low, high):
    """Whether 64 bits u are the greater of u and 1 - u, and the lesser: the latter from complemented bits."""
    large = high >= 0x80000000
    flipped = tl.where(large, 0xFFFFFFFF, 0).to(tl.uint32)
    return large, unit(low ^ flipped, high ^ flipped)


@triton.jit
def exponential(low, high):
    """-log1p(-u) for 64 bits u, float32, without loss at either end."""
    large, lesser = _lesser(low, high)
    # 1 - u, where it is the greater rounded, with its rounding given back below.
    w = tl.where(large, lesser, 1.0 - lesser)
    residual = tl.where(large, 0.0, (1.0 - w) - lesser)
    return -tl.fma(residual, 2.0 - w, log(w))


@triton.jit
def _log2(x):
    """log2(x) by the hardware, whose error is 2^-22: relative, between ½ and 2 absolute."""
    if _ON_DEVICE:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def _radius(low, high):
    """√(-2 log1p(-u)); where u is small by a series."""
    large, u = _lesser(low, high)
    p = tl.fma(tl.fma(tl.fma(u, 0.2, 0.25), u, 0.3333333432674408), u, 0.5)
    near = tl.fma(u * u, p, u)
    far = _log2(tl.where(large, u, 1.0 - u)) * -0.6931471824645996
    return tl.sqrt(2.0 * tl.where(large | (u >= 0.0625), far, near))


@triton.jit
def gumbel(low, high):
    """-log(-log1p(-u)) for 64 bits u; u -> 0 is the winning tail, up to 45."""
    return -log(exponential(low, high))


@triton.jit
def gumbel_at(seed, offset, DOMAIN: tl.constexpr, draw):
    """The Gumbel number of some draws of a key."""
    even_low, even_high, odd_low, odd_high = block(seed, offset, DOMAIN, draw >> 1)
    odd = (draw & 1) != 0
    return gumbel(tl.where(odd, odd_low, even_low), tl.where(odd, odd_high, even_high))


@triton.jit
def gumbel_of(keys, row, KEY_PER_ROW: tl.constexpr, DOMAIN: tl.constexpr, draw):
    """The Gumbel number of some draws of a row."""
    seed, offset = row_key(keys, row, KEY_PER_ROW)
    return gumbel_at(seed, offset, DOMAIN, draw)


@triton.jit
def uniform(low, high):
    """53 bits -> float64 in (0, 1)."""
    bits = (high.to(tl.uint64) << 32 | low.to(tl.uint64)) >> 11
    return bits.to(tl.float64) * 1.1102230246251565e-16 + 5.551115123125783e-17


@triton.jit
def below(low, high, n):
    """An integer in [0, n) for n < 2^31."""
    count = tl.cast(n, tl.uint64)
    carry = (low.to(tl.uint64) * count) >> 32
    return ((high.to(tl.uint64) * count + carry) >> 32).to(tl.int64)


@triton.jit
def sine_cosine(bits):
    """sin and cos of 2π·(bits / 2^32), absolute error 2^-24: polynomials on an eighth of the circle either
    side of the nearest multiple of a quarter."""
    # The quarter is in its two upper bits: the first is the sine's sign, the second swaps it with the cosine.
    turned = bits + 0x20000000
    g = (bits << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10
    square = g * g
    s = tl.fma(square, -0.004602149128913879, 0.07968021929264069)
    s = tl.fma(s, square, -0.6459634900093079)
    s = tl.fma(s, square, 1.5707963705062866) * g
    c = tl.fma(square, 0.0009067399078048766, -0.02086152881383896)
    c = tl.fma(c, square, 0.253669410943985)
    c = tl.fma(c, square, -1.2337005138397217)
    c = tl.fma(c, square, 1.0)
    swapped = (turned & 0x40000000) != 0
    return _signed(tl.where(swapped, c, s), turned), _signed(tl.where(swapped, s, c), turned + 0x40000000)


@triton.jit
def _signed(x, word):
    """x, or -x where the word's first bit is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def normal(even_low, even_high, odd_high):
    """Normals 2i and 2i + 1 of a block in float32, by Box-Muller: draw 2i is the radius, 2i + 1 the angle."""
    radius = _radius(even_low, even_high)
    sine, cosine = sine_cosine(odd_high)
    return radius * cosine, radius * sine
