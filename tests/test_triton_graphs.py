"""Calls that a CUDA graph captures once and replays with new values and advanced keys.

Without a GPU the same calls are made anew by Triton's interpreter instead of replayed, and held against the
CPU's kernels; a second test makes them without their kernels, where nothing may ask a tensor for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.nn import functional as F
from triton_calls import as_tuple, captured, quiet
from waiting import ON_GPU, nothing_waits

import dlcore
from dlcore import LinearLogits, attention, bits, categorical, rng, similarity, sphere
from dlcore._dispatch import run
from dlcore._registry import TRITON
from dlcore.process import guidance, uniform
from dlcore.triton import categorical as triton_categorical
from dlcore.triton import launch, linear_logits_scan

pytestmark = quiet

#: Rows of logits, rows of a head read tile by tile, the vocabulary, the depth of heads and of points.
ROWS, MANY, VOCAB, DEPTH = (64, 200, 20_011, 64) if ON_GPU else (3, 3, 600, 16)
#: Bits of a sequence; rows of a cache, tokens of a training sequence, and the width of a head of attention.
BITS, CACHED, LENGTH, WIDTH = (1024, 4096, 256, 128) if ON_GPU else (32, 24, 8, 16)

Result = Tensor | tuple[Tensor, ...]


class Case(NamedTuple):
    """Shapes of inputs, whose names' first parts say what is in them, a call of them, and the ops it runs."""

    inputs: dict[str, tuple[int, ...]]
    call: Callable[..., Result]
    ops: tuple[str, ...]


