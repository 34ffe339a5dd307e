"""Every system learns, writes, goes on after a kill, and with exact posteriors writes by the text's law."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bench.systems import (
    bitstream,
    block_diffusion,
    catalogue,
    checkpoint,
    command,
    digits,
    flm,
    gidd,
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
from bench.systems.vectors import WIDTH
from dlcore import rng
from dlcore.demo import flows, measures, samplers
from dlcore.demo.options import UserError
from dlcore.process import hybrid
from dlcore.testing.emissions import gaussian_emission
from dlcore.testing.markov import MarkovChain, uniform_emission

TALE = (
    "the cat sat on the mat and the rat sat on the hat. a cat that sat on a rat had the rat on the mat. "
    "then the hat ran, and the cat and the rat ran at the hat. "
) * 10
LENGTH = 16
DATA = training.Data(
    torch.tensor([sorted(set(TALE)).index(letter) for letter in TALE]), vocab_size=len(set(TALE))
)
TRAINED = [name for name in catalogue.NAMES if catalogue.find(name).trains()]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "LAYERS", 1)
    monkeypatch.setattr(network, "WIDTH", 32)


def build(name: str, vocab_size: int = DATA.vocab_size, length: int = LENGTH) -> System:
    """A small system of fixed weights, started from its teacher if it has one."""
    torch.manual_seed(0)
    kind = catalogue.find(name)
    made = kind(vocab_size, length)
    if kind.teacher is not None:
        made.learn_from(build(kind.teacher.name, vocab_size, length))
    return made


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


class Exact(nn.Module):
    """Posteriors in a network's place."""

    def __init__(self, posterior: Callable[..., Tensor]) -> None:
        super().__init__()
        self.posterior = posterior

    def forward(self, *states: Tensor, level: float | None = None) -> Tensor:
        return self.posterior(*states) if level is None else self.posterior(*states, level)


def _masked(system: System, chain: MarkovChain) -> None:
    system.network = Exact(samplers.Network(chain).masked)


def _uniform(system: System, chain: MarkovChain) -> None:
    known = samplers.Network(chain)
    system.network = Exact(lambda z, alpha: known.uniform(z, alpha).leave_one_out)


def _scores(system: System, chain: MarkovChain) -> None:
    known = samplers.Network(chain)
    system.network = Exact(lambda z, alpha: known.masked(z) + math.log(chain.vocab_size))


def _without_mask(system: System, chain: MarkovChain) -> None:
    known = samplers.Network(chain)
    never = torch.tensor([0.0] * chain.vocab_size + [-math.inf])
    system.network = Exact(lambda z, alpha: known.masked(z) + never)


def _hybrid(system: System, chain: MarkovChain) -> None:
    def posterior(z: Tensor, t: float) -> Tensor:
        at = hybrid.schedule(torch.as_tensor(t).expand(z.shape).unsqueeze(-1), p_uniform=gidd.UNIFORM)
        hit = z.unsqueeze(-1) == torch.arange(chain.vocab_size)
        seen = torch.where(hit, at.alpha, 0) + at.uniform / chain.vocab_size
        emission = torch.where(z.unsqueeze(-1) == chain.vocab_size, 0, seen.log()).float()
        return nn.functional.pad(chain.posterior(emission).leave_one_out, (0, 1))

    system.network = Exact(posterior)


def _absorbing(system: System, chain: MarkovChain) -> None:
    def posterior(z: Tensor, u: Tensor, alpha: float | Tensor) -> Tensor:
        emission = uniform_emission(z, 0.5, chain.vocab_size)
        settled = torch.where(emission == emission.amax(-1, keepdim=True), 0, -math.inf)
        lifted = torch.log1p(-torch.as_tensor(alpha).expand(z.shape)).unsqueeze(-1)
        undecided = torch.where(settled == 0, 0, lifted)
        return chain.posterior(torch.where((z == u).unsqueeze(-1), undecided, settled).float()).leave_one_out

    system.network = Exact(posterior)


def _bits(system: System, chain: MarkovChain) -> None:
    system.residual = flows.FlowNetwork(chain).residual


def _known(system: System, chain: MarkovChain) -> flows.FlowNetwork:
    """The exact network of the system's table."""
    known = flows.FlowNetwork(chain)
    system.points.data.copy_(known.points)
    return known


def _elf(system: System, chain: MarkovChain) -> None:
    known = _known(system, chain)
    # The last state has no noise; its posterior is that of very little.
    system.logits = lambda x, t: known.embedded(x, min(float(t), 0.999))


def _one_hot(system: System, chain: MarkovChain) -> None:
    system.points.data.copy_(torch.eye(chain.vocab_size, WIDTH))
    known = flows.FlowNetwork(chain)
    gamma = flm.gammas(chain.vocab_size).tolist()
    system.logits = lambda y, part: (
        known._posterior(gaussian_emission(y, system.table, 1 - gamma[part], alpha=gamma[part])).denoiser
    )


def _lognsr(system: System, chain: MarkovChain) -> None:
    known = _known(system, chain)

    def logits(x: Tensor, gamma: float) -> Tensor:
        power = 1 / (1 + math.exp(-gamma))
        emission = gaussian_emission(x, known.embeddings, math.sqrt(power), alpha=math.sqrt(1 - power))
        return known._posterior(emission).denoiser

    system.logits = logits


