"""Fixtures that every family uses: poisoned buffers, backends, ISA levels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import c_library
import pytest
import ranks
import torch
import triton_variants
from torch.utils._pytree import tree_map_only

import dlcore
from dlcore import _C, _dispatch
from dlcore.cpu import CAPABILITIES, choose_capability, tensors
from dlcore.triton import launch

#: Where Triton's kernels run: on a GPU, else in its interpreter, chosen before Triton is imported.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"

launch.watch = triton_variants.note


@pytest.fixture(autouse=True, scope="module")
def variants_of_a_file() -> None:
    """What a file says of the variants it launched does not depend on the files before it."""
    triton_variants.launched.clear()


POISON = {True: float("nan"), False: -(2**31)}


def _poison(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(POISON[x.is_floating_point()]) if x.dtype not in (torch.bool, torch.uint8) else x


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh buffers hold NaN, so that a kernel which reads or forgets one shows."""
    tensors._workspaces.__dict__.clear()
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **k: _poison(plain(*a, **k)))


@pytest.fixture(scope="session")
def cuda_kernels() -> None:
    """dlcore._cuda as it was built, or, without a GPU, its sources compiled for the host."""
    if DEVICE == "cpu":
        import cuda_on_host

        given = os.environ.get("DLCORE_CUDA_ON_HOST")
        cuda_on_host.load(Path(given) if given else cuda_on_host.build())


_MARGIN = 64


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers hold poison and have margins that nothing may write."""
    margins: list[torch.Tensor] = []
    plain = torch.empty

    def empty(*shape: Any, **options: Any) -> torch.Tensor:
        wanted = plain(*shape, **options)
        room = plain(wanted.numel() + 2 * _MARGIN, dtype=wanted.dtype, device=wanted.device)
        room.view(torch.uint8).fill_(0xFF)  # NaN, or -1
        margins.extend((room[:_MARGIN], room[room.numel() - _MARGIN :]))
        return room[_MARGIN : room.numel() - _MARGIN].view(wanted.shape)

    monkeypatch.setattr(torch, "empty", empty)
    yield
    assert all(bool((m.view(torch.uint8) == 0xFF).all()) for m in margins), "a kernel wrote past a buffer"


#: Families whose tests of Triton's kernels take the interpreter more than half a minute.
SLOW_IN_THE_INTERPRETER = (
    *("attention", "bits", "categorical", "categorical_losses", "guidance"),
    *("sphere", "sphere_dynamics", "sphere_velocity"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU, -m gpu means all tests of the kernels for GPUs; without one, what needs it is skipped."""
    for item in items:
        if DEVICE == "cuda" and item.path.name.startswith(("test_triton_", "test_cuda_")):
            item.add_marker(pytest.mark.gpu)
        elif DEVICE == "cpu" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif item.path.stem in [f"test_triton_{name}" for name in SLOW_IN_THE_INTERPRETER]:
            item.add_marker(pytest.mark.slow)


