"""dlcore: the compute core of diffusion language models."""

from importlib import import_module
from types import ModuleType

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


def __getattr__(name: str) -> ModuleType:
    # On first use: torch may have no distributed, and who stays on one machine pays nothing.
    if name == "distributed":
        try:
            return import_module("dlcore.distributed")
        except ImportError as error:
            raise AttributeError(f"module 'dlcore' has no distributed: {error}") from error
    raise AttributeError(f"module 'dlcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "distributed"})
