"""The demo's third chapter: continuous samplers with exact posteriors end at the chain's law."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from dlcore import __main__ as cli
from dlcore import bits, rng
from dlcore.demo import flows, measures
from dlcore.demo.flows import FLOWS, FlowNetwork
from dlcore.demo.progress import HIDDEN
from dlcore.demo.samplers import SAMPLERS
from dlcore.testing.emissions import bit_logits, gaussian_emission
from dlcore.testing.markov import MarkovChain

TALE = (
    "the cat sat on the mat and the rat sat on the hat. a cat that sat on a rat had the rat on the mat. "
    "then the hat ran, and the cat and the rat ran at the hat. "
) * 10
TINY = ["--chapter", "3", "--length", "24", "--batch", "8", "--steps", "4,2"]


@pytest.fixture
def tale(tmp_path: Path) -> Path:
    file = tmp_path / "tale.txt"
    file.write_text(TALE, "utf-8")
    return file


@pytest.fixture(scope="module")
def chain() -> MarkovChain:
    return MarkovChain.fit(TALE, 2)


def test_chapter_writes_picture_and_numbers(
    tale: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["demo", *TINY, "--text", str(tale), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Chapter 3" in printed
    assert "Chapter 1" not in printed
    assert all(sampler.label in printed for sampler in FLOWS.values())
    assert sorted(path.name for path in out.iterdir()) == ["continuous.json", "continuous.png"]
    assert (out / "continuous.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((out / "continuous.json").read_text("utf-8"))
    assert [(r["sampler"], r["steps"]) for r in saved["results"]] == [(n, s) for n in FLOWS for s in (2, 4)]
    assert saved["timing"] == []
    assert [r["exact"] for r in saved["results"][-2:]] == [False, False]
    for r in saved["results"]:
        assert len(r["text"]) == 24
        assert HIDDEN not in r["text"]
        assert 1 < r["figures"]["perplexity"] < math.inf


def test_samplers_of_two_chapters_and_none_of_another(
    tale: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picked = tmp_path / "out", ["--samplers", "elf,vmf"]
    assert cli.main(["demo", *TINY, *picked, "--text", str(tale), "--out", str(out)]) == 0
    saved = json.loads((out / "continuous.json").read_text("utf-8"))["results"]
    assert [r["sampler"] for r in saved] == ["elf", "elf", "vmf", "vmf"]
    capsys.readouterr()
    assert cli.main(["demo", *TINY, "--samplers", "loo", "--text", str(tale), "--out", str(out)]) == 2
    assert "--samplers: unknown 'loo'; known are bits, bits-churn, blind" in capsys.readouterr().err


def test_names_are_told_apart() -> None:
    assert not set(SAMPLERS) & set(FLOWS)


@pytest.mark.slow
def test_chapter_is_reproducible_and_independent_of_the_selection(tale: Path, tmp_path: Path) -> None:
    def run(name: str, *options: str) -> dict[str, list[object]]:
        arguments = ["demo", *TINY, "--text", str(tale), "--out", str(tmp_path / name), *options]
        assert cli.main(arguments) == 0
        saved = json.loads((tmp_path / name / "continuous.json").read_text("utf-8"))["results"]
        return {r["sampler"]: [r["text"], r["figures"]] for r in saved}

    two = run("two", "--samplers", "vmf,bits-churn")
    assert run("one", "--samplers", "bits-churn")["bits-churn"] == two["bits-churn"]
    assert run("other", "--samplers", "vmf", "--seed", "1")["vmf"] != two["vmf"]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("name", FLOWS)
def test_sampler_ends_clean_after_its_network_calls(name: str, steps: int, chain: MarkovChain) -> None:
    network = FlowNetwork(chain.to(torch.float32))
    states = list(FLOWS[name].sample(network, (3, 11), steps, rng.key(1)))
    assert network.calls == len(states) == steps
    assert states[-1].shape == (3, 11)
    assert int(states[-1].min()) >= 0
    assert all(int(z.min()) >= -1 and int(z.max()) < chain.vocab_size for z in states)
    # A run starts undecided.
    if steps == 7:
        assert int((states[0] == -1).sum()) > 16


def test_residual_is_what_the_matched_filter_lacks(chain: MarkovChain) -> None:
    network = FlowNetwork(chain)
    x = bits.corrupt(torch.zeros(2, 5 * network.width, dtype=torch.float64), 0.7, key=rng.key(3))
    log_probs = chain.posterior(gaussian_emission(x.unflatten(-1, (5, -1)), network.codes, 0.7)).denoiser
    probs = bits.posterior(x, 0.7, network.residual(x, 0.7))
    torch.testing.assert_close(probs, (log_probs.exp() @ network.codes.double()).flatten(-2))
    torch.testing.assert_close(probs, bit_logits(log_probs, network.codes).sigmoid().flatten(-2))


def test_residual_of_fair_bits_is_zero() -> None:
    network = FlowNetwork(MarkovChain(torch.full((8, 8), 1 / 8, dtype=torch.float64)))
    x = bits.corrupt(torch.zeros(2, 12, dtype=torch.float64), 0.7, key=rng.key(3))
    assert float(network.residual(x, 0.7).abs().max()) < 1e-12


def test_entropy_schedule_is_dense_where_bits_are_decided(chain: MarkovChain) -> None:
    schedule = flows.entropy_schedule(chain)
    assert 0.3 < float(schedule.quantile(0.5)) < 3
    assert schedule is flows.entropy_schedule(chain)


#: Perplexity of the tale's chain at this length; finite steps leave every sampler within this share of it.
STEPS, BIAS = 96, 0.015


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FLOWS if "blind" not in name])
def test_exact_samplers_reach_the_entropy_rate(name: str, chain: MarkovChain) -> None:
    """The error falls with the steps, down to what the sample size hides; the official SDE's grows."""
    truth, entropy = math.exp(chain.entropy(48) / 48), float(torch.special.entr(chain.ngram(2)).sum())
    found = {}
    for steps in (6, STEPS):
        network = FlowNetwork(chain.to(torch.float32))
        (*_, tokens) = FLOWS[name].sample(network, (256, 48), steps, rng.key(2))
        found[steps] = measures.measure(tokens, chain)
    figures = found[STEPS]
    if name == "elf-official":
        assert figures.perplexity < truth - 8 * figures.perplexity_error
        return
    assert figures.perplexity == pytest.approx(truth, abs=BIAS * truth + 4 * figures.perplexity_error)
    assert figures.bigram_entropy == pytest.approx(entropy, abs=0.1)
    assert found[6].perplexity > figures.perplexity + 4 * figures.perplexity_error


