"""How often one shifted normal is the largest of V: what FLM's time and Duo's noise levels both rest on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Trapezoids of this width: the integrands are analytic in a strip of at least ±0.3, so exp(-2π·0.3·32).
_WIDTH = 1 / 32
#: Beyond this shift α is 1 in float64 for any vocabulary of 2^53.
FAR = 16.0
_NEAR = -10.0


class ArgmaxIntegral:
    """α(a) and dα/da: of the entry shifted by a among K normals, P(largest) rescaled from [1/K, 1] to [0, 1].

    With w a bound on the K-1 others, α = K/(K-1) ∫ [φ(w-a) - φ(w)] Φ(w)^{K-1} dw. The difference is formed as
    φ(w)·expm1(aw - a²/2) where it cancels, so that small α have full relative precision; and by parts
    dα/da = K ∫ φ(w-a) φ(w) Φ(w)^{K-2} dw, where nothing cancels.
    """

    def __init__(self, vocab_size: int) -> None:
        self.w = torch.arange(_NEAR, FAR - _NEAR, _WIDTH, dtype=torch.float64)
        log_cdf = torch.special.log_ndtr(self.w)
        self.weight = ((vocab_size - 1) * log_cdf).exp() * (_WIDTH * vocab_size / (vocab_size - 1))
        self.density = ((vocab_size - 2) * log_cdf).exp() * phi(self.w) * (_WIDTH * vocab_size)

    def __call__(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """a (n,) in [0, FAR] -> two (n,)."""
        a = a.unsqueeze(-1)
        moved, still = phi(self.w - a), phi(self.w)
        lift = a * (self.w - a / 2)
        gain = torch.where(lift.abs() < 1, still * torch.expm1(lift.clamp(-1, 1)), moved - still)
        return gain @ self.weight, moved @ self.density


def phi(x: Tensor) -> Tensor:
    """The standard normal's density."""
    return (-x * x / 2).exp() / math.sqrt(2 * math.pi)
