"""The attention "dlcore" of transformers: ``attn_implementation="dlcore"`` for any of its models.

A mask travels from transformers' mask functions to the layers as key intervals, int32 (B or 1, 1, S, 4): a
row (start, stop, start, stop) sees keys [start, stop) of both pairs. A mask that needs more stays SDPA's
boolean one, and SDPA attends; the log "dlcore" says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from dlcore import attention
from dlcore._checks import FLOATING
from dlcore._ops.attention import MAX_HEAD_DIM
from dlcore.reference.attention import visible

logger = logging.getLogger("dlcore")

NAME = "dlcore"

#: What the log has said already.
_told: set[str] = set()


def register() -> None:
    """Make ``attn_implementation="dlcore"`` known to transformers: its attention and its mask."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)


def runs(mask: Tensor) -> Tensor | None:
    """The runs of keys that rows of a bool mask (N, S, T) see, int32 (N, 1, S, 4); None if a row has three.

    Example:
        >>> import torch
        >>> from dlcore.integrations.transformers import attention
        >>> attention.runs(torch.tensor([[[True, False, True, True]]]))
        tensor([[[[0, 1, 2, 4]]]], dtype=torch.int32)
    """
    padded = nn.functional.pad(mask, (1, 1))
    edges = padded[..., 1:] != padded[..., :-1]
    count = edges.sum(-1).flatten()
    if bool((count > 4).any()):
        return None
    row, position = edges.flatten(0, 1).nonzero().unbind(1)
    slot = torch.arange(len(row), device=mask.device) - (count.cumsum(0) - count)[row]
    bounds = torch.zeros(len(count), 4, dtype=torch.int32, device=mask.device)
    bounds[row, slot] = position.to(torch.int32)
    return bounds.view(mask.shape[0], 1, mask.shape[1], 4)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor:
    """transformers' mask as key intervals, int32 (B or 1, 1, S, 4); bool (B, 1, S, T) if two fall short.

    Plain causal and bidirectional masks, with padding or without, cost O(B·(S + T)); others, such as sliding
    windows, are evaluated whole. Under torch.compile only a plain mask without padding gives intervals.

    Args:
        batch_size, q_length, kv_length: B, S and T.
        q_offset, kv_offset: positions of the first query and the first key.
        mask_function: whether a query sees a key, as in `transformers.masking_utils`.
        attention_mask: (B, length) bool, False at padding.
    """
    if mask_function in (causal_mask_function, bidirectional_mask_function):
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        bounds = _key_runs(padding, kv_length, kv_offset, device)
        if bounds is not None and mask_function is causal_mask_function:
            stop = torch.arange(1, q_length + 1, device=device) + (q_offset - kv_offset)
            bounds = torch.minimum(bounds, stop.clamp(min=0).to(torch.int32).unsqueeze(-1))
        if bounds is not None:
            return bounds.expand(-1, 1, q_length, 4)
    options: dict[str, Any] = {
        **kwargs,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
    }
    mask = sdpa_mask(batch_size, q_length, kv_length, **options)
    assert mask is not None
    # Without padding every sequence has the same mask, expanded.
    found = _seen_runs(mask[:1] if mask.stride(0) == 0 else mask)
    return mask if found is None else found


def _key_runs(
    padding: Tensor | None, kv_length: int, kv_offset: int, device: torch.device | str
) -> Tensor | None:
    """The runs (B or 1, 1, 1, 4) of keys that are no padding."""
    if padding is None:
        return torch.tensor([[[[0, kv_length, 0, 0]]]], dtype=torch.int32, device=device)
    return _seen_runs(padding[:, None, None, kv_offset : kv_offset + kv_length])