@pytest.mark.slow
def test_churn_repairs_what_a_network_decided_wrongly(chain: MarkovChain) -> None:
    """CoBit's effect: with a network that errs at high noise churn takes off most of what it costs."""
    truth = math.exp(chain.entropy(48) / 48)
    flow, churned = (
        measures.measure(
            list(FLOWS[name].sample(FlowNetwork(chain.to(torch.float32)), (256, 48), STEPS, rng.key(2)))[-1],
            chain,
        )
        for name in ("blind", "blind-churn")
    )
    assert churned.perplexity - truth < 0.7 * (flow.perplexity - truth)


BAD = [
    (["--chapter", "4"], "--chapter: must be one of all, 1, 2, 3, got '4'"),
    (["--chapter", "3", "--seconds", "5"], "--seconds: only chapter 2 has it, which --chapter leaves out"),
    (["--chapter", "3", "--no-timing"], "--no-timing: only chapter 1 has it"),
    (["--chapter", "3", "--samplers", "bits,nonsense"], "unknown 'nonsense'; known are bits, bits-churn"),
    (["--chapter", "1", "--samplers", "bits"], "unknown 'bits'; known are masked"),
    (["--samplers", "nonsense"], "known are masked, confidence"),
    (["--chapter", "3", "--steps", "0"], "--steps: must be positive whole numbers"),
    (["--chapter", "3", "--text", "{tmp}/absent.txt"], "absent.txt: No such file"),
    (["--chapter", "3", "--order", "3", "--batch", "100000"], "GiB"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_options_get_one_line_before_any_work(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *(part.format(tmp=tmp_path) for part in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
