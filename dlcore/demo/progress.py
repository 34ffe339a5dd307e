"""What the user sees while samplers run: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.text import Text

#: Stands for a masked position.
HIDDEN = "·"


class Progress(Protocol):
    """Told what happens."""

    def start(self, label: str, steps: int) -> None:
        """A sampler begins."""

    def show(self, step: int, text: str) -> None:
        """A state of its first sequence."""

    def finish(self, summary: str) -> None:
        """It ended."""


class Plain:
    """A line a sampler."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""

    def start(self, label: str, steps: int) -> None:
        self._label = f"{label}, {steps} steps"

    def show(self, step: int, text: str) -> None:
        pass

    def finish(self, summary: str) -> None:
        self._console.print(f"{self._label}: {summary}", highlight=False, markup=False)


class Panels:
    """The text as it denoises; characters that just changed stand out."""

    def __init__(self, live: Live, runs: int) -> None:
        self._live = live
        self._runs = runs
        self._run = 0
        self._label, self._steps = "", 1
        self._before = ""

    def start(self, label: str, steps: int) -> None:
        self._run += 1
        self._label, self._steps, self._before = label, steps, ""

    def show(self, step: int, text: str) -> None:
        self._live.update(self._panel(step, self._highlight(text)))
        self._before = text

    def finish(self, summary: str) -> None:
        line = f"{self._label}, {self._steps} steps: {summary}"
        self._live.console.print(line, style="dim", highlight=False, markup=False)

    def _highlight(self, text: str) -> Text:
        shown = Text()
        before = self._before.ljust(len(text))
        for new, old in zip(text, before, strict=True):
            shown.append(new, style="dim" if new == HIDDEN else "bold green" if new != old else "")
        return shown

    def _panel(self, step: int, text: Text) -> RenderableType:
        bar = ProgressBar(total=self._runs, completed=self._run - 1 + step / self._steps, width=60)
        title = f"{self._label}, step {step} of {self._steps}"
        return Group(Panel(text, title=title, title_align="left", padding=(1, 2)), bar)


@contextmanager
def reporting(console: Console, runs: int) -> Iterator[Progress]:
    """Progress over `runs` runs, fit for the console."""
    if not console.is_terminal:
        yield Plain(console)
        return
    with Live(console=console, refresh_per_second=12, transient=True) as live:
        yield Panels(live, runs)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start
