"""The C library as an application meets it: installed, found, linked, asked for version and errors."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest
import torch
from c_library import ROOT, CError, Library, configure
from conftest import run_python

import dlcore

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def application(c_prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/c_api built against the installed library."""
    build = tmp_path_factory.mktemp("application")
    configure(ROOT / "tests" / "c_api", build, CMAKE_PREFIX_PATH=c_prefix)
    return build


def _run(*command: object, **kwargs: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True, **kwargs)
    return done.stdout


def test_an_application_draws_what_python_draws(application: Path) -> None:
    rows, vocab, seed = 5, 3000, -(2**40) + 7
    lines = _run(application / "draw", rows, vocab, seed).splitlines()
    logits = dlcore.rng.normal(dlcore.rng.key(1), (rows, vocab))
    draw = dlcore.categorical.sample(logits, temperature=0.8, top_p=0.95, key=dlcore.rng.key(seed))
    assert [int(line.split()[0]) for line in lines] == draw.tokens.tolist()
    numbers = torch.tensor([[float(x) for x in line.split()[1:]] for line in lines])
    torch.testing.assert_close(numbers, torch.stack([draw.logprob, draw.stats.entropy], -1))


def test_an_application_is_told_what_is_wrong(application: Path) -> None:
    done = subprocess.run([application / "draw", "2", "0", "7"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    message = "dlcore_categorical_sample: logits.values.columns must be at least 1, got 0\n"
    assert done.stderr == message


@pytest.mark.parametrize("program", ["header", "header_cuda"])
def test_the_header_is_c99_and_its_example_draws(application: Path, program: str) -> None:
    draw = dlcore.categorical.sample(torch.zeros(2, 1000), temperature=0.8, key=dlcore.rng.key(7))
    assert _run(application / program).split() == [dlcore.__version__, *map(str, draw.tokens.tolist())]


def test_the_version_is_pythons(c: Library) -> None:
    assert c.version().decode() == dlcore.__version__


def test_only_the_api_is_exported(c: Library, c_prefix: Path) -> None:
    (library,) = c_prefix.glob("lib*/libdlcore.so")
    symbols = {line.split()[-1] for line in _run("nm", "-D", "--defined-only", library).splitlines()}
    # Weak symbols of the standard library's templates are none of ours.
    assert {s for s in symbols if not s.startswith("_ZN") or "dlcore" in s} == set(c.functions)


def test_the_capability_is_chosen(c: Library) -> None:
    assert c.cpu_capability() == b"baseline"
    c.choose_cpu_capability(b"baseline")
    with pytest.raises(CError, match=r"choose_cpu_capability: name must be one of .*, got avx1") as error:
        c.choose_cpu_capability(b"avx1")
    assert error.value.status == "UNSUPPORTED"


def test_a_capability_that_is_not_to_be_had_is_an_error(c_prefix: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from c_library import Library
from pathlib import Path
library = Library(next(Path({str(c_prefix)!r}).glob("lib*/libdlcore.so")))
library.rng_uniform(None, 0, 0, 0, None, 0)
print("fine")
"""
    assert run_python(code, DLCORE_CPU_CAPABILITY="baseline") == "fine\n"
    # This build has the baseline alone.
    assert "UNSUPPORTED: dlcore_rng_uniform: DLCORE_CPU_CAPABILITY must be" in run_python(
        code, DLCORE_CPU_CAPABILITY="avx512"
    )


def test_errors_are_each_threads_own(c: Library) -> None:
    theirs: list[bytes] = []
    with pytest.raises(CError):
        c.choose_cpu_capability(None)
    mine = c.last_error()
    other = threading.Thread(target=lambda: theirs.append(c.last_error()))
    other.start()
    other.join()
    assert mine == b"dlcore_choose_cpu_capability: name must not be NULL"
    assert theirs == [b""]
