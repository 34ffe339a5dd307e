"""Sharding rules: ops on DTensors give the plain result, forward and backward, and gather nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves

import dlcore
from dlcore import _dispatch, attention, bits, categorical, rng, sphere
from dlcore.distributed import rules
from dlcore.process import guidance, masked, uniform

B, L, V, D, S = 4, 6, 300, 8, 16
KEY = rng.key(20261126)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(seed))


def points(seed: int, *lead: int) -> Tensor:
    return sphere.normalize(normal(*(lead or (B, L)), D, seed=seed))


def dense(**tensors: Tensor) -> dict[str, Tensor]:
    return {"logits": normal(B, L, V), **tensors}


def linear(**tensors: Tensor) -> dict[str, Tensor]:
    return {"hidden": normal(B, L, D), "weight": normal(V, D, seed=2), "bias": normal(V, seed=3), **tensors}


def logits_of(x: dict[str, Any]) -> Tensor | dlcore.LinearLogits:
    return (
        x.pop("logits")
        if "logits" in x
        else dlcore.LinearLogits(x.pop("hidden"), x.pop("weight"), x.pop("bias"))
    )


def of_logits(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda x: function(logits_of(x), **x, **options)


def drawn(draw: categorical.Draw) -> tuple[Any, ...]:
    return draw.tokens, draw.logprob, tuple(s for s in draw.stats if s is not None)


def of_draw(**options: Any) -> Callable[..., Any]:
    return lambda x: drawn(categorical.sample(logits_of(x), **x, **options))


#: What many rows share.
SHARED = ("weight", "bias", "table")
PER_ROW = {"index": ids(B, L), "temperature": normal(B, L, seed=4).abs() + 0.3}
BITS = {"x": normal(B, L, S), "residual": normal(B, L, S, seed=5)}
LEVEL = normal(B, L, seed=6).abs() + 0.2
HEADS = {
    "q": normal(B, L, 4, D),
    "k": normal(B, L, 2, D, seed=7),
    "v": normal(B, L, 2, 5, seed=8),
}
BOUNDS = {
    "starts": torch.tensor([[[0, 0]]] * L, dtype=torch.int32).view(1, L, 2),
    "stops": torch.tensor([[[i + 1, 0]] for i in range(L)], dtype=torch.int32).view(1, L, 2),
}
COEFFICIENTS = torch.tensor([1.0, 0.0, 0.4, 0.0, 0.4, 0.0])

#: Inputs, what is done to them, and those of which a gradient is asked.
CASES: dict[str, tuple[dict[str, Tensor], Callable[..., Any], tuple[str, ...]]] = {
    "categorical.stats": (dense(**PER_ROW), of_logits(lambda *a, **k: tuple(categorical.stats(*a, **k))), ()),
    "categorical.stats, shift": (
        dense(index=ids(B, L), shift=normal(L)),
        of_logits(lambda *a, **k: tuple(categorical.stats(*a, **k)), exclude=3, softcap=5.0),
        (),
    ),
    "categorical.sample": (dense(**PER_ROW), of_draw(key=KEY), ()),
    "categorical.sample, keys": (dense(key=rng.split(KEY, (B, L))), of_draw(), ()),
    "categorical.sample, top_p": (dense(top_p=torch.full((B, L), 0.4)), of_draw(key=KEY), ()),
    "categorical.sample, min_p": (dense(min_p=torch.full((B, L), 0.4)), of_draw(key=KEY), ()),
    "categorical.sample, top_k": (dense(), of_draw(key=KEY, top_k=3), ()),
    "categorical.sample, head": (linear(), of_draw(key=KEY), ()),
    "categorical.sample_mixture": (
        dense(z=ids(B, L)),
        of_logits(categorical.sample_mixture, coefficients=COEFFICIENTS, key=KEY),
        (),
    ),
    "categorical.sample_mixture, per row": (
        linear(z=ids(B, L), coefficients=COEFFICIENTS.expand(B, L, 6).contiguous()),
        of_logits(categorical.sample_mixture, key=KEY),
        (),
    ),
    "categorical.cross_entropy": (dense(target=ids(B, L)), of_logits(categorical.cross_entropy), ("logits",)),
    "categorical.cross_entropy, head": (
        linear(target=ids(B, L)),
        of_logits(categorical.cross_entropy),
        ("hidden", "weight", "bias"),
    ),
    "categorical.kl": (
        {"p_logits": normal(B, L, V), "q_logits": normal(B, L, V, seed=9)},
        lambda x: categorical.kl(**x),
        ("p_logits", "q_logits"),
    ),
    "categorical.kl, heads": (
        linear(q_logits=normal(B, L, D, seed=9)),
        lambda x: categorical.kl(
            dlcore.LinearLogits(x["hidden"], x["weight"], x["bias"]),
            dlcore.LinearLogits(x["q_logits"], x["weight"]),
            temperature=0.7,
        ),
        ("hidden", "weight", "bias", "q_logits"),
    ),
    "categorical.expectation": (
        linear(table=normal(V, 5, seed=10)),
        of_logits(categorical.expectation, temperature=0.8),
        ("hidden", "weight", "bias", "table"),
    ),
    "categorical.sample_expectation": (
        linear(table=normal(V, 5, seed=10)),
        of_logits(lambda *a, **k: categorical.sample_expectation(*a, **k)[1], key=KEY),
        ("hidden", "weight", "table"),
    ),
    "uniform.nelbo": (
        dense(z=ids(B, L), x=ids(B, L, seed=11)),
        of_logits(uniform.nelbo, alpha=0.4, dalpha=-1.0),
        ("logits",),
    ),
    "uniform.step": (dense(z=ids(B, L)), of_logits(uniform.step, alpha_t=0.4, alpha_s=0.6, key=KEY), ()),
    "masked.step": (
        dense(z=torch.where(ids(B, L) % 2 == 0, V - 1, ids(B, L))),
        of_logits(masked.step, alpha_t=0.4, alpha_s=0.6, mask_id=V - 1, key=KEY),
        (),
    ),
    "guidance.cfg_uniform_step": (
        {"cond": normal(B, L, V), "uncond": normal(B, L, V, seed=12), "z": ids(B, L)},
        lambda x: guidance.cfg_uniform_step(**x, alpha_t=0.4, alpha_s=0.6, gamma=2.0, key=KEY),
        (),
    ),
    "guidance.cfg_uniform_step, per row": (
        {"cond": normal(B, L, V), "uncond": normal(B, L, V, seed=12), "z": ids(B, L)},
        lambda x: guidance.cfg_uniform_step(
            **x,
            alpha_t=0.4,
            alpha_s=torch.linspace(0.5, 1, L),
            gamma=2.0,
            parameterization="denoiser",
            key=KEY,
        ),
        (),
    ),
    "bits.encode": ({"tokens": ids(B, L)}, lambda x: bits.encode(x["tokens"], 9), ()),
    "bits.decode": ({"x": normal(B, L, 9)}, lambda x: bits.decode(x["x"]), ()),
    "bits.matched_filter": ({"x": BITS["x"]}, lambda x: bits.matched_filter(x["x"], 0.7), ("x",)),
    "bits.posterior": (
        {**BITS, "sigma": LEVEL},
        lambda x: bits.posterior(x["x"], x["sigma"], x["residual"]),
        ("x", "residual"),
    ),
    "bits.step": (BITS, lambda x: bits.step(x["x"], x["residual"], 0.7, 0.5), ()),
    "bits.step, churned": (
        {**BITS, "sigma": LEVEL},
        lambda x: bits.step(x["x"], x["residual"], x["sigma"], 0.1, gamma_next=0.2, key=KEY),
        (),
    ),
    "bits.corrupt": ({"x": BITS["x"]}, lambda x: bits.corrupt(x["x"], 0.5, key=KEY), ()),
    "bits.loss": (
        {**BITS, "bits": (normal(B, L, S, seed=12) > 0).float()},
        lambda x: bits.loss(x["residual"], x["x"], x["bits"], 0.7),
        ("residual",),
    ),
    "bits.loss, x": (
        {**BITS, "bits": (normal(B, L, S, seed=12) > 0).float(), "sigma": LEVEL},
        lambda x: bits.loss(x["residual"], x["x"], x["bits"], x["sigma"], kind="bce"),
        ("residual", "x"),
    ),
    "rng": (
        {"key": rng.split(KEY, (B, L))},
        lambda x: (rng.normal(x["key"], 3), rng.fold_in(x["key"], 3)),
        (),
    ),
    "sphere.normalize": ({"x": normal(B, L, D)}, lambda x: sphere.normalize(x["x"]), ("x",)),
    "sphere.project": ({"x": points(0), "u": normal(B, L, D)}, lambda x: sphere.project(**x), ("x", "u")),
    "sphere.angle": ({"x": points(0), "y": points(1)}, lambda x: sphere.angle(**x), ("x", "y")),
    "sphere.slerp": ({"x": points(0), "y": points(1)}, lambda x: sphere.slerp(**x, t=0.3), ("x",)),
    "sphere.slerp, t": (
        {"x": points(0), "y": points(1), "t": LEVEL},
        lambda x: sphere.slerp(**x),
        ("x", "y", "t"),
    ),
    "sphere.log_map": ({"x": points(0), "y": points(1)}, lambda x: sphere.log_map(**x), ("y",)),
    "sphere.exp_map": ({"x": points(0), "v": normal(B, L, D)}, lambda x: sphere.exp_map(**x), ("x", "v")),
    "sphere.rotate": (
        {"x": points(0), "source": points(1), "target": points(2)},
        lambda x: sphere.rotate(**x),
        ("x", "target"),
    ),
    "sphere.step": ({"x": points(0), "v": normal(B, L, D)}, lambda x: sphere.step(x["x"], x["v"], 0.1), ()),
    "sphere.correct": (
        {"x": points(0), "score": normal(B, L, D)},
        lambda x: sphere.correct(x["x"], x["score"], 0.01, key=KEY),
        ("x", "score"),
    ),
    "vmf.sample": ({"mean": points(0)}, lambda x: sphere.vmf.sample(x["mean"], 20.0, key=KEY), ()),
    "sphere.velocity": (
        linear(x=points(0), table=points(1, V)),
        lambda x: sphere.velocity(x.pop("x"), logits_of(x), x["table"], noise=0.5),
        ("hidden", "weight", "table"),
    ),
    "attention.intervals": (
        {**HEADS, **BOUNDS},
        lambda x: attention.intervals(**x, return_lse=True),
        ("q", "k", "v"),
    ),
    "attention.block_causal": (HEADS, lambda x: attention.block_causal(**x, block_size=2), ("q", "k", "v")),
    "attention.block_diffusion": (HEADS, lambda x: attention.block_diffusion(**x, block_size=2), ("q",)),
}


def _first(result: Any) -> Tensor:
    return next(x for x in tree_leaves(result) if x.is_floating_point())


def _call(
    inputs: dict[str, Tensor], function: Callable[..., Any], wanted: tuple[str, ...]
) -> tuple[Any, list[Tensor]]:
    leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in inputs.items()}
    result = function(dict(leaves))
    if not wanted:
        return result, []
    out = _first(result)
    weights = normal(*out.shape, seed=13)
    if isinstance(out, DTensor):
        weights = distribute_tensor(weights, out.device_mesh, out.placements)
    return result, list(torch.autograd.grad((out * weights).sum(), [leaves[n] for n in wanted]))


def _full(x: Any) -> Any:
    assert isinstance(x, DTensor)
    return x.full_tensor()


def _placements(case: str, name: str, x: Tensor, dims: tuple[int, ...]) -> list[Any]:
    """Where the dimensions of the rows are in an argument: heads, rows of attention, or leading ones."""
    found: list[Any] = []
    for dim in dims:
        missing = name in SHARED or (x.dim() == 1) or x.shape[dim] == 1 if dim < x.dim() else True
        if case.startswith("attention"):
            missing = missing or (dim == 1 and name in "kv") or (dim == 2 and name not in "qkv")
        found.append(Replicate() if missing else Shard(dim))
    return found


def check_case(case: str, mesh: DeviceMesh, dims: tuple[int, ...]) -> None:
    inputs, function, wanted = CASES[case]
    plain, plain_grads = _call(inputs, function, wanted)
    spread = {n: distribute_tensor(x, mesh, _placements(case, n, x, dims)) for n, x in inputs.items()}
    with CommDebugMode() as seen:
        result, grads = _call(spread, function, wanted)
    # The sum of the loss, and nothing else.
    assert seen.get_total_counts() <= 2 * mesh.ndim, (case, seen.get_comm_counts())
    for got, want in zip(tree_leaves(result), tree_leaves(plain), strict=True):
        assert got.device_mesh == mesh
        assert any(p.is_shard() for p in got.placements), (case, got.placements)
        assert torch.equal(_full(got), want), (case, dims)
    torch.testing.assert_close([_full(g) for g in grads], plain_grads, rtol=1e-4, atol=1e-5)


def walk(group: dist.ProcessGroup, cases: list[str]) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    for case in cases:
        for dim in (0, 1, *((2,) if case.startswith("attention") else ())):
            check_case(case, mesh, (dim,))


@pytest.mark.parametrize("family", sorted({case.split(".")[0] for case in CASES}))
def test_dtensors_give_the_plain_result(ranks4: ranks.Ranks, family: str) -> None:
    ranks4.run(2, walk, [case for case in CASES if case.split(".")[0] == family])


def walk_a_plane(_: dist.ProcessGroup, cases: list[str]) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    for case in cases:
        check_case(case, mesh, (0, 2) if case.startswith("attention") else (0, 1))


def test_meshes_of_two_dimensions(ranks4: ranks.Ranks) -> None:
    cases = [
        "categorical.sample",
        "categorical.cross_entropy, head",
        "sphere.slerp, t",
        "attention.block_causal",
    ]
    ranks4.run(4, walk_a_plane, cases)


def uneven(group: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    logits, target = normal(5, L, V), ids(5, L)
    spread = [distribute_tensor(x, mesh, [Shard(0)]) for x in (logits, target)]
    assert torch.equal(
        categorical.cross_entropy(*spread).full_tensor(), categorical.cross_entropy(logits, target)
    )
    draw = categorical.sample(spread[0], key=KEY)
    assert draw.tokens.placements == (Shard(0),)
    assert torch.equal(draw.tokens.full_tensor(), categorical.sample(logits, key=KEY).tokens)


def test_batches_that_do_not_divide(ranks4: ranks.Ranks) -> None:
    ranks4.run(2, uneven)
    ranks4.run(3, uneven)


def calls_apart(group: dist.ProcessGroup) -> None:
    """What is missing in one call stands in another, and both have replicated arguments to be cut."""
    mesh = DeviceMesh.from_group(group, "cpu")
    logits, index, number = normal(B, L, V), ids(B, L), torch.full((B, L), 0.4)
    by_rows = [distribute_tensor(x, mesh, [Shard(0)]) for x in (logits, index)]
    whole = distribute_tensor(number, mesh, [Replicate()])
    for _ in range(2):
        for name in ("shift", "temperature"):
            got = categorical.stats(*by_rows, **{name: whole}).entropy
            want = categorical.stats(logits, index, **{name: number}).entropy
            assert torch.equal(got.full_tensor(), want), name


def shared_key(group: dist.ProcessGroup) -> None:
    """Rows of the whole are numbered by a shared key, whatever else is cut."""
    mesh = DeviceMesh.from_group(group, "cpu")
    whole, key = (distribute_tensor(x, mesh, [Replicate()]) for x in (normal(B, L, V), KEY))
    temperature = torch.full((B, L), 0.9)
    cut = distribute_tensor(temperature, mesh, [Shard(0)])
    tokens = categorical.sample(whole, temperature=cut, key=key).tokens
    want = categorical.sample(normal(B, L, V), temperature=temperature, key=KEY).tokens
    assert torch.equal(tokens.full_tensor(), want)


def test_a_shared_key_beside_cut_arguments(ranks4: ranks.Ranks) -> None:
    ranks4.run(2, shared_key)


def test_a_rule_s_answer_is_of_its_own_arguments(ranks4: ranks.Ranks) -> None:
    ranks4.run(2, calls_apart)


def refusals(group: dist.ProcessGroup) -> list[str]:
    mesh = DeviceMesh.from_group(group, "cpu")
    logits, key = normal(B, L, V), distribute_tensor(KEY, mesh, [Replicate()])
    by_rows, by_tokens = (distribute_tensor(logits, mesh, [Shard(dim)]) for dim in (0, 2))
    x = distribute_tensor(points(0), mesh, [Shard(2)])
    weight = distribute_tensor(normal(V, L), mesh, [Shard(0)])
    q, k = (distribute_tensor(normal(B, L, 6, D), mesh, [Shard(dim)]) for dim in (2, 1))
    odd = distribute_tensor(normal(B, L, 3, D), mesh, [Replicate()])
    none = (None,) * 7
    ops = torch.ops.dlcore
    said = []
    for call in (
        lambda: ops.categorical_sample(by_rows, *none, None, None, None, key),
        lambda: ops.categorical_stats(by_tokens, *none),
        lambda: ops.categorical_stats(distribute_tensor(normal(B, L), mesh, [Shard(0)]), weight, *none[1:]),
        lambda: sphere.normalize(x),
        lambda: attention.block_causal(q, odd, odd, block_size=2),
        lambda: attention.block_causal(k, k, k, block_size=2),
    ):
        try:
            call()
            said.append("nothing")
        except NotImplementedError as error:
            said.append(str(error))
    return said


def test_what_would_have_to_be_gathered_is_refused(ranks4: ranks.Ranks) -> None:
    for shared, tokens, weight, inner, heads, keys in ranks4.run(2, refusals):
        assert "q must be sharded over sequences, whole groups of heads or rows of q" in heads
        assert "k must be sharded over sequences, whole groups of heads or rows of q" in keys
        assert "categorical.sample: key must be one per row where rows are sharded, got (2,)" in shared
        assert f"categorical.stats: logits {(B, L, V)} must be sharded over its rows" in tokens
        assert "categorical.stats: weight must be replicated" in weight
        assert f"sphere.normalize: x {(B, L, D)} must be sharded over its rows" in inner


def test_every_op_of_rows_has_a_rule() -> None:
    """What has none works on whole caches, or is only ever called with this rank's part."""
    without = {"attention.decode", "categorical.summary", "similarity.cosine"}
    attentive = {"attention.intervals", "attention.intervals_backward"}
    assert set(rules.RULES) | attentive | without == set(_dispatch.ops())
