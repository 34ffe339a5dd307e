"""Tiny random models of transformers, and inputs for them, for tests of attn_implementation="dlcore"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.13")

import transformers

from dlcore.integrations.transformers import attention

VOCAB, LENGTH = 50, 13
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
LOCAL = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def qwen():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**GROUPED, "num_key_value_heads": 1}))


def gemma2():
    """Softcap and sliding windows."""
    config = transformers.Gemma2Config(**GROUPED, **LOCAL, attn_logit_softcapping=0.5)
    return transformers.Gemma2ForCausalLM(config)


def gemma3():
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GROUPED, **LOCAL))


def gpt_oss():
    """Attention sinks."""
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**GROUPED, **LOCAL, num_local_experts=2, num_experts_per_tok=1)
    )
    for layer in model.model.layers:
        layer.self_attn.sinks.data = torch.linspace(-1, 2, 4)
    return model


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def modernbert():
    """A local window on both sides."""
    config = transformers.ModernBertConfig(
        **SIZES, layer_types=LOCAL["layer_types"], local_attention=6, cls_token_id=1, sep_token_id=2
    )
    return transformers.ModernBertForMaskedLM(config)


CAUSAL = [llama, qwen, gemma2, gemma3, gpt_oss]
MODELS = [*CAUSAL, bert, modernbert]


def build(maker: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return maker().eval()


@dataclass
class Paths:
    """How often each attention ran."""

    kernel: int = 0
    sdpa: int = 0


def paths_of(monkeypatch: pytest.MonkeyPatch) -> Paths:
    """Counts from now on; and the log is as if nothing had been said."""
    counted = Paths()
    kernel, sdpa = attention.attention.intervals, attention.sdpa_attention_forward

    def count_kernel(*args, **kwargs):
        counted.kernel += 1
        return kernel(*args, **kwargs)

    def count_sdpa(*args, **kwargs):
        counted.sdpa += 1
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(attention.attention, "intervals", count_kernel)
    monkeypatch.setattr(attention, "sdpa_attention_forward", count_sdpa)
    monkeypatch.setattr(attention, "_told", set())
    return counted


def padding(kind: str) -> Tensor | None:
    """(2, L): the first sequence is padded, the second is whole."""
    if kind == "none":
        return None
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    hidden = {"left": [0, 1, 2], "right": [11, 12], "hole": [5, 6], "ends": [0, 12], "holes": [3, 5]}[kind]
    mask[0, hidden] = 0
    return mask


def tokens(length: int = LENGTH, seed: int = 1) -> Tensor:
    """(2, length), no special ones."""
    return torch.randint(6, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def real(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Without the rows of padding, which see nothing."""
    return logits.flatten(0, 1) if mask is None else logits[mask.bool()]
