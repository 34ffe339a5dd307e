"""`python -m bench.systems.NAME`: train one system on a text and let it write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bench.systems import checkpoint, measure, training
from bench.systems.system import System
from bench.systems.training import Data
from dlcore import rng
from dlcore.demo import text
from dlcore.demo.measures import Figures
from dlcore.demo.options import UserError, whole
from dlcore.demo.progress import say
from dlcore.testing.markov import MarkovChain

#: Keys of what is drawn, apart for training, scoring and writing.
TRAIN, SCORE, WRITE = range(3)
#: Shorter sequences have too few positions to be noised apart.
SHORTEST = 16


@dataclass(frozen=True)
class Options:
    """What was asked for."""

    text: Path | None
    seconds: int
    steps: int | None
    batch: int
    length: int
    seed: int
    out: Path


@dataclass(frozen=True)
class Result:
    """One system, trained and sampled."""

    name: str
    steps: int
    """Of training."""
    seconds: float
    loss: float
    """On held-out text."""
    calls: int
    """Of the network for a sample."""
    figures: Figures
    written: measure.Written


class _Parser(argparse.ArgumentParser):
    """Errors in one line, raised rather than exited with."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parser(prog: str, description: str, seconds: int, length: int | None = None) -> argparse.ArgumentParser:
    """The options of every system's command; those of a text are left out if sequences have a `length`."""
    made = _Parser(prog=prog, description=description)
    if length is None:
        _add_text(made)
    else:
        made.set_defaults(text=None, length=length)
    made.add_argument(
        "--seconds",
        type=lambda s: whole(s, 1),
        default=seconds,
        help="of training, of a teacher's before it as well (%(default)s)",
    )
    made.add_argument(
        "--steps", type=lambda s: whole(s, 1), help="network calls of a sample (the system's own)"
    )
    made.add_argument(
        "--batch", type=lambda s: whole(s, 1), default=64, help="sequences written (%(default)s)"
    )
    made.add_argument("--seed", type=lambda s: whole(s, 0), default=0, help="of all noise (%(default)s)")
    made.add_argument(
        "--out", type=Path, default=Path("out/systems"), help="folder of the checkpoints (%(default)s)"
    )
    return made


def _add_text(made: argparse.ArgumentParser) -> None:
    made.add_argument("--text", type=Path, help="a UTF-8 file; this Python's own documentation if not given")
    made.add_argument(
        "--length", type=lambda s: whole(s, SHORTEST), default=64, help="tokens of a sequence (%(default)s)"
    )


def main(system: type[System]) -> NoReturn:
    """The command of a system's module."""
    run(lambda: _one(system))


def run(work: Callable[[], None]) -> NoReturn:
    """Do it and exit; a user's mistake is one line and code 2."""
    try:
        work()
    except UserError as error:
        print(f"bench.systems: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the last checkpoint stays, and the same command goes on from it", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _one(system: type[System]) -> None:
    prog = f"python -m bench.systems.{system.name}"
    options = Options(**vars(parser(prog, f"{system.title} ({system.paper})", 60).parse_args()))
    console = Console()
    chain, data = read(options)
    result = train_and_write(console, system, options, chain, data)
    say(console, f"\n{chain.decode(result.written.tokens[0])}\n")
    say(console, summary(result, chain, options.length))


def read(options: Options) -> tuple[MarkovChain, Data]:
    """The chain fitted to the text, and the text's tokens.

    Raises:
        UserError: a file that can't be used, or is too short for the length.
    """
    corpus, alphabet = text.load(options.text)
    chain = MarkovChain.fit(corpus, 2, alphabet=alphabet)
    data = Data(chain.encode(corpus), len(alphabet))
    if len(data.held_out) < options.length:
        raise UserError(
            f"--length {options.length}: the text is too short, its held-out part has {len(data.held_out)}"
        )
    return chain, data


def train_and_write(
    console: Console, system: type[System], options: Options, chain: MarkovChain, data: Data
) -> Result:
    """Train it, its teacher before it, and sample."""
    trained, reached = trained_system(console, system, options, data)
    key = rng.key(options.seed)
    trained.eval()
    loss = training.held_out_loss(trained, data, rng.fold_in(key, SCORE))
    steps = options.steps or system.steps
    written = measure.write(trained, options.batch, steps, rng.fold_in(key, WRITE))
    found = measure.figures(written.tokens, chain)
    return Result(system.name, reached.step, reached.seconds, loss, steps, found, written)


def trained_system(
    console: Console, system: type[System], options: Options, data: Data
) -> tuple[System, checkpoint.Reached]:
    """The system after its training, or as far as its checkpoint had it if that is as long."""
    torch.manual_seed(options.seed)
    try:
        made = system(data.vocab_size, options.length)
    except ValueError as error:
        raise UserError(f"{system.name}: {error}") from None
    reached = checkpoint.Reached()
    if system.teacher is not None:
        teacher, reached = trained_system(console, system.teacher, options, data)
        made.learn_from(teacher)
    if system.trains():
        reached = _train(console, made, options, data)
    return made, reached


def _train(console: Console, system: System, options: Options, data: Data) -> checkpoint.Reached:
    path = options.out / f"{system.name}-seed{options.seed}.safetensors"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
    )
    key = rng.fold_in(rng.key(options.seed), TRAIN)
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(f"training {system.name}", total=options.seconds, loss="")
            for now in training.train(system, data, seconds=options.seconds, key=key, path=path):
                line = f"step {now.step}, loss {now.loss:.3f}"
                bar.update(task, completed=now.seconds, loss=line)
                if now.saved and not console.is_terminal:
                    say(console, f"{system.name}: {now.seconds:.0f} of {options.seconds} s, {line}")
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror or error}") from None
    return checkpoint.load(path, system, None, data.digest())


def summary(result: Result, chain: MarkovChain, length: int) -> str:
    """Two lines."""
    written, figures = result.written, result.figures
    return (
        f"{result.name}: {result.steps} training steps in {result.seconds:.0f} s, "
        f"held-out loss {result.loss:.3f}; perplexity {figures.perplexity:.2f} "
        f"(the text's own {perplexity(chain, length):.2f}), bigram entropy {figures.bigram_entropy:.3f}\n"
        f"{written.per_second:.1f} samples/s, with the references {written.reference_per_second:.1f}; "
        f"{written.dlcore_share:.0%} of it in dlcore"
    )


def perplexity(chain: MarkovChain, length: int) -> float:
    """Of the chain's own sequences."""
    return float(torch.tensor(chain.entropy(length) / length).exp())
