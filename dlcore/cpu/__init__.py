"""The compiled backend: tensors handed to `dlcore._C` as addresses, shapes and strides."""

from __future__ import annotations

import os

from dlcore import _C

#: The ISA levels of the compiled kernels, the best first.
CAPABILITIES = ("avx512", "avx2", "baseline")


def choose_capability(name: str) -> None:
    """Use one ISA level from now on; ValueError if it is unknown or this machine lacks it."""
    if not _C.choose_capability(name):
        raise ValueError(
            f"DLCORE_CPU_CAPABILITY: must be one of {', '.join(CAPABILITIES)} "
            f"and supported by this machine, got {name!r}"
        )


_asked = os.environ.get("DLCORE_CPU_CAPABILITY")
if _asked:
    choose_capability(_asked)
