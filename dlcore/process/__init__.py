"""Diffusion processes and flows: coefficients and compositions of the ops below them."""

from dlcore.process import (
    absorbing_uniform,
    cache,
    d3pm,
    distill,
    duo,
    flow,
    guidance,
    hybrid,
    masked,
    metrics,
    order,
    score,
    uniform,
    unmask,
)

__all__ = [
    "absorbing_uniform",
    "cache",
    "d3pm",
    "distill",
    "duo",
    "flow",
    "guidance",
    "hybrid",
    "masked",
    "metrics",
    "order",
    "score",
    "uniform",
    "unmask",
]
