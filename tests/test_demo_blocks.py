"""The demo's second chapter: one training pass is many sampling passes, and the cache changes no token."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dlcore import __main__ as cli
from dlcore import rng
from dlcore.demo import blocks
from dlcore.demo.block_transformer import BlockTransformer, generate, nelbo, train
from dlcore.process import masked

TALE = (
    "the cat sat on the mat and the rat sat on the hat. a cat that sat on a rat had the rat on the mat. " * 16
)
LETTERS = sorted(set(TALE))
TOKENS = torch.tensor([LETTERS.index(letter) for letter in TALE])
TINY = blocks.Sizes(
    length=32,
    block_size=8,
    layers=2,
    width=64,
    batch=4,
    windows=4,
    draws=1,
    notes=2,
    sequences=2,
    steps=4,
)


@pytest.fixture(autouse=True)
def _single_thread() -> Iterator[None]:
    """Matrices this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model(dtype: torch.dtype = torch.float32) -> BlockTransformer:
    """Untrained, with a head that tells tokens apart."""
    torch.manual_seed(0)
    model = BlockTransformer(len(LETTERS), length=32, block_size=8, layers=2, width=64)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.to(dtype)


def noisy_and_clean() -> tuple[Tensor, Tensor]:
    x = torch.stack((TOKENS[:32], TOKENS[40:72]))
    return masked.corrupt(x, 0.4, len(LETTERS), key=rng.key(3)), x


def test_one_training_pass_is_a_sampling_pass_per_block() -> None:
    model = tiny_model(torch.float64)
    z, x = noisy_and_clean()
    for start, logits in zip(range(0, 32, 8), model(z, x).split(8, 1), strict=True):
        alone = model.recompute(torch.cat((x[:, :start], z[:, start : start + 8]), 1))
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-10)


def test_noisy_copies_share_the_clean_half() -> None:
    model = tiny_model(torch.float64)
    z, x = noisy_and_clean()
    other = masked.corrupt(x, 0.7, len(LETTERS), key=rng.key(4))
    together = model(torch.cat((z, other), 1), x)
    torch.testing.assert_close(together, torch.cat((model(z, x), model(other, x)), 1), rtol=0, atol=1e-10)


def test_decoding_commits_a_block_within_the_next_ones_pass() -> None:
    model = tiny_model(torch.float64)
    z, x = noisy_and_clean()
    cache = model.new_cache(2)
    before = x[:, :0]
    for start in range(0, 32, 8):
        block = z[:, start : start + 8]
        for _ in range(2):  # a block that is denoised again overwrites itself
            logits = model.decode(torch.cat((before, block), 1), cache, num_commit=before.shape[1])
        cache.commit(before.shape[1])
        expected = model.recompute(torch.cat((x[:, :start], block), 1))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        before = x[:, start : start + 8]


def test_cache_changes_no_token() -> None:
    model = tiny_model()
    runs = [
        list(generate(model, batch=3, blocks=4, steps=5, key=rng.key(7), cached=cached))
        for cached in (True, False)
    ]
    assert len(runs[0]) == 20
    for with_cache, without in zip(*runs, strict=True):
        torch.testing.assert_close(with_cache, without, rtol=0, atol=0)
    assert runs[0][-1].shape == (3, 32)
    assert int(runs[0][-1].max()) < len(LETTERS)
    other = list(generate(model, batch=3, blocks=4, steps=5, key=rng.key(8)))[-1]
    assert not torch.equal(other, runs[0][-1])


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = BlockTransformer(len(LETTERS), length=32, block_size=8, layers=2, width=64)
    windows = TOKENS[: 16 * 32].view(16, 32)

    def score() -> float:
        with torch.no_grad():
            return float(nelbo(model, windows, rng.key(9)).mean())

    before = score()
    steps = list(train(model, TOKENS, seconds=1e6, steps=60, batch=4, key=rng.key(1)))
    assert [now.step for now in steps] == list(range(1, 61))
    assert score() < 0.9 * before


def test_training_ends_with_its_seconds() -> None:
    steps = list(train(tiny_model(), TOKENS, seconds=1e-6, key=rng.key(1)))
    assert [now.step for now in steps] == [1]
    assert steps[0].seconds > 1e-6


