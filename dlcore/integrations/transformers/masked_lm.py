"""Parallel decoding of masked language models, without their logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, ModernBertForMaskedLM, PreTrainedModel

from dlcore import LinearLogits, categorical, rng
from dlcore import _checks as checks
from dlcore.process.unmask import select

__all__ = ["unmask"]

#: An encoder, the transform of its hidden states, and the linear head.
Parts = tuple[nn.Module, nn.Module, nn.Linear]

PARTS: dict[type[PreTrainedModel], Callable[[Any], Parts]] = {
    BertForMaskedLM: lambda model: (
        model.bert,
        model.cls.predictions.transform,
        model.cls.predictions.decoder,
    ),
    ModernBertForMaskedLM: lambda model: (model.model, model.head, model.decoder),
}

OP = "transformers.unmask"


@torch.no_grad()
def unmask(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    mask_id: int,
    steps: int | None = None,
    threshold: float | Tensor | None = None,
    factor: float | Tensor | None = None,
    entropy_bound: float | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fill in the masked positions of `input_ids` in parallel, the most confident first.

    Each step runs the encoder once, draws a token for every position that is still masked, and commits some
    of these by exactly one rule; what is committed stays. A draw's confidence is its probability under the
    model at `temperature`, where the mask token has none. Logits (B, L, V) never exist, and the head is run
    where something is masked only. `model.training` is left as it is.

    - steps: so many steps, or fewer if nothing is left; each commits the ⌈masked / steps left⌉ most confident
      positions of a sequence (MaskGIT, arXiv 2202.04200, LLaDA, arXiv 2502.09992; a linear schedule).
    - threshold, factor, entropy_bound: the rules of `dlcore.process.unmask.select`, until nothing is masked
      (Fast-dLLM, arXiv 2505.22618; EB-sampler, arXiv 2505.24857).

    Args:
        model: a BertForMaskedLM or ModernBertForMaskedLM.
        input_ids: (B, L) int64.
        attention_mask: (B, L), 0 at padding; by default every position is seen.
        mask_id: the token to fill in.
        steps: at least 1.
        threshold, factor, entropy_bound: a number, or (B,), one per sequence.
        temperature: non-negative, a number or (B,). At 0 the argmax, with its confidence at temperature 1.
        key: int64 (2,) or one per sequence (B, 2), see `dlcore.rng`; else from `generator` or torch's own.

    Returns:
        (B, L) int64: `input_ids`, without mask tokens.

    Raises:
        TypeError: another model, a head that is no plain Linear, dtypes.
        ValueError: shapes, devices, ids, not exactly one rule, a value out of range, hidden states that are
            not finite.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> from dlcore.integrations import transformers
        >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        >>> model = BertForMaskedLM(BertConfig(vocab_size=100, **sizes)).eval()
        >>> filled = transformers.unmask(model, torch.tensor([[5, 99, 99, 7]]), mask_id=99, steps=2)
        >>> bool((filled == 99).any()), filled[0, [0, 3]].tolist()
        (False, [5, 7])
    """
    parts = _parts(model)
    _check_ids(input_ids, attention_mask, mask_id, parts[-1])
    batch, device = input_ids.shape[:1], input_ids.device
    given = {"steps": steps, "threshold": threshold, "factor": factor, "entropy_bound": entropy_bound}
    name, value = _rule(given, batch, device)
    heat = _per_sequence("temperature", temperature, batch, device).float()
    checks.value_range(OP, "temperature", heat, 0)
    keys = checks.key(OP, key, generator, batch, device)
    keys = keys if keys.dim() == 2 else rng.split(keys, batch)

    ids, masked, step = input_ids.clone(), input_ids == mask_id, 0
    while bool(masked.any()):
        sequence, position = masked.nonzero(as_tuple=True)
        draw = categorical.sample(
            _logits(parts, ids, attention_mask, masked),
            temperature=heat.expand(batch)[sequence],
            exclude=mask_id,
            key=rng.fold_in(rng.fold_in(keys, step)[sequence], position),
        )
        if bool((draw.tokens < 0).any()):
            raise ValueError(f"{OP}: the model's hidden states are not finite")
        drawn = ids.masked_scatter(masked, draw.tokens)
        score = draw.logprob.new_zeros(ids.shape).masked_scatter(masked, _score(name, draw))
        if name == "steps":
            accepted = select(score, masked, top_k=-(-masked.sum(-1) // (value - step)))
        else:
            accepted = select(score, masked, **{name: value})
        ids, masked, step = torch.where(accepted, drawn, ids), masked & ~accepted, step + 1
    return ids


def _parts(model: object) -> Parts:
    for supported, parts in PARTS.items():
        if isinstance(model, supported):
            found = parts(model)
            if type(found[-1]) is not nn.Linear:
                raise TypeError(f"{OP}: model's head must be a Linear, got {type(found[-1]).__name__}")
            return found
    names = " or ".join(supported.__name__ for supported in PARTS)
    raise TypeError(f"{OP}: model must be a {names}, got {type(model).__name__}")


def _check_ids(input_ids: Tensor, attention_mask: Tensor | None, mask_id: int, head: nn.Linear) -> None:
    checks.tokens(OP, "input_ids", input_ids, device=head.weight.device)
    if input_ids.dim() != 2:
        raise ValueError(f"{OP}: input_ids must be (B, L), got {tuple(input_ids.shape)}")
    vocab = head.weight.shape[0]
    checks.token_range(OP, "input_ids", input_ids, vocab)
    checks.integer(OP, "mask_id", mask_id)
    checks.token_id(OP, "mask_id", mask_id, vocab)
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"{OP}: attention_mask must be a Tensor, got {checks.describe(attention_mask)}")
    if attention_mask.shape != input_ids.shape:
        wanted, got = tuple(input_ids.shape), tuple(attention_mask.shape)
        raise ValueError(f"{OP}: attention_mask must have shape {wanted}, got {got}")
    checks.on_device(OP, "attention_mask", attention_mask, input_ids.device)


def _per_sequence(name: str, value: Any, batch: torch.Size, device: torch.device) -> Tensor:
    tensor = checks.per_row(OP, name, value, batch, device, torch.float64)
    if tensor is None:
        raise TypeError(f"{OP}: {name} must be a number or a Tensor, got None")
    return tensor


def _rule(given: dict[str, Any], batch: torch.Size, device: torch.device) -> tuple[str, Any]:
    """The name and the value of the one rule that is given."""
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise ValueError(f"{OP}: give exactly one of {', '.join(given)}, got {', '.join(names) or 'none'}")
    name, value = names[0], given[names[0]]
    if name == "steps":
        checks.integer(OP, name, value)
        if value < 1:
            raise ValueError(f"{OP}: steps must be at least 1, got {value}")
        return name, value
    value = _per_sequence(name, value, batch, device)
    checks.value_range(OP, name, value, -torch.inf if name == "threshold" else 0)
    return name, value


def _logits(parts: Parts, ids: Tensor, attention_mask: Tensor | None, masked: Tensor) -> LinearLogits:
    """The logits (n, V) of the n masked positions."""
    encoder, transform, head = parts
    hidden = encoder(ids, attention_mask=attention_mask, return_dict=True).last_hidden_state[masked]
    # Under autocast the transform's dtype is not the head's.
    return LinearLogits(transform(hidden).to(head.weight.dtype), head.weight, head.bias)


def _score(rule: str, draw: categorical.Draw) -> Tensor:
    """(n,) of what the rule compares."""
    if rule == "entropy_bound":
        return draw.stats.entropy
    # Probabilities near 1 are equal in float32, their logarithms are not.
    return draw.logprob if rule == "steps" else draw.logprob.exp()
