"""Tiny random DiffusionGemmas, stock and accelerated, for tests."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5.13")

from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from dlcore.integrations import transformers as integration
from dlcore.integrations.transformers import diffusion_gemma

VOCAB, CANVAS = 300, 8
SHARP = {"t_min": 1e-6, "t_max": 1.1e-6}


def make(softcap=5.0, dtype=torch.float32):
    """A tiny random model whose softmax has a few likely tokens."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    text = {
        **{"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **heads},
        **{"num_global_key_value_heads": 1, "global_head_dim": 16, "sliding_window": 16},
        **{"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16},
        **{"layer_types": ["sliding_attention", "full_attention"], "initializer_range": 0.4},
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **heads}
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config={"model_type": "gemma4_vision", **vision},
        canvas_length=CANVAS,
        initializer_range=0.4,
        **{"image_token_id": 3, "boi_token_id": 4, "eoi_token_id": 5},
    )
    config.text_config.final_logit_softcapping = softcap
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(config)
    # Else random weights amplify rounding fivefold from step to step.
    model.model.decoder.self_conditioning.down_proj.weight.data *= 0.05
    return model.to(dtype).eval()


def pair(**options):
    """The stock model, and an accelerated one of the same weights."""
    return make(**options), integration.accelerate(make(**options))


def prompt(batch=2):
    return torch.randint(6, VOCAB, (batch, 5), generator=torch.Generator().manual_seed(3))


def sequences(model, ids, seed=0, **options):
    torch.manual_seed(seed)
    options = {"max_new_tokens": 2 * CANVAS, "max_denoising_steps": 4, **options}
    return model.generate(ids, **options).sequences


def steps_of(monkeypatch):
    """A list that grows by one with each step on dlcore."""
    plain, seen = diffusion_gemma._step, []
    monkeypatch.setattr(diffusion_gemma, "_step", lambda *a, **k: seen.append(1) or plain(*a, **k))
    return seen