def fresh(name: str, shape: tuple[int, ...], number: int) -> Tensor:
    """New values for an input."""
    generator = torch.Generator().manual_seed(1000 * number + sum(name.encode()))
    kind = name.split("_")[0]
    if kind == "key":
        return rng.key(3, number)
    if kind == "token":
        return torch.randint(VOCAB, shape, generator=generator)
    if kind == "bit":
        return torch.randint(2, shape, generator=generator).float()
    if kind == "length":
        return torch.randint(CACHED // 2, shape, generator=generator, dtype=torch.int32)
    if kind == "share":
        return 0.2 + 0.6 * torch.rand(shape, generator=generator)
    if kind == "positive":
        return 0.5 + torch.rand(shape, generator=generator)
    normal = torch.randn(shape, generator=generator)
    if ON_GPU and kind in ("q", "k", "v", "past"):
        return normal.bfloat16()
    return F.normalize(normal, dim=-1) if kind == "point" else normal


def trained(call: Callable[..., Tensor], *leaves: str) -> Callable[..., Result]:
    """What a call gives, and its gradients in some inputs."""

    def run(**inputs: Tensor) -> Result:
        inputs |= {name: inputs[name].detach().requires_grad_() for name in leaves}
        out = call(**inputs)
        return (out.detach(), *torch.autograd.grad((out * out).sum(), [inputs[name] for name in leaves]))

    return run


def head(hidden: Tensor, weight: Tensor, bias: Tensor) -> LinearLogits:
    return LinearLogits(hidden, weight, bias)


def _cut(logits: Tensor, key: Tensor, share: Tensor, positive: Tensor) -> Result:
    draw = categorical.sample(logits, top_p=share, top_k=50, min_p=0.01, temperature=positive, key=key)
    return draw.tokens, draw.stats.logsumexp


def _drawn(hidden: Tensor, weight: Tensor, bias: Tensor, key: Tensor, positive: Tensor) -> Result:
    draw = categorical.sample(head(hidden, weight, bias), temperature=positive, key=key)
    return draw.tokens, draw.stats.entropy


def _both(logits: Tensor, table: Tensor, key: Tensor, positive: Tensor) -> Result:
    draw, mean = categorical.sample_expectation(logits, table, temperature=positive, key=key)
    return mean, draw.tokens


def _decode(page_size: int | None) -> Callable[..., Result]:
    def decode(q: Tensor, k: Tensor, v: Tensor, past: Tensor, length: Tensor) -> Result:
        options = {"dtype": q.dtype, "device": q.device, "page_size": page_size}
        cache = attention.KVCache(1, len(q), CACHED, k.shape[2], k.shape[3], **options)
        for store in cache.view(0):
            store.copy_(past.view(store.shape))
        cache.lengths.copy_(length)
        return attention.decode(q, k, v, cache, 0, num_commit=2, return_lse=True)

    return decode


def _moved(x: Tensor, bits_: Tensor, key: Tensor, positive: Tensor, share: Tensor) -> Result:
    return bits.step(x, bits_, positive, positive * share, gamma_next=share, key=key)


def _noise(key: Tensor, token: Tensor) -> Result:
    keys = rng.fold_in(key, token)
    return keys, rng.uniform(keys, 5), rng.normal(key, 5), rng.gumbel(keys, 5)


def _part(logits: Tensor, token: Tensor, key: Tensor, positive: Tensor) -> Result:
    row = (token + 512, positive, token + 512, positive, 30.0, 900, token < 0)
    return run("categorical.summary", logits, None, None, 512, *row, key)


LOGITS, TOKENS = (ROWS, VOCAB), (ROWS,)
HEAD = {"hidden": (ROWS, DEPTH), "weight": (VOCAB, DEPTH), "bias": (VOCAB,)}
TILED = HEAD | {"hidden": (MANY, DEPTH)}
POINTS = {"point_x": (ROWS, DEPTH), "point_y": (ROWS, DEPTH)}
TABLE = {"point_table": (VOCAB, DEPTH)}

CASES: dict[str, Case] = {
    "stats": Case(
        {"logits": LOGITS, "positive": ()},
        lambda logits, positive: tuple(
            x for x in categorical.stats(logits, temperature=positive) if x is not None
        ),
        ("categorical.stats",),
    ),
    "summary": Case(
        {"logits": LOGITS, "token": TOKENS, "key": (2,), "positive": TOKENS}, _part, ("categorical.summary",)
    ),
    "sample, truncated": Case(
        {"logits": LOGITS, "key": (2,), "share": (), "positive": ()}, _cut, ("categorical.sample",)
    ),
    "LinearLogits sample": Case(HEAD | {"key": (2,), "positive": ()}, _drawn, ("categorical.sample",)),
    "LinearLogits sample, tiles": Case(
        TILED | {"key": (2,), "positive": ()}, _drawn, ("categorical.sample",)
    ),
    "cross_entropy": Case(
        {"logits": LOGITS, "token": TOKENS},
        trained(lambda logits, token: categorical.cross_entropy(logits, token), "logits"),
        ("categorical.log_probs", "categorical.log_probs_backward"),
    ),
    "LinearLogits cross_entropy": Case(
        TILED | {"token": (MANY,)},
        trained(
            lambda hidden, weight, bias, token: categorical.cross_entropy(head(hidden, weight, bias), token),
            *HEAD,
        ),
        ("categorical.log_probs", "categorical.log_probs_backward"),
    ),
    "kl": Case(
        {"logits": LOGITS, "others": LOGITS, "positive": ()},
        trained(
            lambda logits, others, positive: categorical.kl(logits, others, temperature=positive),
            "logits",
            "others",
        ),
        ("categorical.kl", "categorical.kl_backward"),
    ),
    "expectation": Case(
        {"logits": LOGITS, "table": (VOCAB, 8), "positive": ()},
        trained(
            lambda logits, table, positive: categorical.expectation(logits, table, temperature=positive),
            "logits",
            "table",
        ),
        ("categorical.expectation", "categorical.expectation_backward"),
    ),
    "LinearLogits expectation": Case(
        TILED | {"table": (VOCAB, 8)},
        trained(
            lambda hidden, weight, bias, table: categorical.expectation(head(hidden, weight, bias), table),
            *HEAD,
        ),
        ("categorical.expectation", "categorical.expectation_backward"),
    ),
    "sample_expectation": Case(
        {"logits": LOGITS, "table": (VOCAB, 8), "key": (2,), "positive": ()},
        _both,
        ("categorical.sample_expectation",),
    ),
    "uniform.step": Case(
        {"logits": LOGITS, "token": TOKENS, "share": (), "key": (2,)},
        lambda logits, token, share, key: uniform.step(logits, token, share, (1 + share) / 2, key=key),
        ("categorical.sample_mixture",),
    ),
    "guidance.cfg_uniform_step": Case(
        {"logits": LOGITS, "others": LOGITS, "token": TOKENS, "share": (), "positive": (), "key": (2,)},
        lambda logits, others, token, share, positive, key: guidance.cfg_uniform_step(
            logits, others, token, share, (1 + share) / 2, 2 * positive, temperature=positive, key=key
        ),
        ("guidance.cfg_uniform_step",),
    ),
    "uniform.nelbo": Case(
        {"logits": LOGITS, "token_z": TOKENS, "token_x": TOKENS, "share": ()},
        trained(
            lambda logits, token_z, token_x, share: uniform.nelbo(logits, token_z, token_x, share, -share),
            "logits",
        ),
        ("uniform.nelbo", "uniform.nelbo_backward"),
    ),
    "bits.encode": Case({"token": TOKENS}, lambda token: bits.encode(token, 16, gray=True), ("bits.encode",)),
    "bits.decode": Case({"x": (ROWS, 12)}, lambda x: bits.decode(x, gray=True), ("bits.decode",)),
    "bits.matched_filter": Case(
        {"x": (ROWS, BITS), "positive": (ROWS, 1)},
        lambda x, positive: bits.matched_filter(x, positive),
        ("bits.matched_filter",),
    ),
    "bits.posterior": Case(
        {"x": (ROWS, BITS), "residual": (ROWS, BITS), "positive": ()},
        lambda x, residual, positive: bits.posterior(x, positive, residual),
        ("bits.posterior",),
    ),
    "bits.corrupt": Case(
        {"x": (ROWS, BITS), "positive": (), "key": (2,)},
        lambda x, positive, key: bits.corrupt(x, positive, key=key),
        ("bits.perturb",),
    ),
    "bits.step": Case(
        {"x": (ROWS, BITS), "bits_": (ROWS, BITS), "key": (2,), "positive": (), "share": ()},
        _moved,
        ("bits.step",),
    ),
    "bits.loss": Case(
        {"residual": (ROWS, BITS), "x": (ROWS, BITS), "bit": (ROWS, BITS), "positive": (ROWS, 1)},
        trained(lambda residual, x, bit, positive: bits.loss(residual, x, bit, positive), "residual", "x"),
        ("bits.loss", "bits.loss_backward"),
    ),
    "rng": Case(
        {"key": (2,), "token": TOKENS},
        _noise,
        ("rng.fold_in", "rng.uniform", "rng.normal", "rng.gumbel"),
    ),
    "similarity.cosine": Case(
        {"new": (2, 4, 2, 8), "cached": (2, 6, 2, 8)},
        lambda new, cached: similarity.cosine(new, cached),
        ("similarity.cosine",),
    ),
    "sphere.normalize": Case(
        {"x": (ROWS, DEPTH)},
        trained(lambda x: sphere.normalize(x)[:, :2], "x"),
        ("sphere.normalize", "sphere.normalize_backward"),
    ),
    "sphere.project": Case(
        POINTS,
        trained(lambda point_x, point_y: sphere.project(point_x, point_y), *POINTS),
        ("sphere.project", "sphere.project_backward"),
    ),
    "sphere.angle": Case(
        POINTS,
        trained(lambda point_x, point_y: sphere.angle(point_x, point_y), *POINTS),
        ("sphere.angle", "sphere.angle_backward"),
    ),
    "sphere.rotate": Case(
        POINTS | {"point_z": (ROWS, DEPTH)},
        trained(
            lambda point_x, point_y, point_z: sphere.rotate(point_x, point_y, point_z)[:, :2],
            *POINTS,
            "point_z",
        ),
        ("sphere.rotate", "sphere.rotate_backward"),
    ),
    "sphere.slerp": Case(
        POINTS | {"share": (ROWS,)},
        trained(
            lambda point_x, point_y, share: sphere.slerp(point_x, point_y, share),
            *("point_x", "point_y", "share"),
        ),
        ("sphere.slerp", "sphere.slerp_backward"),
    ),
    "sphere.exp_map": Case(
        POINTS,
        trained(lambda point_x, point_y: sphere.exp_map(point_x, point_y), *POINTS),
        ("sphere.exp_map", "sphere.exp_map_backward"),
    ),
    "sphere.log_map": Case(
        POINTS,
        trained(lambda point_x, point_y: sphere.log_map(point_x, point_y), *POINTS),
        ("sphere.log_map", "sphere.log_map_backward"),
    ),
    "sphere.step": Case(
        POINTS | {"share": (ROWS,)},
        lambda point_x, point_y, share: sphere.step(point_x, sphere.project(point_x, point_y), share),
        ("sphere.step",),
    ),
    "sphere.correct": Case(
        POINTS | {"share": (ROWS,), "key": (2,)},
        trained(
            lambda point_x, point_y, share, key: sphere.correct(point_x, point_y, share / DEPTH, key=key)[
                :, :2
            ],
            *POINTS,
        ),
        ("sphere.correct", "sphere.correct_backward"),
    ),
    "sphere.velocity": Case(
        {"point_x": (ROWS, DEPTH), "logits": LOGITS, "share": ()} | TABLE,
        trained(
            lambda point_x, logits, share, point_table: sphere.velocity(
                point_x, logits, point_table, noise=share
            ),
            *("point_x", "logits", "point_table"),
        ),
        ("sphere.velocity", "sphere.velocity_backward"),
    ),
    "sphere.velocity, vmf": Case(
        {"point_x": (ROWS, DEPTH), "logits": LOGITS, "positive": (ROWS,)} | TABLE,
        lambda point_x, logits, positive, point_table: sphere.velocity(
            point_x, logits, point_table, path="vmf", kappa=positive
        ),
        ("sphere.velocity",),
    ),
    "sphere.velocity, vmf in 3 dimensions": Case(
        {"point_x": (ROWS, 3), "logits": LOGITS, "positive": (), "point_table": (VOCAB, 3)},
        lambda point_x, logits, positive, point_table: sphere.velocity(
            point_x, logits, point_table, path="vmf", kappa=positive
        ),
        ("sphere.velocity",),
    ),
    "sphere.velocity, of the largest logits": Case(
        {"point_x": (ROWS, DEPTH), "logits": LOGITS, "share": ()} | TABLE,
        lambda point_x, logits, share, point_table: sphere.velocity(
            point_x, logits, point_table, noise=share, top_k=20
        ),
        ("sphere.largest",),
    ),
    "vmf.sample": Case(
        {"point": (ROWS, DEPTH), "positive": (), "key": (2,)},
        lambda point, positive, key: sphere.vmf.sample(point, 20 * positive, key=key),
        ("sphere.sample",),
    ),
    "block_diffusion": Case(
        {name: (1, 2 * LENGTH, 2, WIDTH) for name in "qkv"},
        trained(lambda q, k, v: attention.block_diffusion(q, k, v, block_size=4), *"qkv"),
        ("attention.intervals", "attention.intervals_backward"),
    ),
} | {
    f"decode, pages of {size}": Case(
        {
            "q": (2, 4, 4, WIDTH),
            **{name: (2, 4, 2, WIDTH) for name in "kv"},
            "past": (2 * CACHED, 2, WIDTH),
            "length": (2,),
        },
        _decode(size),
        ("attention.decode",),
    )
    for size in (None, 8)
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Without a GPU a head's few rows are read tile by tile where it is tiles that are meant."""
    if not ON_GPU and "tiles" in request.param:
        monkeypatch.setattr(linear_logits_scan, "FEW_ROWS", 0)
    return CASES[request.param]


def values(case: Case, number: int) -> dict[str, Tensor]:
    return {name: fresh(name, shape, number) for name, shape in case.inputs.items()}


def test_replays_follow_their_inputs(case):
    """Every input, the key included, is changed in place; the result is that of a call, and another one."""
    inputs = {name: x.to(DEVICE) for name, x in values(case, 0).items()}
    before: tuple[Tensor, ...] | None = None
    with dlcore.use_backend("triton"):
        replay = captured(lambda: as_tuple(case.call(**inputs)))
    for number in range(1, 4 if ON_GPU else 3):
        for name, x in values(case, number).items():
            inputs[name].copy_(x)
        with dlcore.use_backend("triton"):
            found = replay()
            assert all(dlcore.last_backend(op) == "triton" for op in case.ops)
        with dlcore.use_backend("triton" if ON_GPU else "cpu"):
            expected = as_tuple(case.call(**inputs))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert before is None or not all(torch.equal(a, b) for a, b in zip(before, found, strict=True))
        before = tuple(x.clone() for x in found)


def test_nothing_waits_for_numbers(case, monkeypatch):
    inputs = {name: x.to(DEVICE) for name, x in values(case, 0).items()}
    with dlcore.use_backend("triton"):
        if ON_GPU:
            case.call(**inputs)
        with nothing_waits(monkeypatch):
            case.call(**inputs)


def test_what_waits_is_told_of(monkeypatch):
    x = torch.ones(3, device=DEVICE)
    error = RuntimeError if ON_GPU else AssertionError
    for call in (
        lambda: x[0].item(),
        lambda: bool(x[0] > 0),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: x.masked_select(x > 0),
        lambda: x.unique(),
        lambda: torch.tensor([1.0], device=DEVICE),
    ):
        with nothing_waits(monkeypatch), pytest.raises(error):
            call()


def test_what_waits_inside_of_an_op_is_told_of(monkeypatch):
    """A planted x[mask] in the host's part of a draw on Triton."""
    inputs = {name: x.to(DEVICE) for name, x in values(CASES["stats"], 0).items()}
    launched = launch.launch

    def planted(kernel: Any, grid: Any, like: Tensor, *args: Any, **meta: Any) -> None:
        like.flatten()[like.flatten() > 0]
        launched(kernel, grid, like, *args, **meta)

    monkeypatch.setattr(triton_categorical, "launch", planted)
    error = RuntimeError if ON_GPU else AssertionError
    with dlcore.use_backend("triton"), nothing_waits(monkeypatch), pytest.raises(error):
        CASES["stats"].call(**inputs)


#: Ops of Triton that no case runs, and why.
ELSEWHERE: dict[str, str] = {}


def test_every_op_is_captured():
    taken = {op for case in CASES.values() for op in case.ops}
    assert {op for ops in TRITON.values() for op in ops} - taken == ELSEWHERE.keys()
