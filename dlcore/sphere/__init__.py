"""The unit sphere of R^d: its geometry, and the laws that diffusion on it needs."""

from dlcore.sphere import cauchy, vmf
from dlcore.sphere.geometry import angle, exp_map, log_map, normalize, project, rotate, slerp

__all__ = [
    "angle",
    "cauchy",
    "exp_map",
    "log_map",
    "normalize",
    "project",
    "rotate",
    "slerp",
    "vmf",
]
