"""Processes that run one function as the ranks of a gloo group."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankError(AssertionError):
    """What a rank raised, with its traceback."""


def _serve(
    rank: int, size: int, store: str, path: list[str], tasks: Any, answers: Any, patience: timedelta
) -> None:
    sys.path[:] = path
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=patience
    )
    # Every rank makes every group.
    groups = {n: dist.new_group(list(range(n)), timeout=patience) for n in range(1, size + 1)}
    while (task := tasks.get()) is not None:
        function, ranks, arguments = task
        if rank >= ranks:
            continue
        try:
            answers.put((rank, function(groups[ranks], *arguments), None))
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Living processes, so that a test pays for no start."""

    def __init__(self, size: int, seconds: float) -> None:
        context, patience = mp.get_context("spawn"), timedelta(seconds=seconds)
        self.size, self._folder = size, tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._tasks = [context.SimpleQueue() for _ in range(size)]
        self._answers = context.Queue()
        self.processes = [
            context.Process(
                target=_serve,
                args=(r, size, store, sys.path, self._tasks[r], self._answers, patience),
                daemon=True,
            )
            for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(
        self,
        ranks: int,
        function: Callable[..., Any],
        *arguments: Any,
        timeout: float = 300,
        lost: tuple[int, ...] = (),
    ) -> list[Any]:
        """function(group, *arguments) on the first `ranks` processes; what each returned, or RankError.

        The `lost` ranks are not waited for: they die of it.
        """
        for queue in self._tasks:
            queue.put((function, ranks, arguments))
        results, failures = [None] * ranks, []
        for _ in range(ranks - len(lost)):
            rank, result, failure = self._answers.get(timeout=timeout)
            results[rank] = result
            if failure is not None:
                failures.append(f"rank {rank}:\n{failure}")
        if failures:
            raise RankError("\n".join(failures))
        return results

    def close(self) -> None:
        """Let the processes end."""
        for queue in self._tasks:
            queue.put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


@contextmanager
def ranks(size: int, seconds: float = 60) -> Iterator[Ranks]:
    """`size` processes in one gloo group, which wait so long for one another."""
    made = Ranks(size, seconds)
    try:
        yield made
    finally:
        made.close()
