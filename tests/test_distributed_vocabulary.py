"""A vocabulary over ranks says what the whole one says: tokens, numbers, gradients."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from vocabulary_shards import (
    KINDS,
    ROWS,
    TOLERANCE,
    VOCAB,
    Payload,
    both,
    close,
    columns,
    equal_gradients,
    every_split,
    inputs,
    keys_of,
    leaves,
    row_options,
    sharded,
    tokens_of,
    whole,
)

import dlcore
from dlcore import LinearLogits, categorical
from dlcore.distributed import ShardedLogits, shard_sizes
from dlcore.process import absorbing_uniform, d3pm, distill, guidance, masked, uniform


def equal_statistics(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str) -> list[Any]:
    found = []
    for dtype in TOLERANCE:
        for options in row_options(tokens_of()):
            got, wanted = (categorical.stats(x, **options) for x in both(inputs(kind, dtype), group, sizes))
            assert torch.equal(got.argmax, wanted.argmax)
            close(got, wanted, dtype)
            found.append([None if x is None else x.tolist() for x in got])
    return found


@every_split()
@KINDS
def test_statistics_equal_those_of_the_whole(ranks4: Ranks, sizes: Any, kind: str) -> None:
    everywhere = ranks4.run(len(sizes), equal_statistics, sizes, kind)
    assert all(str(found) == str(everywhere[0]) for found in everywhere)


def equal_draws(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str) -> None:
    z = tokens_of()
    cases = [*row_options(z), {"temperature": torch.tensor([0.0, 1.0, 0.3])}]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parts = inputs(kind, dtype)
        for seed, options in enumerate(cases):
            for key in keys_of(z, seed):
                got, wanted = (categorical.sample(x, **options, key=key) for x in both(parts, group, sizes))
                assert torch.equal(got.tokens, wanted.tokens)
                close(got.logprob, wanted.logprob, dtype)
                close(got.stats, wanted.stats, dtype)


@every_split()
@KINDS
def test_draws_equal_those_of_the_whole(ranks4: Ranks, sizes: Any, kind: str) -> None:
    ranks4.run(len(sizes), equal_draws, sizes, kind)


def draws_of_little_noise(group: dist.ProcessGroup, sizes: tuple[int, ...]) -> None:
    """Flat logits: the noise of groups and tokens alone decides, in many rows."""
    logits = torch.zeros(100, VOCAB)
    for key in (dlcore.rng.key(3), dlcore.rng.split(dlcore.rng.key(4), 100)):
        got, wanted = (categorical.sample(x, key=key) for x in both((logits,), group, sizes))
        assert torch.equal(got.tokens, wanted.tokens)


@every_split()
def test_noise_is_that_of_the_whole(ranks4: Ranks, sizes: Any) -> None:
    ranks4.run(len(sizes), draws_of_little_noise, sizes)


def equal_mixtures(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str) -> None:
    z = tokens_of()
    uneven = torch.rand(*z.shape, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    uneven[..., 0] = 3.0
    settled = torch.tensor([1.0, 0, 1, 0, 0, 0])
    third = torch.tensor([3.0, 0, 1, 0, 1, 0])
    parts = inputs(kind, torch.float32)
    shift = torch.linspace(-2, 3, z.numel()).view(z.shape)
    cases: list[dict[str, Any]] = [
        {"coefficients": uneven, "shift": shift, "temperature": 0.7},
        {"coefficients": uneven, "prior": 7, "exclude": 20, "softcap": 5.0},
        {"coefficients": third, "temperature": torch.tensor([0.0, 1.0, 0.0])},
        {"coefficients": third, "exclude": 999},
        {"coefficients": settled},
        {"coefficients": torch.stack([third, settled, third])},
    ]
    for seed, case in enumerate(cases):
        for key in keys_of(z, seed):
            got, wanted = (
                categorical.sample_mixture(x, z, **case, key=key) for x in both(parts, group, sizes)
            )
            assert torch.equal(got, wanted)


@every_split()
@KINDS
def test_mixtures_equal_those_of_the_whole(ranks4: Ranks, sizes: Any, kind: str) -> None:
    ranks4.run(len(sizes), equal_mixtures, sizes, kind)


def equal_broken_rows(group: dist.ProcessGroup, sizes: tuple[int, ...], backend: str) -> None:
    logits = inputs("dense", torch.float32)[0].reshape(ROWS, VOCAB)
    logits[0, 3], logits[1, 900], logits[2] = torch.nan, torch.inf, -torch.inf
    # A padded vocabulary: whole shards of nothing.
    logits[3, 90:], logits[4, :600] = -torch.inf, -torch.inf
    z = torch.tensor([5, 5, 5, 5, 700, 5])
    other = inputs("dense", torch.float32, seed=7)[0].reshape(ROWS, VOCAB)
    there, one = both((logits,), group, sizes)
    p, q = both((other,), group, sizes)
    table = torch.eye(VOCAB, 3)
    key = dlcore.rng.key(2)
    half = torch.tensor([2.0, 0, 1, 0, 1, 0])
    with dlcore.use_backend(backend):
        for got, wanted in (
            (categorical.stats(there, z), categorical.stats(one, z)),
            (categorical.cross_entropy(there, z), categorical.cross_entropy(one, z)),
            *(
                (
                    tuple(categorical.sample(there, key=key, **o))[:2],
                    tuple(categorical.sample(one, key=key, **o))[:2],
                )
                for o in ({}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0.0})
            ),
            (
                categorical.sample_mixture(there, z, half, key=key),
                categorical.sample_mixture(one, z, half, key=key),
            ),
        ):
            close(got, wanted, torch.float32)
        assert categorical.sample(there, key=key).tokens[:3].tolist() == [-1, -1, -1]
        for got, wanted in (
            (categorical.kl(there, p), categorical.kl(one, q)),
            (categorical.kl(p, there), categorical.kl(q, one)),
            (categorical.kl(there, there), categorical.kl(one, one)),
            (
                categorical.expectation(there, table[columns(group, sizes)]),
                categorical.expectation(one, table),
            ),
        ):
            close(got, wanted, torch.float32)


@every_split()
@pytest.mark.parametrize("named", ["cpu", "reference"])
def test_broken_rows_and_shards_of_nothing(ranks4: Ranks, sizes: Any, named: str) -> None:
    ranks4.run(len(sizes), equal_broken_rows, sizes, named)


def equal_processes(group: dist.ProcessGroup, sizes: tuple[int, ...], kind: str) -> None:
    z, x, mask_id = tokens_of(), tokens_of(seed=6), 20
    parts, key = inputs(kind, torch.float32), dlcore.rng.key(4)
    hidden = torch.where(torch.tensor([True, True, False]), mask_id, z)
    there, one = both(parts, group, sizes)
    for step in (
        lambda y: uniform.step(y, z, 0.3, 0.6, key=key),
        lambda y: uniform.step(y, z, 0.3, 0.6, parameterization="denoiser", exclude=mask_id, key=key),
        lambda y: masked.step(y, hidden, 0.3, 0.6, mask_id, temperature=0.8, key=key),
        lambda y: masked.step(y, hidden, 0.3, 0.6, mask_id, remask=0.1, key=key),
    ):
        assert torch.equal(step(there), step(one))
    for loss in (
        lambda y: masked.nelbo(y, hidden, x, 0.4, -1.0, mask_id),
        lambda y: uniform.cross_entropy(y, z, x, 0.4, parameterization="denoiser"),
    ):
        equal_gradients(group, sizes, torch.float32, loss, parts)


@every_split()
@KINDS
def test_processes_run_over_ranks(ranks4: Ranks, sizes: Any, kind: str) -> None:
    ranks4.run(len(sizes), equal_processes, sizes, kind)


def refusals(group: dist.ProcessGroup) -> None:
    sizes = (600, 400)
    z, x = tokens_of(), tokens_of(seed=6)
    rank = dist.get_rank(group)
    for kind in ("dense", "head"):
        there = sharded(inputs(kind, torch.float32), group, sizes)
        with pytest.raises(NotImplementedError, match=r"uniform\.nelbo: takes no logits over ranks"):
            uniform.nelbo(there, z, x, 0.4, -1.0)
        with pytest.raises(NotImplementedError, match="takes no logits over ranks"):
            uniform.bridge_log_probs(there, z, 0.3, 0.6)
        with pytest.raises(NotImplementedError, match="takes no logits over ranks"):
            guidance.cfg_uniform_step(there, there, z, 0.3, 0.6, 2.0)
        with pytest.raises(ValueError, match=r"kl: p_logits and q_logits must both lie over ranks"):
            categorical.kl(there, inputs("dense", torch.float32)[0])
        with pytest.raises(ValueError, match=r"stats: index must lie in \[0, 1000\), got 1000"):
            categorical.stats(there, torch.full_like(z, 1000))
        with pytest.raises(ValueError, match=r"expectation: table must be \(\d+, E\)"):
            categorical.expectation(there, torch.randn(VOCAB, 3))
    wide = sharded(inputs("dense", torch.float64), group, sizes)
    with pytest.raises(NotImplementedError, match="top_k, top_p and min_p take no"):
        categorical.sample(wide, top_k=3)
    here = torch.zeros(2, sizes[rank])
    for bad, error, match in (
        ((here, group, (600,)), ValueError, "sizes must be 2 numbers"),
        ((here, group, (600, -1)), ValueError, "sizes must be 2 numbers"),
        ((here, group, "600"), TypeError, "sizes must be a tuple"),
        ((here, "group"), TypeError, "group must be a ProcessGroup"),
        ((here.long(), group), TypeError, "logits must be a floating Tensor"),
        ((torch.zeros(()), group), ValueError, "logits must be dense"),
    ):
        with pytest.raises(error, match=match):
            ShardedLogits(*bad)
    with pytest.raises(ValueError, match=r"stats: sizes\[\d\] must be the"):
        categorical.stats(ShardedLogits(here, group, (500, 500)))
    with pytest.raises(ValueError, match="sizes needs group"):
        LinearLogits(torch.zeros(2, 3), torch.zeros(4, 3), sizes=(4, 4))
    assert shard_sizes(sizes[rank], group) == sizes
    assert ShardedLogits(here, group, sizes).shape == (2, VOCAB)


def test_what_is_refused(ranks4: Ranks) -> None:
    ranks4.run(2, refusals)


def fresh_keys(group: dist.ProcessGroup) -> list[int]:
    torch.manual_seed(dist.get_rank(group))
    logits, z = ShardedLogits(torch.zeros(50, 500), group), torch.zeros(50, dtype=torch.int64)
    drawn = [categorical.sample(logits).tokens, uniform.step(logits, z, 0.1, 0.9)]
    drawn.append(uniform.correct(ShardedLogits(torch.zeros(2, 25, 500), group), z.view(2, 25), 0.5, 5))
    return torch.cat([tokens.flatten() for tokens in drawn]).tolist()


def test_a_fresh_key_is_one_for_all_ranks(ranks4: Ranks) -> None:
    first, *others = ranks4.run(3, fresh_keys)
    assert all(tokens == first for tokens in others)
    assert len(set(first)) > 25


def drawn_under_autocast(group: dist.ProcessGroup) -> None:
    made = torch.Generator().manual_seed(0)
    parts = (torch.randn(64, 32, generator=made), torch.randn(600, 32, generator=made))
    there = LinearLogits(parts[0], parts[1][columns(group, (300, 300))], group=group)
    for limits in ({"top_k": 50}, {"top_p": 0.999}, {}):
        wanted = categorical.sample(LinearLogits(*parts), key=dlcore.rng.key(7), **limits)
        with torch.autocast("cpu", torch.bfloat16):
            got = categorical.sample(there, key=dlcore.rng.key(7), **limits)
        assert torch.equal(got.tokens, wanted.tokens)
        close(got.logprob, wanted.logprob, torch.float32)


def test_autocast_changes_no_draw(ranks4: Ranks) -> None:
    ranks4.run(2, drawn_under_autocast)


def keyless(group: dist.ProcessGroup) -> list[list[int]]:
    torch.manual_seed(dist.get_rank(group))
    logits = ShardedLogits(torch.zeros(2, 25, 300), group)
    z = torch.full((2, 25), 599)
    plain = z * 0
    targets = distill.rollout(lambda z, alpha: logits, z, [0.0, 0.4, 0.8], mask_id=599)
    drawn = [
        masked.step(logits, z, 0.1, 0.9, 599),
        uniform.step(logits, plain, 0.1, 0.9),
        uniform.correct(logits, plain, 0.5, 5),
        d3pm.step(logits, plain, 0.1, 0.9),
        d3pm.step(logits, z, 0.1, 0.9, mask_id=599, subs=True),
        absorbing_uniform.step(logits, plain, plain + 3, 0.1, 0.9),
        *(target.rows for target in targets),
    ]
    return [x.flatten().tolist() for x in drawn]


def test_processes_without_a_key_draw_alike(ranks4: Ranks) -> None:
    first, *others = ranks4.run(2, keyless)
    assert all(found == first for found in others)


def disagreements(group: dist.ProcessGroup) -> None:
    os.environ["DLCORE_CHECK"] = "1"
    try:
        rank = dist.get_rank(group)
        logits = ShardedLogits(torch.zeros(4, 300), group)
        z = torch.zeros(4, dtype=torch.int64)
        categorical.stats(logits, z)
        for call, match in (
            (
                lambda: categorical.sample(logits, key=dlcore.rng.key(rank)),
                "key must be the same on all ranks",
            ),
            (lambda: categorical.stats(logits, z + rank), "index must be the same on all ranks"),
            (lambda: categorical.stats(logits, temperature=1.5 + rank), "temperature must be the same"),
            (
                lambda: categorical.stats(ShardedLogits(torch.zeros(4, 300 + rank), group)),
                "sizes must be the same",
            ),
            (
                lambda: categorical.stats(ShardedLogits(torch.zeros(4 + rank, 300), group)),
                "rows must be the same",
            ),
            (lambda: categorical.stats(logits, z + 600 * rank), "index must lie in"),
        ):
            with pytest.raises(ValueError, match=match):
                call()
            categorical.stats(logits, z)
    finally:
        del os.environ["DLCORE_CHECK"]


def test_ranks_that_disagree_all_hear_of_it(ranks4: Ranks) -> None:
    ranks4.run(2, disagreements)


def dtensors(group: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    target, key = tokens_of(), dlcore.rng.key(3)
    (logits,) = inputs("dense", torch.float32)
    spread = distribute_tensor(logits, mesh, [Shard(2)])
    same = distribute_tensor(target, mesh, [Replicate()])
    assert torch.equal(
        categorical.sample(spread, same, key=key).tokens, categorical.sample(logits, key=key).tokens
    )
    close(categorical.cross_entropy(spread, same), categorical.cross_entropy(logits, target), torch.float32)
    parts = inputs("head", torch.float32)
    one = leaves(parts)
    many = [distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() for x in parts[1:]]
    for hidden in (parts[0].clone(), distribute_tensor(parts[0], mesh, [Replicate()])):
        hidden.requires_grad_()
        head = LinearLogits(hidden, *many)
        assert head.shape == (2, ROWS // 2, VOCAB)
        assert torch.equal(
            categorical.sample(head, same, top_k=9, key=key).tokens,
            categorical.sample(whole(parts), top_k=9, key=key).tokens,
        )
        loss, wanted = categorical.cross_entropy(head, same), categorical.cross_entropy(whole(one), target)
        close(loss, wanted, torch.float32)
        for x in (*one, *many):
            x.grad = None
        loss.sum().backward()
        wanted.sum().backward()
        got = hidden.grad.full_tensor() if isinstance(hidden.grad, DTensor) else hidden.grad
        close((got, *(x.grad.full_tensor() for x in many)), tuple(x.grad for x in one), torch.float32)
    tied = categorical.expectation(LinearLogits(parts[0], *many), many[0])
    close(tied, categorical.expectation(whole(parts), parts[1]), torch.float32)
    for bad in (distribute_tensor(parts[1], mesh, [Shard(1)]), parts[1]):
        with pytest.raises((NotImplementedError, ValueError), match=r"bias|weight"):
            LinearLogits(parts[0], many[0], bad[:, 0])
    rows = distribute_tensor(logits.repeat(2, 1, 1), mesh, [Shard(0)])
    with pytest.raises(NotImplementedError, match="must be replicated"):
        categorical.cross_entropy(spread, distribute_tensor(target.repeat(2, 1)[:2], mesh, [Shard(0)]))
    assert isinstance(categorical.stats(rows).argmax, DTensor)


@pytest.mark.parametrize("count", [2, 3])
def test_dtensors_are_taken(ranks4: Ranks, count: int) -> None:
    ranks4.run(count, dtensors)


def column_sharded_model(group: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(6, 8), "lm_head": torch.nn.Linear(8, VOCAB)})
    x, target = torch.randn(5, 6), torch.arange(5) * 200
    wanted = categorical.cross_entropy(model["lm_head"](model["body"](x)), target)
    wanted.mean().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    tokens = categorical.sample(model["lm_head"](model["body"](x)), key=dlcore.rng.key(1)).tokens
    for as_head in (False, True):
        model.zero_grad()
        split = copy.deepcopy(model)
        parallelize_module(split, mesh, {"lm_head": ColwiseParallel(use_local_output=False)})
        hidden, head = split["body"](x), split["lm_head"]
        logits = LinearLogits(hidden, head.weight, head.bias) if as_head else head(hidden)
        assert torch.equal(categorical.sample(logits, key=dlcore.rng.key(1)).tokens, tokens)
        loss = categorical.cross_entropy(logits, target)
        close(loss, wanted, torch.float32)
        loss.mean().backward()
        for p, grad in zip(split.parameters(), grads, strict=True):
            full = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            close(full, grad, torch.float32)


@pytest.mark.parametrize("count", [2, 3])
def test_a_column_sharded_module_keeps_working(ranks4: Ranks, count: int) -> None:
    ranks4.run(count, column_sharded_model)


def payloads(group: dist.ProcessGroup, vocab: int, rows: int, width: int) -> dict[str, float]:
    """Bytes a row."""
    made = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=made) for n in (rows, vocab // 4))
    hidden.requires_grad_()
    head = LinearLogits(hidden, weight, group=group)
    z, key = torch.zeros(rows, dtype=torch.int64), dlcore.rng.key(1)
    table = torch.randn(vocab // 4, 3)
    found = {}
    for name, call in {
        "stats": lambda: categorical.stats(head),
        "sample": lambda: categorical.sample(head, key=key),
        "mixture": lambda: categorical.sample_mixture(head, z, torch.tensor([2.0, 0, 1, 0, 1, 0]), key=key),
        "kl": lambda: categorical.kl(head, head),
        "expectation": lambda: categorical.expectation(head, table),
        "top_p": lambda: categorical.sample(head, top_p=0.9, key=key),
        "top_k": lambda: categorical.sample(head, top_k=50, key=key),
        "loss": lambda: categorical.cross_entropy(head, z),
        "loss and gradient": lambda: categorical.cross_entropy(head, z).sum().backward(),
    }.items():
        with Payload() as payload:
            call()
        found[name] = payload.sent / rows
    return found


def test_what_is_sent_grows_with_rows_alone(ranks4: Ranks) -> None:
    width = 16
    small, large = (ranks4.run(4, payloads, vocab, 8, width)[0] for vocab in (4096, 16384))
    (many,) = {str(found) for found in ranks4.run(4, payloads, 4096, 64, width)}
    assert many == str(small)
    assert {k: v for k, v in large.items() if k != "top_p"} == {
        k: v for k, v in small.items() if k != "top_p"
    }
    assert small["stats"] == small["sample"] == small["mixture"] == small["loss"] == 10 * 8
    assert small["kl"] == 3 * 8
    assert small["expectation"] == 8 + 3 * 4
    assert small["loss and gradient"] == small["loss"] + 4 * width
    assert small["top_k"] == 80 + 50 * 8
    # Candidates, whether these tell, and if not, one search and one merge.
    assert large["top_p"] <= 80 + 256 * 8 + 4 + 8 + 8 * 2 * 16 * 8 + 8 + 80
