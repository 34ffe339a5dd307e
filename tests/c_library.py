"""The C library for tests: built, installed, and called through ctypes as its header declares it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from alone import alone
from torch import Tensor

ROOT = Path(__file__).parent.parent
HEADERS = ROOT / "csrc" / "include" / "dlcore"
#: Kept between runs, so that the kernels are compiled once.
BUILD = ROOT / "build" / "c-api"

_NUMBERS = {
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def tool(name: str) -> str | None:
    """Where a program is that this environment or the machine has."""
    beside = Path(sys.executable).parent
    return shutil.which(name, path=os.pathsep.join([str(beside), os.environ.get("PATH", os.defpath)]))


def cmake(*arguments: object) -> None:
    """Run CMake; what it said is in the error if it fails."""
    found = tool("cmake")
    assert found is not None, "the tests of the C library need CMake: pip install cmake"
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def configure(source: Path, build: Path, **options: object) -> None:
    """Configure and build."""
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    cmake("-S", source, "-B", build, *ninja, *(f"-D{name}={value}" for name, value in options.items()))
    cmake("--build", build, "--parallel", 2)


def install(prefix: Path) -> Path:
    """The library's baseline level, built as the README says and installed under `prefix`.

    The CUDA functions run on the host, as csrc/cuda's other tests do.
    """
    with alone(BUILD):
        configure(ROOT, BUILD, DLCORE_PYTHON="OFF", DLCORE_ISA_LEVELS="baseline", DLCORE_CUDA="HOST")
        cmake("--install", BUILD, "--prefix", prefix)
    return prefix


class Library:
    """Constants, structs and functions of the headers; a function that fails raises CError."""

    def __init__(self, path: Path, cuda: bool = False) -> None:
        self.library = ctypes.CDLL(str(path))
        self.types: dict[str, Any] = dict(_NUMBERS)
        headers = ["dlcore.h", "dlcore_cuda.h"] if cuda else ["dlcore.h"]
        text = "\n".join((HEADERS / name).read_text() for name in headers)
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
        self.constants = {n: int(v) for n, v in re.findall(r"(DLCORE_\w+) = (\d+)", text)}
        for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", text, re.S):
            self.types[name] = type(name, (ctypes.Structure,), {"_fields_": self._fields(body)})
        self.functions = {}
        for result, name, arguments in re.findall(r"^DLCORE_API ([^;(]*?)(\w+)\(([^;]*)\);", text, re.M):
            function = getattr(self.library, name)
            function.restype = ctypes.c_char_p if "char" in result else ctypes.c_int
            parameters = [] if arguments == "void" else arguments.split(",")
            function.argtypes = [self._type(p) for p in parameters]
            self.functions[name] = function

    def _type(self, declared: str) -> Any:
        if "*" in declared:
            return ctypes.c_char_p if "char" in declared else ctypes.c_void_p
        return self.types[declared.split()[0]]

    def _fields(self, body: str) -> list[tuple[str, Any]]:
        fields = []
        for declaration in filter(str.strip, body.split(";")):
            kind, names = self._type(declaration), declaration.rpartition("*")[2] or declaration
            names = names if "*" in declaration else declaration.split(None, 1)[1]
            fields += [(name.strip(), kind) for name in names.split(",")]
        return fields

    def __getattr__(self, name: str) -> Any:
        """A constant, a struct or a function, without the prefix."""
        if f"DLCORE_{name}" in self.constants:
            return self.constants[f"DLCORE_{name}"]
        name = f"dlcore_{name}"
        if name in self.types:
            return lambda **members: self._struct(name, members)
        function = self.functions[name]
        return function if function.restype is ctypes.c_char_p else lambda *a: self._call(function, a)

    def _struct(self, name: str, members: dict[str, Any]) -> Any:
        """A struct, zeros but for `members`; Tensors stand for their addresses and are kept alive."""
        struct = self.types[name](**{k: _passed(v) for k, v in members.items() if v is not None})
        struct.held = list(members.values())
        return struct

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> None:
        passed = [
            ctypes.addressof(a) if isinstance(a, ctypes.Structure) and t is ctypes.c_void_p else _passed(a)
            for a, t in zip(arguments, function.argtypes, strict=True)
        ]
        status = function(*passed)
        if status != 0:
            name = next(n for n, v in self.constants.items() if v == status)
            raise CError(name.removeprefix("DLCORE_"), self.last_error().decode())

    # Tensors as arguments.

    def matrix_of(self, x: Tensor | None) -> Any:
        """(..., columns) as rows that are one stride apart."""
        if x is None:
            return self.matrix()
        flat = x.flatten(0, -2) if x.dim() > 2 else x if x.dim() == 2 else x.unsqueeze(0)
        assert flat.data_ptr() == x.data_ptr()
        rows, columns = flat.shape
        stride = flat.stride(0) if rows > 1 else 0
        return self.matrix(data=x, dtype=DTYPES[x.dtype], rows=rows, columns=columns, row_stride=stride)

    def keys_of(self, key: Tensor) -> Any:
        """A shared key (2,), or one per row."""
        return self.keys(data=key, stride=int(key.dim() > 1))

    def row_numbers(self, value: float | Tensor | None, dtype: torch.dtype = torch.float32) -> Any:
        """A number for all rows, or (...) one per row."""
        kind = {torch.float32: self.floats, torch.float64: self.doubles, torch.int64: self.ints}[dtype]
        if value is None:
            return kind()
        numbers = torch.as_tensor(value, dtype=dtype).contiguous()
        return kind(data=numbers, stride=int(numbers.dim() > 0))

    def doubles_of(self, value: float | Tensor | None) -> Any:
        return self.row_numbers(value, torch.float64)


def _passed(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


class CError(Exception):
    """A status that is not OK."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message
