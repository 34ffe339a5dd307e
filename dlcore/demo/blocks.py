"""The second chapter: a block-diffusion transformer, trained for a minute, writes with and without cache."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dlcore import rng
from dlcore.demo import report
from dlcore.demo.block_transformer import BlockTransformer, Trained, generate, nelbo, train
from dlcore.demo.options import Options, UserError
from dlcore.demo.progress import HIDDEN, Progress, Stopwatch, reporting, say
from dlcore.testing.markov import MarkovChain

#: The share of the text that training doesn't see.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Sizes:
    """Of the model, its training and what it writes."""

    length: int = 256
    block_size: int = 16
    layers: int = 4
    width: int = 128
    batch: int = 4
    """Windows per training step."""
    windows: int = 64
    """Of held-out text, scored after training at `draws` draws of noise each, and at one during it."""
    draws: int = 4
    notes: int = 6
    """How often the score during training is told."""
    sequences: int = 8
    """Written at once."""
    steps: int = 16
    """Per block."""


SIZES = Sizes()


@dataclass(frozen=True)
class Training:
    """What training came to. Scores in nats per character of held-out text, errors over windows."""

    parameters: int
    steps: int
    seconds: float
    nelbo: float
    nelbo_error: float
    chains: dict[int, float]
    """By order, the exact score of the same windows under a chain fitted to the training text."""


@dataclass(frozen=True)
class Generation:
    """Both ways to write the same text: seconds of every step, block after block."""

    cached: list[float]
    recomputed: list[float]
    differs_at: int | None
    """The first position where the tokens differ in any sequence; None: identical."""
    text: str


def check_text(corpus: str) -> None:
    """Raises UserError for a text whose held-out part is shorter than a window."""
    need = math.ceil(SIZES.length / HELD_OUT)
    if len(corpus) < need:
        raise UserError(
            f"chapter 2 needs at least {need} usable characters, got {len(corpus)}: try --chapter 1"
        )


def chapter(console: Console, options: Options, corpus: str, alphabet: str) -> None:
    """Train, score, write, and print and save what it came to."""
    sizes, watch, key = SIZES, Stopwatch(), rng.key(options.seed)
    train_key, score_key, write_key = rng.split(key, 3)
    cut = len(corpus) - int(len(corpus) * HELD_OUT)
    chains = {k: MarkovChain.fit(corpus[:cut], k, alphabet=alphabet) for k in range(1, options.order + 1)}
    chain = chains[options.order]
    tokens = chain.encode(corpus)
    windows = _spread(tokens[cut:], sizes.length, sizes.windows)
    torch.manual_seed(options.seed)
    model = BlockTransformer(
        len(alphabet),
        length=sizes.length,
        block_size=sizes.block_size,
        layers=sizes.layers,
        width=sizes.width,
    )
    _print_model(console, model, sizes)
    with reporting(console, 3) as progress:
        trained = _train(progress, options, sizes, model, tokens[:cut], windows, train_key)
        prepared = watch.seconds()
        score, error = _score(model, windows, score_key, sizes.draws)
        progress.note(f"held-out NELBO {score:.3f} ± {error:.3f} nats per character")
        generation = _write_twice(progress, sizes, model, chain, write_key)
    training = Training(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=trained.step,
        seconds=trained.seconds,
        nelbo=score,
        nelbo_error=error,
        chains={k: _chain_score(c, windows) for k, c in chains.items()},
    )
    print_results(console, sizes, training, generation)
    seconds = {"training": prepared, "rest": watch.seconds() - prepared, "total": watch.seconds()}
    path = options.out / "block-diffusion.json"
    save_json(path, options, sizes, training, generation, seconds)
    say(console, f"Numbers: {path}")
    say(console, "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def _spread(tokens: Tensor, length: int, count: int) -> Tensor:
    """At most `count` windows (n, length) of tokens (N,), apart and evenly spread."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


def _train(
    progress: Progress,
    options: Options,
    sizes: Sizes,
    model: BlockTransformer,
    tokens: Tensor,
    windows: Tensor,
    key: Tensor,
) -> Trained:
    recent: deque[float] = deque(maxlen=20)
    score_key, told, now = rng.fold_in(key, 1), 0, Trained(0, 0.0, math.nan)
    progress.start("training", options.seconds, "second")
    for now in train(model, tokens, seconds=options.seconds, key=key, batch=sizes.batch):
        recent.append(now.loss)
        line = f"{now.step} steps, loss {statistics.fmean(recent):.3f} nats per character"
        progress.show(min(int(now.seconds), options.seconds), line)
        if now.seconds * sizes.notes >= (told + 1) * options.seconds and now.seconds < options.seconds:
            told = int(now.seconds * sizes.notes / options.seconds)
            score, _ = _score(model, windows, score_key, 1)
            progress.note(f"{now.seconds:.0f} s: {line}, held-out NELBO {score:.3f}")
    progress.finish(f"{now.step} steps of {now.seconds / now.step * 1e3:.0f} ms")
    return now


