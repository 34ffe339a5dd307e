"""The unit sphere: geometry, and the laws that diffusion on it needs."""

from dlcore.sphere import vmf

__all__ = ["vmf"]
