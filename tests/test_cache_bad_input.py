"""What the refresh policies refuse, and how they say so."""

from __future__ import annotations

import re

import pytest
import torch
from test_cache import LENGTHS, MASK, PROMPT, start

from dlcore.process import cache

TOKENS, KV = start()
BOOLS, LENGTH = TOKENS == MASK, LENGTHS
ROWS = cache.rows(BOOLS)
FLOATS = torch.zeros(3, 13, 2, 8)
BAD = [
    (lambda: cache.rows(TOKENS), TypeError, "cache.rows: mask must be a bool Tensor, got int64 (3, 16)"),
    (lambda: cache.rows(BOOLS[0]), ValueError, "cache.rows: mask must have shape (B, L), got (16,)"),
    (lambda: cache.rows(BOOLS, 12), ValueError, "cache.rows: size must hold the mask's 13 rows, got 12"),
    (lambda: cache.rows(BOOLS, -1), ValueError, "cache.rows: size must be at least 0, got -1"),
    (lambda: cache.rows(BOOLS, 1.0), TypeError, "cache.rows: size must be an int, got float 1.0"),
    (lambda: cache.take(TOKENS, (1, 2)), TypeError, "cache.take: rows must be Rows, got tuple (1, 2)"),
    (lambda: cache.take([1], ROWS), TypeError, "cache.take: x must be a Tensor, got list [1]"),
    (
        lambda: cache.take(TOKENS[:2], ROWS),
        ValueError,
        "cache.take: rows.positions must be (B, n) for x (B, L, ...)",
    ),
    (
        lambda: cache.take(TOKENS[:, :9], ROWS),
        ValueError,
        "cache.take: rows.positions must lie in [0, 9), got 15",
    ),
    (
        lambda: cache.put(TOKENS, ROWS, ROWS.positions.int()),
        TypeError,
        "cache.put: values must be a torch.int64 Tensor",
    ),
    (
        lambda: cache.put(TOKENS, ROWS, TOKENS),
        ValueError,
        "cache.put: values must have shape (3, 13), got (3, 16)",
    ),
    (
        lambda: cache.attend(FLOATS, FLOATS, FLOATS, None, 0, ROWS),
        TypeError,
        "cache.attend: cache must be a KVCache",
    ),
    (lambda: cache.attend(FLOATS[:, :3], FLOATS, FLOATS, KV, 0, ROWS), ValueError, "for q (B, n, ...)"),
    (
        lambda: cache.attend(FLOATS, FLOATS.half(), None, KV, 0, ROWS),
        TypeError,
        "k must have the cache's dtype",
    ),
    (lambda: cache.attend(FLOATS, None, None, KV, 2, ROWS), ValueError, "layer must lie in [0, 2), got 2"),
    (
        lambda: cache.attend(FLOATS, None, None, KV, 0, ROWS, softcap=-1.0),
        ValueError,
        "softcap must lie in [0, inf]",
    ),
    (lambda: cache.similarity(FLOATS, None, 0, ROWS), TypeError, "cache.similarity: cache must be a KVCache"),
    (lambda: cache.similarity(FLOATS[..., :3], KV, 0, ROWS), ValueError, "v must be (3, n, 2, 8)"),
    (
        lambda: cache.dkv_decode(TOKENS, LENGTH, 0),
        TypeError,
        "cache.dkv_decode: decoded must be a bool Tensor",
    ),
    (lambda: cache.dkv_decode(BOOLS, LENGTH + 1, 0), ValueError, "lengths must lie in [0, 16], got 17"),
    (lambda: cache.dkv_decode(BOOLS, LENGTH[:2], 0), ValueError, "lengths must have shape (3,), got (2,)"),
    (
        lambda: cache.dkv_decode(BOOLS, 16, 0),
        TypeError,
        "lengths must be an int32 or int64 Tensor, got int 16",
    ),
    (lambda: cache.dkv_decode(BOOLS, LENGTH, -1), ValueError, "step must lie in [0, inf], got -1"),
    (lambda: cache.dkv_decode(BOOLS, LENGTH, None), TypeError, "step must be an int or an integer Tensor"),
    (
        lambda: cache.dkv_decode(BOOLS, LENGTH, 0, interval=0),
        ValueError,
        "interval must be at least 1, got 0",
    ),
    (
        lambda: cache.dkv_greedy(BOOLS, BOOLS[:2], LENGTH, 0),
        ValueError,
        "last must have shape (3, 16), got (2, 16)",
    ),
    (
        lambda: cache.dkv_greedy(BOOLS, BOOLS, LENGTH, 0, window=-1),
        ValueError,
        "window must be at least 0, got -1",
    ),
    (lambda: cache.prefix_cache(PROMPT, LENGTH, 12), ValueError, "lengths must lie in [0, 12], got 16"),
    (
        lambda: cache.prefix_cache(PROMPT, None, 16),
        TypeError,
        "lengths must be an int32 or int64 Tensor, got NoneType None",
    ),
    (lambda: cache.prefix_cache(-PROMPT, LENGTH, 16), ValueError, "start must lie in [0, inf], got -3"),
    (lambda: cache.prefix_cache(PROMPT, LENGTH, 0), ValueError, "max_len must be at least 1, got 0"),
    (lambda: cache.prefix_cache(PROMPT, LENGTH, 16, 1), TypeError, "fresh must be a bool or a bool Tensor"),
    (
        lambda: cache.prefix_cache(PROMPT, LENGTH, 16, BOOLS),
        ValueError,
        "fresh must be a bool or a bool Tensor (3,)",
    ),
    (lambda: cache.dual_cache(PROMPT, 0, LENGTH, 16), ValueError, "block_size must be at least 1, got 0"),
    (
        lambda: cache.dllm_cache(PROMPT, LENGTH, 16, 0, prompt_interval=0, response_interval=1),
        ValueError,
        "cache.dllm_cache: prompt_interval must be at least 1, got 0",
    ),
    (lambda: cache.least_similar(BOOLS.float(), BOOLS, 1.5), ValueError, "ratio must lie in [0, 1], got 1.5"),
    (lambda: cache.least_similar(BOOLS, BOOLS, 0.5), TypeError, "similarity must be float32"),
    (
        lambda: cache.least_similar(BOOLS.float(), BOOLS[:2], 0.5),
        ValueError,
        "candidates must have shape (3, 16)",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD, ids=[text for _, _, text in BAD])
def test_bad_input(call, error, text):
    with pytest.raises(error, match=re.escape(text)) as caught:
        call()
    assert re.match(r"(cache\.\w+|KVCache\.scatter): ", str(caught.value))
