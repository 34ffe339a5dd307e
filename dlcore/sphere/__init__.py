"""Flows and diffusions on the unit sphere, over a vocabulary of unit vectors."""

from dlcore.sphere.dynamics import correct, step
from dlcore.sphere.velocity import matched_filter, posterior_score, radial_weight, velocity

__all__ = ["correct", "matched_filter", "posterior_score", "radial_weight", "step", "velocity"]
