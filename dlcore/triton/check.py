"""`python -m dlcore.triton.check`: compiles every kernel for several GPUs, without one; what each takes.

Every family names calls that launch each of its variants; they are made with tensors that hold no data (the
meta device), so a host function that waits for its numbers fails here, too.
"""

from __future__ import annotations

import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import lru_cache
from importlib import import_module
from io import StringIO
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from dlcore import triton as package
from dlcore.triton.launch import Launch, interpreting, kernels, recording

#: Compute capabilities, and the shared memory a program may have there; 8.0's is that of 8.6, 8.9 and 12.0,
#: which take the same shapes: it has 163 KiB itself.
TARGETS = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
#: What 8.0 itself has: float32 gradients of heads beyond 256 need it, whose smallest tiles fill 130 KiB.
LARGE = 163 << 10
#: Families whose kernels hold a few numbers a thread: none may be spilled.
NO_SPILLS = ("bits", "categorical", "guidance", "linear_logits", "rng", "similarity", "sphere", "uniform")

_TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.bool: "i1",
}


class Usage(NamedTuple):
    """What a compiled kernel takes: registers and spilled bytes a thread, shared bytes a program."""

    family: str
    kernel: str
    constants: str
    target: int
    registers: int
    spilled: int
    shared: int

    def complaint(self) -> str | None:
        """Why this may not be, or None."""
        if self.spilled and self.family.startswith(NO_SPILLS):
            return f"spills {self.spilled} bytes a thread"
        large = self.family == "attention_backward" and re.match("fp32 .* DIM=512 ", self.constants)
        limit = max(TARGETS[self.target], LARGE if large else 0)
        return f"wants {self.shared} bytes of shared memory of {limit}" if self.shared > limit else None


def modules() -> list[str]:
    """The modules of dlcore.triton."""
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


@lru_cache
def launches(family: str) -> list[tuple[Launch, ...]]:
    """Every variant that the family's examples launch: what runs on each target.

    Examples have sizes for which every target launches the same kernels, in the same order.
    """
    variants = list(zip(*(made(family, target) for target in TARGETS), strict=True))
    assert all(len({x.kernel for x in variant}) == 1 for variant in variants), family
    found = {
        str([(x.kernel.__name__, _source(x)[1:], x.meta) for x in variant]): variant for variant in variants
    }
    return list(found.values())


def made(family: str, target: int | None = None) -> list[Launch]:
    """The launches of the family's examples."""
    with recording(target) as found:
        examples = getattr(import_module(f"dlcore.triton.{family}"), "examples", lambda _: ())
        for call in examples("meta"):
            call()
    return found


def missed(found: Iterable[Launch]) -> list[str]:
    """The kernels that no example launches."""
    names = {name for module in modules() for name in kernels(module)}
    return sorted(names - {x.kernel.__name__ for x in found})


def _source(x: Launch) -> tuple[Any, dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Kernel, signature, constants and hints: what a call with such arguments is compiled for."""
    given = dict(zip(x.kernel.arg_names, x.args, strict=False)) | x.meta
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(x.kernel.params):
        value = given[parameter.name]
        free = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (free and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i1" if value is True or value is False else _integer(value)
        aligned = isinstance(value, Tensor) or (free and type(value) is int and value % 16 == 0)
        if aligned and not parameter.is_constexpr:
            hints[(i,)] = [["tt.divisibility", 16]]
    return x.kernel, signature, constants, hints


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _usage(job: tuple[str, int, int]) -> Usage:
    """Of a family's variant of that number; such a job goes to another process."""
    family, variant, number = job
    return usage(family, launches(family)[variant][number], list(TARGETS)[number])


def usage(family: str, x: Launch, target: int) -> Usage:
    """Compile as for a device of that compute capability, and read what the assembler says of the result."""
    kernel, signature, constants, hints = _source(x)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    options = {k: v for k, v in x.meta.items() if k not in kernel.arg_names}
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), StringIO() as log:
        triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
        with redirect_stdout(log):
            compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        said = log.getvalue()
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    if registers is None or spilled is None:
        raise RuntimeError(f"the assembler says nothing of {kernel.__name__}: {said}")
    dtypes = dict.fromkeys(t for t in signature.values() if t in ("*fp32", "*bf16", "*fp16", "*fp64"))
    absent = [k for k, v in constants.items() if v is None]
    shown = [*(t.removeprefix("*") for t in dtypes), *(f"{k}={v}" for k, v in x.meta.items())]
    label = " ".join([*shown, *(["without", *absent] if absent else [])])
    numbers = (int(registers[1]), int(spilled[1]), compiled.metadata.shared)
    return Usage(family, kernel.__name__, label, target, *numbers)


def table(rows: Iterable[Usage]) -> Iterator[str]:
    """A line per kernel, with registers, spilled bytes and shared memory for every target, and the constants
    of the last one; a line more for each whose constants are others."""
    yield "registers/spilled bytes/shared bytes for " + ", ".join(f"sm_{t}" for t in TARGETS)
    variants: list[Usage] = []
    for row in rows:
        variants.append(row)
        if len(variants) == len(TARGETS):
            cells = " ".join(f"{u.registers:>4}/{u.spilled}/{u.shared}" for u in variants)
            yield f"{cells:<42} {row.family}.{row.kernel} [{row.constants}]"
            for other in variants:
                if other.constants != row.constants:
                    yield f"{'':<42} of sm_{other.target} [{other.constants}]"
            variants.clear()


def main(names: list[str]) -> int:
    """Check the named families, or all; 1 if a kernel spills or wants too much shared memory."""
    if interpreting():
        print("dlcore.triton.check: TRITON_INTERPRET is set, nothing would be compiled", file=sys.stderr)
        return 2
    found = {family: launches(family) for family in names or modules()}
    forgotten = [] if names else missed(x for group in found.values() for variant in group for x in variant)
    complaints = [f"{name}: no example launches it" for name in forgotten]

    numbers = range(len(TARGETS))
    jobs = [(family, i, n) for family, group in found.items() for i in range(len(group)) for n in numbers]

    def checked(rows: Iterable[Usage]) -> Iterator[Usage]:
        for row in rows:
            if complaint := row.complaint():
                complaints.append(f"{row.family}.{row.kernel} sm_{row.target} [{row.constants}]: {complaint}")
            yield row

    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        for line in table(checked(pool.map(_usage, jobs))):
            print(line, flush=True)
    print(*complaints or ["every kernel compiles; none spills that may not, none wants too much"], sep="\n")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
