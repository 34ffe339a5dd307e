"""Every system by its name, in the order of the table."""

from __future__ import annotations

from importlib import import_module

from bench.systems.system import System

#: Modules beside this one. A teacher comes before those that start from it.
NAMES = (
    "mdlm",
    "remdm",
    "sedd",
    "d3pm",
    "udm_loo",
    "udm_predictor_corrector",
    "absorbing_uniform",
    "duo",
    "gidd",
    "block_diffusion",
    "blockgen_arpc",
    "llada",
    "entropy_bound",
    "lomdm",
    "sdtt",
    "idlm",
    "bitstream",
    "elf",
    "flm",
    "langflow",
    "slerp",
    "vmf",
    "guidance",
    "dkv_cache",
)


def find(name: str) -> type[System]:
    """The system of the module `name`."""
    module = import_module(f"bench.systems.{name}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, System) and value.__module__ == module.__name__
    )
    return found
