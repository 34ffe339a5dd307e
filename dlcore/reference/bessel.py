"""Ratios and logarithms of modified Bessel functions I_ν, ν = d/2 - 1, as the von Mises-Fisher law needs.

Everything comes from Debye's expansion of w = κ I_ν'(κ)/I_ν(κ), which solves κ w' = r² - w², r² = ν² + κ²:
w = r + Σ_n W_n(p) r^(1-n) with p = ν/r, and the polynomials W_n follow one from another. Each quantity below
is a sum of it in which nothing cancels. Small d is reached from `_SEED` and above by exact recurrences that
lose no digits: with a_d = A_d/κ, a_d = 1/(d + κ² a_{d+2}), where A_d = I_{d/2}/I_{d/2-1}.

Debye: Olver, "Asymptotics and Special Functions" (1974), chapter 10.7. All in float64; d is an int.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

#: The dimension from which the expansion alone is exact to rounding, and its number of terms.
_SEED, _TERMS = 64, 12

#: A polynomial in p by its coefficients of p^0, p^1, ...
Polynomial = list[Fraction]


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product = [Fraction(0)] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return product


def _plus(*terms: Polynomial) -> Polynomial:
    width = max(map(len, terms))
    return [sum((t[i] for t in terms if i < len(t)), Fraction(0)) for i in range(width)]


def _scaled(c: Fraction | int, a: Polynomial) -> Polynomial:
    return [c * x for x in a]


def _slope(a: Polynomial) -> Polynomial:
    """p times the derivative."""
    return [i * x for i, x in enumerate(a)]


def _over_rest(a: Polynomial) -> Polynomial:
    """a / (1 - p²), which divides it."""
    quotient = list(a[:-2])
    for i in range(2, len(quotient)):
        quotient[i] += quotient[i - 2]
    return quotient


def _debye(terms: int) -> list[Polynomial]:
    """W_0, ..., W_terms: W_n = ½[(1 - p²)(p W' + (n - 2) W)_{n-1} - Σ_{0<i<n} W_i W_{n-i}]."""
    rest = [Fraction(1), Fraction(0), Fraction(-1)]
    w: list[Polynomial] = [[Fraction(1)]]
    for n in range(1, terms + 1):
        moved = _times(rest, _plus(_slope(w[-1]), _scaled(n - 2, w[-1])))
        squares = (_scaled(-1, _times(w[i], w[n - i])) for i in range(1, n))
        w.append(_scaled(Fraction(1, 2), _plus(moved, *squares)))
    return w


def _table(polynomials: list[Polynomial]) -> Tensor:
    """(terms, width): row n holds the coefficients of the n-th."""
    width = max(map(len, polynomials))
    rows = [[float(c) for c in p] + [0.0] * (width - len(p)) for p in polynomials]
    return torch.tensor(rows, dtype=torch.float64)


def _tables() -> tuple[Tensor, Tensor, Tensor]:
    """Terms n >= 1 of A/κ (by p²), of A' (by p²), and of the logarithm (by p, less a factor 1 - p)."""
    w = _debye(_TERMS)
    ratio = [_over_rest(x) for x in w[1:]]
    slope = [
        _plus(_scaled(-1, _slope(x)), _scaled(1 - n, x), _scaled(-1, v))
        for n, (x, v) in enumerate(zip(w[1:], ratio, strict=True), start=1)
    ]
    # ∫_p^1 V_{k+1}(x) x^{k-1} dx, and (1 - p^{j+1})/(j + 1) = (1 - p)(1 + ... + p^j)/(j + 1).
    logarithm = []
    for k, v in enumerate(ratio[1:], start=1):
        powers = [Fraction(0)] * (k - 1) + v
        shares = [c / (j + 1) for j, c in enumerate(powers)]
        logarithm.append([sum(shares[j:], Fraction(0)) for j in range(len(shares))])
    return _table([p[::2] for p in ratio]), _table([p[::2] for p in slope]), _table(logarithm)


_RATIO, _SLOPE, _LOGARITHM = _tables()


def _sum(table: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Σ_n y^n Σ_j table[n, j] x^j, n from 1."""
    terms, width = table.shape
    powers = x.unsqueeze(-1) ** torch.arange(width, device=x.device)
    weights = y.unsqueeze(-1) ** torch.arange(1, terms + 1, device=x.device)
    return ((powers @ table.to(x.device).mT) * weights).sum(-1)


class _Seed:
    """The expansion at a dimension that is large enough, `d` or one above it."""

    def __init__(self, kappa: Tensor, d: int) -> None:
        self.kappa, self.square = kappa, kappa * kappa
        self.top = d + 2 * max(0, (_SEED - d + 1) // 2)
        #: The dimensions from the one below it down to d.
        self.below = range(self.top - 2, d - 2, -2)
        self.nu = self.top / 2 - 1
        self.r = torch.sqrt(self.nu**2 + self.square)
        self.p = self.nu / self.r
        self.correction = _sum(_RATIO, self.p**2, 1 / self.r) / self.r
        #: A/κ.
        self.a = 1 / (self.r + self.nu) + self.correction


def ratios(kappa: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """A/κ, 1 - A and A' = dA/dκ, each to its own relative precision, float64; finite also at κ = 0."""
    seed = _Seed(kappa, d)
    nu, r, square, a = seed.nu, seed.r, seed.square, seed.a
    rest = nu * (1 + nu / (r + kappa)) / (r + nu) - kappa * seed.correction
    slope = nu / (r * (r + nu)) + _sum(_SLOPE, seed.p**2, 1 / r) / r
    for size in seed.below:
        lower = 1 / (size + square * a)
        rest = (size - kappa * rest) * lower
        slope = lower * lower * (size - square * slope)
        a = lower
    return a, rest, slope


def log_growth(kappa: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Φ = ln C_d(0) - ln C_d(κ) = ln[Γ(d/2) (2/κ)^ν I_ν(κ)] = ∫_0^κ A, and Φ - κ."""
    seed = _Seed(kappa, d)
    nu, r, square, a = seed.nu, seed.r, seed.square, seed.a
    grown = square / (r + nu)  # r - ν
    logs = -nu * torch.log1p(grown / (2 * nu)) - 0.5 * torch.log1p(grown / nu)
    series = grown / r * _sum(_LOGARITHM, seed.p, torch.full_like(r, 1 / nu))
    # What Φ has besides r - ν.
    others = logs + series
    for size in seed.below:
        others = others + torch.log1p(square * a / size)
        a = 1 / (size + square * a)
    whole = grown + others
    return whole, torch.where(kappa < d, whole - kappa, nu * nu / (r + kappa) - nu + others)


def log_uniform(d: int) -> float:
    """ln C_d(0): minus the logarithm of the sphere's area."""
    return math.lgamma(d / 2) - math.log(2) - d / 2 * math.log(math.pi)
