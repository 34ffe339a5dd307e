"""Logits that stay a product: a language-model head's input and its weight."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlcore._checks import FLOATING, describe, on_device

if TYPE_CHECKING:
    from dlcore.distributed.groups import Group


@dataclass(frozen=True)
class LinearLogits:
    """The logits ``hidden @ weight.T + bias``, accepted wherever dlcore takes logits, never stored whole.

    Args:
        hidden: (..., D), D at least 1, float32, bfloat16, float16 or float64 (on the reference).
        weight: (V, D), of hidden's dtype.
        bias: (V,), optional.
        group: a ProcessGroup or a DeviceMesh of one dimension, over whose ranks the vocabulary lies: weight
            and bias are then this rank's tokens, (V_r, D) and (V_r,), after those of the rank before; see
            `dlcore.distributed`. Of DTensors sharded on dimension 0 it is their own. None, as
            torch.distributed.group.WORLD is before init_process_group, says that all of it is here.
        sizes: every rank's V_r; None says that all are equal.

    Products are accumulated in float32, or float64 for float64. Gradients reach hidden, weight and bias.

    Raises:
        ValueError: the shapes or the devices do not fit.
        TypeError: no Tensor, a dtype that is not floating, or dtypes that differ.

    Example:
        >>> import torch, dlcore
        >>> logits = dlcore.LinearLogits(torch.randn(2, 3, 8), torch.randn(100, 8))
        >>> logits.shape
        torch.Size([2, 3, 100])
        >>> dlcore.categorical.sample(logits).tokens.shape
        torch.Size([2, 3])
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    group: Group | None = field(default=None, kw_only=True)
    sizes: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        hidden, weight, bias = self.hidden, self.weight, self.bias
        for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if not isinstance(x, Tensor) and not (name == "bias" and x is None):
                raise TypeError(f"LinearLogits: {name} must be a Tensor, got {describe(x)}")
        given = (hidden, weight, bias, self.group, self.sizes)
        if given[3:] != (None, None) or any(hasattr(x, "placements") for x in given[:3]):
            from dlcore.distributed.logits import head_shards

            fields = ("hidden", "weight", "bias", "group", "sizes")
            for name, value in zip(fields, head_shards(*given), strict=True):
                object.__setattr__(self, name, value)
            hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden.dim() < 1 or weight.dim() != 2 or not 1 <= hidden.shape[-1] == weight.shape[1]:
            raise ValueError(
                "LinearLogits: weight must be (V, D) for hidden (..., D), D >= 1, "
                f"got hidden {describe(hidden)} and weight {describe(weight)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"LinearLogits: bias must be ({weight.shape[0]},), got {describe(bias)}")
        for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.layout != torch.strided:
                raise TypeError(f"LinearLogits: {name} must be dense, got {tensor.layout}")
            if tensor is not None and (tensor.dtype not in FLOATING or tensor.dtype != hidden.dtype):
                raise TypeError(
                    f"LinearLogits: {name} must be floating and of hidden's dtype {hidden.dtype}, "
                    f"got {tensor.dtype}"
                )
            if tensor is not None:
                on_device("LinearLogits", name, tensor, hidden.device)

    @property
    def shape(self) -> torch.Size:
        """(..., V), of all ranks' tokens."""
        vocab = self.weight.shape[0] if self.sizes is None else sum(self.sizes)
        return torch.Size((*self.hidden.shape[:-1], vocab))

    @property
    def device(self) -> torch.device:
        """The device of hidden."""
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden and weight."""
        return self.hidden.dtype

    def materialize(self) -> Tensor:
        """The (..., V) logits as one tensor, in float32 or wider: for tests and small vocabularies.

        Of a vocabulary over ranks this rank's (..., V_r).
        """
        from dlcore.reference.categorical import materialize

        with torch.autocast(self.device.type, enabled=False):
            return materialize(self.hidden, self.weight, self.bias)
