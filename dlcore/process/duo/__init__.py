"""Duo, the diffusion duality: uniform-state diffusion as the argmax of a Gaussian one.

The state w = ᾱ·x + σ̄·ε in V dimensions, with γ = ln(σ̄²/ᾱ²), has z = argmax w as uniform-state
diffusion's token at α = T(γ). What that gives:

- noise levels: `transform` and `inverse_transform` on the host, `Transformation` as the loop's table;
- the curriculum: `curriculum` draws z and the k largest entries of softmax(w/τ) without V numbers, `embed`
  makes the network's input of them, `curriculum_temperature` is τ. The loss is `uniform.nelbo` at z
  throughout;
- discrete consistency distillation: `consistency_pair` and `consistency_loss`, dt by `distill.step_size`;
- sampling: `uniform.step` with the κ of `kappa` or `kappa_profile` at the levels of `alpha_profile`, then
  `greedy`.

Sources: The Diffusion Duality, arXiv 2506.10892; Chapter II, arXiv 2602.21185.
"""

from dlcore.process.duo.consistency import consistency_loss, consistency_pair
from dlcore.process.duo.relaxation import (
    Relaxed,
    corrupt,
    curriculum,
    curriculum_temperature,
    embed,
)
from dlcore.process.duo.sampling import alpha_profile, greedy, kappa, kappa_profile
from dlcore.process.duo.transformation import Levels, Transformation, inverse_transform, transform

__all__ = [
    "Levels",
    "Relaxed",
    "Transformation",
    "alpha_profile",
    "consistency_loss",
    "consistency_pair",
    "corrupt",
    "curriculum",
    "curriculum_temperature",
    "embed",
    "greedy",
    "inverse_transform",
    "kappa",
    "kappa_profile",
    "transform",
]
