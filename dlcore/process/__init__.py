"""Diffusion processes over tokens: coefficients and compositions of `dlcore.categorical`."""

from dlcore.process import absorbing_uniform, masked, uniform, unmask

__all__ = ["absorbing_uniform", "masked", "uniform", "unmask"]
