"""Noise levels where the bits are decided: a schedule fitted to a denoiser's errors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import rng

#: Less mass than this between two noise levels says nothing of where to step.
_LEAST_MASS = 1e-9
#: The largest power and gate: their own powers stay finite.
_MOST = 1e6


class EntropySchedule:
    """A law of noise levels σ: log-uniform inside bins of given mass.

    With a mass that follows the entropy rate, equal steps of the cumulative mass decide equally much: so does
    `grid` place the steps of a sampler, and `sample` the levels of training.

    Args:
        edges: (K + 1,) ascending positive noise levels, σ in the coding's units.
        density: (K,) the relative mass of each bin; kept normalised to the sum 1.

    Raises:
        ValueError: edges that do not ascend, masses that are negative or all 0, sizes. TypeError: no numbers.

    Source:
        Batzolis et al., "CoBit", arXiv 2605.07013.

    Example:
        >>> from dlcore.bits import EntropySchedule
        >>> schedule = EntropySchedule([0.1, 1.0, 10.0], [3.0, 1.0])
        >>> schedule.quantile(0.75)
        1.0
        >>> schedule.grid(5)
        tensor([10.0000,  1.0000,  0.4642,  0.2154,  0.1000], dtype=torch.float64)
    """

    def __init__(self, edges: Tensor | Sequence[float], density: Tensor | Sequence[float]) -> None:
        op = "bits.EntropySchedule"
        self.edges, density = _numbers(op, "edges", edges), _numbers(op, "density", density)
        ascending = bool((self.edges > 0).all() and (self.edges.diff() > 0).all())
        if self.edges.numel() < 2 or not ascending or not bool(self.edges.isfinite().all()):
            raise ValueError(f"{op}: edges must be at least two ascending positive numbers, got {edges}")
        if density.shape != (self.edges.numel() - 1,):
            wanted = self.edges.numel() - 1
            raise ValueError(f"{op}: density must have shape ({wanted},), got {tuple(density.shape)}")
        total = float(density.sum())
        if not bool((density >= 0).all()) or not 0 < total < math.inf:
            raise ValueError(f"{op}: density must be non-negative, finite and not all 0, got {density}")
        self.density = density / total
        mass = self.density.cumsum(0)
        self._mass = torch.cat([mass.new_zeros(1), mass / mass[-1]])

    @classmethod
    def fit(
        cls,
        sigma: Tensor,
        error: Tensor,
        *,
        bins: int = 128,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        power: float = 0.5,
        gate: float = 0.1,
    ) -> EntropySchedule:
        """The schedule of pairs (noise level, mean squared error of the posterior mean per bit).

        error/σ² is the entropy rate dH(bits | x)/d ln σ in nats per bit (I-MMSE: Guo, Shamai and Verdú 2005).
        In log-spaced bins the mass is g(σ)·(mean of error/σ²)^power with g(σ) = σ³/(σ³ + gate³), which leaves
        out the levels where the bits are settled. A bin without pairs takes the error of the bins around it,
        interpolated in ln σ. Pairs outside [sigma_min, sigma_max] are left out.

        Args:
            sigma: positive noise levels, of any shape, none NaN.
            error: of the same shape: `bits.loss(..., kind="squared")`, say.
            bins: how many.
            sigma_min, sigma_max: the first and the last edge.
            power: 1/2 ("sqrt-rate") or 1 ("rate"), at least 0.
            gate: where g is a half, at least 0; 0 for none.

        Raises:
            ValueError: shapes, a sigma that is NaN, errors that are negative or not finite, no pair in range,
                numbers out of range. TypeError: dtypes, no numbers.

        Example:
            >>> import torch
            >>> from dlcore.bits import EntropySchedule
            >>> sigma = torch.logspace(-2, 1, 1000)
            >>> EntropySchedule.fit(sigma, 0.25 * sigma**2 / (sigma**2 + 0.25), bins=16, sigma_min=0.01)
            EntropySchedule(16 bins of σ in [0.01, 80], median 0.351)
        """
        op = "bits.EntropySchedule.fit"
        for name, x in (("sigma", sigma), ("error", error)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise TypeError(f"{op}: {name} must be a floating Tensor, got {checks.describe(x)}")
        if sigma.shape != error.shape:
            raise ValueError(
                f"{op}: error must have sigma's shape {tuple(sigma.shape)}, got {tuple(error.shape)}"
            )
        checks.integer(op, "bins", bins)
        for name, end in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
            checks.real(op, name, end)
        for name, value in (("power", power), ("gate", gate)):
            checks.real(op, name, value, 0.0, _MOST)
        if bins < 1 or not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"{op}: takes bins >= 1 and 0 < sigma_min < sigma_max, got {bins}, {sigma_min}, {sigma_max}"
            )
        sigma, error = (x.detach().double().cpu().flatten() for x in (sigma, error))
        if not bool((error >= 0).all() and error.isfinite().all()):
            raise ValueError(f"{op}: error must be finite and non-negative")
        if bool(sigma.isnan().any()):
            raise ValueError(f"{op}: sigma must be numbers, got nan")
        inside = (sigma >= sigma_min) & (sigma <= sigma_max)
        if not bool(inside.any()):
            raise ValueError(f"{op}: no sigma lies in [{sigma_min}, {sigma_max}]")
        sigma, error = sigma[inside], error[inside]
        logs = torch.linspace(math.log(sigma_min), math.log(sigma_max), bins + 1, dtype=torch.float64)
        edges = logs.exp()
        edges[0], edges[-1] = sigma_min, sigma_max
        which = (torch.bucketize(sigma, edges, right=True) - 1).clamp(max=bins - 1)
        count = torch.bincount(which, minlength=bins)
        filled = count > 0
        rate = torch.bincount(which, weights=error / sigma**2, minlength=bins) / count.clamp(min=1)
        middle = (logs[1:] + logs[:-1]) / 2
        between = _interpolate(middle, middle[filled], (rate * (2 * middle).exp())[filled])
        rate = torch.where(filled, rate, between * (-2 * middle).exp())
        cube = (3 * middle).exp()
        return cls(edges, cube / (cube + gate**3) * rate**power)

    def cdf(self, sigma: float | Tensor) -> float | Tensor:
        """The mass below sigma: 0 up to the first edge, 1 from the last on. A float for a float."""
        x = torch.as_tensor(sigma, dtype=torch.float64)
        below = _interpolate(x.clamp_min(0).log(), self.edges.log(), self._mass)
        return below if isinstance(sigma, Tensor) else float(below)

    def quantile(self, q: float | Tensor) -> float | Tensor:
        """The least sigma whose mass below is q in [0, 1]: the inverse of `cdf`. A float for a float."""
        x = torch.as_tensor(q, dtype=torch.float64)
        checks.value_range("bits.EntropySchedule.quantile", "q", x, 0, 1)
        found = self._inverse(x, self._mass, self.edges)
        return found if isinstance(q, Tensor) else float(found)

    def window(self, low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
        """The levels (σ at quantile low, σ at quantile high) between which `bits.churn_gamma` lets churn in.

        Example:
            >>> from dlcore.bits import EntropySchedule
            >>> EntropySchedule([0.1, 1.0, 10.0], [3.0, 1.0]).window(0.0, 0.75)
            (0.1, 1.0)
        """
        if not 0 <= low <= high <= 1:
            raise ValueError(f"bits.EntropySchedule.window: takes 0 <= low <= high <= 1, got {low}, {high}")
        return float(self.quantile(low)), float(self.quantile(high))

    def grid(
        self,
        n: int,
        sigma_max: float | None = None,
        sigma_min: float | None = None,
        *,
        midpoints: bool = False,
    ) -> Tensor:
        """n descending noise levels (n,) float64, equal masses apart, from sigma_max to sigma_min exactly.

        Where there is no mass between the two, the levels are log-linear.

        Args:
            n: at least 2.
            sigma_max, sigma_min: the last and the first edge by default.
            midpoints: put the cumulative mass of a bin at its middle (in ln σ), not at its right edge where
                it belongs: the public code's tables are read this way, half a bin lower.

        Raises:
            ValueError: n below 2, or not 0 < sigma_min < sigma_max. TypeError: n no int, or no numbers.

        Example:
            >>> from dlcore.bits import EntropySchedule
            >>> EntropySchedule([0.1, 1.0, 10.0], [1.0, 1.0]).grid(3, sigma_max=80.0, sigma_min=0.1)
            tensor([80.0000,  1.0000,  0.1000], dtype=torch.float64)
        """
        op = "bits.EntropySchedule.grid"
        checks.integer(op, "n", n)
        high = float(self.edges[-1]) if sigma_max is None else sigma_max
        low = float(self.edges[0]) if sigma_min is None else sigma_min
        for name, end in (("sigma_max", high), ("sigma_min", low)):
            checks.real(op, name, end)
        if n < 2 or not 0 < low < high < math.inf:
            raise ValueError(f"{op}: takes n >= 2 and 0 < sigma_min < sigma_max, got {n}, {low}, {high}")
        mass, sigma = self._mass, self.edges
        if midpoints:
            mass, sigma = mass[1:], (sigma[1:] * sigma[:-1]).sqrt()
        ends = torch.tensor([high, low], dtype=torch.float64).log()
        first, last = (float(x) for x in _interpolate(ends, sigma.log(), mass))
        if first - last > _LEAST_MASS:
            levels = self._inverse(torch.linspace(first, last, n, dtype=torch.float64), mass, sigma)
        else:
            levels = torch.linspace(math.log(high), math.log(low), n, dtype=torch.float64).exp()
        levels = levels.clamp(low, high)
        levels[0], levels[-1] = high, low
        return levels

    def sample(
        self,
        shape: int | Sequence[int],
        *,
        key: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Noise levels float32 for training: a bin by its mass, then log-uniform inside.

        A key (2,) gives (*shape,), keys (*lead, 2) give (*lead, *shape), as in `rng.uniform`.

        Example:
            >>> import dlcore
            >>> from dlcore.bits import EntropySchedule
            >>> EntropySchedule([0.1, 1.0, 10.0], [3.0, 1.0]).sample(4, key=dlcore.rng.key(7)).shape
            torch.Size([4])
        """
        op = "bits.EntropySchedule.sample"
        lead = None if key is not None else torch.Size()
        u = rng.uniform(checks.key(op, key, generator, lead), shape, dtype=torch.float64)
        return self._inverse(u, self._mass, self.edges).float()

    def save(self, path: str | PathLike[str]) -> None:
        """Write {"edges": [...], "density": [...]} as JSON; `load` gives the same numbers back."""
        table = {"edges": self.edges.tolist(), "density": self.density.tolist()}
        Path(path).write_text(json.dumps(table) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> EntropySchedule:
        """Read what `save` wrote. ValueError for a file that is no such JSON."""
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(table, dict) or not {"edges", "density"} <= table.keys():
            raise ValueError(f"bits.EntropySchedule.load: {path} must hold edges and density")
        return cls(table["edges"], table["density"])

    def __repr__(self) -> str:
        low, high = float(self.edges[0]), float(self.edges[-1])
        span = f"σ in [{low:g}, {high:g}], median {self.quantile(0.5):.3g}"
        return f"EntropySchedule({self.density.numel()} bins of {span})"

    @staticmethod
    def _inverse(q: Tensor, mass: Tensor, sigma: Tensor) -> Tensor:
        """σ, log-linear between the knots (mass, sigma); a knot's own mass gives it exactly."""
        right = torch.searchsorted(mass, q.contiguous()).clamp(1, mass.numel() - 1)
        left = right - 1
        step = mass[right] - mass[left]
        share = torch.where(step > 0, (q - mass[left]) / torch.where(step > 0, step, 1), 0).clamp(0, 1)
        between = sigma[left] * (sigma[right] / sigma[left]) ** share
        return torch.where(share == 1, sigma[right], between)


def _numbers(op: str, name: str, x: Tensor | Sequence[float]) -> Tensor:
    """A vector of float64 on the CPU."""
    try:
        vector = torch.as_tensor(x, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{op}: {name} must be numbers, got {checks.describe(x)}") from error
    if vector.dim() != 1:
        raise ValueError(f"{op}: {name} must be a vector, got {tuple(vector.shape)}")
    return vector.clone()


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), ascending in knots, and level outside."""
    if knots.numel() == 1:
        return values.expand(x.shape)
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, knots.numel() - 1)
    left = right - 1
    share = ((x - knots[left]) / (knots[right] - knots[left])).clamp(0, 1)
    return values[left] + share * (values[right] - values[left])