def _circles(system: System, chain: MarkovChain) -> None:
    system.logits = _known(system, chain).on_circles


def _concentrated(system: System, chain: MarkovChain) -> None:
    system.logits = _known(system, chain).concentrated


#: What puts the chain's posteriors in the place of what was learnt, and network calls that leave next to no
#: error of the steps.
EXACT: dict[str, tuple[Callable[[System, MarkovChain], None], int]] = {
    "mdlm": (_masked, 64),
    "remdm": (_masked, 64),
    "udm_loo": (_uniform, 64),
    "udm_predictor_corrector": (_uniform, 64),
    "absorbing_uniform": (_absorbing, 64),
    "sedd": (_scores, 64),
    "d3pm": (_without_mask, 64),
    "duo": (_uniform, 64),
    "gidd": (_hybrid, 64),
    "entropy_bound": (_masked, 64),
    "lomdm": (_masked, 64),
    "bitstream": (_bits, 64),
    "elf": (_elf, 64),
    "flm": (_one_hot, 64),
    "langflow": (_lognsr, 64),
    "slerp": (_circles, 64),
    "vmf": (_concentrated, 64),
}
#: Nats of bigrams, and the share of perplexity, that a method itself is off by: the corrector redraws what
#: fits worst, which trades entropy for perplexity; the bound lets dependent tokens go together.
OFF = {"udm_predictor_corrector": 0.2, "entropy_bound": 0.1}
BATCH = 384


@pytest.fixture(scope="module")
def chain() -> MarkovChain:
    """Five tokens that depend much on the one before."""
    weights = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return MarkovChain((1.5 * weights).softmax(-1)).to(torch.float32)


@pytest.fixture(scope="module")
def truth(chain: MarkovChain) -> measures.Truth:
    return measures.truth(chain, BATCH, LENGTH, seed=0)


def blind(chain: MarkovChain) -> MarkovChain:
    """The same tokens, none of which knows the others."""
    return MarkovChain(chain.stationary.expand_as(chain.transition))


def sharp(chain: MarkovChain) -> MarkovChain:
    """Surer than it should be."""
    return MarkovChain((1.25 * chain.transition.log()).softmax(-1))


@torch.no_grad()
def reaches(name: str, posteriors: MarkovChain, chain: MarkovChain, truth: measures.Truth) -> bool:
    """Whether samples with these posteriors have the chain's bigrams and perplexity as its own have."""
    install, steps = EXACT[name]
    system = build(name, chain.vocab_size).eval()
    install(system, posteriors)
    figures = measures.measure(system.generate(BATCH, steps, rng.key(5)), chain)
    own, spread, off = truth.same_size, truth.spread, OFF.get(name, 0.0)
    excess = figures.bigram_kl - own.bigram_kl
    error = figures.perplexity - own.perplexity
    return excess < 5 * spread.bigram_kl + off and abs(error) < 5 * spread.perplexity + off * truth.perplexity


@pytest.mark.parametrize("name", EXACT)
def test_exact_posteriors_reach_the_law(name: str, chain: MarkovChain, truth: measures.Truth) -> None:
    assert reaches(name, chain, chain, truth)


@pytest.mark.parametrize("name", EXACT)
def test_blind_posteriors_do_not(name: str, chain: MarkovChain, truth: measures.Truth) -> None:
    assert not reaches(name, blind(chain), chain, truth)


@pytest.mark.parametrize("name", sorted(EXACT.keys() - OFF.keys()))
def test_sharp_posteriors_do_not(name: str, chain: MarkovChain, truth: measures.Truth) -> None:
    assert not reaches(name, sharp(chain), chain, truth)


BOUNDS = sorted(name for name in EXACT if catalogue.find(name).bound and catalogue.find(name).trains())


def excess(name: str, posteriors: MarkovChain, chain: MarkovChain) -> tuple[float, float]:
    """What the loss with these posteriors is above the text's own, in nats per token, and its error."""
    system = build(name, chain.vocab_size).eval()
    EXACT[name][0](system, posteriors)
    draws = rng.split(rng.key(6), 24)
    text = chain.sample(2048, LENGTH, generator=torch.Generator().manual_seed(2))
    # The bound is of this text's likelihood, of which the entropy is the mean over all.
    likelihood = float(chain.log_likelihood(text).mean()) / LENGTH
    found = torch.stack([system.loss(text, key, 1.0) for key in draws])
    return float(found.mean()) + likelihood, float(found.std()) / math.sqrt(len(draws))


@pytest.mark.parametrize("name", BOUNDS)
@torch.no_grad()
def test_exact_posteriors_make_the_bound_the_likelihood(name: str, chain: MarkovChain) -> None:
    gap, error = excess(name, chain, chain)
    assert abs(gap) < 5 * error
    assert error < 0.02
    gap, error = excess(name, blind(chain), chain)
    assert gap > 5 * error


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
    monkeypatch.setattr(sys, "argv", ["x", "--length", "20"])
    options = command.Options(**vars(command.parser("x", "", 1).parse_args()))
    with pytest.raises(UserError, match=r"block_diffusion: .*multiple of block_size.*got length 20"):
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
