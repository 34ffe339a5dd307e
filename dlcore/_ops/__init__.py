"""Every op, declared once, a file for each family. Importing this declares them all."""

from dlcore._ops import (
    attention,
    bits,
    categorical,
    guidance,
    rng,
    similarity,
    sphere,
    sphere_dynamics,
    sphere_velocity,
    uniform,
)

__all__ = [
    "attention",
    "bits",
    "categorical",
    "guidance",
    "rng",
    "similarity",
    "sphere",
    "sphere_dynamics",
    "sphere_velocity",
    "uniform",
]
