"""Run the benchmarks with torch's memory as it comes and kept warm, write the results, print the table.

python -m bench.run [-k EXPRESSION] [--allocator default|warm|both] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import picture
from bench.report import Record, document, reduced

HERE = Path(__file__).parent
#: glibc then hands no memory back, so that a fresh tensor costs no page faults.
WARM = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
OPTIONS = (
    *("--benchmark-enable", "--benchmark-only", "--benchmark-disable-gc", "--benchmark-quiet"),
    *("--verbose", "--no-header", "-W", "ignore"),
)


def measure(select: str | None, extra: dict[str, str]) -> tuple[Record | None, int]:
    """One run of the suite in a process of its own: what it measured, if anything, and pytest's status."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "raw.json"
        command = [sys.executable, "-m", "pytest", str(HERE), *OPTIONS, f"--benchmark-json={file}"]
        command += ["-k", select] if select else []
        status = subprocess.run(command, env=os.environ | extra, cwd=HERE.parent, check=False).returncode
        text = file.read_text() if file.exists() else ""
        return (reduced(json.loads(text)) if text else None), status


def slug(text: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(folder: Path, runs: dict[str, Record]) -> str:
    """JSON per allocator, one table of both, and the picture of attention if it ran; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    first = next(iter(runs.values()))
    stem = f"{slug(str(first['machine']['cpu']))}-{first['datetime'][:10]}"
    for allocator, run in runs.items():
        suffix = "" if allocator == "default" else f"-{allocator}"
        (folder / f"{stem}{suffix}.json").write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
        picture.save(folder / f"{stem}{suffix}-attention.png", run)
    text = document(*runs.values())
    (folder / f"{stem}.md").write_text(text)
    return text


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.run", description="Run dlcore's benchmarks.")
    parser.add_argument("-k", dest="select", metavar="EXPRESSION", help="pytest's selection, e.g. 'nelbo'")
    parser.add_argument("--allocator", choices=("default", "warm", "both"), default="both")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    options = parser.parse_args()
    settings = {"default": {}, "warm": WARM}
    wanted = settings if options.allocator == "both" else {options.allocator: settings[options.allocator]}
    runs, worst = {}, 0
    for allocator, extra in wanted.items():
        run, status = measure(options.select, extra)
        worst = max(worst, status)
        if run is None:
            sys.exit(f"bench: nothing was measured (pytest ended with {status})")
        runs[allocator] = run
    print(write(options.out, runs))
    sys.exit(worst)


if __name__ == "__main__":
    main()
