"""DiffusionGemma with dlcore inside against transformers' own, on tiny random models."""

from __future__ import annotations

import math

import pytest
import torch
from goodness import chi_square
from torch import nn

pytest.importorskip("transformers", minversion="5.13")

from tiny_diffusion_gemma import CANVAS, SHARP, VOCAB, make, pair, prompt, sequences, steps_of
from transformers.generation import LogitsProcessorList
from transformers.models.diffusion_gemma import generation_diffusion_gemma as stock

from dlcore.integrations import transformers as integration
from dlcore.integrations.transformers import diffusion_gemma

BOUND = stock.EntropyBoundSamplerConfig


@pytest.fixture
def fixed_canvases(monkeypatch):
    """Canvases that depend on nothing but their number, so that both models start and renoise alike."""

    def canvas(self, batch_size, device):
        self.number = getattr(self, "number", 0) + 1
        generator = torch.Generator().manual_seed(self.number)
        return torch.randint(6, self.vocab_size, (batch_size, self.canvas_length), generator=generator)

    monkeypatch.setattr(stock.EntropyBoundSampler, "initialize_canvas", canvas)


@pytest.fixture
def steps(monkeypatch):
    return steps_of(monkeypatch)


LEFT_PADDED = {"attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])}
STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.slow
@pytest.mark.parametrize("softcap", [5.0, 1e6])
@pytest.mark.parametrize("cache", [{}, STATIC], ids=["dynamic", "static"])
@pytest.mark.parametrize("inputs", [{}, LEFT_PADDED], ids=["whole", "padded"])
def test_without_heat_the_sequences_are_stocks(fixed_canvases, steps, softcap, cache, inputs):
    """Three prompts, three canvases of up to four steps; then with an end of sequence."""
    reference, model = pair(softcap=softcap)
    options = {"max_new_tokens": 3 * CANVAS, **SHARP, **cache, **inputs}
    wanted = sequences(reference, prompt(3), **options)
    assert len(wanted.unique()) > 12
    assert torch.equal(sequences(model, prompt(3), **options), wanted)
    options |= {"max_new_tokens": 2 * CANVAS, "eos_token_id": int(wanted[0, 9]), "pad_token_id": 0}
    wanted, got = (each.generate(prompt(3), max_denoising_steps=4, **options) for each in (reference, model))
    assert (wanted.sequences[:, 5:] == 0).any()
    assert torch.equal(got.sequences, wanted.sequences)
    assert torch.equal(got.tokens_per_forward, wanted.tokens_per_forward)
    assert len(steps) >= 8


@pytest.mark.slow
def test_conditioning_and_cache_of_the_user(fixed_canvases, steps):
    reference, model = pair()
    ids = prompt()
    logits = torch.randn(2, CANVAS, VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    plain = sequences(reference, ids, **SHARP)
    changed = []
    for mask in (None, torch.tensor([True, False])):
        options = {"self_conditioning_logits": logits, "self_conditioning_mask": mask, **SHARP}
        wanted = sequences(reference, ids, max_denoising_steps=1, **options)
        changed.append(wanted)
        assert torch.equal(sequences(model, ids, max_denoising_steps=1, **options), wanted)
        assert torch.equal(sequences(model, ids, **options), sequences(reference, ids, **options))
    canvas = torch.randint(6, VOCAB, (2, CANVAS))
    wanted = sequences(reference, ids, decoder_input_ids=canvas, **SHARP)
    assert torch.equal(sequences(model, ids, decoder_input_ids=canvas, **SHARP), wanted)
    assert not torch.equal(changed[0], changed[1])
    assert not torch.equal(wanted, plain)
    turns = []
    for each in (reference, model):
        first = each.generate(ids, max_new_tokens=CANVAS, max_denoising_steps=2, **SHARP)
        name = "cache" if "cache" in first else "past_key_values"
        turns.append(sequences(each, first.sequences[:, 5:], **{name: first[name]}, **SHARP))
    assert torch.equal(*turns)
    assert len(steps) > 12


class Steps:
    """One model's denoising steps, from given canvases."""

    def __init__(self, model, ids, bound=0.5, stability=1, confidence=1.0, schedules=((0.4, 0.8),), **inputs):
        self.model, self.sampler = model, stock.EntropyBoundSampler(BOUND(bound), CANVAS, VOCAB, 8)
        self.criterion = None
        if stability is not None:
            self.criterion = stock.StableAndConfidentStoppingCriteria(stability, confidence)
        self.processors = LogitsProcessorList(
            [stock.LinearTemperatureScheduleLogitsProcessor(low, high, 8) for low, high in schedules]
        )
        with torch.no_grad():
            prefill = model.model.encoder(input_ids=ids)
        name = "cache" if "cache" in prefill else "past_key_values"
        self.inputs = {name: prefill[name], "input_ids": ids, **inputs}
        self.finished, self.argmax, self.signal = torch.zeros(len(ids), dtype=torch.bool), None, None

    def __call__(self, canvas, number):
        """The next canvas; the rest is kept."""
        length = self.inputs["input_ids"].shape[1]
        with torch.no_grad():
            canvas, self.argmax, self.signal, self.finished = self.model._denoising_step(
                decoder_forward=self.model.forward,
                current_canvas=canvas,
                argmax_canvas=canvas if self.argmax is None else self.argmax,
                decoder_position_ids=torch.arange(length + 1, length + 1 + CANVAS).unsqueeze(0),
                self_conditioning_logits=self.signal,
                mask_mapping={"full_attention": None, "sliding_attention": None},
                finished_denoising=self.finished.clone(),
                cur_step=number,
                sampler=self.sampler,
                logits_processor=self.processors,
                diffusion_stopping_criteria=self.criterion,
                **self.inputs,
            )
        return canvas


def first_canvas(batch=2):
    return torch.randint(6, VOCAB, (batch, CANVAS), generator=torch.Generator().manual_seed(2))


#: Temperature schedules with a bound and a confidence in the midst of the entropies that they lead to.
HEATS = [((), 14.0, 3.3), (((0.05, 0.5),), 2.0, 0.8), (((0.2, 0.9), (0.5, 1.0)), 4.0, 1.3)]


@pytest.mark.slow
@pytest.mark.parametrize("stability", [0, 1, 2, None])
@pytest.mark.parametrize(("schedules", "bound", "confidence"), HEATS)
def test_decisions_are_stocks(fixed_canvases, schedules, bound, confidence, stability):
    """Both take each step from the same canvas: what stock's made of the last one."""
    options = {"schedules": schedules, "bound": bound, "confidence": confidence, "stability": stability}
    reference, model = pair(softcap=20.0)
    theirs, ours = (Steps(each, prompt(6), **options) for each in (reference, model))
    canvas, accepted, finished = first_canvas(6), 0, []
    for number in range(8, 0, -1):
        before = theirs.finished
        mine, canvas, start = ours(canvas, number), theirs(canvas, number), canvas
        masks = (each.sampler.accepted_token_mask[~before] for each in (ours, theirs))
        assert torch.equal(*masks)
        assert torch.equal(ours.argmax, theirs.argmax)
        assert torch.equal(ours.finished, theirs.finished)
        torch.testing.assert_close(
            ours.signal.cpu(), theirs.signal, rtol=0, atol=1e-3 * float(theirs.signal.max())
        )
        renoised = ~theirs.sampler.accepted_token_mask & ~before[:, None]
        assert torch.equal(mine[renoised], canvas[renoised])
        assert torch.equal(mine[before], start[before])
        if stability:
            assert torch.equal(ours.criterion.argmax_canvas_history, theirs.criterion.argmax_canvas_history)
        accepted, finished = accepted + int((~renoised).sum()), [*finished, int(theirs.finished.sum())]
    assert 8 * 6 < accepted < 8 * 6 * CANVAS
    # At a constant temperature the argmax never settles.
    assert (finished[-1] > 0 and finished[0] < 6) == (stability == 0 or bool(schedules and stability))


def ragged(batch, length, seed):
    """Logits (batch, length, 50), some nearly uniform and some nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    sharp = torch.rand(batch, length, 1, generator=generator) * 12
    return torch.randn(batch, length, 50, generator=generator) * sharp


@pytest.mark.parametrize("bound", [1e-3, 0.1, 2.0, 50.0])
def test_acceptance_equals_the_samplers_for_equal_logits(bound):
    sampler = stock.EntropyBoundSampler(BOUND(bound), 32, 50, 8)
    tokens = torch.ones(200, 32, dtype=torch.int64)

    def accepted(logits):
        wanted = sampler.accept_canvas(0 * tokens, tokens, logits, 1).bool()
        entropy = diffusion_gemma.categorical.stats(logits).entropy
        return diffusion_gemma.unmask.select(entropy, tokens.bool(), entropy_bound=bound), wanted, entropy

    logits = ragged(200, 32, 0)
    got, wanted, _ = accepted(logits)
    assert 200 <= int(wanted.sum()) < wanted.numel()
    assert torch.equal(got, wanted)
    logits[:, 16:] = logits[:, :16].flip(1)
    got, wanted, entropy = accepted(logits)  # of equal entropies stock takes whichever its sort has first
    assert torch.equal((got * entropy).sort(-1)[0], (wanted * entropy).sort(-1)[0])
    for even in (0.0, -1e4):
        logits = torch.zeros(200, 32, 50)
        logits[..., 1:] = even
        got, wanted, _ = accepted(logits)
        assert torch.equal(got.sum(-1), wanted.sum(-1))


@pytest.mark.parametrize("stability", [0, 1, 3])
def test_stopping_equals_the_criterions_for_equal_logits(stability):
    theirs, ours = (stock.StableAndConfidentStoppingCriteria(stability, 0.5) for _ in range(2))
    logits, both = ragged(40, 4, 1), []
    for number in range(8):
        keep = torch.arange(40) % 4 >= number  # rows that stop changing one after another, and change again
        logits = torch.where(keep[:, None, None] | (number > 5), ragged(40, 4, 1 + number), logits)
        argmax, entropy = logits.argmax(-1), diffusion_gemma.categorical.stats(logits).entropy
        wanted = theirs(argmax, logits)
        assert torch.equal(diffusion_gemma.stops(ours, argmax, entropy), wanted)
        both += wanted.tolist()
    assert 0 < sum(both) < len(both)
    if stability:
        assert torch.equal(ours.argmax_canvas_history, theirs.argmax_canvas_history)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_draws_follow_the_law(dtype, apart):
    """Equal rows, so that each position draws many times, in a second step, which the first conditions."""
    batch = 1500
    reference, model = pair(dtype=dtype)
    options = {"bound": 1e9, "stability": None}
    theirs = Steps(reference, prompt(1), **options)
    ours = Steps(model, prompt(1).expand(batch, -1), **options)
    torch.manual_seed(5)
    for number in (8, 7):
        theirs(first_canvas(1), number)
        tokens = ours(first_canvas(1).expand(batch, -1), number)
    with torch.no_grad():
        processed, raw = ours.signal.cpu()[0].double(), ours.signal.head.materialize()[0].double()
    law, wanted = (torch.softmax(x, -1) for x in (processed, theirs.signal[0].double()))
    assert (law - wanted).abs().sum(-1).max() / 2 < apart
    assert min(chi_square(tokens[:, i], law[i]) for i in range(CANVAS)) > 1e-4
    # The same draws refute the raw logits and softcapped ones without heat.
    for wrong in (raw, 5 * torch.tanh(raw / 5)):
        wrong = torch.softmax(wrong, -1)
        assert max(chi_square(tokens[:, i], wrong[i]) for i in range(CANVAS)) < 1e-6


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_soft_embedding_is_stocks(dtype, share):
    reference, model = pair(dtype=dtype)
    theirs, ours = Steps(reference, prompt()), Steps(model, prompt())
    theirs(first_canvas(), 8)
    ours(first_canvas(), 8)
    weight = reference.lm_head.weight
    wanted = torch.matmul(theirs.signal.softmax(-1, dtype=torch.float32).to(dtype), weight)
    got = torch.matmul(ours.signal.softmax(dim=-1, dtype=torch.float32).to(dtype), weight)
    assert got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= share * wanted.abs().max()
    with pytest.raises(TypeError):
        torch.matmul(weight, ours.signal)
    with pytest.raises(TypeError):
        torch.exp(ours.signal)


def test_the_vocabulary_is_swept_once_a_step(monkeypatch):
    model = integration.accelerate(make())
    sweep, calls = diffusion_gemma.categorical.sample_expectation, []
    monkeypatch.setattr(
        diffusion_gemma.categorical, "sample_expectation", lambda *a, **k: calls.append(1) or sweep(*a, **k)
    )
    head = []
    monkeypatch.setattr(nn.Linear, "forward", counted(head, nn.Linear.forward))
    sequences(model, prompt(), max_new_tokens=CANVAS, max_denoising_steps=3, confidence_threshold=1e-9)
    assert len(calls) == 3
    assert not [x for x in head if x is model.lm_head]


def counted(seen, forward):
    """`forward`, noting the module that it runs for."""

    def run(self, x):
        seen.append(self)
        return forward(self, x)

    return run


@pytest.mark.slow
def test_manual_seed_governs():
    model = integration.accelerate(make())
    options = {"t_min": 1.0, "t_max": 2.0}
    first, again, other = (sequences(model, prompt(), seed, **options) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_manual_seed_governs_the_draws_alone():
    """Where everything is accepted the next canvas is the draw."""
    drawn = []
    for seed in (0, 0, 1):
        step = Steps(integration.accelerate(make()), prompt(), bound=1e9, schedules=((1.0, 2.0),))
        torch.manual_seed(seed)
        drawn.append([step(first_canvas(), 8), step(first_canvas(), 8)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_stopping_criteria_of_the_user_need_no_logits(fixed_canvases, steps):
    reference, model = pair()
    options = {"max_new_tokens": 3 * CANVAS, "stopping_criteria": None, **SHARP}
    for each in (reference, model):
        options["stopping_criteria"] = stock.StoppingCriteriaList([stock.MaxLengthCriteria(5 + 2 * CANVAS)])
        assert sequences(each, prompt(), **options).shape == (2, 5 + 2 * CANVAS)
    assert steps


class Streamer:
    """Keeps what it is given."""

    def __init__(self, takes_logits):
        self._takes_logits, self.puts, self.drafts = takes_logits, [], []

    def put(self, value):
        self.puts.append(value)

    def put_draft(self, value=None, logits=None):
        self.drafts.append(value if logits is None else logits)

    def end(self):
        self.puts.append(None)


@pytest.mark.parametrize("takes_logits", [False, True])
def test_streamers(fixed_canvases, steps, takes_logits):
    """Also in steps after a sequence has finished, whose draft and logits then stay."""
    shown = []
    for model in pair():
        streamer = Streamer(takes_logits)
        sequences(model, prompt(3), streamer=streamer, max_denoising_steps=6, **SHARP)
        shown.append(streamer)
    theirs, ours = shown
    assert len(theirs.drafts) == len(steps) >= 8
    for mine, wanted in zip(ours.puts[:-1] + ours.drafts, theirs.puts[:-1] + theirs.drafts, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert ours.puts[-1] is theirs.puts[-1] is None


def test_drawn_logits_have_the_dtype_of_the_model():
    for model in pair(dtype=torch.bfloat16):
        streamer = Streamer(True)
        sequences(model, prompt(), streamer=streamer, max_denoising_steps=1)
        assert streamer.drafts[0].dtype == torch.bfloat16


def test_forward_still_returns_logits():
    reference, model = pair()
    canvas = first_canvas()
    with torch.no_grad():
        wanted = reference(input_ids=prompt(), decoder_input_ids=canvas).logits
        got = model(input_ids=prompt(), decoder_input_ids=canvas).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_hidden_states_that_are_not_finite():
    model = integration.accelerate(make())
    with torch.no_grad():
        model.model.decoder.norm.weight.fill_(math.nan)
    with pytest.raises(
        ValueError, match=r"transformers.accelerate: the decoder's hidden states are not finite"
    ):
        sequences(model, prompt())


@pytest.mark.slow
def test_generate_compiles(fixed_canvases, steps):
    """A static cache, whose encoder transformers compiles."""
    reference, model = pair()
    options = {"max_new_tokens": 3 * CANVAS, **SHARP, **STATIC}
    wanted = sequences(reference, prompt(), **options)
    assert torch.equal(sequences(model, prompt(), **options | {"disable_compile": False}), wanted)
    assert model._compiled_encoder is not None
    assert steps
