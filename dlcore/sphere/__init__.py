"""The unit sphere of R^d: its geometry, the laws that diffusion on it needs, and flows over a vocabulary."""

from dlcore.sphere import cauchy, vmf
from dlcore.sphere.dynamics import correct, step
from dlcore.sphere.geometry import angle, exp_map, log_map, normalize, project, rotate, slerp
from dlcore.sphere.velocity import posterior_logits, posterior_score, radial_weight, velocity

__all__ = [
    "angle",
    "cauchy",
    "correct",
    "exp_map",
    "log_map",
    "normalize",
    "posterior_logits",
    "posterior_score",
    "project",
    "radial_weight",
    "rotate",
    "slerp",
    "step",
    "velocity",
    "vmf",
]
