"""The demo from end to end."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule

from dlcore import rng
from dlcore.demo import blocks, measures, picture, report, text, timing
from dlcore.demo.flows import FLOWS, FlowNetwork
from dlcore.demo.options import Options, check_memory, from_namespace, prepare_folder
from dlcore.demo.progress import HIDDEN, Progress, Stopwatch, reporting, say
from dlcore.demo.samplers import SAMPLERS, Network, Sampler
from dlcore.testing.markov import MarkovChain


@dataclass(frozen=True)
class Chapter:
    """Samplers, the network that they call, and the files that tell of them."""

    title: str
    samplers: Mapping[str, Sampler]
    network: Callable[[MarkovChain], Network]
    picture: str
    numbers: str


CHAPTERS = {
    1: Chapter(
        "Chapter 1: samplers on a language whose exact posteriors are known",
        SAMPLERS,
        Network,
        "perplexity-entropy.png",
        "results.json",
    ),
    3: Chapter(
        "Chapter 3: flows over bits, spheres and embeddings, with the same exact posteriors",
        FLOWS,
        FlowNetwork,
        "continuous.png",
        "continuous.json",
    ),
}


def main(parsed: argparse.Namespace) -> int:
    """Run the demo as asked. Raises UserError for bad options and files."""
    options = from_namespace(parsed, {number: tuple(c.samplers) for number, c in CHAPTERS.items()})
    prepare_folder(options.out)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    watch = Stopwatch()
    corpus, alphabet = text.load(options.text)
    if set(options.chapters) & set(CHAPTERS):
        check_memory(options, len(alphabet))
    if 2 in options.chapters:
        blocks.check_text(corpus)
    for number in options.chapters:
        if number == 2:
            _title(console, "Chapter 2: a block-diffusion transformer with a KV cache")
            blocks.chapter(console, options, corpus, alphabet)
        elif set(options.samplers) & set(CHAPTERS[number].samplers):
            _title(console, CHAPTERS[number].title)
            _samplers(console, options, number, corpus, alphabet, watch)
        watch = Stopwatch()
    return 0


def _title(console: Console, line: str) -> None:
    console.print(Rule(line, align="left"))


def _samplers(
    console: Console, options: Options, number: int, corpus: str, alphabet: str, watch: Stopwatch
) -> None:
    """The first chapter or the third."""
    chapter = CHAPTERS[number]
    chain = MarkovChain.fit(corpus, options.order, alphabet=alphabet)
    facts = report.chain_facts(chain, len(corpus))
    _print_chain(console, facts)
    fitted = watch.seconds()
    with _single_thread():
        truth = measures.truth(chain, options.batch, options.length, options.seed)
        results = generate(console, options, chapter, chain)
    generated = watch.seconds()
    report.print_results(console, chapter.samplers, results, truth)
    report.print_texts(console, chapter.samplers, results, _true_text(chain, options))
    picture.save(options.out / chapter.picture, chapter.samplers, results, truth)
    reported = watch.seconds()
    measured = _step_times(console) if options.timing and number == 1 else []
    seconds = {
        "fit": fitted,
        "samplers": generated - fitted,
        "report": reported - generated,
        "timing": watch.seconds() - reported,
        "total": watch.seconds(),
    }
    numbers = options.out / chapter.numbers
    report.save_json(numbers, options, facts, truth, chapter.samplers, results, measured, seconds)
    say(console, f"Picture: {options.out / chapter.picture}")
    say(console, f"Numbers: {numbers}")
    say(console, "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def generate(
    console: Console, options: Options, chapter: Chapter, chain: MarkovChain
) -> list[measures.Result]:
    """Every sampler at every step count; keys depend on sampler and steps alone, not on the selection."""
    fast = chain.to(torch.float32)
    chosen = [name for name in options.samplers if name in chapter.samplers]
    with reporting(console, len(chosen) * len(options.steps)) as progress:
        return [
            _generate_one(progress, options, chapter, chain, fast, name, steps)
            for name in chosen
            for steps in options.steps
        ]


def _generate_one(
    progress: Progress,
    options: Options,
    chapter: Chapter,
    chain: MarkovChain,
    fast: MarkovChain,
    name: str,
    steps: int,
) -> measures.Result:
    key = rng.fold_in(rng.fold_in(rng.key(options.seed), list(chapter.samplers).index(name)), steps)
    network, sampler, watch = chapter.network(fast), chapter.samplers[name], Stopwatch()
    progress.start(sampler.label, steps)
    z = torch.empty(0)
    for z in sampler.sample(network, (options.batch, options.length), steps, key):
        progress.show(network.calls, chain.decode(z[0], placeholder=HIDDEN))
    figures = measures.measure(z, chain)
    result = measures.Result(name, steps, watch.seconds(), figures, chain.decode(z[0]))
    progress.finish(
        f"perplexity {figures.perplexity:.2f}, bigram entropy {figures.bigram_entropy:.3f}, "
        f"KL {figures.bigram_kl:.3f}, {result.seconds:.1f} s"
    )
    return result


def _print_chain(console: Console, facts: dict[str, Any]) -> None:
    say(
        console,
        f"A chain of order {facts['order']} over {len(facts['alphabet'])} letters, fitted to "
        f"{facts['characters']:,} characters: {facts['entropy_rate']:.3f} nats per character, "
        f"perplexity {facts['perplexity']:.2f}.\n"
        "Its exact posteriors stand in for the network, so every error below is a sampler's own.\n",
    )


def _true_text(chain: MarkovChain, options: Options) -> str:
    generator = torch.Generator().manual_seed(options.seed)
    return chain.decode(chain.sample(1, options.length, generator=generator)[0])


def _step_times(console: Console) -> list[timing.Measurement]:
    """Measure in a child, telling of each; a child that dies leaves what it had measured."""
    measured: list[timing.Measurement] = []
    try:
        for m in timing.measure_apart():
            measured.append(m)
            took = m.note if m.seconds is None else f"{m.seconds * 1e3:.1f} ms"
            say(console, f"timing {m.op} {m.shape} {m.provider}: {took}")
    except (RuntimeError, OSError) as error:
        say(console, f"timing stopped: {error}")
    if measured:
        report.print_timing(console, measured)
    return measured


@contextmanager
def _single_thread() -> Iterator[None]:
    """The chain's matrices are so small that threads cost more than they give, most so when busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
