"""Diffusion processes and flows: coefficients and compositions of the ops below them."""

from dlcore.process import (
    absorbing_uniform,
    distill,
    duo,
    flow,
    guidance,
    masked,
    metrics,
    uniform,
    unmask,
)

__all__ = [
    "absorbing_uniform",
    "distill",
    "duo",
    "flow",
    "guidance",
    "masked",
    "metrics",
    "uniform",
    "unmask",
]
