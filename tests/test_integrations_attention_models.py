"""Whole models with attn_implementation="dlcore" against transformers' own attention, on random weights."""

from __future__ import annotations

import logging

import pytest
import torch
from attention_oracles import normal
from torch import nn

import dlcore

pytest.importorskip("transformers", minversion="5.13")

import transformers
from tiny_diffusion_gemma import CANVAS, make
from tiny_transformers import (
    GROUPED,
    LENGTH,
    MODELS,
    VOCAB,
    Paths,
    bert,
    build,
    close,
    gemma2,
    gemma3,
    llama,
    padding,
    paths_of,
    real,
    tokens,
)
from transformers import masking_utils as masks

from dlcore.integrations.transformers import attention


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> Paths:
    return paths_of(monkeypatch)


@pytest.mark.parametrize("maker", MODELS)
@pytest.mark.parametrize("kind", ["none", "left", "right", "hole", "ends"])
def test_logits_and_gradients(maker, kind: str, paths: Paths) -> None:
    model, mask = build(maker), padding(kind)
    weight = normal(2, LENGTH, VOCAB, dtype=torch.float32)
    found = {}
    for name in ("eager", "dlcore"):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(tokens(), attention_mask=mask).logits
        real(logits * weight, mask).sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[name] = real(logits, mask), grads
    assert (paths.kernel, paths.sdpa) == (2, 0)
    assert dlcore.last_backend("attention.intervals_backward") == "cpu"
    close(found["dlcore"][0], found["eager"][0])
    assert found["dlcore"][1].keys() == found["eager"][1].keys()
    largest = max(grad.abs().max() for grad in found["eager"][1].values())
    for name, grad in found["eager"][1].items():
        close(found["dlcore"][1][name] / largest, grad / largest)


@pytest.mark.slow
@pytest.mark.parametrize("maker", [llama, gemma2, gemma3])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("kind", ["none", "left"])
def test_generate(maker, cache: str, kind: str, paths: Paths) -> None:
    """Past the sliding window, and the same tokens and scores as with eager attention."""
    model, mask = build(maker), padding(kind)
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "cache_implementation": cache,
        "return_dict_in_generate": True,
        "output_scores": True,
        "eos_token_id": None,
    }
    mask = torch.ones(2, LENGTH, dtype=torch.int64) if mask is None else mask
    found = {}
    for name in ("eager", "dlcore"):
        model.set_attn_implementation(name)
        found[name] = model.generate(tokens(), attention_mask=mask, **options)
    assert (paths.kernel, paths.sdpa) == (2 * 8, 0)
    assert torch.equal(found["dlcore"].sequences, found["eager"].sequences)
    for got, wanted in zip(found["dlcore"].scores, found["eager"].scores, strict=True):
        close(got, wanted)


@pytest.mark.parametrize("kind", ["none", "left"])
def test_diffusion_gemma(kind: str, paths: Paths) -> None:
    model, mask = make(), padding(kind)
    whole = torch.ones(2, LENGTH, dtype=torch.int64) if mask is None else mask
    found = {}
    for name in ("eager", "dlcore"):
        model.set_attn_implementation({"": name, "text_config": name})
        with torch.no_grad():
            found[name] = model(
                tokens(),
                attention_mask=mask,
                decoder_input_ids=tokens(CANVAS, seed=2),
                decoder_attention_mask=nn.functional.pad(whole, (0, CANVAS), value=1).bool(),
            ).logits
    assert (paths.kernel, paths.sdpa) == (4, 0)
    close(found["dlcore"], found["eager"], 1e-4)