@torch.no_grad()
def _score(model: BlockTransformer, windows: Tensor, key: Tensor, draws: int) -> tuple[float, float]:
    """The NELBO per character of windows (n, L) over `draws` of noise, and its standard error."""
    values = torch.stack([nelbo(model, windows, k).mean(-1) for k in rng.split(key, draws)]).mean(0)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


@torch.no_grad()
def _chain_score(chain: MarkovChain, windows: Tensor) -> float:
    return -float(chain.log_likelihood(windows).double().mean()) / windows.shape[1]


def _write_twice(
    progress: Progress, sizes: Sizes, model: BlockTransformer, chain: MarkovChain, key: Tensor
) -> Generation:
    """The same text with the cache and without."""
    cached, seconds = _write(progress, sizes, model, chain, key, cached=True)
    recomputed, seconds_recomputed = _write(progress, sizes, model, chain, key, cached=False)
    differs = (cached != recomputed).any(0).nonzero()
    return Generation(
        cached=seconds,
        recomputed=seconds_recomputed,
        differs_at=int(differs[0]) if len(differs) else None,
        text=chain.decode(cached[0]),
    )


def _write(
    progress: Progress, sizes: Sizes, model: BlockTransformer, chain: MarkovChain, key: Tensor, cached: bool
) -> tuple[Tensor, list[float]]:
    """Tokens (sequences, L) and the seconds of each step, what is shown left out."""
    blocks = sizes.length // sizes.block_size
    states = generate(model, batch=sizes.sequences, blocks=blocks, steps=sizes.steps, key=key, cached=cached)
    seconds: list[float] = []
    progress.start("writing with the cache" if cached else "writing without a cache", blocks * sizes.steps)
    z = torch.empty(0)
    for step in range(blocks * sizes.steps):
        watch = Stopwatch()
        z = next(states)
        seconds.append(watch.seconds())
        progress.show(step + 1, chain.decode(z[0], placeholder=HIDDEN))
    progress.finish(f"{sum(seconds):.2f} s")
    return z, seconds


def _print_model(console: Console, model: BlockTransformer, sizes: Sizes) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    say(
        console,
        f"{parameters:,} parameters, {sizes.layers} layers of width {sizes.width}; texts of {sizes.length} "
        f"characters in blocks of {sizes.block_size}.\n"
        "Trained in one pass over [x_t; x_0]; every block is then denoised given the blocks before it.\n",
    )


def print_results(console: Console, sizes: Sizes, training: Training, generation: Generation) -> None:
    """One table of training and writing, and a text."""
    table = Table(title="Block diffusion with a KV cache", title_justify="left", caption_justify="left")
    table.caption = (
        "The model's score is an upper bound, the chains' are exact, on the same held-out text. "
        f"Writing is {sizes.sequences} texts at once; without the cache every step computes all blocks anew. "
        "Times are medians over steps, in brackets over those of the last block."
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    for row in _training_rows(training):
        table.add_row(*row)
    table.add_section()
    for row in _generation_rows(sizes, generation):
        table.add_row(*row)
    console.print(table)
    console.print("\nWhat it writes", style="italic")
    console.print(Text(generation.text))
    console.print()


def _training_rows(training: Training) -> list[tuple[str, str]]:
    error = "" if math.isnan(training.nelbo_error) else f" ± {training.nelbo_error:.3f}"
    return [
        ("training", f"{training.steps} steps, {training.seconds:.1f} s"),
        ("a training step", f"{training.seconds / training.steps * 1e3:.0f} ms"),
        ("held-out NELBO, nats per character", f"{training.nelbo:.3f}{error}"),
        *((f"a chain of order {k} there", f"{score:.3f}") for k, score in training.chains.items()),
    ]


def _generation_rows(sizes: Sizes, generation: Generation) -> list[tuple[str, str]]:
    (cached, cached_last), (anew, anew_last) = (
        (statistics.median(seconds), statistics.median(seconds[-sizes.steps :]))
        for seconds in (generation.cached, generation.recomputed)
    )
    differs = generation.differs_at
    return [
        ("a writing step with the cache", f"{cached * 1e3:.1f} ms ({cached_last * 1e3:.1f} ms)"),
        ("a writing step without", f"{anew * 1e3:.1f} ms ({anew_last * 1e3:.1f} ms)"),
        ("times longer without", f"{anew / cached:.1f} ({anew_last / cached_last:.1f})"),
        (f"a block of {sizes.steps} steps, with and without", _blocks(sizes, generation)),
        ("tokens identical", "yes" if differs is None else f"no, from position {differs} on"),
    ]


def _blocks(sizes: Sizes, generation: Generation) -> str:
    """Mean seconds per block, both ways."""
    count = len(generation.cached) // sizes.steps
    return " and ".join(f"{sum(s) / count * 1e3:.0f} ms" for s in (generation.cached, generation.recomputed))


def save_json(
    path: Path,
    options: Options,
    sizes: Sizes,
    training: Training,
    generation: Generation,
    seconds: dict[str, float],
) -> None:
    """Every number, with what made it."""
    content = {
        **report.origin(options),
        "sizes": asdict(sizes),
        "training": asdict(training),
        "generation": asdict(generation),
        "seconds": seconds,
    }
    report.write_json(path, content)
