"""Text for the chain: what every Python installation carries, or the user's file."""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from dlcore.demo.options import UserError
from dlcore.testing.markov import normalise_text

#: The size of the alphabet: the 30 commonest characters of a text, whatever its script.
LETTERS = 30
#: Fewer characters leave nearly every context of two unseen.
FEWEST_CHARACTERS = 1_000


def load(path: Path | None) -> tuple[str, str]:
    """(text, alphabet): lower case, single spaces, only the commonest characters.

    Raises:
        UserError: a file that is missing, no UTF-8, or of too few usable characters.
    """
    raw = default_text() if path is None else _read(path)
    alphabet = commonest(raw, LETTERS)
    text = normalise_text(raw, alphabet)
    where = "this Python's documentation" if path is None else f"--text {path}"
    if len(text) < FEWEST_CHARACTERS or len(alphabet) < 2:
        raise UserError(
            f"{where}: needs at least {FEWEST_CHARACTERS} usable characters, at least 2 of them different; "
            f"got {len(text)} and {len(alphabet)}"
        )
    return text, alphabet


def commonest(text: str, count: int) -> str:
    """The `count` commonest characters of the normalised text, sorted; ties go to the lowest code point."""
    tally = Counter(normalise_text(text))
    ranked = sorted(tally, key=lambda c: (-tally[c], c))
    return "".join(sorted(ranked[:count]))


def default_text() -> str:
    """Prose of this Python: the language reference in pydoc, then the docstrings of the standard library.

    The same text on every run of one Python installation; docstrings alone where pydoc's topics are missing.
    """
    return "\n".join([*_prose(_topics()), *_prose(_docstrings(Path(sysconfig.get_paths()["stdlib"])))])


def _topics() -> Iterable[str]:
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return (topics[name] for name in sorted(topics))


def _docstrings(folder: Path) -> Iterable[str]:
    for file in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node) or ""


def _prose(parts: Iterable[str]) -> Iterable[str]:
    """Lines of at least five words that are letters and plain punctuation nearly throughout."""
    for part in parts:
        for line in part.splitlines():
            plain = sum(c.isalpha() or c in " .,'" for c in line)
            if plain >= 0.95 * len(line) and len(line.split()) >= 5:
                yield line


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror or error}") from None
