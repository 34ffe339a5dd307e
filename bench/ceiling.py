"""What the machine can do at best, measured beside what is to be judged."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from dlcore import _C


def best(call: Callable[[], Any], rounds: int) -> float:
    """The least of `rounds` wall times, in seconds."""
    times = []
    for _ in range(rounds):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return min(times)


def read_seconds(x: Tensor, rounds: int = 10) -> float:
    """One pure read of a contiguous tensor by all threads: wide loads and additions, nothing else."""
    count, threads = x.numel() * x.element_size() // 4, torch.get_num_threads()
    return best(lambda: _C.read(x.data_ptr(), count, threads), rounds)


@cache
def copy_bandwidth(size: int = 1 << 27) -> float:
    """Bytes read plus bytes written per second by a copy between tensors that exist already."""
    source, target = torch.ones(size // 4), torch.ones(size // 4)
    return 2 * size / best(lambda: target.copy_(source), 5)


@cache
def gemm_rate(rows: int = 256, inner: int = 512, columns: int = 4096) -> float:
    """Floating-point operations per second of torch's float32 matrix product into a tensor that exists."""
    a, b, out = torch.ones(rows, inner), torch.ones(columns, inner), torch.ones(rows, columns)
    return 2 * rows * inner * columns / best(lambda: torch.mm(a, b.T, out=out), 10)
