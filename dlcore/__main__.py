"""`python -m dlcore info | demo | bench`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from dlcore.demo.options import UserError, add_arguments


class _Parser(argparse.ArgumentParser):
    """Errors in one line, raised rather than exited with."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m dlcore", description="The compute core of diffusion language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,demo,bench}")
    commands.add_parser("info", help="versions, CPU level, threads, and which backend can run which op")
    demo = commands.add_parser(
        "demo",
        help="samplers on a language whose exact posteriors are known; block diffusion, trained; flows",
    )
    add_arguments(demo)
    commands.add_parser("bench", help="the benchmarks of a source tree; arguments as those of `make bench`")
    return parser


def _info() -> int:
    from dlcore import _info

    print(_info.report())
    return 0


def _demo(parsed: argparse.Namespace) -> int:
    _need("demo", "demo", "rich", "matplotlib")
    from dlcore.demo import run

    return run.main(parsed)


def _bench(rest: Sequence[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "run.py").is_file():
        raise UserError(f"bench needs a source tree: there is no bench/run.py beside {root / 'dlcore'}")
    _need("bench", "test", "pytest", "pytest_benchmark")
    return subprocess.run([sys.executable, "-m", "bench.run", *rest], cwd=root, check=False).returncode


def _need(command: str, extra: str, *modules: str) -> None:
    """Say what to install if a module is missing."""
    if any(find_spec(name) is None for name in modules):
        names = " and ".join(modules).replace("_", "-")
        raise UserError(f"python -m dlcore {command} needs {names}: pip install 'dlcore[{extra}]'")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. Bad options and files give one line on stderr and 2."""
    try:
        parsed, rest = _parser().parse_known_args(argv)
        if rest and parsed.command != "bench":
            raise UserError(f"unknown option {rest[0]}")
        if parsed.command == "bench":
            return _bench(rest)
        return _info() if parsed.command == "info" else _demo(parsed)
    except UserError as error:
        print(f"dlcore: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
