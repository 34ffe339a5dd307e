"""`python -m bench.systems.NAME` where the data are no text: train on separate sequences, write some."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from torch import Tensor

from bench.systems import training
from bench.systems.command import SCORE, WRITE, Options, parser, run, trained_system
from bench.systems.system import System
from bench.systems.training import Data
from dlcore import rng
from dlcore.demo.progress import say

#: Written, unless another number is asked for.
BATCH = 256


@dataclass(frozen=True)
class Outcome:
    """What a report is made of."""

    data: Data
    tokens: Tensor
    """(batch, L), written."""
    loss: float
    """On held-out sequences."""
    out: Path


#: Lines to print; it may write files.
Report = Callable[[Outcome], str]


def main(system: type[System], read: Callable[[], Data], report: Report) -> NoReturn:
    """The command of an example's module."""
    run(lambda: _one(system, read(), report))


def _one(system: type[System], data: Data, report: Report) -> None:
    prog = f"python -m bench.systems.{system.name}"
    made = parser(prog, f"{system.title} ({system.paper})", 60, length=data.tokens.shape[1])
    made.set_defaults(batch=BATCH)
    options = Options(**vars(made.parse_args()))
    console = Console()
    trained, reached = trained_system(console, system, options, data)
    key = rng.key(options.seed)
    trained.eval()
    loss = training.held_out_loss(trained, data, rng.fold_in(key, SCORE))
    with torch.no_grad():
        tokens = trained.generate(options.batch, options.steps or system.steps, rng.fold_in(key, WRITE))
    say(console, report(Outcome(data, tokens, loss, options.out)))
    say(
        console,
        f"{system.name}: {reached.step} training steps in {reached.seconds:.0f} s, held-out loss {loss:.3f}",
    )
