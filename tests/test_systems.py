"""Every system learns, writes, goes on after a kill, and trains on what it is said to train on."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from small_systems import DATA, LENGTH, build, shrink
from torch import Tensor, nn

from bench.systems import (
    bitstream,
    block_diffusion,
    catalogue,
    checkpoint,
    command,
    digits,
    guidance,
    idlm,
    molecules,
    network,
    sdtt,
    sequences,
    smiles,
    training,
)
from bench.systems.checkpoint import Reached
from bench.systems.lomdm import _exponent
from bench.systems.system import System, levels
from dlcore import LinearLogits, rng
from dlcore.demo.options import UserError

TRAINED = [name for name in catalogue.NAMES if catalogue.find(name).trains()]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def losses(system: System, steps: int, path: Path | None = None, stop: int | None = None) -> list[float]:
    """Of a training of `steps`, which leaves after `stop` of them; every step is saved if there is a path."""
    found = []
    for now in training.train(
        system, DATA, seconds=math.inf, steps=steps, key=rng.key(3), path=path, save_every=0.0
    ):
        found.append(now.loss)
        if now.step == stop:
            break
    return found


@torch.no_grad()
def held_out(system: System, draws: int = 32) -> Tensor:
    """Losses of the same windows and the same noise whenever it is called."""
    keys = rng.split(rng.key(4), (draws, 2))
    system.eval()
    found = [system.loss(training.windows(DATA.held_out, LENGTH, 8, k[0]), k[1], 1.0) for k in keys]
    system.train()
    return torch.stack(found)


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_falls(name: str) -> None:
    system = build(name)
    if isinstance(system, bitstream.Bitstream):
        # Its noise levels follow its errors to where they are largest, and its losses with them.
        system._remember = lambda sigma, error: None
    if isinstance(system, (sdtt.SDTT, idlm.IDLM)):
        # A student that has all to learn, of a teacher that knows something.
        teacher = build("mdlm")
        losses(teacher, 60)
        system.frozen.load_state_dict(teacher.network.state_dict())
    before = held_out(system)
    assert all(map(math.isfinite, losses(system, 60)))
    gain = before - held_out(system)
    assert float(gain.mean()) > 4 * float(gain.std()) / math.sqrt(len(gain))


@pytest.mark.parametrize("name", catalogue.NAMES)
@torch.no_grad()
def test_tokens_follow_from_the_key(name: str) -> None:
    system = build(name).eval()
    for weight in system.network.parameters():
        # Heads start at zero, and then all noise is read as the first token.
        weight.add_(0.5 * torch.randn(weight.shape))
    tokens = system.generate(3, 6, rng.key(1))
    assert tokens.shape == (3, LENGTH)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, system.generate(3, 6, rng.key(1)))
    assert not torch.equal(tokens, system.generate(3, 6, rng.key(2)))
    for steps in (1, 2, 6):
        tokens = system.generate(3, steps, rng.key(1))
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < DATA.vocab_size


@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_training_goes_on_as_if_it_had_not(name: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    stopped, whole = build(name), build(name)
    expected = losses(whole, 6)
    found = losses(stopped, 6, path, stop=3)
    resumed = build(name)
    found += losses(resumed, 6, path)
    assert found == expected
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in resumed.state_dict().items())
    assert losses(build(name), 6, path) == []


def _garbage(path: Path) -> None:
    path.write_bytes(b"no checkpoint")


def _torn(path: Path) -> None:
    losses(build("mdlm"), 1, path)
    path.write_bytes(path.read_bytes()[:-9])


def _other_system(path: Path) -> None:
    losses(build("remdm"), 1, path)


def _other_length(path: Path) -> None:
    losses(build("mdlm", length=LENGTH + 1), 1, path)


def _other_text(path: Path) -> None:
    system = build("mdlm")
    checkpoint.save(path, system, torch.optim.AdamW(system.parameters()), Reached(1, 1.0), "another")


def _other_size(path: Path) -> None:
    network.LAYERS = 2
    losses(build("mdlm"), 1, path)
    network.LAYERS = 1


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (_garbage, "no checkpoint"),
    (_torn, "no checkpoint"),
    (_other_system, "system remdm instead of system mdlm"),
    (_other_length, "length 17 instead of length 16"),
    (_other_text, "text another instead of text"),
    (_other_size, "does not fit"),
]


@pytest.mark.parametrize(("leave", "message"), WRONG, ids=[leave.__name__ for leave, _ in WRONG])
def test_a_wrong_checkpoint_is_refused(leave: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    leave(path)
    with pytest.raises(UserError, match=message):
        losses(build("mdlm"), 6, path)


def test_levels_stay_inside_after_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    for end in (0.0, 1 - 2**-53):
        jitter = torch.full((16,), end, dtype=torch.float64)
        monkeypatch.setattr(rng, "uniform", lambda key, shape, jitter=jitter: jitter)
        found = levels(16, rng.key(0))
        assert 0 < float(found.min()) < float(found.max()) < 1


def test_a_learned_order_warps_no_time() -> None:
    made = catalogue.find("lomdm")(20, 16)
    for parameter in made.forward_order.parameters():
        nn.init.normal_(parameter)
    exponents = _exponent(made.forward_order(torch.arange(32).view(2, 16) % 20)).detach().log()
    assert bool((exponents.std(-1) > 0.3).all())
    assert bool((exponents.mean(-1).abs() < 1e-6).all())


def test_the_schedule_of_bits_follows_the_errors() -> None:
    """Where nothing is left to learn there is nothing to draw, and evaluation remembers nothing."""
    system = build("bitstream")
    assert isinstance(system, bitstream.Bitstream)
    before = system.schedule().quantile(0.5)
    system.errors[system.middles > 0.5] *= 1e-3
    assert system.schedule().quantile(0.5) < before
    kept = system.errors.clone()
    system.eval().loss(DATA.tokens[:LENGTH].view(1, -1), rng.key(0), 1.0)
    assert torch.equal(system.errors, kept)
    system.train().loss(DATA.tokens[:LENGTH].view(1, -1), rng.key(0), 1.0)
    assert not torch.equal(system.errors, kept)


class Watched(nn.Module):
    """A network that keeps what it gave, disturbed where z shows a token if there is noise."""

    def __init__(self, inner: nn.Module, mask_id: int, noise: float = 0.0) -> None:
        super().__init__()
        self.inner, self.mask_id, self.noise = inner, mask_id, noise

    def forward(self, z: Tensor) -> LinearLogits:
        logits = self.inner(z)
        self.shown = z != self.mask_id
        self.hidden = logits.hidden + self.noise * self.shown.unsqueeze(-1) * torch.randn_like(logits.hidden)
        if self.hidden.requires_grad:
            self.hidden.retain_grad()
        return LinearLogits(self.hidden, logits.weight)


def test_what_a_student_thinks_of_tokens_that_it_sees_is_nowhere_in_idlms_loss() -> None:
    """A token that z' shows is itself, in the student's loss and in the fake's."""
    system = build("idlm")
    assert isinstance(system, idlm.IDLM)
    for seed, model in enumerate((system.network, system.frozen, system.fake)):
        model.head.weight.data.normal_(generator=torch.Generator().manual_seed(seed))
    plain, x = system.network, DATA.tokens[: 4 * LENGTH].view(4, LENGTH)
    system.fake = Watched(system.fake, system.mask_id)
    found = []
    for noise in (0.0, 3.0):
        system.network = Watched(plain, system.mask_id, noise)
        loss = system.loss(x, rng.key(2), 1.0)
        loss.backward()
        student = system.network
        found.append(loss.detach())
        assert bool(student.shown.any())
        assert bool(student.hidden.grad[~student.shown].abs().sum() > 0)
        assert bool((student.hidden.grad[student.shown] == 0).all())
        # The fake learns what was shown, too, where it is hidden from it.
        follows = student.shown & ~system.fake.shown
        assert bool((system.fake.hidden.grad[follows].abs().sum(-1) > 0).all())
    assert torch.equal(*found)


