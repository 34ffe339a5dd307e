"""DiffusionGemma's denoising step on dlcore: one sweep over the vocabulary, and no logits."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma import generation_diffusion_gemma as stock

from dlcore import LinearLogits, categorical
from dlcore.process import unmask
from dlcore.reference.categorical import transform

logger = logging.getLogger("dlcore")

Step = tuple[Tensor, Tensor, Any, Tensor]


@dataclass(frozen=True)
class SoftLogits:
    """The processed logits (B, L, V) of a step, by the one thing that the next step wants of them.

    The decoder takes it where it takes logits: it asks for `logits.softmax(...).to(...)` and the product with
    its embeddings, which is `soft`. Streamers that draw logits ask for `cpu`, which makes them anew.

    Args:
        soft: (B, L, D), the softmax times the embeddings.
        head: the raw logits.
        softcap: of the raw logits, or None.
        temperature: (B, 1).
    """

    soft: Tensor
    head: LinearLogits
    softcap: float | None
    temperature: Tensor

    def softmax(self, *_: Any, **__: Any) -> SoftLogits:
        """The probabilities, as absent as the logits."""
        return self

    def to(self, *_: Any, **__: Any) -> SoftLogits:
        """The same: the product is handed out in the dtype of its other factor."""
        return self

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function is torch.matmul and isinstance(args[0], cls):
            return args[0].soft.to(args[1].dtype)
        return NotImplemented

    def cpu(self) -> Tensor:
        """(B, L, V) logits after softcap and temperature, in the dtype of the head."""
        logits = transform(self.head.materialize(), temperature=self.temperature, softcap=self.softcap)
        return logits.to(self.head.dtype).cpu()


def denoising_step(model: DiffusionGemmaForBlockDiffusion, **inputs: Any) -> Step:
    """In the place of `model._denoising_step`, with its arguments and results; the model's own where it must.

    Returns:
        The canvas (B, L), its argmax (B, L), what conditions the next step, and who has finished (B,).

    Raises:
        ValueError: the decoder's hidden states are not finite.
    """
    reason = needs_logits(model, inputs)
    if reason is None:
        return _step(model, **inputs)
    _log_once(reason)
    result: Step = type(model)._denoising_step(model, **inputs)
    return result


def needs_logits(model: DiffusionGemmaForBlockDiffusion, inputs: dict[str, Any]) -> str | None:
    """Why this step cannot do without logits, or None."""
    plain = DiffusionGemmaForBlockDiffusion
    if type(model)._denoising_step is not plain._denoising_step:
        return f"{type(model).__name__} has a denoising step of its own"
    if getattr(model.forward, "__func__", None) is not plain.forward:
        return f"{type(model).__name__} has a forward of its own"
    head, criterion = model.lm_head, inputs["diffusion_stopping_criteria"]
    known = [(inputs["sampler"], stock.EntropyBoundSampler), (head, nn.Linear)]
    known += [(x, stock.LinearTemperatureScheduleLogitsProcessor) for x in inputs["logits_processor"]]
    known += [(criterion, stock.StableAndConfidentStoppingCriteria)] if criterion is not None else []
    for part, wanted in known:
        if type(part) is not wanted:
            return f"there is a {type(part).__name__} in the place of a {wanted.__name__}"
    if head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return "lm_head has hooks"
    device = inputs["current_canvas"].device
    for weight in (head.weight, model.model.decoder.embed_tokens.weight):
        if type(weight) is not nn.Parameter or weight.device != device:
            return f"a weight of the vocabulary is no plain parameter on {device}"
    return None


@cache
def _log_once(reason: str) -> None:
    logger.warning("transformers.accelerate: %s; denoising takes the model's own step", reason)


def _step(
    model: DiffusionGemmaForBlockDiffusion,
    *,
    decoder_forward: Callable[..., Any],
    current_canvas: Tensor,
    argmax_canvas: Tensor,
    input_ids: Tensor,
    decoder_position_ids: Tensor,
    self_conditioning_logits: Tensor | SoftLogits | None,
    mask_mapping: dict[str, Tensor | None],
    finished_denoising: Tensor,
    cur_step: int,
    sampler: Any,
    logits_processor: Any,
    diffusion_stopping_criteria: Any,
    **model_kwargs: Any,
) -> Step:
    """A step without logits; the cache is in `model_kwargs`, by the name that this transformers gives it."""
    hidden = model.model(
        decoder_input_ids=current_canvas,
        self_conditioning_logits=self_conditioning_logits,
        decoder_attention_mask=mask_mapping,
        decoder_position_ids=decoder_position_ids,
        **model_kwargs,
    ).last_hidden_state
    done = finished_denoising.unsqueeze(-1)
    # A schedule divides logits by the temperature, so of ones it makes the inverse.
    ones = torch.ones(done.shape, device=done.device)
    heat = 1 / logits_processor(input_ids, ones, cur_step=cur_step)
    if isinstance(self_conditioning_logits, SoftLogits):
        # Who has finished stays with the logits of that step.
        hidden = torch.where(done.unsqueeze(-1), self_conditioning_logits.head.hidden, hidden)
        heat = torch.where(done, self_conditioning_logits.temperature, heat)

    head = LinearLogits(hidden, model.lm_head.weight, model.lm_head.bias)
    embeddings, softcap = model.model.decoder.embed_tokens.weight, model.final_logit_softcapping
    draw, soft = categorical.sample_expectation(head, embeddings, temperature=heat, softcap=softcap)
    entropy, argmax = draw.stats.entropy, draw.stats.argmax
    if bool((argmax < 0).any()):
        raise ValueError("transformers.accelerate: the decoder's hidden states are not finite")

    everywhere = torch.ones_like(argmax, dtype=torch.bool)
    sampler.accepted_token_mask = unmask.select(entropy, everywhere, entropy_bound=sampler.entropy_bound)
    accepted = torch.where(sampler.accepted_token_mask, draw.tokens, current_canvas)
    # Of the class: where generate compiles, the sampler's own is that of an earlier sampler.
    canvas = type(sampler).renoise_canvas(sampler, accepted, cur_step)

    canvas, argmax = torch.where(done, current_canvas, canvas), torch.where(done, argmax_canvas, argmax)
    if diffusion_stopping_criteria is not None:
        finished_denoising = finished_denoising | stops(diffusion_stopping_criteria, argmax, entropy)
    return canvas, argmax, SoftLogits(soft, head, softcap, heat), finished_denoising


def stops(criterion: Any, argmax: Tensor, entropy: Tensor) -> Tensor:
    """Who (B,) is stable and confident by a StableAndConfidentStoppingCriteria, whose history moves on.

    Args:
        argmax, entropy: (B, L).
    """
    # A vocabulary of one token has no entropy: everyone is confident, and the criterion tells who is stable.
    stable: Tensor = criterion(argmax, entropy.new_zeros(*entropy.shape, 1))
    confident: Tensor = entropy.mean(-1) < criterion.confidence_threshold
    return stable & confident
