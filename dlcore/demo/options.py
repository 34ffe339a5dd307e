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


CHAPTERS = (1, 2, 3)
#: Defaults of the options that not every chapter has, and the chapters that have them.
_OF_CHAPTERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "samplers": (None, (1, 3)),
    "steps": ((8, 32, 128), (1, 3)),
    "length": (128, (1, 3)),
    "batch": (64, (1, 3)),
    "timing": (True, (1,)),
    "seconds": (60, (2,)),
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
    chapters = {"all": CHAPTERS, **{str(number): (number,) for number in CHAPTERS}}
    if text not in chapters:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(chapters)}, got {text!r}")
    return chapters[text]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options; those of one chapter alone are absent unless given."""
    parser.add_argument(
        "--chapter",
        type=_chapters,
        default=CHAPTERS,
        metavar="1|2|3|all",
        help="1: samplers, 2: a block-diffusion transformer with a cache, 3: continuous flows (all)",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to fit (default: Python's own)")
    parser.add_argument("--order", type=lambda t: whole(t, 1, 3), default=2, help="of the Markov chain (2)")
    parser.add_argument("--seed", type=lambda t: whole(t, 0, 2**63 - 1), default=0, help="of all draws (0)")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="of the results (out)")
    _add_chapter_arguments(
        *(
            parser.add_argument_group(title, argument_default=argparse.SUPPRESS)
            for title in ("chapters 1 and 3", "chapter 1", "chapter 2")
        )
    )


def _add_chapter_arguments(
    both: argparse._ArgumentGroup, one: argparse._ArgumentGroup, two: argparse._ArgumentGroup
) -> None:
    both.add_argument("--samplers", type=_names, metavar="A,B", help="a selection (default: all)")
    both.add_argument("--steps", type=_steps, metavar="N,M", help="network calls (8,32,128)")
    both.add_argument("--length", type=lambda t: whole(t, 2), help="characters (128)")
    both.add_argument("--batch", type=lambda t: whole(t, 1), help="sequences per sampler (64)")
    one.add_argument("--no-timing", dest="timing", action="store_false", help="leave out the step times")
    two.add_argument("--seconds", type=lambda t: whole(t, 1, 86_400), help="of training (60)")


def from_namespace(parsed: argparse.Namespace, known: dict[int, tuple[str, ...]]) -> Options:
    """Options of parsed arguments; samplers are checked against those that the chosen chapters know.

    Raises:
        UserError: an unknown sampler, or an option of chapters that are left out.
    """
    given = vars(parsed)
    values: dict[str, Any] = {}
    for name, (default, chapters) in _OF_CHAPTERS.items():
        if name in given and not set(chapters) & set(parsed.chapter):
            flag = "no-timing" if name == "timing" else name
            who = " and ".join(map(str, chapters))
            having = f"chapter {who} has" if len(chapters) == 1 else f"chapters {who} have"
            raise UserError(f"--{flag}: only {having} it, which --chapter leaves out")
        values[name] = given.get(name, default)
    names = [name for chapter in parsed.chapter for name in known.get(chapter, ())]
    chosen = names if values["samplers"] is None else values["samplers"]
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise UserError(f"--samplers: unknown {', '.join(map(repr, unknown))}; known are {', '.join(names)}")
    values["samplers"] = tuple(chosen)
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
