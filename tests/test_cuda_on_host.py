"""The machine that runs CUDA kernels on the host: what it must catch, and that the kernels pass it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cuda_on_host
import pytest
from conftest import DEVICE, run_python

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernels run there")

ROOT = Path(__file__).resolve().parents[1]
SCAN, SUMS = "csrc/cuda/categorical_scan.cu", "csrc/cuda/group_sums.h"

#: Draws of the CUDA kernels beside the CPU's, as a program of its own.
PROGRAM = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}]
import cuda_on_host, torch
from pathlib import Path
cuda_on_host.load(Path({{module!r}}))
import dlcore
from dlcore import categorical, rng
logits = 4 * torch.randn(3, {{vocab}}, generator=torch.Generator().manual_seed(0))
room = torch.full((3 * {{vocab}} + 64,), 99.0)
logits = room[32:-32].view(3, {{vocab}}).copy_(logits)
expected = categorical.sample(logits, key=rng.key(1))
with dlcore.use_backend("cuda"):
    found = categorical.sample(logits, key=rng.key(1))
def numbers(x):
    return torch.stack([x.logprob, x.stats.logsumexp, x.stats.margin, x.stats.entropy])

same = torch.equal(found.tokens, expected.tokens)
print("same" if same and torch.allclose(numbers(found), numbers(expected), atol=1e-5) else "different")
"""


def run(module: Path, vocab: int = 2501) -> str:
    return run_python(PROGRAM.format(module=str(module), vocab=vocab))


def test_the_kernels_draw_as_the_cpu_does():
    assert run(cuda_on_host.build()) == "same\n"


@pytest.mark.parametrize("enough", [4096, 1])
def test_a_warp_may_read_much_of_a_row(enough):
    """Eight steps of four groups, or several rounds of them, of which the last is short."""
    few, many = f"kEnoughChunks = {enough}", f"kManyChunks = {16 if enough == 1 else 1}"
    edits = [(SCAN, "kEnoughChunks = 4096", few), (SCAN, "kManyChunks = 32768", many)]
    assert run(cuda_on_host.build(edits), 40_003) == "same\n"


START = "const RowSoftmax row(a.softmax, r);\n    const float"

FAULTS = {
    "an entry past the row's end, the largest of all": (
        (SUMS, "if (column >= columns)", "if (column > columns)"),
        "different",
    ),
    "lanes that keep another's group": (
        (SCAN, "if (place == step) own = s;", "if (place == step + 1) own = s;"),
        "different",
    ),
    "four entries at once where rows are 2501 apart": (
        (SCAN, "if (abreast == kMost)", "if (abreast > 0)"),
        "misaligned",
    ),
    "half a warp that waits for the other": (
        (SCAN, START, f"if (lane > 15) continue;\n    {START}"),
        "never come",
    ),
}


@pytest.mark.parametrize(("edit", "said"), FAULTS.values(), ids=FAULTS)
def test_an_injected_fault_shows(edit, said):
    assert said in run(cuda_on_host.build([edit]))


def sanitizer(*options: str) -> dict[str, str]:
    """The environment of a Python whose every allocation AddressSanitizer watches."""
    libraries = [
        subprocess.check_output([cuda_on_host.COMPILER, f"-print-file-name={name}"], text=True).strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": ":".join(("detect_leaks=0", *options))}


@pytest.mark.slow
def test_no_kernel_leaves_its_buffers():
    """The CUDA tests once more, under AddressSanitizer; faulty kernels have modules without it."""
    module = cuda_on_host.build(sanitize=True)
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_cuda_*.py") if p != Path(__file__))
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", "not faults_show")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env={**os.environ, **sanitizer(), "DLCORE_CUDA_ON_HOST": str(module)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.slow
def test_the_sanitizer_sees_a_read_past_the_end():
    module = cuda_on_host.build(
        [(SUMS, "if (column >= columns)", "if (column >= columns + 64)")], sanitize=True
    )
    code = PROGRAM.format(module=str(module), vocab=2501).replace("room[32:-32]", "room[64:]")
    assert "heap-buffer-overflow" in run_python(code, **sanitizer())


NUMBERS = "csrc/cuda/bit_numbers.cu"


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit", [None, (NUMBERS, "r < rows; r +=", "r <= rows; r +=")], ids=["as it is", "fault"]
)
def test_the_numbers_of_bits_levels_stay_in_their_arrays(edit, tmp_path):
    """Python's module does not call them; a program of its own does, under AddressSanitizer."""
    done = cuda_on_host.run_program("bit_numbers", [NUMBERS], [edit] if edit else [], tmp_path)
    assert (done.returncode == 0) == (edit is None), done.stdout + done.stderr
    assert ("heap-buffer-overflow" in done.stderr) == (edit is not None)
