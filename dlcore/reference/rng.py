"""Noise stream v1 in torch: Philox4x32-10 keyed by (seed, offset), counted by (domain, index).

Philox: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
Every 32-bit word lives in an int64 tensor, where the wrap-around of int64 products is well defined.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
# Keys the hash of fold_in apart from every draw under the same seed.
_FOLD_TWEAK = (0x243F6A88, 0x85A308D3)


class Domain(IntEnum):
    """What a draw is for; draws of different domains share no counter."""

    ELEMENT = 0
    GROUP = 1
    TOKEN = 2
    ROUTE = 3
    DIRECTION = 8
    COSINE = 9


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on 32-bit words held in int64 tensors that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _words(x: Tensor) -> tuple[Tensor, Tensor]:
    return x & _MASK, (x >> 32) & _MASK


def _int64(high: Tensor, low: Tensor) -> Tensor:
    return (high << 32) | low


def fold_in(key: Tensor, data: Tensor) -> Tensor:
    """key (*lead, 2) and data (*lead) int64, broadcast together -> (*lead, 2) with a hashed offset."""
    seed, offset = key.unbind(-1)
    low, high = _words(seed)
    hashed = philox((*_words(offset), *_words(data)), (low ^ _FOLD_TWEAK[0], high ^ _FOLD_TWEAK[1]))
    folded = _int64(hashed[1], hashed[0])
    return torch.stack(torch.broadcast_tensors(seed, folded), -1)


def row_keys(key: Tensor, lead: torch.Size) -> Tensor:
    """One key per row: a shared key (2,) is folded with the flattened row, (*lead, 2) is taken as it is."""
    if key.dim() > 1:
        return key
    return fold_in(key, torch.arange(lead.numel(), device=key.device).view(lead))


def bits(key: Tensor, domain: Domain, index: Tensor) -> tuple[Tensor, Tensor]:
    """64 random bits as (high, low) words. key (*lead, 2); index (*lead or 1, n) int64 -> (*lead, n).

    Index i takes words (0, 1) of block i // 2 when even, words (2, 3) when odd.
    """
    seed, offset = (part.unsqueeze(-1) for part in key.unbind(-1))
    low, high = _words(index >> 1)
    word = philox((low, (int(domain) << 24) | high, *_words(offset)), _words(seed))
    odd = (index & 1).bool()
    return torch.where(odd, word[3], word[1]), torch.where(odd, word[2], word[0])


def unit(high: Tensor, low: Tensor) -> Tensor:
    """64 bits -> float64 in (0, 1], with relative precision 2^-53."""
    return high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64


def exponential(high: Tensor, low: Tensor) -> Tensor:
    """-log1p(-u) without loss at either end: the complement of u is formed from the complemented bits."""
    small = -torch.log1p(-unit(high, low).clamp(max=0.5))
    large = -torch.log(unit(_MASK - high, _MASK - low))
    return torch.where(high < 2**31, small, large)


def gumbel_noise(key: Tensor, domain: Domain, index: Tensor) -> Tensor:
    """-log(-log1p(-u)) in float64; u -> 0 is the winning tail, exact down to 2^-65."""
    return -torch.log(exponential(*bits(key, domain, index)))


def uniform_noise(key: Tensor, domain: Domain, index: Tensor) -> Tensor:
    """53 random bits -> float64 in (0, 1)."""
    high, low = bits(key, domain, index)
    return ((high << 21) | (low >> 11)).double() * 2.0**-53 + 2.0**-54


def below(key: Tensor, domain: Domain, index: Tensor, n: int) -> Tensor:
    """Integers in [0, n), n < 2^31, biased by less than n / 2^64."""
    high, low = bits(key, domain, index)
    return (high * n + (low * n >> 32)) >> 32


def normal_noise(key: Tensor, domain: Domain, index: Tensor) -> Tensor:
    """Standard normal numbers in float64: Box-Muller on uniforms 2i (radius) and 2i + 1 (angle)."""
    radius = torch.sqrt(2 * exponential(*bits(key, domain, index & ~1)))
    angle = 2 * math.pi * uniform_noise(key, domain, index | 1)
    return radius * torch.where((index & 1).bool(), torch.sin(angle), torch.cos(angle))


def _elements(key: Tensor, shape: list[int]) -> Tensor:
    return torch.arange(math.prod(shape), device=key.device).expand(*key.shape[:-1], -1)


def _shaped(x: Tensor, key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    return x.view(*key.shape[:-1], *shape).to(dtype)


def uniform(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) in [0, 1); rounded down, so that 1 never occurs."""
    u = uniform_noise(key, Domain.ELEMENT, _elements(key, shape))
    below_one = 1 - torch.finfo(dtype).eps / 2
    return _shaped(u.clamp(max=below_one), key, shape, dtype)


def gumbel(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) standard Gumbel."""
    return _shaped(gumbel_noise(key, Domain.ELEMENT, _elements(key, shape)), key, shape, dtype)


def normal(key: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """(*lead, *shape) standard normal."""
    return _shaped(normal_noise(key, Domain.ELEMENT, _elements(key, shape)), key, shape, dtype)
