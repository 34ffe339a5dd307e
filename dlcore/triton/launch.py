"""What every Triton family shares on the host: why it cannot run, and how a kernel is launched."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlcore._tensors import too_wide

logger = logging.getLogger("dlcore")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Compiled variants that were launched before.
_compiled: set[Any] = set()

#: The same by kernel, device, kinds of arguments and options.
_ready: dict[Any, Any] = {}


class Launch(NamedTuple):
    """A kernel, what it was called with, and constants and options by name."""

    kernel: Any
    args: tuple[Any, ...]
    meta: dict[str, Any]


class Variant(NamedTuple):
    """What a kernel is compiled for, alignment and options aside: the arguments' types, and constants."""

    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]


#: Told of every launch that is made, if set.
watch: Callable[[Launch], None] | None = None
_recorded: list[Launch] | None = None
#: The compute capability that is told of tensors on no GPU: the interpreter can do what a new one can.
_assumed = 90


def variant(x: Launch) -> Variant:
    """The variant that a launch needs: absent arguments and tensors by dtype, numbers not at all."""
    names = x.kernel.arg_names
    types = tuple(
        (name, "none" if a is None else str(a.dtype).removeprefix("torch."))
        for name, a in zip(names, x.args, strict=False)
        if a is None or isinstance(a, Tensor)
    )
    return Variant(x.kernel.__name__, types, tuple(sorted((k, v) for k, v in x.meta.items() if k in names)))


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def reasons(*args: Any) -> list[str]:
    """Why Triton can't take these arguments; the first one is logits or a key."""
    found = []
    if "triton" not in sys.modules and find_spec("triton") is None:
        found.append("needs Triton: pip install triton")
    on_cpu = next((x for x in args if isinstance(x, Tensor) and not x.is_cuda), None)
    if on_cpu is not None and not (interpreting() and on_cpu.is_cpu):
        found.append(f"takes CUDA tensors, got {on_cpu.device}")
    if not args and not (torch.cuda.is_available() or interpreting()):
        found.append("needs a CUDA device")
    if args and args[0].dtype not in DTYPES and args[0].dtype != torch.int64:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        found.append(f"takes {accepted}, got {str(args[0].dtype).removeprefix('torch.')}")
    wide = too_wide(args[0]) if args else None
    if wide is not None:
        found.append(wide)
    return found


def launch(kernel: Any, grid: int | tuple[int, ...], like: Tensor, *args: Any, **meta: Any) -> None:
    """Run `kernel` on so many programs, on the device of `like`; an empty grid runs nothing.

    `meta` holds the kernel's constants and Triton's own options (num_warps, num_stages).
    """
    grid = (grid,) if isinstance(grid, int) else grid
    if 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, args, meta))
        return
    if watch is not None:
        watch(Launch(kernel, args, meta))
    device = like.get_device()
    if not like.is_cuda or device == torch.cuda.current_device():
        _run(kernel, grid, device, args, meta)
    else:
        with torch.cuda.device(device):
            _run(kernel, grid, device, args, meta)


def _run(
    kernel: Any, grid: tuple[int, ...], device: int, args: tuple[Any, ...], meta: dict[str, Any]
) -> None:
    """Run a kernel on the current device: what Triton compiled before for arguments of these kinds.

    Triton would find it, too, but looks over the kernel's globals first, which takes longer than all else.
    """
    key, triton = None, _triton()
    if triton is not None and hasattr(kernel, "device_caches"):  # the interpreter's kernels have none
        bound, kinds, options = kernel.device_caches[device][-1](*args, **meta)
        key = (kernel.fn, device, *kinds, *options.items())
        ready = _ready.get(key)
        if ready is not None:
            settings = triton.knobs.runtime
            if settings.launch_enter_hook.calls or settings.launch_exit_hook.calls:  # a profiler's
                ready[(*grid, 1, 1)](*bound.values())
                return
            stream = triton.runtime.driver.active.get_current_stream(device)
            place = (*(*grid, 1, 1)[:3], stream, ready.function, ready.packed_metadata)
            ready.run(*place, None, None, None, *bound.values())
            return
    start = time.perf_counter()
    compiled = kernel[grid](*args, **meta)
    if key is not None:
        _ready[key] = compiled
    if compiled is not None and compiled not in _compiled:
        _compiled.add(compiled)
        took, constants = time.perf_counter() - start, variant(Launch(kernel, args, meta)).constants
        shown = ", ".join(f"{k}={v}" for k, v in constants)
        logger.info(
            "triton: %s [%s] was made ready for its first call in %.2f s", kernel.__name__, shown, took
        )


@cache
def _triton() -> Any:
    """Triton, if it is one of those whose way of a launch `_run` follows."""
    triton = importlib.import_module("triton")
    return triton if triton.__version__.startswith(("3.6.", "3.7.")) else None


@contextmanager
def recording(target: int | None = None) -> Iterator[list[Launch]]:
    """Collect the launches inside the block instead of making them, say of calls with meta tensors; those are
    made as for a GPU of that compute capability."""
    global _assumed, _recorded
    found: list[Launch] = []
    before = _assumed, _recorded
    _assumed, _recorded = target or _assumed, found
    try:
        yield found
    finally:
        _assumed, _recorded = before


def multiplies_from_shared(device: torch.device) -> bool:
    """Whether products take their operands from shared memory, of which a program may have 227 KiB then, and
    tiles are copied by descriptors: compute capabilities 9.0 to 11.x."""
    capability = _capability_of_gpu(device) if device.type == "cuda" else _assumed
    return 90 <= capability < 120


@lru_cache(maxsize=16)
def _capability_of_gpu(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def kernels(module: str) -> dict[str, Any]:
    """The kernels of dlcore.triton.<module> by name: what is called *_kernel."""
    names = vars(importlib.import_module(f"dlcore.triton.{module}"))
    return {n: k for n, k in names.items() if n.endswith("_kernel") and k.fn.__module__.endswith(module)}


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two from n on, within [low, high]."""
    return min(max(1 << (n - 1).bit_length(), low), high)
