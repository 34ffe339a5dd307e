"""The attention family in Triton."""

from dlcore.triton.attention_backward import intervals_backward
from dlcore.triton.attention_forward import intervals

__all__ = ["intervals", "intervals_backward"]
