"""The picture: exact perplexity against bigram entropy, a point a system."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.systems.command import Result

_COLOURS = "#0072B2", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#7A6A00", "#555555"
_MARKERS = "o", "s", "^", "D"


def save(path: Path, results: Sequence[Result], perplexity: float, entropy: float) -> None:
    """Write it as PNG. The star is the text's own chain, of `perplexity` and bigram `entropy`."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.set(yscale="log", xlabel="bigram entropy (nats)", ylabel="perplexity under the true law")
        axes.grid(alpha=0.25, linewidth=0.6)
        for i, result in enumerate(results):
            colour = _COLOURS[i % len(_COLOURS)]
            marker = _MARKERS[i // len(_COLOURS) % len(_MARKERS)]
            figures = result.figures
            axes.plot(
                figures.bigram_entropy, figures.perplexity, marker, color=colour, ms=7, label=result.name
            )
        axes.plot(entropy, perplexity, "*", color="black", markersize=15, label="the truth")
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        figure.savefig(path, metadata={"Software": None})
