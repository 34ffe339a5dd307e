"""Diffusion processes and flows: coefficients and compositions of the ops below them."""

from dlcore.process import absorbing_uniform, cache, flow, masked, uniform, unmask

__all__ = ["absorbing_uniform", "cache", "flow", "masked", "uniform", "unmask"]
