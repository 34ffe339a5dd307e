"""The command line: every sampler runs, files and figures are right, bad options get one clear line."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

import dlcore
from dlcore import __main__ as cli
from dlcore import _dispatch, rng
from dlcore.demo import measures, picture, text, timing
from dlcore.demo.measures import Figures, Result, Truth
from dlcore.demo.progress import HIDDEN, reporting
from dlcore.demo.samplers import SAMPLERS, Network, absorbing_emission
from dlcore.testing.markov import MarkovChain

TALE = (
    "the cat sat on the mat and the rat sat on the hat. a cat that sat on a rat had the rat on the mat. "
    "then the hat ran, and the cat and the rat ran at the hat. "
) * 10
TINY = ["--chapter", "1", "--length", "24", "--batch", "8", "--steps", "4,2", "--no-timing"]


@pytest.fixture
def tale(tmp_path: Path) -> Path:
    file = tmp_path / "tale.txt"
    file.write_text(TALE, "utf-8")
    return file


@pytest.fixture(scope="module")
def chain() -> MarkovChain:
    return MarkovChain.fit(TALE, 2)


def test_demo_writes_picture_and_numbers(
    tale: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    assert cli.main(["demo", *TINY, "--text", str(tale), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert all(sampler.label in printed for sampler in SAMPLERS.values())
    assert (out / "perplexity-entropy.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "results.json").read_text("utf-8"))
    assert [(r["sampler"], r["steps"]) for r in saved["results"]] == [
        (n, s) for n in SAMPLERS for s in (2, 4)
    ]
    assert saved["versions"]["dlcore"] == dlcore.__version__
    assert saved["options"]["steps"] == [2, 4]
    assert saved["timing"] == []
    letters = len(saved["chain"]["alphabet"])
    for r in saved["results"]:
        assert len(r["text"]) == 24
        assert HIDDEN not in r["text"]
        figures = r["figures"]
        assert 1 < figures["perplexity"] < math.inf
        assert 0 < figures["bigram_entropy"] <= 2 * math.log(letters)
        assert figures["bigram_kl"] > 0


def test_demo_is_reproducible_and_independent_of_the_selection(tale: Path, tmp_path: Path) -> None:
    def run(name: str, *options: str) -> dict[str, list[object]]:
        arguments = ["demo", *TINY, "--text", str(tale), "--out", str(tmp_path / name), *options]
        assert cli.main(arguments) == 0
        saved = json.loads((tmp_path / name / "results.json").read_text("utf-8"))["results"]
        return {r["sampler"]: [r["text"], r["figures"]] for r in saved}

    two = run("two", "--samplers", "psi,loo")
    assert list(two) == ["psi", "loo"]
    assert run("one", "--samplers", "loo")["loo"] == two["loo"]
    assert run("other", "--samplers", "loo", "--seed", "1")["loo"] != two["loo"]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_sampler_ends_clean_after_its_network_calls(name: str, steps: int, chain: MarkovChain) -> None:
    network = Network(chain.to(torch.float32))
    states = list(SAMPLERS[name].sample(network, (3, 11), steps, rng.key(1)))
    assert network.calls == len(states) == steps
    assert states[-1].shape == (3, 11)
    assert int(states[-1].min()) >= 0
    assert int(states[-1].max()) < chain.vocab_size


def test_absorbing_emission_is_the_law_of_z_and_u() -> None:
    """Against q(z, u | x) enumerated: V (1/V) [α·1[z = x] + (1-α)·1[z = u]]."""
    vocab, alpha = 3, 0.3
    z, u, x = torch.meshgrid(*[torch.arange(vocab)] * 3, indexing="ij")
    law = alpha * (z == x) + (1 - alpha) * (z == u)
    emission = absorbing_emission(z[..., 0], u[..., 0], alpha, vocab).exp()
    # Equal up to a constant per (z, u).
    torch.testing.assert_close(emission / emission.sum(-1, keepdim=True), law / law.sum(-1, keepdim=True))


@pytest.mark.slow
def test_default_text_is_prose_and_stable() -> None:
    raw, alphabet = text.load(None)
    assert len(raw) > 100_000
    assert len(alphabet) == text.LETTERS
    assert {"e", "t", " "} < set(alphabet)
    assert set(raw) <= set(alphabet)
    assert " of the " in raw
    assert text.load(None) == (raw, alphabet)


def test_alphabet_takes_the_commonest_of_any_script() -> None:
    assert text.commonest("ββα ααα γ", 3) == " αβ"


def test_truth_measures_its_own_samples(chain: MarkovChain) -> None:
    truth = measures.truth(chain, batch=200, length=24, seed=0)
    assert truth.perplexity == pytest.approx(math.exp(chain.entropy(24) / 24))
    # Four standard errors of the mean of 16 batches.
    assert truth.same_size.perplexity == pytest.approx(truth.perplexity, abs=truth.spread.perplexity)
    assert truth.same_size.bigram_entropy == pytest.approx(truth.bigram_entropy, abs=0.05)


def test_single_sequence_has_no_standard_error(chain: MarkovChain) -> None:
    assert math.isnan(measures.measure(chain.sample(1, 24), chain).perplexity_error)


def test_live_progress_shows_text_and_a_pipe_gets_plain_lines() -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=80, color_system="standard")
        with reporting(console, 1) as progress:
            progress.start("a sampler", 2)
            progress.show(1, f"ab{HIDDEN}")
            progress.show(2, "abc")
            progress.finish("perplexity 3")
        assert "perplexity 3" in stream.getvalue()
        assert ("\x1b" in stream.getvalue()) == terminal


BAD = [
    (["demo", "--samplers", "loo,nonsense"], "unknown 'nonsense'; known are masked, confidence"),
    (["demo", "--samplers", ""], "unknown ''"),
    (["demo", "--steps", "8,0"], "--steps: must be positive whole numbers with commas between, got '8,0'"),
    (["demo", "--steps", "1.5"], "--steps"),
    (["demo", "--steps", ""], "--steps"),
    (["demo", "--length", "1"], "--length: must be a whole number of at least 2, got '1'"),
    (["demo", "--batch", "none"], "--batch: must be a whole number of at least 1, got 'none'"),
    (["demo", "--order", "4"], "--order: must be a whole number from 1 to 3, got '4'"),
    (["demo", "--seed", "-1"], "--seed"),
    (["demo", "--text", "{tmp}/absent.txt"], "absent.txt: No such file"),
    (["demo", "--text", "{tmp}"], "Is a directory"),
    (["demo", "--text", "{tmp}/empty.txt"], "needs at least 1000 usable characters"),
    (["demo", "--text", "{tmp}/short.txt"], "got 8 and"),
    (["demo", "--text", "{tmp}/constant.txt"], "at least 2 of them different; got 2000 and 1"),
    (["demo", "--text", "{tmp}/binary.txt"], "binary.txt: not UTF-8 text"),
    (["demo", "--out", "{tmp}/short.txt"], "--out {tmp}/short.txt: File exists"),
    (["demo", "--out", "{tmp}/short.txt/below"], "Not a directory"),
    (["demo", "--text", "{tmp}/long.txt", "--order", "3", "--batch", "100000"], "GiB"),
    (["demo", "--nonsense"], "--nonsense"),
    (["info", "--nonsense"], "--nonsense"),
    (["nonsense"], "nonsense"),
    ([], "required"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_options_and_files_get_one_line_and_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "empty.txt": b"",
        "short.txt": b"too few.",
        "constant.txt": b"a" * 2000,
        "binary.txt": b"\xff\xfe\x00\x01" * 1000,
        "long.txt": TALE.encode(),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert cli.main([part.format(tmp=tmp_path) for part in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dlcore: error: ")
    assert message.format(tmp=tmp_path) in captured.err


@pytest.mark.parametrize(
    ("command", "modules", "hint"),
    [
        ("demo", ("rich", "matplotlib"), "needs rich and matplotlib: pip install 'dlcore[demo]'"),
        ("bench", ("pytest_benchmark",), "needs pytest and pytest-benchmark: pip install 'dlcore[test]'"),
    ],
)
def test_missing_extras_are_named(
    command: str,
    modules: tuple[str, ...],
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in modules else object())
    assert cli.main([command]) == 2
    assert hint in capsys.readouterr().err


def test_bench_without_a_source_tree(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "dlcore" / "__main__.py"))
    assert cli.main(["bench"]) == 2
    assert "bench needs a source tree" in capsys.readouterr().err


def test_info_lists_every_op_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    ops = _dispatch.ops()
    assert {line.split()[0] for line in printed.splitlines()[-len(ops) :]} == set(ops)
    assert all(word in printed for word in (dlcore.__version__, torch.__version__, *_dispatch.PRIORITY))


def test_info_gives_reasons(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(
        _dispatch._implementations["rng.normal"], "cpu", (lambda: None, lambda: ["no such CPU"])
    )
    assert cli.main(["info"]) == 0
    row = next(r for r in capsys.readouterr().out.splitlines() if r.startswith("rng.normal"))
    assert "no such CPU" in row


def test_info_needs_neither_rich_nor_matplotlib() -> None:
    program = (
        "import sys; sys.modules['rich'] = sys.modules['matplotlib'] = None\n"
        "from dlcore.__main__ import main; sys.exit(main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("op", timing.STEPS)
def test_timed_chains_agree_with_dlcore(op: str) -> None:
    """The peers compute the same law: mean probability of the outcome classes at one small shape."""
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 8).expand(1, 20_000, 8)
    z = torch.full((1, 20_000), 7 if op == "masked.step" else 3)
    ours, peer = (step(logits, z).flatten().bincount(minlength=8) / z.numel() for step in timing.STEPS[op])
    # Five standard errors of a difference of two shares of 20,000.
    assert float((ours - peer).abs().max()) < 5 * math.sqrt(2 * 0.25 / z.numel())


def test_timing_says_why_torch_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> object:
        def call(*args: object) -> None:
            raise RuntimeError(
                "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')"
            )

        return call

    monkeypatch.setattr(torch, "compile", broken)
    found = list(timing.measurements(((1, 2, 500),)))
    assert [(m.op, m.provider) for m in found] == [(op, p) for op in timing.STEPS for p in timing.PROVIDERS]
    for m in found:
        assert (m.seconds is None) == (m.provider == "compile")
        assert m.note == ("no working C++ compiler" if m.provider == "compile" else "")


def test_labels_of_the_picture_lie_on_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crowded on purpose: no label on another one, on a sampler's line, or outside of its axes."""
    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k))[1])
    figures = Figures(6.0, 0.1, 5.25, 0.0)
    truth = Truth(6.0, 5.28, figures, Figures(0.1, 0.1, 0.03, 0.0))
    results = [
        Result(
            name, steps, 1.0, Figures(6 + 30 * (i + 1) / steps**1.5, 0.1, 5.2 + (i + 2) / steps**1.2, 0.0), ""
        )
        for i, name in enumerate(SAMPLERS)
        for steps in (8, 32, 128)
    ]
    picture.save(tmp_path / "picture.png", SAMPLERS, results, truth)
    (figure,) = drawn
    assert sum(len(axes.texts) for axes in figure.axes) >= 8
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.texts]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(axes.bbox.x0 <= b.x0 and b.x1 <= axes.bbox.x1 and axes.bbox.y0 <= b.y0 for b in boxes)
        points = axes.transData.transform([(r.figures.bigram_entropy, r.figures.perplexity) for r in results])
        lines = points.reshape(len(SAMPLERS), 3, 2)
        shares = torch.linspace(0, 1, 200).numpy()[:, None, None]
        along = ((1 - shares) * lines[:, None, :-1] + shares * lines[:, None, 1:]).reshape(-1, 2)
        assert not any(b.x0 + 2 < x < b.x1 - 2 and b.y0 + 2 < y < b.y1 - 2 for b in boxes for x, y in along)