#: Files whose every test runs once more with the ops on the GPU, where there is one; so do, of all files, the
#: tests that take each backend in turn. ISA levels are the CPU's.
ON_GPU = (
    *("absorbing_uniform", "attention", "attention_decode", "bits", "bits_codes", "categorical"),
    "categorical_summary",
    *("categorical_losses", "d3pm", "distill", "end_to_end", "flow", "guidance", "hybrid", "linear_logits"),
    *("masked", "metrics", "score", "sphere", "sphere_dynamics", "sphere_laws", "sphere_velocity", "uniform"),
    "guidance_classifier",
    *("uniform_losses", "uniform_nelbo", "unmask", "vmf", "vmf_sample"),
)
#: The kernels that run there: Triton's, or with DLCORE_BACKEND=cuda the CUDA ones, where an op has them.
ON_DEVICE = _dispatch._variable or "triton"
GPU = [pytest.param(ON_DEVICE, marks=pytest.mark.gpu)] if DEVICE == "cuda" else []
# It is asked for test by test; neither these nor the processes that they start are to inherit it.
_dispatch._variable = None
os.environ.pop("DLCORE_BACKEND", None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    listed = metafunc.definition.path.stem.removeprefix("test_") in ON_GPU
    if GPU and listed and not {"backend", "level"} & set(metafunc.fixturenames):
        metafunc.parametrize("at_home", ["cpu", *GPU], indirect=True)


def on_device(x: torch.Tensor, device: str) -> torch.Tensor:
    """`x` on a device, with its strides and what lies between its rows."""
    if x.device.type == device:
        return x
    whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    return whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@contextmanager
def device_runs_cpu_tensors() -> Iterator[None]:
    """CPU tensors go to the GPU where an op has kernels there; what these give or write comes back."""

    def moving(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
        schema = getattr(torch.ops.dlcore, op.replace(".", "_")).default._schema
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]

        def run(*args: Any) -> Any:
            moved = tree_map_only(torch.Tensor, lambda x: on_device(x, DEVICE), args)
            result = tree_map_only(torch.Tensor, lambda x: x.to(args[0].device), function(*moved))
            for x, y, out in zip(args, moved, written, strict=True):
                if out and x is not None:
                    x.copy_(y)
            return result

        return run

    def elsewhere(reasons: Callable[..., list[str]]) -> Callable[..., list[str]]:
        return lambda *args: [r for r in reasons(*args) if not r.startswith("takes CUDA tensors")]

    with pytest.MonkeyPatch.context() as patch:
        for op, table in _dispatch._implementations.items():
            if ON_DEVICE in table:
                function, reasons = table[ON_DEVICE]
                patch.setitem(table, ON_DEVICE, (moving(op, function), elsewhere(reasons)))
        patch.setitem(_dispatch.AT_HOME, "cpu", (ON_DEVICE, *_dispatch.AT_HOME["cpu"]))
        yield


@pytest.fixture(autouse=True)
def at_home(request: pytest.FixtureRequest) -> Iterator[None]:
    """The backend that runs CPU tensors unasked."""
    on_cpu = getattr(request, "param", "cpu") == "cpu"
    with nullcontext() if on_cpu else device_runs_cpu_tensors():
        yield


@pytest.fixture(params=["cpu", "reference", *GPU])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend in turn."""
    named = request.param in ("cpu", "reference")
    with dlcore.use_backend(request.param) if named else device_runs_cpu_tensors():
        yield request.param


def expected_backend(op: str, backend: str) -> str:
    """What runs an op where a test walks `backend`: the CPU's kernel, if the op has none there."""
    return backend if backend in _dispatch._implementations[op] else "cpu"


def run_python(code: str, **variables: str) -> str:
    """What a process of its own prints, errors included."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def levels() -> list[str]:
    """The ISA levels that this machine runs."""
    current = _C.capability()
    found = [name for name in CAPABILITIES if _C.choose_capability(name)]
    choose_capability(current)
    return found


@pytest.fixture(params=levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each ISA level in turn."""
    current = _C.capability()
    choose_capability(request.param)
    yield request.param
    choose_capability(current)


@pytest.fixture(scope="session")
def c_prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C library is installed."""
    return c_library.install(tmp_path_factory.mktemp("prefix"))


@pytest.fixture(scope="session")
def c(c_prefix: Path) -> c_library.Library:
    """The C library."""
    (path,) = c_prefix.glob("lib*/libdlcore.so")
    return c_library.Library(path)


@pytest.fixture(scope="session")
def cuda_c(c_prefix: Path) -> c_library.Library:
    """The C library with the CUDA functions, on the host."""
    (path,) = c_prefix.glob("lib*/libdlcore_cuda.so")
    return c_library.Library(path, cuda=True)


@pytest.fixture(scope="session")
def ranks4() -> Iterator[ranks.Ranks]:
    """Four living processes; `ranks4.run(n, function, ...)` runs a function as n ranks of a gloo group."""
    with ranks.ranks(4) as living:
        yield living


@pytest.fixture
def restored_level() -> Iterator[None]:
    """Puts the ISA level back after the test."""
    before = _C.capability()
    yield
    choose_capability(before)
