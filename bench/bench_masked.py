"""Masked diffusion: MDLM's and ReMDM's steps, the NELBO, and LLaDA's unmasking by confidence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench import peers
from bench.bench_uniform import ALPHA_T, MIXTURE, NEXT, SHAPE, TINY, moved_bytes
from bench.case import (
    Case,
    Shape,
    Work,
    name,
    nbytes,
    normal,
    random_tokens,
    rows,
    rows_agree,
    tokens_in_range,
)
from dlcore import categorical, rng
from dlcore.process import masked, unmask

Select = Callable[[Tensor, Tensor], Tensor]

SIGMA = 0.02
LLADA, TINY_LLADA = (1, 256, 126464), (2, 8, 1003)


def _half_masked(shape: Shape) -> tuple[Tensor, int]:
    """Tokens of which every other is the mask, which is the last id."""
    mask_id = shape[-1] - 1
    z = random_tokens(shape[:-1], mask_id)
    return torch.where(torch.arange(z.numel()).view_as(z) % 2 == 0, mask_id, z), mask_id


def _step(shape: Shape, alpha_s: float, *, every_row: bool = False, remask: float = 0.0) -> Work:
    """An ordinary step on half-masked tokens, or the last one on masks alone, which reads every row."""
    logits = normal(shape)
    z, mask_id = _half_masked(shape)
    z = torch.full_like(z, mask_id) if every_row else z
    key = rng.key(7)

    def ours(x: Tensor, z: Tensor) -> Tensor:
        return masked.step(x, z, ALPHA_T, alpha_s, mask_id, remask=remask, key=key)

    eager = partial(peers.mdlm_step, alpha_t=ALPHA_T, alpha_s=alpha_s, mask_id=mask_id)
    if remask:
        eager = partial(peers.remdm_step, alpha_t=ALPHA_T, alpha_s=alpha_s, mask_id=mask_id, sigma=remask)

    def check(result: Tensor, logits: Tensor, z: Tensor) -> None:
        tokens_in_range(result, logits)
        assert alpha_s < 1 or not bool((result == mask_id).any())
        assert remask or bool((result == z)[z != mask_id].all())

    return Work(
        inputs=(logits, z),
        functions={"dlcore": ours, "eager": eager},
        check=check,
        bytes=nbytes(logits) if every_row else moved_bytes(ours, logits, z),
    )


def _nelbo(shape: Shape) -> Work:
    logits, x = normal(shape), random_tokens(shape[:-1], shape[-1] - 1, seed=2)
    half, mask_id = _half_masked(shape)
    z = torch.where(half == mask_id, mask_id, x)

    def eager(logits: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return peers.mdlm_nelbo(logits, z, x, ALPHA_T, -1.0, mask_id)

    return Work(
        inputs=(logits, z, x),
        functions={
            "dlcore": lambda a, z, x: masked.nelbo(a, z, x, ALPHA_T, -1.0, mask_id),
            "eager": eager,
        },
        check=rows_agree(eager, 1),
        bytes=2 * nbytes(logits),  # half is read forward; half is read and all is written backward
        differentiate=1,
    )


def _confidence(shape: Shape, *, select: Select, eager: Callable[..., Tensor], dtype: torch.dtype) -> Work:
    """LLaDA's step: draw every masked position, commit the selected."""
    logits, mask_id = normal(shape, dtype), shape[-1] - 1
    z = torch.full(shape[:-1], mask_id)

    def ours(x: Tensor, z: Tensor) -> Tensor:
        draw = categorical.sample(x)
        return torch.where(select(draw.logprob.exp(), z == mask_id), draw.tokens, z)

    return Work(
        inputs=(logits, z),
        functions={"dlcore": ours, "eager": partial(eager, mask_id=mask_id)},
        check=tokens_in_range,
        bytes=nbytes(logits),
    )


def _step_case(note: str, build: Callable[[Shape], Work], providers: tuple[str, ...]) -> Case:
    return Case("masked.step", SHAPE, TINY, build, note, MIXTURE, providers)


def _llada_case(note: str, build: Callable[[Shape], Work], providers: tuple[str, ...]) -> Case:
    return Case("unmask.select", LLADA, TINY_LLADA, build, note, "categorical.sample", providers)


ALL, QUICK = ("dlcore", "eager", "compile"), ("dlcore", "eager")
TOP_K = partial(_confidence, select=partial(unmask.select, top_k=4), eager=partial(peers.llada_step, count=4))
THRESHOLD = partial(
    _confidence,
    select=partial(unmask.select, threshold=0.9),
    eager=partial(peers.threshold_step, threshold=0.9),
)
CASES = (
    _step_case("α_s=1, all masked: every row read", partial(_step, alpha_s=1.0, every_row=True), ALL),
    _step_case("a step of 64: rows that stay are not read", partial(_step, alpha_s=NEXT), QUICK),
    _step_case("ReMDM, a step of 64", partial(_step, alpha_s=NEXT, remask=SIGMA), ALL),
    Case(
        "masked.nelbo",
        (256, 50257),
        (6, 1003),
        _nelbo,
        "half masked, forward, backward",
        "categorical.log_probs",
        QUICK,
    ),
    _llada_case("LLaDA, top_k", partial(TOP_K, dtype=torch.float32), ALL),
    _llada_case("LLaDA, top_k, bfloat16", partial(TOP_K, dtype=torch.bfloat16), QUICK),
    _llada_case("Fast-dLLM, threshold", partial(THRESHOLD, dtype=torch.float32), QUICK),
)


@pytest.mark.parametrize(("case", "provider"), rows(CASES), ids=name)
def test_masked(case: Case, provider: str, measure: Callable[[Case, str], None]) -> None:
    measure(case, provider)
