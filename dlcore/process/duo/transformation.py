"""Duo's diffusion transformation operator: the noise level α of a Gaussian process's argmax."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore.process._argmax import FAR, ArgmaxIntegral
from dlcore.process.flow.flm_time import flm_gamma

_HERE = torch.device("cpu")
#: Quadratures at once: 2048 rows of 1152 nodes are 19 MB.
_ROWS = 2048
#: alpha may pass a table's ends by so much, the rounding of one that a table made.
_SLACK = 1e-12


def _vocabulary(op: str, vocab_size: int) -> None:
    checks.integer(op, "vocab_size", vocab_size)
    if vocab_size < 2:
        raise ValueError(f"{op}: vocab_size must be at least 2, got {vocab_size}")


def _tensor(op: str, name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """Numbers of any shape as float64."""
    lead = value.shape if isinstance(value, Tensor) else torch.Size()
    return checks.number(op, name, value, lead, device)


def transform(gamma: float | Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """T(γ) and dT/dγ, by quadrature: α of z = argmax(ᾱ·x + σ̄·ε) with ᾱ² = sigmoid(-γ), σ̄² = sigmoid(γ).

    ε has V independent standard normals, so with μ = ᾱ/σ̄ = e^{-γ/2}
    T(γ) = V/(V-1)·[∫ φ(u-μ) Φ(u)^{V-1} du - 1/V], and z is uniform-state diffusion's at that α. (FLM's
    change of time is the same function of μ: T(γ) = `flow.flm_alpha` of μ/(1 + μ).) Relative error of
    both below 1e-14 for V from 2 to 2^18 and γ from -4 to 6, small values too. No gradient.

    Args:
        gamma: (...) finite: ln(σ̄²/ᾱ²), a number or a tensor.
        vocab_size: V >= 2.

    Returns:
        Two (...) float64 on gamma's device; computed on the CPU.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        The Diffusion Duality, arXiv 2506.10892.

    Example:
        >>> from dlcore.process import duo
        >>> duo.transform(-2.5, 50_257)
        (tensor(0.2380, dtype=torch.float64), tensor(-0.5223, dtype=torch.float64))
    """
    op = "duo.transform"
    _vocabulary(op, vocab_size)
    value = gamma.detach() if isinstance(gamma, Tensor) else gamma
    g = checks.within(op, "gamma", _tensor(op, "gamma", value, _HERE), -torch.inf, torch.inf, "()")
    mu = (-g / 2).exp().reshape(-1)
    integral = ArgmaxIntegral(vocab_size)
    parts = [integral(part) for part in mu.clamp(max=FAR).split(_ROWS)]
    alpha, slope = (torch.cat(column) for column in zip(*parts, strict=True))
    near = mu < FAR
    alpha = torch.where(near, alpha.clamp(0, 1), 1)
    dalpha = torch.where(near, -slope * mu / 2, 0)
    device = gamma.device if isinstance(gamma, Tensor) else _HERE
    return alpha.reshape(g.shape).to(device), dalpha.reshape(g.shape).to(device)


def inverse_transform(alpha: float | Tensor, vocab_size: int) -> Tensor:
    """γ with T(γ) = alpha; inf at 0 and -inf at 1. For choosing a range of γ that suits a vocabulary.

    Args:
        alpha: (...) in [0, 1], a number or a tensor.
        vocab_size: V >= 2.

    Returns:
        (...) float64, on alpha's device; computed on the CPU. No gradient.

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import duo
        >>> duo.inverse_transform(0.5, 50_257)
        tensor(-2.8838, dtype=torch.float64)
    """
    op = "duo.inverse_transform"
    _vocabulary(op, vocab_size)
    checks.within(op, "alpha", _tensor(op, "alpha", alpha, _HERE), 0, 1)
    share = flm_gamma(alpha, vocab_size)
    return -2 * torch.logit(share)


class Levels(NamedTuple):
    """Noise at times t, float64 of t's shape: γ, α = T(γ) and dα/dt."""

    gamma: Tensor
    alpha: Tensor
    dalpha: Tensor


