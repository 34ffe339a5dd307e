"""The demo's tables and its JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import dlcore
from dlcore.demo.measures import Figures, Result, Truth
from dlcore.demo.options import Options
from dlcore.demo.samplers import Sampler
from dlcore.demo.timing import PROVIDERS, Measurement
from dlcore.testing.markov import MarkovChain


def chain_facts(chain: MarkovChain, characters: int) -> dict[str, Any]:
    """What was fitted, for print and JSON."""
    return {
        "order": chain.order,
        "alphabet": chain.alphabet,
        "characters": characters,
        "entropy_rate": chain.entropy_rate(),
        "perplexity": math.exp(chain.entropy_rate()),
    }


def print_results(
    console: Console, samplers: Mapping[str, Sampler], results: Sequence[Result], truth: Truth
) -> None:
    """Perplexity, entropy and divergence per sampler and step count, the truth above."""
    table = Table(title="Exact figures under the true law", title_justify="left", caption_justify="left")
    table.caption = (
        "Steps are network calls. Exact samplers reach the true law as steps grow; their draws then read as "
        "'samples of the chain' do, which are as many as a sampler's. ± is one standard error."
    )
    table.add_column("sampler")
    table.add_column("exact")
    for name in ("steps", "perplexity", "bigram\nentropy", "bigram\nKL", "seconds"):
        table.add_column(name, justify="right")
    exact = f"{truth.perplexity:.2f}", f"{truth.bigram_entropy:.3f}", "0"
    table.add_row("the chain, exactly", "", "", *exact, "")
    table.add_row("samples of the chain", "", "", *_cells(truth.same_size), "", end_section=True)
    for name, group in groupby(results, key=lambda r: r.sampler):
        runs = list(group)
        for i, run in enumerate(runs):
            sampler = samplers[name]
            table.add_row(
                sampler.label if i == 0 else "",
                ("yes" if sampler.exact else "no") if i == 0 else "",
                str(run.steps),
                *_cells(run.figures),
                f"{run.seconds:.1f}",
                end_section=i == len(runs) - 1,
            )
    console.print(table)


def _cells(figures: Figures) -> tuple[str, str, str]:
    error = "" if math.isnan(figures.perplexity_error) else f" ± {figures.perplexity_error:.2f}"
    return f"{figures.perplexity:.2f}{error}", f"{figures.bigram_entropy:.3f}", f"{figures.bigram_kl:.3f}"


def print_texts(
    console: Console, samplers: Mapping[str, Sampler], results: Sequence[Result], true_text: str
) -> None:
    """A line of every sampler at its largest number of steps."""
    lines = [("the chain itself", true_text)]
    for name, group in groupby(results, key=lambda r: r.sampler):
        lines.append((samplers[name].label, list(group)[-1].text))
    width = max(len(label) for label, _ in lines)
    console.print("\nWhat they write at the most steps", style="italic")
    for label, text in lines:
        line = Text(f"{label:<{width}}  {text}")
        line.stylize("dim", 0, width)
        console.print(line, no_wrap=True, overflow="ellipsis")
    console.print()


def print_timing(console: Console, measured: Sequence[Measurement]) -> None:
    """Step times and ratios per op and shape."""
    table = Table(title="Step times, float32, memory kept warm", title_justify="left", caption_justify="left")
    table.caption = (
        f"Best of warm calls on {torch.get_num_threads()} threads, from α = 0.4 to 0.5. "
        "masked.step reads only the rows that a draw needs."
    )
    table.add_column("step")
    table.add_column("(B, L, V)")
    for name in ("dlcore", "torch eager", "torch.compile", "compiling"):
        table.add_column(name, justify="right")
    for (op, shape), group in groupby(measured, key=lambda m: (m.op, m.shape)):
        by_provider = {m.provider: m for m in group}
        ours = by_provider.get("dlcore")
        compiling = by_provider["compile"].compile_seconds if "compile" in by_provider else None
        table.add_row(
            op,
            f"{shape[0]} x {shape[1]} x {shape[2]:,}",
            *(_time(by_provider.get(p), ours) for p in PROVIDERS),
            "" if compiling is None else f"{compiling:.0f} s",
        )
    console.print(table)


def _time(measurement: Measurement | None, ours: Measurement | None) -> str:
    if measurement is None:
        return "failed"
    if measurement.seconds is None:
        return measurement.note
    shown = f"{measurement.seconds * 1e3:.1f} ms"
    if ours is None or ours is measurement or ours.seconds is None:
        return shown
    return f"{shown} ({measurement.seconds / ours.seconds:.0f}x)"


def save_json(
    path: Path,
    options: Options,
    facts: dict[str, Any],
    truth: Truth,
    samplers: Mapping[str, Sampler],
    results: Sequence[Result],
    measured: Sequence[Measurement],
    seconds: dict[str, float],
) -> None:
    """Every number, with what made it."""
    content = {
        **origin(options),
        "chain": facts,
        "truth": asdict(truth),
        "results": [{**asdict(r), "exact": samplers[r.sampler].exact} for r in results],
        "timing": [asdict(m) for m in measured],
        "seconds": seconds,
    }
    write_json(path, content)


def origin(options: Options) -> dict[str, Any]:
    """What the numbers of a chapter come from."""
    return {
        "options": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(options).items()},
        "versions": {
            "dlcore": dlcore.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Content as JSON, with null for what is not finite."""
    path.write_text(json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n", "utf-8")


def _finite(value: Any) -> Any:
    """NaN and infinities as None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
