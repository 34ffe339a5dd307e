"""The picture: exact perplexity against bigram entropy, a line a sampler, a point a step count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dlcore.demo.measures import Result, Truth
from dlcore.demo.samplers import Sampler

#: Okabe and Ito's colours, told apart by every kind of colour vision, and a shape each: one per sampler.
_STYLES = (
    ("#0072B2", "o"),
    ("#E69F00", "s"),
    ("#56B4E9", "^"),
    ("#D55E00", "X"),
    ("#009E73", "D"),
    ("#CC79A7", "v"),
    ("#7A6A00", "P"),
    ("#555555", "<"),
    ("#6A3D9A", ">"),
    ("#8C564B", "p"),
)
Samplers = Mapping[str, Sampler]


def _style(samplers: Samplers, name: str) -> tuple[str, str]:
    """A sampler's own colour and shape, whichever are shown beside it."""
    return _STYLES[list(samplers).index(name)]


def save(path: Path, samplers: Samplers, results: Sequence[Result], truth: Truth) -> None:
    """Write the picture as PNG."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 5.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        whole, near = figure.subplots(1, 2)
        for axes in (whole, near):
            _draw(axes, samplers, results, truth)
        whole.set_title("All samplers (solid: exact as steps grow)", loc="left")
        near.set_title("Near the truth (numbers: steps)", loc="left")
        _zoom(near, samplers, results, truth)
        handles, labels = whole.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.draw_without_rendering()  # settles the layout that labels are placed in
        _label(near, samplers, results, truth, results)
        _label(whole, samplers, results, truth, [r for r in results if not _inside(near, r)])
        figure.savefig(path, metadata={"Software": None})


def _draw(axes: Any, samplers: Samplers, results: Sequence[Result], truth: Truth) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("bigram entropy (nats)")
    axes.set_ylabel("perplexity under the true law")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 7, 8, 10), numticks=20))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for name, group in groupby(results, key=lambda r: r.sampler):
        runs = list(group)
        colour, marker = _style(samplers, name)
        axes.plot(
            [r.figures.bigram_entropy for r in runs],
            [r.figures.perplexity for r in runs],
            color=colour,
            marker=marker,
            markersize=6,
            linewidth=1.4,
            linestyle="-" if samplers[name].exact else "--",
            label=samplers[name].label,
        )
    axes.plot(
        truth.bigram_entropy, truth.perplexity, "*", color="black", markersize=15, label="the truth", zorder=5
    )
    axes.add_patch(
        Ellipse(
            (truth.same_size.bigram_entropy, truth.same_size.perplexity),
            4 * truth.spread.bigram_entropy,
            4 * truth.spread.perplexity,
            color="black",
            alpha=0.18,
            linewidth=0,
            label="samples of the chain, ± 2 sd",
        )
    )


def _zoom(axes: Any, samplers: Samplers, results: Sequence[Result], truth: Truth) -> None:
    """Limit the axes to the truth and the exact samplers, or to all if none is."""
    shown = [r.figures for r in results if samplers[r.sampler].exact] or [r.figures for r in results]
    own, spread = truth.same_size, truth.spread
    x = [f.bigram_entropy for f in shown] + [truth.bigram_entropy]
    x += [own.bigram_entropy - 2 * spread.bigram_entropy, own.bigram_entropy + 2 * spread.bigram_entropy]
    y = [f.perplexity for f in shown] + [truth.perplexity, own.perplexity - 2 * spread.perplexity]
    margin = 0.06 * (max(x) - min(x))
    axes.set_xlim(min(x) - margin, max(x) + margin)
    axes.set_ylim(min(y) / 1.05, max(y) * 1.08)


def _label(
    axes: Any, samplers: Samplers, results: Sequence[Result], truth: Truth, labelled: Sequence[Result]
) -> None:
    """Write the steps beside the points of `labelled` where there is room: on no point, line or label."""
    points = [(r.figures.bigram_entropy, r.figures.perplexity) for r in results]
    pixels = axes.transData.transform([*points, (truth.bigram_entropy, truth.perplexity)])
    taken = [(x - 9, y - 9, x + 9, y + 9) for x, y in pixels] + _lines(results, pixels)
    for r, point, (x, y) in zip(results, points, pixels, strict=False):
        if r not in labelled or not _inside(axes, r):
            continue
        text = str(r.steps)
        width, height = 12 * len(text), 18
        right, left, middle = x + 11, x - 11 - width, x - width / 2
        beside, above, below = y - height / 2, y + 11, y - 11 - height
        places = [(right, beside), (left, beside), (middle, above), (middle, below)]
        places += [(right, above), (left, above), (right, below), (left, below)]
        for left, low in places:
            box = (left, low, left + width, low + height)
            x0, y0, x1, y1 = axes.bbox.extents
            if not (x0 < box[0] and y0 < box[1] and box[2] < x1 and box[3] < y1):
                continue
            if not any(_overlap(box, other) for other in taken):
                taken.append(box)
                offset = ((left - x) * 72 / axes.figure.dpi, (low - y) * 72 / axes.figure.dpi)
                colour = _style(samplers, r.sampler)[0]
                halo = withStroke(linewidth=2, foreground="white")
                axes.annotate(
                    text,
                    point,
                    offset,
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                    path_effects=[halo],
                )
                break


def _lines(results: Sequence[Result], pixels: Sequence[Any]) -> list[tuple[float, ...]]:
    """Small boxes along the lines between a sampler's points."""
    boxes: list[tuple[float, ...]] = []
    for (one, start), (other, end) in pairwise(zip(results, pixels, strict=False)):
        if one.sampler != other.sampler:
            continue
        count = 1 + int(math.dist(start, end) / 2)
        for i in range(count):
            x, y = (a + (b - a) * i / count for a, b in zip(start, end, strict=True))
            boxes.append((x - 1, y - 1, x + 1, y + 1))
    return boxes


def _inside(axes: Any, result: Result) -> bool:
    """Whether the result's point lies in the axes' limits."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    at = result.figures
    return bool(left <= at.bigram_entropy <= right and low <= at.perplexity <= high)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
