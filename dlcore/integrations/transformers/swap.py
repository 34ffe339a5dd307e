"""Put dlcore into a transformers model in place, and take it out again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedModel

from dlcore.integrations.transformers import attention, diffusion_gemma

__all__ = ["accelerate", "restore"]

Model = TypeVar("Model", bound=PreTrainedModel)

#: The methods that give way, per model.
METHODS: dict[type[PreTrainedModel], dict[str, Callable[..., Any]]] = {
    DiffusionGemmaForBlockDiffusion: {"_denoising_step": diffusion_gemma.denoising_step},
}
#: Where a model notes what attention its config and its text config had before.
BEFORE = "_dlcore_before"


def accelerate(model: Model) -> Model:
    """Let `model.generate` run on dlcore, in place; returns the model.

    DiffusionGemma's denoising step becomes one sweep over the vocabulary that keeps no logits (temperature,
    softcap, draw, argmax, entropy, soft embedding), and attention over text ``attn_implementation="dlcore"``;
    images keep theirs. Acceptance, renoising and stopping decide as the model's own, and the draws follow the
    same law under `torch.manual_seed`, though they are not the same draws. `model(...)` still returns logits.

    `generate` takes the model's own step, and says so once in the log "dlcore", where that needs logits: with
    logits processors, samplers or adaptive stopping criteria of other classes than DiffusionGemma's own, or
    with a head that is no plain `torch.nn.Linear` on the device of the tokens.

    Nothing is subclassed: deep copies are accelerated, too. Accelerating twice changes nothing.

    Args:
        model: a DiffusionGemmaForBlockDiffusion.

    Raises:
        TypeError: another model.

    Example:
        >>> from dlcore.integrations import transformers
        >>> transformers.accelerate("a name")
        Traceback (most recent call last):
            ...
        TypeError: transformers.accelerate: model must be a DiffusionGemmaForBlockDiffusion, got str
    """
    methods = _methods("transformers.accelerate", model)
    if not hasattr(model, BEFORE):
        before = _attention(model)
        model.set_attn_implementation(dict.fromkeys(before, attention.NAME))
        # Unlike a method, a partial survives deepcopy, which binds it to the copy, and pickle.
        swapped = {name: partial(function, model) for name, function in methods.items()}
        vars(model).update(swapped, **{BEFORE: before})
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place; returns the model. One that is not accelerated is left as it is.

    Args:
        model: a DiffusionGemmaForBlockDiffusion.

    Raises:
        TypeError: another model.

    Example:
        >>> from dlcore.integrations import transformers
        >>> transformers.restore("a name")
        Traceback (most recent call last):
            ...
        TypeError: transformers.restore: model must be a DiffusionGemmaForBlockDiffusion, got str
    """
    methods = _methods("transformers.restore", model)
    if hasattr(model, BEFORE):
        model.set_attn_implementation(getattr(model, BEFORE))
        for name in (*methods, BEFORE):
            delattr(model, name)
    return model


def _methods(op: str, model: object) -> dict[str, Callable[..., Any]]:
    """What to swap in this model."""
    for supported, methods in METHODS.items():
        if isinstance(model, supported):
            return methods
    names = " or ".join(supported.__name__ for supported in METHODS)
    raise TypeError(f"{op}: model must be a {names}, got {type(model).__name__}")


def _attention(model: PreTrainedModel) -> dict[str, str]:
    """As `set_attn_implementation` takes it."""
    config = model.config
    return {"": config._attn_implementation, "text_config": config.text_config._attn_implementation}
