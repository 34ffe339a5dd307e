"""The demo's command line, checked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

#: Bytes that the chain's forward messages may take; they dominate the demo's memory.
_MEMORY = 2 << 30


class UserError(Exception):
    """A bad option or file: one line for stderr, exit code 2."""


@dataclass(frozen=True)
class Options:
    """What the demo was asked for."""

    text: Path | None
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    length: int
    batch: int
    order: int
    seed: int
    out: Path
    timing: bool


def whole(text: str, least: int, most: int | None = None) -> int:
    """A whole number from `least` to `most`, for argparse."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, got {text!r}")
    return value


def _steps(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({whole(part.strip(), 1) for part in text.split(",")}))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"must be positive whole numbers with commas between, got {text!r}"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to fit (default: Python's own)")
    parser.add_argument("--samplers", type=_names, metavar="A,B", help="a selection (default: all)")
    parser.add_argument(
        "--steps", type=_steps, default=(8, 32, 128), metavar="N,M", help="network calls (8,32,128)"
    )
    parser.add_argument("--length", type=lambda t: whole(t, 2), default=128, help="characters (128)")
    parser.add_argument("--batch", type=lambda t: whole(t, 1), default=64, help="sequences per sampler (64)")
    parser.add_argument("--order", type=lambda t: whole(t, 1, 3), default=2, help="of the Markov chain (2)")
    parser.add_argument("--seed", type=lambda t: whole(t, 0, 2**63 - 1), default=0, help="of all draws (0)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="of the results (out)")
    parser.add_argument("--no-timing", dest="timing", action="store_false", help="leave out the step times")


def from_namespace(parsed: argparse.Namespace, known: tuple[str, ...]) -> Options:
    """Options of parsed arguments; samplers are checked against `known`.

    Raises:
        UserError: an unknown sampler, or a batch that would not fit in memory.
    """
    chosen = known if parsed.samplers is None else parsed.samplers
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(f"--samplers: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    return Options(
        text=parsed.text,
        samplers=chosen,
        steps=parsed.steps,
        length=parsed.length,
        batch=parsed.batch,
        order=parsed.order,
        seed=parsed.seed,
        out=parsed.out,
        timing=parsed.timing,
    )


def check_memory(options: Options, vocab_size: int) -> None:
    """Refuse a posterior that would not fit: L·B·V^k float32 numbers."""
    need = 4 * options.length * options.batch * vocab_size**options.order
    if need > _MEMORY:
        raise UserError(
            f"--order {options.order} with --batch {options.batch} and --length {options.length} would need "
            f"{need / 2**30:.1f} GiB, at most {_MEMORY >> 30} are allowed: lower one of them"
        )


def prepare_folder(folder: Path) -> None:
    """Make the output folder, or say why it cannot hold results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".dlcore-demo"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror or error}") from None
