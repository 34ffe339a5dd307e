"""The demo's command line, checked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Bytes that the chain's forward messages may take; they dominate the demo's memory.
_MEMORY = 2 << 30


class UserError(Exception):
    """A bad option or file: one line for stderr, exit code 2."""


@dataclass(frozen=True)
class Options:
    """What the demo was asked for."""

    chapters: tuple[int, ...]
    text: Path | None
    samplers: tuple[str, ...]
    steps: tuple[int, ...]
    length: int
    batch: int
    order: int
    seed: int
    out: Path
    timing: bool
    seconds: int


#: Defaults of the options that only one chapter has.
_OF_CHAPTER: dict[int, dict[str, Any]] = {
    1: {"samplers": None, "steps": (8, 32, 128), "length": 128, "batch": 64, "timing": True},
    2: {"seconds": 60},
}


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


def _chapters(text: str) -> tuple[int, ...]:
    chapters = {"all": tuple(_OF_CHAPTER), **{str(number): (number,) for number in _OF_CHAPTER}}
    if text not in chapters:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(chapters)}, got {text!r}")
    return chapters[text]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options; those of one chapter alone are absent unless given."""
    parser.add_argument(
        "--chapter",
        type=_chapters,
        default=tuple(_OF_CHAPTER),
        metavar="1|2|all",
        help="1: samplers, 2: a block-diffusion transformer with a cache (all)",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to fit (default: Python's own)")
    parser.add_argument("--order", type=lambda t: whole(t, 1, 3), default=2, help="of the Markov chain (2)")
    parser.add_argument("--seed", type=lambda t: whole(t, 0, 2**63 - 1), default=0, help="of all draws (0)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="of the results (out)")
    _add_chapter_arguments(
        parser.add_argument_group("chapter 1", argument_default=argparse.SUPPRESS),
        parser.add_argument_group("chapter 2", argument_default=argparse.SUPPRESS),
    )


def _add_chapter_arguments(one: argparse._ArgumentGroup, two: argparse._ArgumentGroup) -> None:
    one.add_argument("--samplers", type=_names, metavar="A,B", help="a selection (default: all)")
    one.add_argument("--steps", type=_steps, metavar="N,M", help="network calls (8,32,128)")
    one.add_argument("--length", type=lambda t: whole(t, 2), help="characters (128)")
    one.add_argument("--batch", type=lambda t: whole(t, 1), help="sequences per sampler (64)")
    one.add_argument("--no-timing", dest="timing", action="store_false", help="leave out the step times")
    two.add_argument("--seconds", type=lambda t: whole(t, 1, 86_400), help="of training (60)")


def from_namespace(parsed: argparse.Namespace, known: tuple[str, ...]) -> Options:
    """Options of parsed arguments; samplers are checked against `known`.

    Raises:
        UserError: an unknown sampler, or an option of a chapter that is left out.
    """
    given = vars(parsed)
    values: dict[str, Any] = {}
    for chapter, defaults in _OF_CHAPTER.items():
        for name, default in defaults.items():
            if name in given and chapter not in parsed.chapter:
                flag = "no-timing" if name == "timing" else name
                raise UserError(f"--{flag}: only chapter {chapter} has it, which --chapter leaves out")
            values[name] = given.get(name, default)
    chosen = known if values["samplers"] is None else values["samplers"]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise UserError(f"--samplers: unknown {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    values["samplers"] = chosen
    return Options(
        chapters=parsed.chapter,
        text=parsed.text,
        order=parsed.order,
        seed=parsed.seed,
        out=parsed.out,
        **values,
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
