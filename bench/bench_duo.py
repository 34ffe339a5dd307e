"""Duo's curriculum: the tempered softmax of a Gaussian state and the embedding it is fed as, at GPT-2's V."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.case import Case, Shape, Work, name, nbytes, normal, random_tokens, rows
from dlcore import rng
from dlcore.process import duo

#: Sequences, tokens of each, V, dimensions of an embedding.
SHAPE, TINY = (8, 128, 50_257, 768), (2, 8, 50, 16)
GAMMA, TAU, TERMS = -2.5, 1e-3, 2


def dense(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """In the form of the published definition: the state, its argmax and its softmax, (B, L, V) each."""
    signal, spread = (math.sqrt(1 / (1 + math.exp(g))) for g in (GAMMA, -GAMMA))
    clean = F.one_hot(x, len(table)).to(table.dtype)
    state = signal * clean + spread * torch.randn_like(clean)
    return state.argmax(-1), torch.softmax(state / TAU, -1) @ table


def _curriculum(shape: Shape, terms: int) -> Work:
    *lead, vocab, width = shape
    x, table, key = random_tokens(tuple(lead), vocab), normal((vocab, width)), rng.key(7)

    def ours(x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        z, ids, weights = duo.curriculum(x, GAMMA, TAU, vocab, top_k=terms, key=key)
        return z, duo.embed(ids, weights, table)

    def check(result: tuple[Tensor, Tensor], x: Tensor, table: Tensor) -> None:
        """z is x as often as T(γ) says; so cold a softmax is z's own row."""
        z, soft = result
        alpha = float(duo.transform(GAMMA, vocab)[0])
        stays = alpha + (1 - alpha) / vocab
        error = math.sqrt(stays * (1 - stays) / x.numel())
        assert abs(float((z == x).double().mean()) - stays) < 5 * error
        nearest = F.cosine_similarity(soft, table[z], dim=-1)
        assert float(nearest.median()) > 0.99

    rows_read = terms * nbytes(table) // vocab * x.numel()
    return Work(
        inputs=(x, table),
        functions={"dlcore": ours, "eager": dense},
        check=check,
        bytes=rows_read + nbytes(table) // vocab * x.numel() + 2 * nbytes(x),
    )


CASES = tuple(
    Case("duo.curriculum", SHAPE, TINY, partial(_curriculum, terms=terms), f"{terms} terms", "rng.normal")
    for terms in (TERMS, 5)
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_duo(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
