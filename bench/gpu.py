"""`make bench-gpu`: every family on a GPU beside torch, by CUDA events with a flushed cache; one JSON a day.

dlcore's own calls are also captured in a CUDA graph and timed by its replays, without their host's part. What
the host does for a call is timed on small shapes, where it is not waited for. Ceilings (reading, copying,
bfloat16 products) are measured in the same run, and every time is given as a share of those that may bind it.
A case's rows are written as soon as it is measured, in place of those that the day's file had of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import dlcore
from bench.gpu_cases import CASES, Call, Case, Work

RESULTS = Path(__file__).parent / "results"
#: What is measured beside dlcore, or runs it, where it is installed.
PACKAGES = ("torch", "triton", "flash-attn", "flashinfer-python", "liger-kernel")
Row = dict[str, Any]


def seconds(call: Call, repeats: int = 20) -> float:
    """The median time of a call on the device, each after a write that pushes everything else out of L2."""
    flush = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return float(statistics.median(times))


def host_seconds(call: Call, rounds: int = 10, calls: int = 20) -> float:
    """The median time that a call takes to return, of as many as the device's queue holds without a wait."""
    times = []
    for _ in range(rounds):
        _wait()
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    _wait()
    return float(statistics.median(times[calls:]))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def graph_of(call: Call) -> Call:
    """The replay of a CUDA graph of the call, which has been made before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ceilings() -> dict[str, float]:
    """Bytes per second of reading and copying, floating-point operations per second of bfloat16 products."""
    return {"read": _read(), "copy": _copy(), "bfloat16": _product()}


def _read(size: int = 1 << 31) -> float:
    x = torch.ones(size // 4, device="cuda")
    return size / seconds(x.amax)


def _copy(size: int = 1 << 31) -> float:
    x = torch.ones(size // 4, device="cuda")
    y = torch.empty_like(x)
    return 2 * size / seconds(lambda: y.copy_(x))


def _product(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b)


def shares(work: Work, took: float, ceiling: dict[str, float]) -> dict[str, float]:
    """Of the read bandwidth for work that only reads, of the copy's if it writes, and of the matrix rate."""
    found = {}
    if work.writes:
        found["copy"] = (work.reads + work.writes) / took / ceiling["copy"]
    elif work.reads:
        found["read"] = work.reads / took / ceiling["read"]
    if work.flops:
        found["matrix"] = work.flops / took / ceiling["bfloat16"]
    return found


def measured(case: Case, ceiling: dict[str, float]) -> Iterator[Row]:
    """A row per provider: seconds, shares of what may bind them, and for dlcore the host's microseconds."""
    hosts = {}
    for provider, backend, call in _on_backends(case.build("cuda", True).calls):
        if backend is not None:
            with dlcore.use_backend(backend):
                hosts[provider] = host_seconds(call)
    work = case.build("cuda", False)
    for provider, backend, call in _on_backends(work.calls):
        with nullcontext() if backend is None else dlcore.use_backend(backend):
            times = {provider: seconds(call) * (work.parts or {}).get(provider, 1)}
            if backend is not None:
                times[f"{provider}, graph"] = seconds(graph_of(call))
        for name, took in times.items():
            row: Row = {"case": case.name, "provider": name, "seconds": took}
            row |= {"shares": shares(work, took, ceiling)}
            yield row | ({"host_us": hosts[name] * 1e6} if name in hosts else {})


def _on_backends(calls: dict[str, Call]) -> Iterator[tuple[str, str | None, Call]]:
    """Labels and backends of the calls: dlcore's on Triton, and on CUDA where it has kernels for them."""
    for provider, call in calls.items():
        if not provider.startswith("dlcore"):
            yield provider, None, call
            continue
        yield provider, "triton", call
        try:
            with dlcore.use_backend("cuda"):
                call()
        except NotImplementedError:
            continue
        yield f"{provider}, cuda", "cuda", call


def line(row: Row) -> str:
    """A row of the table."""
    cells = [f"{row['shares'][name]:>7.0%}" if name in row["shares"] else " " * 7 for name in COLUMNS]
    host = f"{row['host_us']:>8.1f}" if "host_us" in row else " " * 8
    return f"{row['case']:<42} {row['provider']:<21} {row['seconds'] * 1e6:>10.1f} {' '.join(cells)} {host}"


#: Shares that are shown, of the ceilings.
COLUMNS = ("read", "copy", "matrix")
HEADER = f"{'case':<42} {'provider':<21} {'µs':>10} {'% read':>7} {'% copy':>7} {'% mm':>7} {'host µs':>8}"


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {"dlcore": dlcore.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def merge(path: Path, run: str, about: Row, rows: list[Row]) -> None:
    """Write a case's rows into a file, in place of those that it has of that case.

    `about` is what all rows of this run share; each names its run.
    """
    found = json.loads(path.read_text()) if path.exists() else {"runs": {}, "results": []}
    replaced = {row["case"] for row in rows}
    kept = [row for row in found["results"] if row["case"] not in replaced]
    found["results"] = kept + [row | {"run": run} for row in rows]
    named = {row["run"] for row in found["results"]}
    found["runs"] = {name: x for name, x in (found["runs"] | {run: about}).items() if name in named}
    path.write_text(json.dumps(found, indent=1) + "\n")


def main(names: list[str]) -> int:
    """Measure the cases whose names hold one of `names`, or all; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("bench.gpu: needs a CUDA device", file=sys.stderr)
        return 2
    device, now = torch.cuda.get_device_name(), datetime.now()
    path = RESULTS / f"{device.lower().replace(' ', '-')}-{now.date()}.json"
    ceiling = ceilings()
    about = {"device": device, "versions": versions(), "cuda": torch.version.cuda, "ceilings": ceiling}
    print(*(f"{k}: {v / 1e12:.2f} T/s" for k, v in ceiling.items()), HEADER, sep="\n")
    for case in CASES:
        if names and not any(n in case.name for n in names):
            continue
        rows = []
        for row in measured(case, ceiling):
            print(line(row), flush=True)
            rows.append(row)
        merge(path, now.isoformat(timespec="seconds"), about, rows)
        torch.cuda.empty_cache()
    print(path)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of cases' names; all if none")
    sys.exit(main(parser.parse_args().names))
