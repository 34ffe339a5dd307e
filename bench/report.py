"""pytest-benchmark's JSON made small, and a table of it.

python -m bench.report results.json [warm.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Record = dict[str, Any]

#: Nothing takes less than this share of what memory and arithmetic need at best.
FLOOR = 0.95
STATISTICS = ("min", "median", "iqr", "rounds", "iterations")
HEADER = (
    "case",
    "provider",
    "time",
    "GB/s",
    "% of read",
    "GFLOP/s",
    "% of mm",
    "% of oneDNN",
    "ns/pair",
    "% of ceiling",
    "reads",
    "÷ dlcore",
    "time, warm",
    "÷ dlcore, warm",
    "peak memory",
    "÷ dlcore's",
)


def add_ratios(benchmarks: list[Record]) -> None:
    """extra_info["ratios"]: the median time of each provider of the group over this one's."""
    medians: dict[str, dict[str, float]] = {}
    for b in benchmarks:
        medians.setdefault(b["group"], {})[b["extra_info"]["provider"]] = b["stats"]["median"]
    for b in benchmarks:
        mine = b["stats"]["median"]
        others = {p: float(f"{t / mine:.4g}") for p, t in medians[b["group"]].items()}
        del others[b["extra_info"]["provider"]]
        b["extra_info"]["ratios"] = others


def mark_suspicious(benchmarks: list[Record]) -> None:
    """extra_info["suspicious"]: faster than the run's best read of that size or product of that dtype."""
    reads: dict[int, float] = {}
    products: dict[str, float] = {}
    for b in benchmarks:
        info = b["extra_info"]
        size, dtype = info["unit_bytes"], info["dtype"]
        reads[size] = max(info["read_gb_per_s"], reads.get(size, 0))
        rates = info["gemm_gflop_per_s"], info.get("onednn_gflop_per_s"), products.get(dtype)
        products[dtype] = max(rate or 0 for rate in rates)
    for b in benchmarks:
        info = b["extra_info"]
        multiplying = info["flops"] / products[info["dtype"]] if info["flops"] else 0
        need = max(info["bytes"] / reads[info["unit_bytes"]], multiplying) * 1e-9
        info["suspicious"] = b["stats"]["min"] < FLOOR * need


def reduced(raw: Record) -> Record:
    """What is worth keeping of pytest-benchmark's JSON: no rounds, hosts, users or paths."""
    machine = raw["machine_info"]
    cpu = machine.get("cpu", {})
    return {
        "datetime": raw["datetime"],
        "commit": raw.get("commit_info", {}).get("id"),
        "machine": {
            "cpu": cpu.get("brand_raw", machine.get("processor")),
            "cores": cpu.get("count"),
            "python": machine.get("python_version"),
        },
        "benchmarks": [
            {
                "group": b["group"],
                "stats": {key: b["stats"][key] for key in STATISTICS},
                "extra_info": b["extra_info"],
            }
            for b in raw["benchmarks"]
        ],
    }


def seconds(t: float) -> str:
    """Three figures and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if t >= size:
            return f"{t / size:.3g} {unit}"
    return f"{t / 1e-6:.3g} µs"


def _number(x: float | None, form: str) -> str:
    return "" if x is None else format(x, form)


def _slower(record: Record | None, ours: dict[str, float]) -> str:
    """How many times dlcore's time this is."""
    if record is None or record["extra_info"]["provider"] == "dlcore" or record["group"] not in ours:
        return ""
    return f"{record['stats']['median'] / ours[record['group']]:.3g}"


def _ours(run: Record | None) -> dict[str, float]:
    benchmarks = run["benchmarks"] if run else []
    return {b["group"]: b["stats"]["median"] for b in benchmarks if b["extra_info"]["provider"] == "dlcore"}


def _time(record: Record | None) -> str:
    if record is None:
        return ""
    return seconds(record["stats"]["median"]) + (" (!)" if record["extra_info"]["suspicious"] else "")


