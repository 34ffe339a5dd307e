"""Every op, declared once, a file for each family. Importing this declares them all."""

from dlcore._ops import attention, categorical, rng, sphere, sphere_dynamics, sphere_velocity, uniform

__all__ = ["attention", "categorical", "rng", "sphere", "sphere_dynamics", "sphere_velocity", "uniform"]
