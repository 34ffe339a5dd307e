"""dlcore: the compute core of diffusion language models."""

from dlcore import attention, bits, categorical, process, rng, similarity, sphere
from dlcore._dispatch import backends, explain, last_backend, use_backend
from dlcore.linear_logits import LinearLogits

__version__ = "0.1.0"

__all__ = [
    "LinearLogits",
    "attention",
    "backends",
    "bits",
    "categorical",
    "explain",
    "last_backend",
    "process",
    "rng",
    "similarity",
    "sphere",
    "use_backend",
]
