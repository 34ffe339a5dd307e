"""Step times at real vocabularies: dlcore against the same step in eager torch and under torch.compile.

It runs as a process of its own (`python -m dlcore.demo.timing`), which writes a line of JSON per measurement:
so that memory can be kept warm for torch, whose time would else be the allocator's, and so that a compiler's
failure stays here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor

import dlcore
from dlcore.process import masked, uniform

#: (B, L, V) of the logits.
SHAPES = ((2, 128, 50_257), (1, 64, 262_144))
PROVIDERS = ("dlcore", "eager", "compile")
ALPHA_T, ALPHA_S = 0.4, 0.5
#: glibc keeps freed memory, so that no call pays page faults; other allocators ignore these.
_WARM_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
#: A run ends after so many calls, or after so many seconds once every provider has had two.
_CALLS, _SECONDS = 20, 2.5

Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Measurement:
    """The best time of a warm step. `seconds` is None where it could not run, and `note` says why."""

    op: str
    shape: tuple[int, int, int]
    provider: str
    seconds: float | None
    compile_seconds: float | None = None
    note: str = ""


def _race(weights: Tensor) -> Tensor:
    """A draw in proportion to weights (..., V): the exponential race, in the weights' own precision."""
    return (weights / -torch.rand_like(weights).log()).argmax(-1)


def torch_uniform_step(logits: Tensor, z: Tensor) -> Tensor:
    """`uniform.step` as a lean eager chain: softmax, plug-in bridge, race."""
    vocab_size, ratio = logits.shape[-1], ALPHA_T / ALPHA_S
    clean = ALPHA_S * logits.softmax(-1) + (1 - ALPHA_S) / vocab_size
    weights = clean * ((1 - ratio) / vocab_size)
    here = z.unsqueeze(-1)
    weights = weights.scatter(-1, here, clean.gather(-1, here) * (ratio + (1 - ratio) / vocab_size))
    return _race(weights)


def torch_masked_step(logits: Tensor, z: Tensor) -> Tensor:
    """`masked.step` as an eager chain: mask out, softmax, race, carry over. The mask is the last token."""
    mask_id = logits.shape[-1] - 1
    mask = torch.tensor([mask_id])
    p = logits.index_fill(-1, mask, -torch.inf).softmax(-1)
    weights = (p * (ALPHA_S - ALPHA_T)).index_fill(-1, mask, 1 - ALPHA_S)
    return torch.where(z == mask_id, _race(weights), z)


def _dlcore_uniform_step(logits: Tensor, z: Tensor) -> Tensor:
    return uniform.step(logits, z, ALPHA_T, ALPHA_S)


def _dlcore_masked_step(logits: Tensor, z: Tensor) -> Tensor:
    return masked.step(logits, z, ALPHA_T, ALPHA_S, logits.shape[-1] - 1)


#: op -> (dlcore's step, torch's).
STEPS: dict[str, tuple[Step, Step]] = {
    "uniform.step": (_dlcore_uniform_step, torch_uniform_step),
    "masked.step": (_dlcore_masked_step, torch_masked_step),
}


def _tokens(op: str, shape: tuple[int, int, int]) -> Tensor:
    """A state at α_t: for masked.step the share of masks that it has there."""
    x = torch.randint(shape[-1] - 1, shape[:-1])
    if op == "masked.step":
        return masked.corrupt(x, ALPHA_T, shape[-1] - 1)
    return uniform.corrupt(x, ALPHA_T, shape[-1])


def _best(step: Step, logits: Tensor, z: Tensor) -> float:
    """Seconds of the best call, after one that warms up."""
    step(logits, z)
    times: list[float] = []
    while len(times) < _CALLS and (len(times) < 2 or sum(times) < _SECONDS):
        start = time.perf_counter()
        step(logits, z)
        times.append(time.perf_counter() - start)
    return min(times)


def _measure(op: str, shape: tuple[int, int, int], provider: str, logits: Tensor) -> Measurement:
    ours, torchs = STEPS[op]
    z = _tokens(op, shape)
    if provider != "compile":
        return Measurement(op, shape, provider, _best(ours if provider == "dlcore" else torchs, logits, z))
    torch._dynamo.reset()
    compiled: Step = torch.compile(torchs, fullgraph=True, dynamic=False)
    start = time.perf_counter()
    try:
        compiled(logits, z)
    except Exception as error:  # whatever a missing or broken C++ compiler raises
        return Measurement(op, shape, provider, None, note=reason(error))
    compile_seconds = time.perf_counter() - start
    return Measurement(op, shape, provider, _best(compiled, logits, z), compile_seconds)


def reason(error: Exception) -> str:
    """A failure of torch.compile in one short line."""
    text = str(error)
    if "CppCompiler" in text or "compiler" in text.lower():
        return "no working C++ compiler"
    return (text.strip().splitlines() or [type(error).__name__])[0][:60]


def measurements(shapes: tuple[tuple[int, int, int], ...] = SHAPES) -> Iterator[Measurement]:
    """Every op at every shape by every provider, in this process."""
    for shape in shapes:
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for op in STEPS:
            for provider in PROVIDERS:
                yield _measure(op, shape, provider, logits)


def measure_apart() -> Iterator[Measurement]:
    """`measurements` of a child process; raises RuntimeError with its last words if it fails."""
    paths = [str(Path(dlcore.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **_WARM_MEMORY, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "dlcore.demo.timing"]
    # A pipe that nobody empties would stop a child that complains at length.
    with TemporaryFile("w+") as complaints:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                fields = json.loads(line)
                yield Measurement(**{**fields, "shape": tuple(fields["shape"])})
        complaints.seek(0)
        last_words = complaints.read().strip().splitlines()
    if child.returncode != 0:
        raise RuntimeError(last_words[-1] if last_words else f"exit code {child.returncode}")


if __name__ == "__main__":
    for measurement in measurements():
        print(json.dumps(asdict(measurement)), flush=True)
