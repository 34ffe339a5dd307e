"""Putting dlcore into transformers' models and taking it out; what falls back to their own step."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch
from conftest import run_python
from torch import nn

pytest.importorskip("transformers", minversion="5.13")

from tiny_diffusion_gemma import CANVAS, SHARP, VOCAB, make, pair, prompt, sequences, steps_of
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.models.diffusion_gemma import generation_diffusion_gemma as stock

from dlcore.integrations import transformers as integration
from dlcore.integrations.transformers import diffusion_gemma


@pytest.fixture
def log(caplog):
    """What dlcore's log says, from its beginning."""
    diffusion_gemma._log_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="dlcore")
    return caplog


@pytest.fixture
def steps(monkeypatch):
    return steps_of(monkeypatch)


class Banning(LogitsProcessor):
    def __call__(self, input_ids, scores, cur_step):
        return scores.index_fill(-1, torch.arange(6, 40), -torch.inf)


class OwnSampler(stock.EntropyBoundSampler):
    pass


class OwnCriterion(stock.StableAndConfidentStoppingCriteria):
    pass


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def own_sampler(model):
    def prepare(config):
        return OwnSampler(config.sampler_config, CANVAS, VOCAB, config.max_denoising_steps)

    model._prepare_sampler = prepare


def own_criterion(model):
    model._prepare_diffusion_stopping_criteria = lambda config: OwnCriterion(1, 0.5)


def own_head(model):
    head = Halved(32, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def hooked_head(model):
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * 2)


def own_forward(model):
    plain = model.forward
    model.forward = lambda *a, **k: plain(*a, **k)


def odd_weight(model):
    embeddings = model.model.decoder.embed_tokens
    weight = embeddings.weight.data
    del embeddings.weight
    embeddings.weight = weight


#: What is done to a model, with options of generate if it returns any, and what the log says then.
FALLBACKS = [
    (lambda model: {"logits_processor": LogitsProcessorList([Banning()])}, "there is a Banning in the place"),
    (own_sampler, "there is a OwnSampler in the place of a EntropyBoundSampler"),
    (own_criterion, "there is a OwnCriterion in the place"),
    (own_head, "there is a Halved in the place of a Linear"),
    (hooked_head, "lm_head has hooks"),
    (own_forward, "DiffusionGemmaForBlockDiffusion has a forward of its own"),
    (odd_weight, "a weight of the vocabulary is no plain parameter on cpu"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "reason"), FALLBACKS)
def test_what_needs_logits_gets_the_models_own_step(log, steps, change, reason):
    """Bit for bit what transformers makes of the same attention, and one line in the log for two calls."""
    reference, model = pair()
    reference.set_attn_implementation({"": "dlcore", "text_config": "dlcore"})
    results = []
    for each in (reference, model):
        options = change(each) or {}
        results.append([sequences(each, prompt(), seed, **options) for seed in range(2)])
    for wanted, got in zip(*results, strict=True):
        assert torch.equal(got, wanted)
    assert not steps
    assert [record.name for record in log.records] == ["dlcore"]
    assert reason in log.text


class OwnStep(DiffusionGemmaForBlockDiffusion):
    def _denoising_step(self, current_canvas, finished_denoising, **_):
        return 0 * current_canvas + 7, 0 * current_canvas + 7, None, ~finished_denoising


def test_a_subclass_keeps_its_step(log, steps):
    model = make()
    model.__class__ = OwnStep
    integration.accelerate(model)
    assert (sequences(model, prompt())[:, 5:] == 7).all()
    assert not steps
    assert "OwnStep has a denoising step of its own" in log.text


def test_restore_brings_everything_back():
    reference, model = make(), make()
    before = dict(vars(model)), model.config.to_dict()
    ids, options = prompt(), {"cache_implementation": "dynamic"}
    wanted = sequences(reference, ids, **options)
    assert integration.accelerate(model) is model
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "dlcore"
    assert model.config.vision_config._attn_implementation == "sdpa"
    once = dict(vars(model))
    assert integration.accelerate(model) is model
    assert dict(vars(model)) == once
    assert not torch.equal(sequences(model, ids, **options), wanted)
    assert integration.restore(model) is model
    assert (dict(vars(model)), model.config.to_dict()) == before
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    assert torch.equal(sequences(model, ids, **options), wanted)
    assert integration.restore(model) is model
    assert dict(vars(model)) == before[0]


def test_restore_knows_which_attention_was_there():
    model = make()
    model.set_attn_implementation("eager")
    integration.restore(integration.accelerate(model))
    configs = model.config, model.config.text_config, model.config.vision_config
    assert [config._attn_implementation for config in configs] == ["eager"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_accelerated_on_their_own(copied, steps):
    model = integration.accelerate(make())
    other = copied(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    integration.restore(model)
    got = sequences(other, prompt(), **SHARP)
    assert len(steps) >= 2
    integration.accelerate(model)
    assert not torch.equal(sequences(model, prompt(), **SHARP), got)
    assert vars(integration.restore(other)).keys() == vars(make()).keys()


@pytest.mark.parametrize("call", [integration.accelerate, integration.restore])
def test_unknown_models(call):
    message = rf"transformers.{call.__name__}: model must be a DiffusionGemmaForBlockDiffusion, got Linear"
    with pytest.raises(TypeError, match=message):
        call(nn.Linear(2, 2))


def test_importing_dlcore_leaves_transformers_alone():
    assert run_python("import dlcore, sys; print('transformers' in sys.modules)") == "False\n"


@pytest.mark.parametrize("found", ["None", "type('', (), {'__version__': '5.12.1'})()"])
def test_a_transformers_that_is_missing_or_old(found):
    code = f"import sys; sys.modules['transformers'] = {found}; import dlcore.integrations.transformers"
    error = run_python(code).strip().splitlines()[-1]
    assert error.startswith(
        "ImportError: dlcore.integrations.transformers needs transformers 5.13 or newer ("
    )
    assert error.endswith("): pip install 'dlcore[transformers]'")
    assert "5.12.1" in error or found == "None"