def test_guidance_tells_the_class_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    system, told = build("guidance"), []
    plain = system.network.forward
    monkeypatch.setattr(system.network, "forward", lambda z, label: told.append(label) or plain(z, label))
    x = torch.randint(6, (400, LENGTH), generator=torch.Generator().manual_seed(1))
    wanted = guidance.label(x)
    assert 50 < int((wanted == guidance.MANY).sum()) < 350
    system.train().loss(x, rng.key(2), 0.5)
    system.eval().loss(x, rng.key(2), 0.5)
    for labels in told:
        assert bool((labels == labels[:, :1]).all())
    trained, scored = (labels[:, 0] for labels in told)
    untold = trained == guidance.UNTOLD
    assert torch.equal(trained[~untold], wanted[~untold])
    assert abs(float(untold.double().mean()) - guidance.DROPPED) < 5 * math.sqrt(0.2 * 0.8 / 400)
    assert bool((scored == guidance.UNTOLD).all())


VALID = ["C", "CC(=O)O", "C1CCCC1", "C1CC2CC1CC2", "N#C", "C(F)(F)F", "CC  "]
INVALID = [
    "",
    " ",
    " C",
    "C C",
    "X",
    "C(",
    "C)",
    "()C",
    "C()C",
    "(C)C",
    "C(C)",
    "C(C(C))C",
    "C=",
    "=C",
    "C==C",
    "C(=)C",
    "C=(C)C",
    "C1CC",
    "C11",
    "C1C1",
    "C12CCC12",
    "C(C)1CCC1",
    "C=1CC1",
    "FCF=C",
    "F=C",
    "O=O=O",
    "C(C)(C)(C)(C)C",
]


