"""Times that families train and sample at: ELF's logit-normal law, LangFlow's Gumbel law."""

from __future__ import annotations

import torch
from torch import Tensor

from dlcore import _checks as checks
from dlcore import rng

_HERE = torch.device("cpu")


def _steps(op: str, steps: int) -> None:
    checks.integer(op, "steps", steps)
    if steps < 1:
        raise ValueError(f"{op}: steps must be at least 1, got {steps}")


def _between(op: str, name: str, value: float, low: float, high: float) -> Tensor:
    """A number strictly between two others, as float64."""
    return checks.within(op, name, checks.number(op, name, value, torch.Size(), _HERE), low, high, "()")


def elf_grid(
    steps: int,
    *,
    mean: float = -1.5,
    std: float = 0.8,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Times 0 = t_0 < ... < t_steps = 1 as dense as training's, t = sigmoid(N(mean, std²)).

    Without key and generator they are the law's quantiles (FMLM*, arXiv 2607.00714), the same in every call;
    with one of them sorted draws, as ELF's official code has it.

    Args:
        steps: >= 1.
        mean, std: of the logits of t; std > 0.

    Returns:
        (steps + 1,) float64 on the CPU, times of the path "linear".

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import flow
        >>> [round(t, 3) for t in flow.elf_grid(4).tolist()]
        [0.0, 0.115, 0.182, 0.277, 1.0]
    """
    op = "flow.elf_grid"
    _steps(op, steps)
    middle, spread = _between(op, "mean", mean, -torch.inf, torch.inf), _between(op, "std", std, 0, torch.inf)
    if key is None and generator is None:
        normal = torch.special.ndtri(torch.arange(1, steps, dtype=torch.float64) / steps)
    else:
        drawn = rng.normal(
            checks.key(op, key, generator, torch.Size(), _HERE), (steps - 1,), dtype=torch.float64
        )
        normal = drawn.sort().values
    inner = torch.sigmoid(middle + spread * normal)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=1.0)


def langflow_gamma(quantile: float | Tensor, *, location: float = 4.723, scale: float = 0.852) -> Tensor:
    """Quantiles of LangFlow's noise levels γ = ln(σ²/α²), a Gumbel law: γ = location - scale·ln(-ln q).

    Training draws q uniformly; the defaults are what LangFlow's schedule starts from. The law's distribution
    function is fitted to the share of a token's entropy that is left at γ, so every part of the law holds as
    much information as another.

    Args:
        quantile: (...) in (0, 1), a number or a real tensor.
        location, scale: of the law; scale > 0.

    Returns:
        (...) float64, times of the path "lognsr". Differentiable in quantile.

    Raises:
        TypeError, ValueError: what does not fit.

    Source:
        LangFlow, arXiv 2604.11748.

    Example:
        >>> from dlcore.process import flow
        >>> flow.langflow_gamma(0.5)
        tensor(5.0353, dtype=torch.float64)
    """
    op = "flow.langflow_gamma"
    lead = quantile.shape if isinstance(quantile, Tensor) else torch.Size()
    device = quantile.device if isinstance(quantile, Tensor) else _HERE
    q = checks.within(op, "quantile", checks.number(op, "quantile", quantile, lead, device), 0, 1, "()")
    middle = _between(op, "location", location, -torch.inf, torch.inf).to(device)
    width = _between(op, "scale", scale, 0, torch.inf).to(device)
    return middle - width * (-q.log()).log()


def langflow_grid(
    steps: int, *, location: float = 4.723, scale: float = 0.852, cutoff: float = 1e-5
) -> Tensor:
    """LangFlow's sampling times: `langflow_gamma` of quantiles from 1 - cutoff down to cutoff, evenly.

    Args:
        steps: >= 1; LangFlow's sampler takes the argmax of the network's logits at the last time.
        location, scale: as in `langflow_gamma`.
        cutoff: in (0, 1/2).

    Returns:
        (steps + 1,) float64 on the CPU, falling, times of the path "lognsr".

    Raises:
        TypeError, ValueError: what does not fit.

    Example:
        >>> from dlcore.process import flow
        >>> [round(t, 3) for t in flow.langflow_grid(2).tolist()]
        [14.532, 5.035, 2.641]
    """
    op = "flow.langflow_grid"
    _steps(op, steps)
    edge = float(_between(op, "cutoff", cutoff, 0, 0.5))
    quantiles = torch.linspace(1 - edge, edge, steps + 1, dtype=torch.float64)
    return langflow_gamma(quantiles, location=location, scale=scale)