@pytest.mark.parametrize("kind", ["none", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_diffusion_gemma_generates(kind: str, cache: str, paths: Paths) -> None:
    """Two canvases of two denoising steps: the same tokens as with SDPA under the same seed."""
    model, mask = make(), padding(kind)
    options = {
        "max_new_tokens": 2 * CANVAS,
        "max_denoising_steps": 2,
        "cache_implementation": cache,
        "disable_compile": True,
        "eos_token_id": None,
    }
    mask = torch.ones(2, LENGTH, dtype=torch.int64) if mask is None else mask
    found = {}
    for name in ("sdpa", "dlcore"):
        model.set_attn_implementation({"": name, "text_config": name})
        torch.manual_seed(3)
        found[name] = model.generate(tokens(), attention_mask=mask, **options).sequences
    assert (paths.kernel, paths.sdpa) == (2 * 2 * (1 + 2), 0)
    assert found["dlcore"].shape == (2, LENGTH + 2 * CANVAS)
    assert torch.equal(found["dlcore"], found["sdpa"])


def test_packed_documents(paths: Paths) -> None:
    """Positions that start anew make documents, of no more than one run of keys each."""
    model = build(llama)
    positions = torch.cat([torch.arange(5), torch.arange(1), torch.arange(7)]).expand(2, -1)
    found = {}
    for name in ("eager", "dlcore"):
        model.set_attn_implementation(name)
        found[name] = model(tokens(), position_ids=positions).logits
    assert (paths.kernel, paths.sdpa) == (2, 0)
    close(found["dlcore"], found["eager"])


def test_mask_of_the_caller(paths: Paths) -> None:
    """A 4-D mask reaches the layers as it is: bool runs on the kernels, float on SDPA."""
    model = build(llama).requires_grad_(False)
    model.set_attn_implementation("sdpa")
    mask = torch.rand(2, 1, LENGTH, 2, generator=torch.Generator().manual_seed(4)) * LENGTH
    at = torch.arange(LENGTH)
    mask = ((at >= mask.amin(-1, True)) & (at < mask.amax(-1, True))) | (at == at[:, None])
    additive = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    wanted = model(tokens(), attention_mask=mask).logits
    model.set_attn_implementation("dlcore")
    close(model(tokens(), attention_mask=mask).logits, wanted)
    assert (paths.kernel, paths.sdpa) == (2, 0)
    close(model(tokens(), attention_mask=additive).logits, wanted)
    assert (paths.kernel, paths.sdpa) == (2, 2)


def test_three_runs_fall_back_and_say_so_once(paths: Paths, caplog: pytest.LogCaptureFixture) -> None:
    model, mask = build(bert), padding("holes")
    model.set_attn_implementation("eager")
    wanted = real(model(tokens(), attention_mask=mask).logits, mask)
    model.set_attn_implementation("dlcore")
    with caplog.at_level(logging.WARNING, logger="dlcore"):
        for _ in range(2):
            close(real(model(tokens(), attention_mask=mask).logits, mask), wanted)
    assert (paths.kernel, paths.sdpa) == (0, 4)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "transformers attention 'dlcore': SDPA attends, "
        "because of a mask with more than two runs of keys in a row"
    ]


def test_dropout_falls_back(paths: Paths) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GROUPED, attention_dropout=0.5)
    model = transformers.LlamaForCausalLM(config).train()
    found = {}
    for name in ("sdpa", "dlcore"):
        model.set_attn_implementation(name)
        torch.manual_seed(7)
        found[name] = model(tokens(), attention_mask=padding("hole")).logits
    assert (paths.kernel, paths.sdpa) == (0, 2)
    close(real(found["dlcore"], padding("hole")), real(found["sdpa"], padding("hole")))
    model.eval()(tokens())
    assert (paths.kernel, paths.sdpa) == (2, 2)


def test_bfloat16(paths: Paths) -> None:
    """No further from float32 than SDPA is."""
    model, mask = build(llama).requires_grad_(False), padding("left")
    model.set_attn_implementation("eager")
    wanted = real(model(tokens(), attention_mask=mask).logits, mask)
    model.bfloat16()
    error = {}
    for name in ("sdpa", "dlcore"):
        model.set_attn_implementation(name)
        got = real(model(tokens(), attention_mask=mask).logits, mask)
        assert got.dtype == torch.bfloat16
        error[name] = (got - wanted).square().mean().sqrt()
    assert (paths.kernel, dlcore.last_backend("attention.intervals")) == (2, "cpu")
    assert error["dlcore"] <= 1.5 * error["sdpa"] < 0.1 * wanted.std()


def test_float64_runs_on_the_reference(paths: Paths) -> None:
    model = build(llama).requires_grad_(False).double()
    model.set_attn_implementation("sdpa")
    wanted = model(tokens()).logits
    model.set_attn_implementation("dlcore")
    close(model(tokens()).logits, wanted, 1e-9)
    assert (paths.kernel, dlcore.last_backend("attention.intervals")) == (2, "reference")


def test_compiled_whole() -> None:
    """Masks without padding, and those made before, are no break in a graph."""
    model = build(gemma2).requires_grad_(False)
    model.set_attn_implementation("dlcore")
    functions = {
        "full_attention": masks.causal_mask_function,
        "sliding_attention": masks.sliding_window_causal_mask_function(4),
    }
    mask = {
        layers: attention.make_mask(
            2, LENGTH, LENGTH, mask_function=function, attention_mask=padding("left").bool()
        )
        for layers, function in functions.items()
    }
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(
        real(compiled(tokens(), attention_mask=mask, use_cache=False).logits, padding("left")),
        real(model(tokens(), attention_mask=mask, use_cache=False).logits, padding("left")),
    )
    plain = build(llama).requires_grad_(False)
    plain.set_attn_implementation("dlcore")
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    close(compiled(tokens(), use_cache=False).logits, plain(tokens(), use_cache=False).logits)