@pytest.mark.parametrize("string", VALID)
def test_molecules_of_the_grammar(string: str) -> None:
    assert smiles.is_valid(string)


@pytest.mark.parametrize("string", INVALID)
def test_strings_that_are_no_molecules(string: str) -> None:
    assert not smiles.is_valid(string)


def test_generated_molecules_are_valid_and_the_same_again() -> None:
    strings = smiles.generate(2000, molecules.LENGTH, seed=0)
    assert all(map(smiles.is_valid, strings))
    assert len(set(strings)) > 1500
    assert strings[:100] == smiles.generate(100, molecules.LENGTH, seed=0)
    # All of the grammar is in use.
    assert set("".join(strings)) == set(smiles.ALPHABET) - {smiles.PAD}
    data = molecules.read(100)
    assert data.tokens.shape == (100, molecules.LENGTH)
    assert molecules.decode(data.tokens) == strings[:100]


def test_sequences_are_drawn_whole() -> None:
    data = molecules.read(50)
    drawn = training.windows(data.training, molecules.LENGTH, 20, rng.key(0))
    rows = {tuple(row) for row in data.training.tolist()}
    assert {tuple(row) for row in drawn.tolist()} <= rows
    assert len(data.training) + len(data.held_out) == 50


def test_tiles_keep_every_image() -> None:
    images = torch.arange(1, 18).unsqueeze(1).expand(17, digits.SIDE**2)
    picture = digits.tiled(images)
    assert picture.shape == (2 * (digits.SIDE + 1), digits.ROW * (digits.SIDE + 1))
    assert picture[0, 0] == 1
    assert picture[0, digits.SIDE + 1] == 2
    assert picture[digits.SIDE + 1, 0] == 17
    assert int((picture > 0).sum()) == images.numel()
    assert digits.distance(images, images[:1] + 1) == pytest.approx(8 * (1 + sum(range(16))) / 17)


def test_a_length_that_a_system_cannot_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--length", "18"])
    options = command.Options(**vars(command.parser("x", "", 1).parse_args()))
    with pytest.raises(UserError, match=r"block_diffusion: .*multiple of block_size.*got length 18"):
        command.trained_system(Console(), block_diffusion.BlockDiffusion, options, DATA)


EXAMPLES = [(molecules, "valid "), (digits, "bits per pixel")]


@pytest.mark.slow
@pytest.mark.parametrize(("example", "line"), EXAMPLES, ids=["molecules", "digits"])
def test_an_example_runs_alone(
    example: object,
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["--seconds", "1", "--steps", "2", "--batch", "4", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    system = example.Molecules if example is molecules else example.Digits
    with pytest.raises(SystemExit) as stopped:
        sequences.main(system, example.read, example.report)
    assert stopped.value.code == 0
    assert line in capsys.readouterr().out
    assert (tmp_path / "out" / f"{system.name}-seed0.safetensors").exists()
    assert (example is molecules) or (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")
