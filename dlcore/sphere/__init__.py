"""The unit sphere of R^d: its geometry, the laws that diffusion on it needs, and flows over a vocabulary.

The structure is that of every family here (`dlcore.bits`, `dlcore.process.flow`):

- a corruption: `slerp` to uniform noise, `vmf.sample`, `cauchy.sample`;
- a context-free posterior logit: `posterior_logits`;
- a drift weighed with the posterior: `velocity`, `posterior_score`;
- a cheap update: `step`, `correct`.
"""

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
