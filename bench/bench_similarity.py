"""Cosines between new values and a cache's: what dLLM-Cache computes in every layer of every step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, Shape, Work, name, nbytes, normal, rows
from dlcore import similarity
from dlcore.attention import KVCache

#: Sequences, rows of their responses, heads, head dimension; a response starts after a prompt.
SHAPE, TINY = (2, 512, 32, 128), (2, 5, 2, 16)
PROMPT = 256


def _cosines(shape: Shape, dtype: torch.dtype, page_size: int | None) -> Work:
    """New values of the responses (B, n, H, D) against those of a cache, at positions of each sequence's."""
    batch, count, heads, dim = shape
    cache = KVCache(1, batch, PROMPT + batch + count, heads, dim, dtype=dtype, page_size=page_size)
    new = normal(shape, dtype)
    at = PROMPT + torch.arange(batch).unsqueeze(1) + torch.arange(count)
    cache.scatter(0, at, new, (new + normal(shape, dtype, seed=1)).to(dtype))
    values, table = cache.view(0)[1], cache.page_table

    def ours(new: Tensor, at: Tensor) -> Tensor:
        return similarity.cosine(new, values, at, page_table=table)

    def torchs(new: Tensor, at: Tensor) -> Tensor:
        """In the form of public code: the cached rows gathered, then compared."""
        held = values if table is None else values[table.long()].flatten(1, 2)
        held = held.gather(1, at[..., None, None].expand_as(new))
        return F.cosine_similarity(new.flatten(2), held.flatten(2).to(new.dtype), dim=-1)

    def check(result: Tensor, new: Tensor, at: Tensor) -> None:
        rounding = torch.finfo(torch.float32 if result.dtype == torch.float32 else dtype).eps
        torch.testing.assert_close(result.double(), torchs(new.double(), at), rtol=0, atol=8 * rounding)

    return Work(
        inputs=(new, at), functions={"dlcore": ours, "eager": torchs}, check=check, bytes=2 * nbytes(new)
    )


CASES = tuple(
    Case("similarity.cosine", SHAPE, TINY, lambda s, d=dtype, p=page: _cosines(s, d, p), note)  # type: ignore[misc]
    for dtype, page, note in (
        (torch.float32, None, "float32"),
        (torch.bfloat16, None, "bfloat16"),
        (torch.bfloat16, 32, "bfloat16, pages of 32"),
    )
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_similarity(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