def test_nelbo_of_the_uniform_law_is_log_v() -> None:
    model = tiny_model()
    torch.nn.init.zeros_(model.head.weight)
    _, x = noisy_and_clean()
    with torch.no_grad():
        values = torch.stack([nelbo(model, x, key).mean() for key in rng.split(rng.key(5), 100)])
    error = float(values.std()) / math.sqrt(len(values))
    assert float(values.mean()) == pytest.approx(math.log(len(LETTERS)), abs=5 * error)
    assert error < 0.1


@pytest.mark.parametrize("sizes", [{"length": 30}, {"width": 48}])
def test_sizes_that_do_not_divide(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"BlockTransformer: length must be a multiple of block_size"):
        BlockTransformer(10, **sizes)


@pytest.fixture
def tale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(blocks, "SIZES", TINY)
    file = tmp_path / "tale.txt"
    file.write_text(TALE, "utf-8")
    return file


def test_chapter_prints_and_saves_what_it_came_to(
    tale: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["demo", "--chapter", "2", "--seconds", "1", "--text", str(tale), "--out", str(out)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "Chapter 1" not in printed
    assert "tokens identical" in printed
    assert [path.name for path in out.iterdir()] == ["block-diffusion.json"]
    saved = json.loads((out / "block-diffusion.json").read_text("utf-8"))
    assert saved["options"]["seconds"] == 1
    assert saved["sizes"]["block_size"] == 8
    assert saved["training"]["steps"] >= 1
    assert saved["training"]["nelbo"] > 0
    assert list(saved["training"]["chains"]) == ["1", "2"]
    generation = saved["generation"]
    assert generation["differs_at"] is None
    assert len(generation["cached"]) == len(generation["recomputed"]) == 16
    assert len(generation["text"]) == 32
    assert generation["text"] in printed


def test_all_chapters_run_in_turn(tale: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = ["--samplers", "masked,elf", "--steps", "2", "--length", "16", "--batch", "4", "--no-timing"]
    files = ["--text", str(tale), "--out", str(tmp_path / "out")]
    assert cli.main(["demo", "--seconds", "1", *one, *files]) == 0
    printed = capsys.readouterr().out
    assert printed.index("Chapter 1") < printed.index("Chapter 2") < printed.index("Chapter 3")
    assert (tmp_path / "out" / "results.json").is_file()
    assert (tmp_path / "out" / "block-diffusion.json").is_file()
    assert (tmp_path / "out" / "continuous.json").is_file()


def test_a_difference_is_told(monkeypatch: pytest.MonkeyPatch, tale: Path, tmp_path: Path) -> None:
    def broken(model: BlockTransformer, *, cached: bool, **options: object) -> object:
        for z in generate(model, cached=cached, **options):  # type: ignore[arg-type]
            z[:, 5:6] = int(cached)
            yield z

    monkeypatch.setattr(blocks, "generate", broken)
    out = tmp_path / "out"
    assert cli.main(["demo", "--chapter", "2", "--seconds", "1", "--text", str(tale), "--out", str(out)]) == 0
    assert json.loads((out / "block-diffusion.json").read_text("utf-8"))["generation"]["differs_at"] == 5


BAD = [
    (["--chapter", "0"], "--chapter: must be one of all, 1, 2, 3, got '0'"),
    (["--chapter", ""], "--chapter"),
    (["--seconds", "0"], "--seconds: must be a whole number from 1 to 86400, got '0'"),
    (["--seconds", "a minute"], "--seconds"),
    (["--chapter", "1", "--seconds", "5"], "--seconds: only chapter 2 has it, which --chapter leaves out"),
    (["--chapter", "2", "--samplers", "loo"], "--samplers: only chapters 1 and 3 have it"),
    (["--chapter", "2", "--steps", "8"], "--steps: only chapters 1 and 3 have it"),
    (["--chapter", "2", "--length", "64"], "--length: only chapters 1 and 3"),
    (["--chapter", "2", "--batch", "8"], "--batch: only chapters 1 and 3"),
    (["--chapter", "2", "--no-timing"], "--no-timing: only chapter 1"),
    (
        ["--text", "{tmp}/short.txt"],
        "chapter 2 needs at least 2560 usable characters, got 1200: try --chapter 1",
    ),
    (["--chapter", "2", "--text", "{tmp}/absent.txt"], "absent.txt: No such file"),
    (["--chapter", "2", "--out", "{tmp}/short.txt"], "File exists"),
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
    (tmp_path / "short.txt").write_text("a short tale" * 100, "utf-8")
    assert cli.main(["demo", *(part.format(tmp=tmp_path) for part in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("dlcore: error: ")
    assert message in captured.err
