"""`python -m bench.systems`: train every system on one text, let each write, print the table."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import dlcore
from bench.systems import picture
from bench.systems.catalogue import NAMES, find
from bench.systems.command import Options, Result, parser, perplexity, read, run, summary, train_and_write
from dlcore.demo.options import UserError
from dlcore.demo.progress import say
from dlcore.testing.markov import MarkovChain

#: Of training each.
SECONDS = 40


def _all() -> None:
    made = parser("python -m bench.systems", __doc__ or "", SECONDS)
    made.add_argument("--systems", default=",".join(NAMES), help="their names, with commas between (all)")
    parsed = vars(made.parse_args())
    names = _chosen(parsed.pop("systems"))
    options, console, began = Options(**parsed), Console(), time.perf_counter()
    if not console.is_terminal:
        console = Console(width=140)
    chain, data = read(options)
    results = []
    for name in names:
        results.append(train_and_write(console, find(name), options, chain, data))
        say(console, summary(results[-1], chain, options.length))
    console.print(table(results, chain, options))
    _save(options, results, chain, time.perf_counter() - began)
    say(console, f"Picture: {options.out / 'systems.png'}")
    say(console, f"Numbers: {options.out / 'systems.json'}")


def _chosen(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"--systems: must be among {', '.join(NAMES)}, got {', '.join(unknown)}")
    return names


def table(results: list[Result], chain: MarkovChain, options: Options) -> Table:
    """A line a system."""
    shown = Table(
        title=f"{options.batch} texts of {options.length} characters; the text's own perplexity is "
        f"{perplexity(chain, options.length):.2f}",
        caption="loss: of held-out text, in nats a character where it bounds the likelihood (else in "
        "brackets); perplexity: exact, under the text's own chain",
    )
    shown.add_column("system")
    for name in ("loss", "perplexity", "bigram entropy", "samples/s", "by the references", "in dlcore"):
        shown.add_column(name, justify="right")
    for r in results:
        loss = f"{r.loss:.3f}" if find(r.name).bound else f"[{r.loss:.3f}]"
        shown.add_row(
            r.name,
            loss.replace("[", r"\["),
            f"{r.figures.perplexity:.2f}",
            f"{r.figures.bigram_entropy:.3f}",
            f"{r.written.per_second:.1f}",
            f"{r.written.reference_per_second:.1f}",
            f"{r.written.dlcore_share:.0%}",
        )
    return shown


def _save(options: Options, results: list[Result], chain: MarkovChain, seconds: float) -> None:
    entropy = float(torch.special.entr(chain.ngram(2).double()).sum())
    own = perplexity(chain, options.length)
    picture.save(options.out / "systems.png", results, own, entropy)
    facts = {
        "versions": {
            "dlcore": dlcore.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "capability": dlcore._C.capability(),
        "options": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
        },
        "seconds": seconds,
        "truth": {"perplexity": own, "bigram_entropy": entropy},
        "systems": [_row(r, chain) for r in results],
    }
    (options.out / "systems.json").write_text(json.dumps(facts, indent=1) + "\n")


def _row(r: Result, chain: MarkovChain) -> dict[str, object]:
    system, written = find(r.name), r.written
    return {
        "name": r.name,
        "title": system.title,
        "paper": system.paper,
        "training_steps": r.steps,
        "training_seconds": r.seconds,
        "loss": r.loss,
        "loss_is_bound": system.bound,
        **asdict(r.figures),
        "network_calls": r.calls,
        "samples_per_second": written.per_second,
        "reference_samples_per_second": written.reference_per_second,
        "dlcore_share": written.dlcore_share,
        "text": chain.decode(written.tokens[0]),
    }


if __name__ == "__main__":
    run(_all)
