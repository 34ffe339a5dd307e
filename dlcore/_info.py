"""What `python -m dlcore info` prints."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch

import dlcore
from dlcore import _dispatch


def report() -> str:
    """Versions, CPU level, threads, and per op which backends can run and why others cannot."""
    facts = {
        "dlcore": dlcore.__version__,
        "torch": torch.__version__,
        "python": f"{platform.python_version()} ({sys.platform}, {platform.machine()})",
        "threads": str(torch.get_num_threads()),
        **_compiled(),
        "triton": _triton(),
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    return "\n".join([*lines, "", *_table()])


def _compiled() -> dict[str, str]:
    """What the compiled module says of itself, if it is there."""
    try:
        from dlcore import _C
    except ImportError as error:
        return {"compiled module": f"missing: {error}"}
    return {"cpu capability": _C.capability(), "parallel runtime": _C.parallel_runtime()}


def _triton() -> str:
    """Triton's version, if it is installed, and the GPU that it would compile for."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "missing"
    return f"{version}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no CUDA device'}"


def _table() -> list[str]:
    """A line per op: "yes" under each backend that can run it, else its reasons."""
    rows = [["op", *_dispatch.PRIORITY]]
    for op in _dispatch.ops():
        reasons = dlcore.backends(op)
        assert isinstance(reasons, dict)
        rows.append([op, *("; ".join(reasons[b]) or "yes" for b in _dispatch.PRIORITY)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
