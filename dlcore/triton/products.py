"""Matrix products of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

#: The interpreter multiplies bfloat16 by its bits.
EMULATED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, total):
    """total + a·b with float32 sums; float32 factors as they are, not rounded to TensorFloat-32."""
    if EMULATED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