def _seen_runs(mask: Tensor) -> Tensor | None:
    """`runs` of a mask (B, 1, S, T), unless the graph of a compiler must not depend on it."""
    return None if torch.compiler.is_compiling() else runs(mask.squeeze(1))


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A layer's attention, as transformers calls it.

    Falls back to SDPA, saying so once in the log "dlcore", for dropout, `position_bias`, float masks, masks
    per head or with more than two runs of keys in a row, and head dimensions beyond the kernels'. A row that
    sees no key gives 0.

    Args:
        module: the layer; `is_causal` and `num_key_value_groups` are read.
        query: (B, Hq, S, D). key: (B, Hkv, T, D). value: (B, Hkv, T, Dv).
        attention_mask: intervals of `make_mask`, bool (B or 1, 1, S, T), or None: row s sees keys up to s if
            `is_causal` (by default the module's) and S > 1, else all.
        scaling: of the scores, by default D^-1/2.
        softcap: of the scores, or None.
        s_aux: (Hq,) attention sinks: a score more in each row's softmax, without a value.

    Returns:
        (B, S, Hq, Dv), contiguous, and None for the weights.

    Raises:
        NotImplementedError: a fallback with softcap or sinks, which SDPA does not know.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    reason = _refusal(query, key, value, attention_mask, dropout, kwargs)
    bounds = None if reason else _bounds(query, key, attention_mask, causal)
    if bounds is None:
        _fall_back(reason or "a mask with more than two runs of keys in a row", softcap, s_aux)
        mask = attention_mask if attention_mask is None else _dense(attention_mask, key.shape[2])
        options = {"dropout": dropout, "scaling": scaling, "is_causal": causal, **kwargs}
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
        return result
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    starts, stops = bounds[:, 0, :, ::2], bounds[:, 0, :, 1::2]
    out, lse = attention.intervals(
        q, k, v, starts, stops, softmax_scale=scaling, softcap=softcap or 0.0, return_lse=True
    )
    return (out if s_aux is None else _sink(out, lse, s_aux)), None


def _is_intervals(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.shape[-1] == 4


def _refusal(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> str | None:
    """Why SDPA has to attend, from all but the mask's values; None if it has not."""
    if dropout:
        return "attention dropout"
    if kwargs.get("position_bias") is not None:
        return "a position bias"
    if query.dtype not in FLOATING or not query.dtype == key.dtype == value.dtype:
        return f"dtypes {query.dtype}, {key.dtype}, {value.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"head dimensions {query.shape[-1]} and {value.shape[-1]}"
    if key.shape[0] != query.shape[0]:
        return "queries and keys of different batches"
    if mask is None or _is_intervals(mask):
        return None
    if mask.dtype != torch.bool:
        return f"a mask of {mask.dtype}"
    if mask.shape[1:] != (1, query.shape[2], key.shape[2]):
        return "a mask that is not (B or 1, 1, S, T)"
    return "a dense mask under torch.compile" if torch.compiler.is_compiling() else None


def _bounds(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """The intervals of a layer; None if a row sees more than two runs of keys."""
    if mask is None:
        rows, keys = query.shape[2], key.shape[2]
        function = causal_mask_function if causal and rows > 1 else bidirectional_mask_function
        return make_mask(1, rows, keys, mask_function=function, device=query.device)
    return mask if _is_intervals(mask) else runs(mask.squeeze(1))


def _dense(mask: Tensor, keys: int) -> Tensor:
    """A mask as SDPA takes it."""
    if not _is_intervals(mask):
        return mask
    return visible(mask[:, 0, :, ::2], mask[:, 0, :, 1::2], keys).unsqueeze(1)


def _fall_back(reason: str, softcap: float | None, s_aux: Tensor | None) -> None:
    """Say once that SDPA attends, if it can."""
    if softcap is not None or s_aux is not None:
        raise NotImplementedError(
            f"transformers attention {NAME!r}: softcap and sinks cannot run with {reason}; "
            "use attn_implementation='eager'"
        )
    if reason not in _told and not torch.compiler.is_compiling():
        _told.add(reason)
        logger.warning("transformers attention %r: SDPA attends, because of %s", NAME, reason)


def _sink(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """out (B, S, H, D) with a score (H,) more in each softmax, whose log-sum-exp was lse (B, H, S)."""
    share = torch.sigmoid(lse.transpose(1, 2) - sinks.to(lse.dtype)).unsqueeze(-1)
    return (out * share).to(out.dtype)
