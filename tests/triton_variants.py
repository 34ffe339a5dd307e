"""Which variants of Triton's kernels tests launched, of those that `make gpu-check` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dlcore.triton.launch import Launch, Variant, variant

#: What was launched so far.
launched: set[Variant] = set()

#: Constants that may differ between what tests launch and what is compiled: the interpreter is too slow for
#: tiles as large as a GPU's, and no kernel asks for the size of one but where `_asked` says so.
SIZES = {
    **dict.fromkeys(("BLOCK", "BLOCK_D", "BLOCK_M", "BLOCK_N", "BLOCK_R", "BLOCK_V"), "lanes of a tile"),
    **dict.fromkeys(("ROWS", "DEPTH", "GROUPS", "SIZE", "TILES"), "rows, columns or tiles of a program"),
    **dict.fromkeys(("PARTS", "TOGETHER"), "splits of the keys that are merged at a time"),
    **dict.fromkeys(("DIM", "VALUE_DIM", "HEADS", "GROUP"), "a model's dimensions and heads"),
    "PAGE_SIZE": "rows of a page of a cache",
}
#: Compiled variants that no test launches, and why.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def note(x: Launch) -> None:
    launched.add(variant(x))


@contextmanager
def watched() -> Iterator[set[Variant]]:
    """What is launched inside."""
    before = launched.copy()
    launched.clear()
    try:
        yield launched
    finally:
        launched.update(before)


def _asked(kernel: str, constants: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """What kernels ask of sizes."""
    for columns, block in (("DIM", "BLOCK_D"), ("VALUE_DIM", "BLOCK_V")):
        if columns in constants and block in constants:
            yield f"{columns} < {block}", constants[columns] < constants[block]
    if "PAGE_SIZE" in constants:
        yield "PAGE_SIZE > 0", constants["PAGE_SIZE"] > 0
    if kernel == "sphere_sample_kernel" and constants["WHOLE"]:
        yield "BLOCK <= 256", constants["BLOCK"] <= 256


def paths(variants: set[Variant]) -> set[tuple[str, str]]:
    """Kernels with what selects their code, sizes aside: constants, and which arguments are absent; and, each
    by itself, the types of an argument, which are converted as it is read or written."""
    found = set()
    for v in variants:
        constants = dict(v.constants)
        flags = [f"{k}={x}" for k, x in constants.items() if k not in SIZES]
        flags += [said if true else f"not {said}" for said, true in _asked(v.kernel, constants)]
        flags += [f"no {name}" for name, kind in v.types if kind == "none"]
        found.add((v.kernel, ", ".join(flags)))
        found |= {(v.kernel, f"{name}: {kind}") for name, kind in v.types if kind != "none"}
    return found


def missed(*modules: str) -> list[tuple[str, str]]:
    """The paths of what `make gpu-check` compiles for some modules that no test before took."""
    from dlcore.triton import check

    listed = {variant(x) for module in modules for x in check.made(module)}
    assert listed, "no kernels"
    return sorted(paths(listed) - paths(launched) - EXCEPTIONS.keys())
