"""`measure`: run one provider of one case, check what it gave, and note what its time means."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from time import perf_counter, sleep
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import dlcore
from bench import ceiling
from bench.case import COMPILED, Case, Work, nbytes
from bench.report import add_ratios, mark_suspicious
from dlcore import _C

#: Seconds of timed calls per benchmark, and rounds at most and at least.
BUDGET, MOST, LEAST = 1.2, 40, 2
#: Calls shorter than this are timed in batches of about as long.
BATCH = 2e-3


@lru_cache(maxsize=1)
def prepared(case: Case, tiny: bool) -> Work:
    """The case's work, kept for its next provider."""
    torch.manual_seed(0)
    return case.build(case.tiny if tiny else case.shape)


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[[Case, str], None]:
    """A function (case, provider): timed with benchmarks enabled, else one call on the tiny shape."""

    def run(case: Case, provider: str) -> None:
        if not benchmark.enabled and provider in COMPILED:
            pytest.skip("torch.compile is left out of smoke tests")
        work = prepared(case, not benchmark.enabled)
        benchmark.group = case.group
        if benchmark.enabled:
            result = timed(benchmark, case, provider, work)
        else:
            result = benchmark(work.call(provider))
        if provider not in work.unlike:
            work.check(result, *work.inputs)

    return run


@dataclass(frozen=True)
class Warm:
    """A call that has been made: its seconds then, and the first time, compilation included."""

    seconds: float
    first: float


def warm_up(call: Callable[[], Any], prepare: Callable[[], None] | None) -> Warm:
    """Call twice: compile and fault pages in, then take the time for the number of rounds."""
    sleep(0.05)  # the threads of earlier ops stop spinning
    times = []
    for _ in range(2):
        if prepare:
            prepare()
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return Warm(times[1], times[0])


def timed(benchmark: BenchmarkFixture, case: Case, provider: str, work: Work) -> Any:
    """Time one provider, the machine's ceilings before and after, and note what that means."""
    call, prepare = work.call(provider), work.prepare.get(provider)
    try:
        warm = warm_up(call, prepare)
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        pytest.skip(f"torch.compile cannot run this here: {str(error).splitlines()[0]}")
    before = Ceilings.of(work)
    iterations = 1 if prepare else math.ceil(BATCH / max(warm.seconds, 1e-7)) if warm.seconds < BATCH else 1
    rounds = max(LEAST, min(MOST, int(BUDGET / (warm.seconds * iterations))))
    result = benchmark.pedantic(call, setup=prepare, rounds=rounds, iterations=iterations)
    after = Ceilings.of(work)
    numbers = benchmark.stats.stats  # type: ignore[union-attr]
    benchmark.extra_info.update(
        op=case.op,
        shape=list(case.shape),
        note=case.note,
        provider=provider,
        first_call_s=round(warm.first, 4),
        **judged(work, numbers.min, numbers.median, before.or_better(after)),
        **surroundings(case, provider),
    )
    return result


@dataclass(frozen=True)
class Ceilings:
    """Seconds of a pure read of the first input; flops per second of a matrix product, 0 without one."""

    read: float
    gemm: float
    onednn: float

    @classmethod
    def of(cls, work: Work) -> Ceilings:
        """Measured now, the product in the dtype of the first input."""
        first = work.inputs[0].detach()
        read = ceiling.read_seconds(first)
        if not work.flops:
            return cls(read, 0.0, 0.0)
        wide = first.dtype == torch.float32  # torch.mm has only narrow products done by oneDNN
        return cls(read, ceiling.gemm_rate(first.dtype), ceiling.onednn_rate() if wide else 0.0)

    def or_better(self, other: Ceilings) -> Ceilings:
        """The best of both."""
        return Ceilings(
            min(self.read, other.read), max(self.gemm, other.gemm), max(self.onednn, other.onednn)
        )


def judged(work: Work, least: float, median: float, best: Ceilings) -> dict[str, Any]:
    """What the time means: best time against best read and product, the median for the rates."""
    unit, memory, products = nbytes(work.inputs[0]), work.bytes > 0, work.flops > 0
    reading, multiplying = work.bytes * best.read / unit, work.flops / best.gemm if products else 0.0
    return {
        "dtype": str(work.inputs[0].dtype).removeprefix("torch."),
        "bytes": work.bytes,
        "flops": work.flops,
        "pairs": work.pairs,
        "unit_bytes": unit,
        "gb_per_s": round(work.bytes / median / 1e9, 3) if memory else None,
        "gflop_per_s": round(work.flops / median / 1e9, 3) if products else None,
        "ns_per_pair": round(median / work.pairs * 1e9, 4) if work.pairs else None,
        "read_gb_per_s": round(unit / best.read / 1e9, 3),
        "copy_gb_per_s": round(ceiling.copy_bandwidth() / 1e9, 3),
        "gemm_gflop_per_s": round(best.gemm / 1e9, 3) if products else None,
        "onednn_gflop_per_s": round(best.onednn / 1e9, 3) if best.onednn else None,
        "reads": round(least / best.read, 3) if memory and not products else None,
        "percent_of_read": round(100 * reading / least, 2) if memory else None,
        "percent_of_mm": round(100 * multiplying / least, 2) if products else None,
        "percent_of_onednn": round(100 * work.flops / best.onednn / least, 2) if best.onednn else None,
        "percent_of_ceiling": round(100 * max(reading, multiplying) / least, 2)
        if memory or products
        else None,
    }


def surroundings(case: Case, provider: str) -> dict[str, Any]:
    """What ran, and in what: backend, versions, threads, allocator."""
    ours = provider.startswith("dlcore")
    return {
        "backend": dlcore.last_backend(case.kernel or case.op) if ours else "torch",
        "capability": _C.capability() if ours else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "allocator": "warm" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "default",
    }


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Every row also tells how its group's providers compare, and whether it is too good."""
    add_ratios(output_json["benchmarks"])
    mark_suspicious(output_json["benchmarks"])
