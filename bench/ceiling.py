"""What the machine can do at best, measured beside what is to be judged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dlcore import _C


def best(call: Callable[[], Any], rounds: int, seconds: float = 0.0) -> float:
    """The least of `rounds` wall times, or of more until `seconds` have passed, in seconds."""
    times: list[float] = []
    while len(times) < rounds or sum(times) < seconds:
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def read_seconds(x: Tensor, rounds: int = 10) -> float:
    """One pure read of a contiguous tensor by all threads: wide loads and additions, nothing else."""
    count, threads = x.numel() * x.element_size() // 4, torch.get_num_threads()
    return best(lambda: _C.read(x.data_ptr(), count, threads), rounds, seconds=0.02)


@cache
def copy_bandwidth(size: int = 1 << 27) -> float:
    """Bytes read plus bytes written per second by a copy between tensors that exist already."""
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    return 2 * size / best(lambda: target.copy_(source), 5)


def gemm_rate(
    dtype: torch.dtype = torch.float32, rows: int = 256, inner: int = 512, columns: int = 4096
) -> float:
    """Floating-point operations per second of torch's matrix product into a tensor that exists."""
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    out = torch.ones(rows, columns, dtype=dtype)
    return 2 * rows * inner * columns / best(lambda: torch.mm(a, b.T, out=out), 10)


def onednn_rate(rows: int = 256, inner: int = 512, columns: int = 4096) -> float:
    """The same by oneDNN in float32, several times torch.mm's rate on AMD; 0 where torch lacks it."""
    if not torch.backends.mkldnn.is_available():
        return 0.0
    a, b = torch.ones(rows, inner).to_mkldnn(), torch.ones(columns, inner).to_mkldnn()
    return 2 * rows * inner * columns / best(lambda: F.linear(a, b), 10)
