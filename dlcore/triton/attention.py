"""The attention family in Triton."""

from dlcore.triton.attention_backward import intervals_backward
from dlcore.triton.attention_decode import decode
from dlcore.triton.attention_forward import intervals

__all__ = ["decode", "intervals", "intervals_backward"]
