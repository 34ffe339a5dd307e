"""The picture of attention's cost: time against length, a line a provider and block size, log-log.

python -m bench.picture results.json picture.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

from bench.report import Record

OP, NOTE = "attention.block_diffusion", "float32"
#: Okabe and Ito's colours per provider, a dash pattern per block size.
COLOURS = {
    "dlcore": "#0072B2",
    "SDPA, mask": "#D55E00",
    "SDPA, no mask": "#E69F00",
    "flex_attention": "#009E73",
}
DASHES = {4: ":", 16: "-", 64: "--"}

Points = list[tuple[int, float]]


def curves(run: Record) -> dict[tuple[str, int], Points]:
    """(provider, block size) -> (length, median milliseconds), from every forward of the training mask."""
    found: dict[tuple[str, int], Points] = {}
    for b in run["benchmarks"]:
        info = b["extra_info"]
        if info["op"] == OP and info["note"] == NOTE:
            length, block = info["shape"][:2]
            found.setdefault((info["provider"], block), []).append((length, b["stats"]["median"] * 1e3))
    return {key: sorted(points) for key, points in found.items()}


def save(path: Path, run: Record) -> bool:
    """Write the picture as PNG if the run has a curve to draw; whether it did."""
    found = {key: points for key, points in curves(run).items() if len(points) > 1}
    if not found:
        return False
    info = run["benchmarks"][0]["extra_info"]
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 5.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        _draw(axes, found)
        where = f"{run['machine']['cpu']}, {info['threads']} threads, {info['allocator']} allocator"
        axes.set_title(f"Training mask, forward, 12 heads of 64, float32; {where}", loc="left", fontsize=10)
        figure.savefig(path, metadata={"Software": None})
    return True


def _draw(axes: Axes, found: dict[tuple[str, int], Points]) -> None:
    lengths = sorted({length for points in found.values() for length, _ in points})
    for (provider, block), points in sorted(found.items()):
        axes.loglog(
            *zip(*points, strict=True),
            color=COLOURS.get(provider, "#555555"),
            linestyle=DASHES.get(block, "-"),
            marker="o",
            markersize=4,
            label=f"{provider}, block {block}",
        )
    axes.xaxis.set_major_locator(FixedLocator(lengths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("L, tokens of a sequence (rows are 2 L)")
    axes.set_ylabel("median time, ms")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)


def main(source: str, target: str) -> None:
    """Draw one reduced JSON file."""
    if not save(Path(target), json.loads(Path(source).read_text())):
        sys.exit(f"bench: {source} holds no times of {OP} over L")


if __name__ == "__main__":
    main(*sys.argv[1:3])
