"""The demo from end to end."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.rule import Rule

from dlcore import rng
from dlcore.demo import blocks, measures, picture, report, text, timing
from dlcore.demo.options import Options, check_memory, from_namespace, prepare_folder
from dlcore.demo.progress import HIDDEN, Progress, Stopwatch, reporting, say
from dlcore.demo.samplers import SAMPLERS, Network
from dlcore.testing.markov import MarkovChain


def main(parsed: argparse.Namespace) -> int:
    """Run the demo as asked. Raises UserError for bad options and files."""
    options = from_namespace(parsed, tuple(SAMPLERS))
    prepare_folder(options.out)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    watch = Stopwatch()
    corpus, alphabet = text.load(options.text)
    if 1 in options.chapters:
        check_memory(options, len(alphabet))
    if 2 in options.chapters:
        blocks.check_text(corpus)
    if 1 in options.chapters:
        _title(console, "Chapter 1: samplers on a language whose exact posteriors are known")
        _samplers(console, options, corpus, alphabet, watch)
    if 2 in options.chapters:
        _title(console, "Chapter 2: a block-diffusion transformer with a KV cache")
        blocks.chapter(console, options, corpus, alphabet)
    return 0


def _title(console: Console, line: str) -> None:
    console.print(Rule(line, align="left"))


def _samplers(console: Console, options: Options, corpus: str, alphabet: str, watch: Stopwatch) -> None:
    """The first chapter."""
    chain = MarkovChain.fit(corpus, options.order, alphabet=alphabet)
    facts = report.chain_facts(chain, len(corpus))
    _print_chain(console, facts)
    fitted = watch.seconds()
    with _single_thread():
        truth = measures.truth(chain, options.batch, options.length, options.seed)
        results = generate(console, options, chain)
    generated = watch.seconds()
    report.print_results(console, results, truth)
    report.print_texts(console, results, _true_text(chain, options))
    picture.save(options.out / "perplexity-entropy.png", results, truth)
    reported = watch.seconds()
    measured = _step_times(console) if options.timing else []
    seconds = {
        "fit": fitted,
        "samplers": generated - fitted,
        "report": reported - generated,
        "timing": watch.seconds() - reported,
        "total": watch.seconds(),
    }
    report.save_json(options.out / "results.json", options, facts, truth, results, measured, seconds)
    say(console, f"Picture: {options.out / 'perplexity-entropy.png'}")
    say(console, f"Numbers: {options.out / 'results.json'}")
    say(console, "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def generate(console: Console, options: Options, chain: MarkovChain) -> list[measures.Result]:
    """Every sampler at every step count; keys depend on sampler and steps alone, not on the selection."""
    fast = chain.to(torch.float32)
    with reporting(console, len(options.samplers) * len(options.steps)) as progress:
        return [
            _generate_one(progress, options, chain, fast, name, steps)
            for name in options.samplers
            for steps in options.steps
        ]


def _generate_one(
    progress: Progress, options: Options, chain: MarkovChain, fast: MarkovChain, name: str, steps: int
) -> measures.Result:
    key = rng.fold_in(rng.fold_in(rng.key(options.seed), list(SAMPLERS).index(name)), steps)
    network, watch = Network(fast), Stopwatch()
    progress.start(SAMPLERS[name].label, steps)
    z = torch.empty(0)
    for z in SAMPLERS[name].sample(network, (options.batch, options.length), steps, key):
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