def table(plain: Record, warm: Record | None = None) -> str:
    """Markdown, aligned so that it also reads well in a terminal."""
    by_row = {_row(b): b for b in warm["benchmarks"]} if warm else {}
    ours, ours_warm, peaks = _ours(plain), _ours(warm), _peaks(plain)
    lines, last = [HEADER], ""
    for b in plain["benchmarks"]:
        info, other = b["extra_info"], by_row.get(_row(b))
        lines.append(
            (
                "" if b["group"] == last else b["group"],
                info["provider"],
                _time(b),
                _number(info["gb_per_s"], ".3g"),
                *_attention(info),
                _number(None if _is_attention(info) else info["percent_of_ceiling"], ".3g"),
                _number(info["reads"], ".3g"),
                _slower(b, ours),
                _time(other),
                _slower(other, ours_warm),
                *_memory(b, peaks),
            )
        )
        last = b["group"]
    columns = [column for column in zip(*lines, strict=True) if any(column[1:]) or len(lines) == 1]
    return "\n".join(_markdown(list(zip(*columns, strict=True))))


def _is_attention(info: Record) -> bool:
    return bool(info.get("pairs"))


def _attention(info: Record) -> tuple[str, ...]:
    """What tells in an attention: each ceiling by itself, and the time per visible pair."""
    if not _is_attention(info):
        return ("",) * 5
    keys = ("percent_of_read", "gflop_per_s", "percent_of_mm", "percent_of_onednn", "ns_per_pair")
    return tuple(_number(info[key], ".3g") for key in keys)


def _peaks(run: Record) -> dict[str, int]:
    """What dlcore's call needs at its peak, where that was measured."""
    infos = {
        b["group"]: b["extra_info"] for b in run["benchmarks"] if b["extra_info"]["provider"] == "dlcore"
    }
    return {group: info["peak_bytes"] for group, info in infos.items() if "peak_bytes" in info}


def _memory(record: Record, ours: dict[str, int]) -> tuple[str, str]:
    """The peak, and how many times dlcore's it is."""
    info = record["extra_info"]
    if "peak_bytes" not in info:
        return "", ""
    others = info["provider"] != "dlcore" and record["group"] in ours
    ratio = f"{info['peak_bytes'] / ours[record['group']]:.3g}" if others else ""
    return f"{info['peak_bytes'] / 2**20:,.0f} MiB", ratio


def _row(record: Record) -> tuple[str, str]:
    return record["group"], record["extra_info"]["provider"]


def _markdown(lines: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: tuple[str, ...]) -> str:
        padded = (
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|".join("-" * (w + 2) if i < 2 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
    return [line(lines[0]), f"|{rule}|", *map(line, lines[1:])]


def heading(run: Record) -> str:
    """What the numbers were measured on."""
    machine, benchmarks = run["machine"], run["benchmarks"]
    if not benchmarks:
        return "no benchmarks"
    info = benchmarks[0]["extra_info"]
    ours = next(
        (b["extra_info"]["capability"] for b in benchmarks if b["extra_info"]["backend"] != "torch"), "-"
    )
    best_read = max(
        (b["extra_info"]["read_gb_per_s"] for b in benchmarks if b["extra_info"]["bytes"] > 1 << 26),
        default=None,
    )
    best_product = max(
        (b["extra_info"]["gemm_gflop_per_s"] or 0 for b in benchmarks if _is_float32(b["extra_info"])),
        default=None,
    )
    parts = [
        f"{machine['cpu']}, {info['threads']} threads, {ours}",
        f"Python {machine['python']}, torch {info['torch']}",
        f"read {_number(best_read, '.3g') or '-'} GB/s, copy {info['copy_gb_per_s']:.3g} GB/s, "
        f"GEMM {_number(best_product or None, '.3g') or '-'} GFLOP/s",
        run["datetime"][:10],
    ]
    return "; ".join(parts)


def _is_float32(info: Record) -> bool:
    return bool(info.get("dtype", "float32") == "float32")


def document(plain: Record, warm: Record | None = None) -> str:
    """A heading and the table; (!) marks a time too short to be true."""
    return f"{heading(plain)}\n\n{table(plain, warm)}\n"


def main(paths: list[str]) -> None:
    """Print the table of one or two reduced JSON files."""
    runs = [json.loads(Path(path).read_text()) for path in paths]
    print(document(*runs))


if __name__ == "__main__":
    main(sys.argv[1:3])
