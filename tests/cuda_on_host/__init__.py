"""The sources of csrc/cuda as a module that runs on the host: compiled by a plain C++ compiler, for tests."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11
from alone import alone

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build" / "cuda_on_host"
COMPILER = os.environ.get("CXX", "c++")
#: (GCC sees ghosts in pybind11 then.)
SANITIZE = ("-fsanitize=address", "-fno-omit-frame-pointer", "-Wno-maybe-uninitialized")

FLAGS = ("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
FLAGS += ('-DDLCORE_CUDA_DEVICE="cpu"',)

#: Where a source differs from what is committed: (path, old text, new text).
Edit = tuple[str, str, str]


def _sources(edits: Iterable[Edit]) -> dict[str, str]:
    paths = [p for d in ("csrc", "tests/cuda_on_host") for p in sorted((ROOT / d).rglob("*"))]
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in paths if p.suffix in (".cu", ".cpp", ".h")}
    for path, old, new in edits:
        if texts[path].count(old) != 1:
            raise ValueError(f"{path} has {texts[path].count(old)} times {old!r}, it should have one")
        texts[path] = texts[path].replace(old, new)
    return texts


def _write(texts: dict[str, str], place: Path) -> None:
    for path, text in texts.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)


def run_program(
    name: str, sources: Iterable[str], edits: Iterable[Edit], place: Path
) -> subprocess.CompletedProcess[str]:
    """tests/cuda_on_host/NAME.cpp and sources of csrc/cuda, built in `place` under AddressSanitizer, run."""
    _write(_sources(edits), place)
    units = [place / "tests/cuda_on_host" / f"{name}.cpp", *(place / source for source in sources)]
    include = f"-isystem{place / 'tests/cuda_on_host'}"
    subprocess.run(
        [COMPILER, *FLAGS, *SANITIZE, include, "-x", "c++", *units, "-o", place / name], check=True
    )
    return subprocess.run([place / name], capture_output=True, text=True, check=False)


def build(edits: Iterable[Edit] = (), *, sanitize: bool = False) -> Path:
    """The compiled module; it is built anew only where a source has changed."""
    with alone(BUILDS):
        return _build(_sources(edits), sanitize)


def _build(texts: dict[str, str], sanitize: bool) -> Path:
    flags = [*FLAGS, "-fPIC", "-fvisibility=hidden", *(SANITIZE if sanitize else ())]
    said = repr((sorted(texts.items()), flags, COMPILER, sys.version))
    place = BUILDS / hashlib.sha256(said.encode()).hexdigest()[:16]
    module = place / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if module.exists():
        return module
    _write(texts, place)
    places = (place / "tests/cuda_on_host", pybind11.get_include(), sysconfig.get_paths()["include"])
    found = [*flags, *(f"-isystem{p}" for p in places)]
    units = [p for p in texts if p.startswith("csrc/cuda/") and not p.endswith(".h")]
    headers = repr(sorted((p, t) for p, t in texts.items() if p.endswith(".h")))

    def compiled(unit: str) -> str:
        named = hashlib.sha256(repr((headers, unit, texts[unit], flags)).encode()).hexdigest()[:16]
        to = BUILDS / "objects" / f"{named}.o"
        if not to.exists():  # what an edit leaves alone is shared
            to.parent.mkdir(parents=True, exist_ok=True)
            partial = to.with_suffix(".partial")
            subprocess.run([COMPILER, *found, "-x", "c++", "-c", place / unit, "-o", partial], check=True)
            partial.rename(to)
        return str(to)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, units))
    partial = module.with_suffix(".partial")
    subprocess.run([COMPILER, *flags, "-shared", *objects, "-o", partial], check=True)
    partial.rename(module)
    return module


def load(module: Path) -> ModuleType:
    """Stand the module at `dlcore._cuda`, wherever that has been imported already, too."""
    # Of another name: pybind11 hands out a second module of one name as the first.
    spec = importlib.util.spec_from_file_location("cuda_on_host._cuda", module)
    if spec is None or spec.loader is None:
        raise ImportError(f"{module} is not a module")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    import dlcore

    sys.modules["dlcore._cuda"] = dlcore._cuda = loaded  # type: ignore[attr-defined]
    for name, user in list(sys.modules.items()):
        if name.startswith("dlcore.cuda.") and hasattr(user, "_cuda"):
            user._cuda = loaded  # type: ignore[attr-defined]
    return loaded