class Transformation:
    """T(γ) for the training loop: a table of cubics over γ that have T's value and slope at their ends.

    Time is linear in γ: γ_t = gamma_min + t·(gamma_max - gamma_min), so t = 0 is the clean end. Every method
    is tensors in, tensors out, without a wait for the device, and stays one graph under ``torch.compile``.
    With the default 1024 cubics over 4 units of γ, α is good to 1e-10 and dT/dγ to 1e-7, for V from 2 to
    2^18; `error` measures both. The error falls with the fourth and third power of the cubics' width.

    Args:
        vocab_size: V >= 2.
        gamma_min, gamma_max: finite, ascending. Duo trains GPT-2's vocabulary on [-3.5, -1.75] and distils on
            [-4, -1]; `covering` chooses by α.
        size: how many cubics.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        The Diffusion Duality, arXiv 2506.10892; its published table takes the nearest of 100,000 points and
        differences of them.

    Example:
        >>> import torch
        >>> from dlcore.process import duo
        >>> table = duo.Transformation(50_257, -3.5, -1.75)
        >>> gamma, alpha, dalpha = table.levels(torch.tensor([0.0, 0.5, 1.0]))
        >>> alpha.float(), dalpha.float()
        (tensor([0.9283, 0.3102, 0.0383]), tensor([-0.6566, -1.1085, -0.1696]))
    """

    def __init__(
        self, vocab_size: int, gamma_min: float = -5.0, gamma_max: float = -1.0, *, size: int = 1024
    ) -> None:
        op = "duo.Transformation"
        _vocabulary(op, vocab_size)
        checks.integer(op, "size", size)
        if size < 1:
            raise ValueError(f"{op}: size must be at least 1, got {size}")
        limit = torch.finfo(torch.float32).max
        checks.real(op, "gamma_min", gamma_min, -limit, limit)
        checks.real(op, "gamma_max", gamma_max, -limit, limit)
        if gamma_min >= gamma_max:
            raise ValueError(f"{op}: gamma_min must lie below gamma_max {gamma_max:g}, got {gamma_min:g}")
        self.vocab_size, self.gamma_min, self.gamma_max = vocab_size, gamma_min, gamma_max
        self._width = (gamma_max - gamma_min) / size
        knots = torch.linspace(gamma_min, gamma_max, size + 1, dtype=torch.float64)
        alpha, slope = transform(knots, vocab_size)
        rise, d0, d1 = alpha.diff(), slope[:-1] * self._width, slope[1:] * self._width
        #: Coefficients of 1, θ, θ², θ³ per cubic, θ in [0, 1].
        self._cubics = torch.stack([alpha[:-1], d0, 3 * rise - 2 * d0 - d1, d0 + d1 - 2 * rise], -1)
        self._falling = alpha

    @classmethod
    def covering(
        cls, vocab_size: int, alpha_max: float = 0.99, alpha_min: float = 0.01, *, size: int = 1024
    ) -> Transformation:
        """The table whose time runs from alpha_max at t = 0 down to alpha_min at t = 1.

        Example:
            >>> from dlcore.process import duo
            >>> table = duo.Transformation.covering(27)
            >>> round(table.gamma_min, 2), round(table.gamma_max, 2)
            (-3.07, 4.27)
        """
        ends = inverse_transform(torch.tensor([alpha_max, alpha_min], dtype=torch.float64), vocab_size)
        return cls(vocab_size, *ends.tolist(), size=size)

    def __repr__(self) -> str:
        return f"Transformation({self.vocab_size}, {self.gamma_min:g}, {self.gamma_max:g})"

    @property
    def device(self) -> torch.device:
        """Where the table lies."""
        return self._cubics.device

    def to(self, device: torch.device | str) -> Transformation:
        """The same table on another device."""
        moved = object.__new__(type(self))
        moved.__dict__.update(self.__dict__)
        moved._cubics, moved._falling = self._cubics.to(device), self._falling.to(device)
        return moved

    def error(self) -> tuple[float, float]:
        """The largest errors of α and dT/dγ against `transform`, where a cubic errs most: measured now.

        Example:
            >>> from dlcore.process import duo
            >>> max(duo.Transformation(50_257).error()) < 1e-7
            True
        """
        start = self.gamma_min + self._width * torch.arange(len(self._cubics), dtype=torch.float64)
        # A cubic's value errs most in the middle, its slope at (3 ± √3)/6.
        at = torch.cat([start + self._width * share for share in (0.5, 0.2113248654, 0.7886751346)])
        alpha, slope = transform(at, self.vocab_size)
        got = self.alpha(at.to(self.device)).cpu(), self.derivative(at.to(self.device)).cpu()
        return float((got[0] - alpha).abs().max()), float((got[1] - slope).abs().max())

    def alpha(self, gamma: float | Tensor) -> Tensor:
        """T(γ), (...) float64, for γ in [gamma_min, gamma_max]; differentiable in γ."""
        return self._value(self._checked("duo.Transformation.alpha", gamma))

    def derivative(self, gamma: float | Tensor) -> Tensor:
        """dT/dγ < 0, (...) float64, for γ in [gamma_min, gamma_max]."""
        return self._slope(self._checked("duo.Transformation.derivative", gamma))

    def gamma(self, alpha: float | Tensor) -> Tensor:
        """γ with T(γ) = alpha, (...) float64, for α between the table's ends.

        `alpha` of it is alpha to a few float64 roundings. Where the table is flat (α = 1 to rounding) so is
        the question, and γ is any of the answers. No gradient.

        Example:
            >>> from dlcore.process import duo
            >>> duo.Transformation(50_257).gamma(0.5)
            tensor(-2.8838, dtype=torch.float64)
        """
        op = "duo.Transformation.gamma"
        target = _tensor(op, "alpha", alpha, self.device).detach()
        if checks.reads_data(target):
            low, high = float(self._falling[-1]), float(self._falling[0])
            checks.within(op, "alpha", target, low - _SLACK, high + _SLACK)
        flat = target.reshape(-1)
        cell = torch.searchsorted(-self._falling, -flat, right=True) - 1
        cell = cell.clamp(0, len(self._cubics) - 1)
        c0, c1, c2, c3 = self._cubics[cell].unbind(-1)
        drop = c1 + c2 + c3
        theta = torch.where(drop < 0, (flat - c0) / torch.where(drop < 0, drop, 1), 0).clamp(0, 1)
        # Newton from the chord: the cubic bends by the cell's width, so four rounds reach rounding.
        for _ in range(4):
            value = c0 + theta * (c1 + theta * (c2 + theta * c3)) - flat
            slope = c1 + theta * (2 * c2 + theta * 3 * c3)
            theta = torch.where(slope < 0, theta - value / torch.where(slope < 0, slope, 1), theta).clamp(
                0, 1
            )
        return (self.gamma_min + self._width * (cell + theta)).reshape(target.shape)

    def levels(self, t: float | Tensor) -> Levels:
        """γ_t, α_t = T(γ_t) and α'_t = dα/dt at times t in [0, 1], float64 of t's shape."""
        op = "duo.Transformation.levels"
        time = checks.within(op, "t", _tensor(op, "t", t, self.device), 0, 1)
        span = self.gamma_max - self.gamma_min
        gamma = self.gamma_min + time * span
        return Levels(gamma, self._value(gamma), self._slope(gamma) * span)

    def _checked(self, op: str, gamma: float | Tensor) -> Tensor:
        return checks.within(
            op, "gamma", _tensor(op, "gamma", gamma, self.device), self.gamma_min, self.gamma_max
        )

    def _cell(self, gamma: Tensor) -> tuple[Tensor, ...]:
        place = (gamma - self.gamma_min) / self._width
        cell = place.floor().clamp(0, len(self._cubics) - 1)
        return ((place - cell).clamp(0, 1), *self._cubics[cell.long()].unbind(-1))

    def _value(self, gamma: Tensor) -> Tensor:
        theta, c0, c1, c2, c3 = self._cell(gamma)
        return (c0 + theta * (c1 + theta * (c2 + theta * c3))).clamp(0, 1)

    def _slope(self, gamma: Tensor) -> Tensor:
        theta, _, c1, c2, c3 = self._cell(gamma)
        return (c1 + theta * (2 * c2 + theta * 3 * c3)) / self._width
