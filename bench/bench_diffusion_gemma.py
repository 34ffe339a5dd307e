"""A denoising step of a small random DiffusionGemma: transformers' own, and with dlcore in its place.

python -m bench.bench_diffusion_gemma PROVIDER HIDDEN CANVAS V   # the memory that two steps need, in bytes
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.case import Case, Shape, Work, name, nbytes, random_tokens, rows, tokens_in_range

PROVIDERS = ("dlcore", "transformers")
PROMPT, STEPS = 64, 48


@dataclass
class Denoiser:
    """A model after a prompt, and what its last step hands to the next."""

    model: Any
    inputs: dict[str, Any]
    signal: Any = None

    @torch.no_grad()
    def step(self, canvas: Tensor) -> tuple[Tensor, ...]:
        """(canvas, argmax, signal, finished) after a step that `signal` conditions."""
        result: tuple[Tensor, ...] = self.model._denoising_step(
            current_canvas=canvas,
            argmax_canvas=canvas,
            self_conditioning_logits=self.signal,
            finished_denoising=torch.zeros(len(canvas), dtype=torch.bool),
            **self.inputs,
        )
        return result


def denoiser(provider: str, shape: Shape) -> Denoiser:
    """shape is (hidden, canvas, V): two layers, four experts, the model's own temperatures and thresholds."""
    import transformers
    from transformers.models.diffusion_gemma import generation_diffusion_gemma as generation

    from dlcore.integrations.transformers import accelerate

    hidden, canvas, vocab = shape
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4}
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "initializer_range": 0.1, **heads}
    config = transformers.DiffusionGemmaConfig(
        text_config={
            **{**sizes, "vocab_size": vocab, "num_hidden_layers": 2},
            **{"global_head_dim": hidden // 4, "num_global_key_value_heads": 2, "sliding_window": 128},
            **{"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": hidden // 2},
            **{"layer_types": ["sliding_attention", "full_attention"]},
        },
        vision_config={**sizes, "model_type": "gemma4_vision", "num_hidden_layers": 1},
        canvas_length=canvas,
        initializer_range=0.1,
        image_token_id=3,
        boi_token_id=4,
        eoi_token_id=5,
    )
    torch.manual_seed(0)
    model = transformers.DiffusionGemmaForBlockDiffusion(config).eval()
    if provider == "dlcore":
        accelerate(model)
    prompt = random_tokens((1, PROMPT), vocab - 6) + 6
    with torch.no_grad():
        encoded = model.model.encoder(input_ids=prompt)
    cache = "cache" if "cache" in encoded else "past_key_values"
    inputs = {
        "decoder_forward": model.forward,
        "input_ids": prompt,
        "decoder_position_ids": torch.arange(PROMPT, PROMPT + canvas).unsqueeze(0),
        "mask_mapping": {"full_attention": None, "sliding_attention": None},
        "cur_step": STEPS // 2,
        "sampler": generation.EntropyBoundSampler(
            generation.EntropyBoundSamplerConfig(0.1), canvas, vocab, STEPS
        ),
        "logits_processor": transformers.LogitsProcessorList(
            [generation.LinearTemperatureScheduleLogitsProcessor(0.4, 0.8, STEPS)]
        ),
        "diffusion_stopping_criteria": generation.StableAndConfidentStoppingCriteria(1, 0.005),
        cache: encoded[cache],
    }
    return Denoiser(model, inputs)


def _step(shape: Shape) -> Work:
    """A step in the middle of a canvas, conditioned by the one before."""
    hidden, length, vocab = shape
    canvas = random_tokens((1, length), vocab)
    ready = {provider: denoiser(provider, shape) for provider in PROVIDERS}
    for each in ready.values():
        each.signal = each.step(canvas)[2]
    weight = ready["dlcore"].model.lm_head.weight.detach()
    wanted = ready["transformers"].step(canvas)[1]

    def runs(provider: str) -> Callable[..., Tensor]:
        return lambda weight, canvas: ready[provider].step(canvas)[1]

    def check(result: Tensor, weight: Tensor, canvas: Tensor) -> None:
        tokens_in_range(result, weight[:1, :1].expand(*canvas.shape, vocab))
        assert (
            result == wanted
        ).double().mean() > 0.98  # rounding decides between logits that are nearly equal

    return Work(
        inputs=(weight, canvas),
        functions={provider: runs(provider) for provider in PROVIDERS},
        check=check,
        bytes=nbytes(weight),
        flops=4 * length * hidden * vocab,  # the head and the soft embedding
    )


def peak(provider: str, shape: Shape) -> int:
    """Bytes that two steps need over model and prompt, in a process of its own that returns what it frees."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-m", "bench.bench_diffusion_gemma", provider, *map(str, shape)],
        env=plain | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout)


def _resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _two_steps(provider: str, shape: Shape) -> int:
    for size in (TINY, shape):  # the first also loads and allocates what every process needs
        ready = denoiser(provider, size)
        canvas = random_tokens((1, size[1]), size[2])
        with open("/proc/self/clear_refs", "w") as references:
            references.write("5")  # VmHWM starts anew
        before = _resident("VmRSS")
        for _ in range(2):
            ready.signal = ready.step(canvas)[2]
    return _resident("VmHWM") - before


#: hidden × canvas × V.
TINY = (16, 8, 307)
CASES = tuple(
    Case(
        "diffusion_gemma.step",
        (128, 256, vocab),
        TINY,
        _step,
        kernel="categorical.sample_expectation",
        providers=PROVIDERS,
    )
    for vocab in (32768, 65536, 131072, 262144)
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_diffusion_gemma(
    case: Case, provider: str, measure: Callable[[Case, str], None], benchmark: BenchmarkFixture
) -> None:
    pytest.importorskip("transformers", minversion="5.13")
    measure(case, provider)
    if benchmark.enabled:
        benchmark.extra_info["peak_bytes"] = peak(provider, case.shape)


if __name__ == "__main__":
    print(_two_steps(sys.argv[1], tuple(map(int, sys.argv[2:]))))
