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

    def start(self, label: str, steps: int, unit: str = "step") -> None:
        """A run begins: of a sampler, or of a training."""

    def show(self, step: int, text: str) -> None:
        """A state of its first sequence, or how far it is."""

    def note(self, line: str) -> None:
        """Worth keeping on the screen."""

    def finish(self, summary: str) -> None:
        """It ended."""


class Plain:
    """A line a run, and its notes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._label = ""

    def start(self, label: str, steps: int, unit: str = "step") -> None:
        self._label = f"{label}, {steps} {unit}s"

    def show(self, step: int, text: str) -> None:
        pass

    def note(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False)

    def finish(self, summary: str) -> None:
        self.note(f"{self._label}: {summary}")


class Panels:
    """The text as it denoises; characters that just changed stand out."""

    def __init__(self, live: Live, runs: int) -> None:
        self._live = live
        self._runs = runs
        self._run = 0
        self._label, self._steps, self._unit = "", 1, "step"
        self._before = ""

    def start(self, label: str, steps: int, unit: str = "step") -> None:
        self._run += 1
        self._label, self._steps, self._unit, self._before = label, steps, unit, ""

    def show(self, step: int, text: str) -> None:
        self._live.update(self._panel(step, self._highlight(text)))
        self._before = text

    def note(self, line: str) -> None:
        self._live.console.print(line, style="dim", highlight=False, markup=False)

    def finish(self, summary: str) -> None:
        self.note(f"{self._label}, {self._steps} {self._unit}s: {summary}")

    def _highlight(self, text: str) -> Text:
        shown = Text()
        before = self._before.ljust(len(text))
        for new, old in zip(text, before, strict=True):
            shown.append(new, style="dim" if new == HIDDEN else "bold green" if new != old else "")
        return shown

    def _panel(self, step: int, text: Text) -> RenderableType:
        bar = ProgressBar(total=self._runs, completed=self._run - 1 + step / self._steps, width=60)
        title = f"{self._label}, {self._unit} {step} of {self._steps}"
        return Group(Panel(text, title=title, title_align="left", padding=(1, 2)), bar)


@contextmanager
def reporting(console: Console, runs: int) -> Iterator[Progress]:
    """Progress over `runs` runs, fit for the console."""
    if not console.is_terminal:
        yield Plain(console)
        return
    with Live(console=console, refresh_per_second=12, transient=True) as live:
        yield Panels(live, runs)


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


class Stopwatch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self._start
