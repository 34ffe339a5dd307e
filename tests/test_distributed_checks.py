"""DLCORE_CHECK=1: ranks that do not agree get an error each instead of a hang, and the next call works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

import dlcore
from dlcore import distributed
from dlcore.distributed import groups
from dlcore.distributed.groups import agreement, gather, process_group

OP = "categorical.sample"


@contextmanager
def checked(seconds: float = 20.0) -> Iterator[None]:
    """DLCORE_CHECK=1, and so much patience."""
    before = groups.CHECK_SECONDS
    os.environ["DLCORE_CHECK"], groups.CHECK_SECONDS = "1", seconds
    try:
        yield
    finally:
        del os.environ["DLCORE_CHECK"]
        groups.CHECK_SECONDS = before


def call(group: dist.ProcessGroup, op: str = OP, **facts: Any) -> torch.Tensor:
    """What a sharded function does: checks, then a collective."""
    with agreement(op, group, **facts):
        pass
    return gather(torch.tensor([dist.get_rank(group)]), group)


def refusal(function: Callable[[], Any]) -> str:
    """What a call raises, and that it does so in time."""
    start = time.monotonic()
    try:
        function()
    except (ValueError, TypeError) as error:
        assert time.monotonic() - start < 30
        return f"{type(error).__name__}: {error}"
    return "nothing"


def works(group: dist.ProcessGroup) -> bool:
    return call(group, key=torch.tensor([1, 2])).flatten().tolist() == list(range(dist.get_world_size(group)))


def differ(group: dist.ProcessGroup, name: str) -> tuple[str, bool]:
    rank = dist.get_rank(group)
    last = rank == dist.get_world_size(group) - 1
    key = torch.tensor([7, int(last)])
    given: dict[str, Any] = {
        "key": {"key": key},
        "rows": {"rows": torch.Size((2, 3 + last))},
        "sizes": {"sizes": (100, 100 + last)},
        "temperature": {"temperature": 0.5 + last},
        "dtype": {"z": torch.zeros(2, dtype=torch.float64 if last else torch.float32)},
        "missing": {} if last else {"top_k": 3},
        "op": {"op": "categorical.stats" if last else OP},
    }[name]
    with checked():
        return refusal(lambda: call(group, **given)), works(group)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["key", "rows", "sizes", "temperature", "dtype", "missing", "op"])
def test_a_difference_is_named_on_every_rank(ranks4: ranks.Ranks, size: int, name: str) -> None:
    argument = {"dtype": "z", "missing": "top_k"}.get(name, name)
    for said, then in ranks4.run(size, differ, name):
        assert said.startswith("ValueError: categorical.s")
        assert f"{argument} must be the same on all ranks" in said
        assert f"on rank {size - 1}" in said or f"on {size - 1}" in said
        assert then


def fail_alone(group: dist.ProcessGroup, error: type[Exception]) -> tuple[str, bool]:
    def function() -> None:
        with agreement(OP, group, key=torch.tensor([1, 2])):
            if dist.get_rank(group) == 1:
                raise error("weight must be (V, D)")

    with checked():
        return refusal(function), works(group)


@pytest.mark.parametrize("error", [ValueError, TypeError])
def test_one_rank_fails_its_own_check(ranks4: ranks.Ranks, error: type[Exception]) -> None:
    others = f"ValueError: {OP}: rank 1 was refused, {error.__name__}: weight must be (V, D)"
    expected = [others, f"{error.__name__}: weight must be (V, D)", others]
    assert ranks4.run(3, fail_alone, error) == [(said, True) for said in expected]


def stay_away(group: dist.ProcessGroup, times: int) -> tuple[list[str], list[bool]]:
    with checked(1.0):
        away = dist.get_rank(group) == 1
        said = [] if away else [refusal(lambda: call(group)) for _ in range(times)]
    if away:
        time.sleep(2.5 * times + 0.5)  # a FileStore waits in whole seconds
    with checked():
        return said, [works(group) for _ in range(3)]


@pytest.mark.parametrize("times", [1, 3])
def test_a_rank_that_does_not_come_is_back_in_step_with_the_next_call(
    ranks4: ranks.Ranks, times: int
) -> None:
    missing = (
        f"ValueError: {OP}: rank 1 did not come within 1 s: a group's ranks must all make the same calls"
    )
    results = ranks4.run(3, stay_away, times)
    assert [said for said, _ in results] == [[missing] * times, [], [missing] * times]
    assert all(all(then) for _, then in results)


def come_late(group: dist.ProcessGroup) -> tuple[str, bool]:
    late = dist.get_rank(group) == 0
    if late:
        time.sleep(1.5)
    with checked(0.5):
        said = refusal(lambda: call(group))
    time.sleep(0.5 if late else 2.5)
    with checked():
        return said, works(group)


def test_a_rank_that_comes_too_late(ranks4: ranks.Ranks) -> None:
    """It does not meet the others in a call that they gave up."""
    results = ranks4.run(2, come_late)
    assert "rank 1 did not come within 0.5 s" in results[0][0]
    assert "rank 0 did not come within 0.5 s" in results[1][0]
    assert all(then for _, then in results)


def mix_groups(group: dist.ProcessGroup) -> tuple[str, bool]:
    other = dist.new_group([0, 1, 2, 3])
    with checked(1.0):
        said = refusal(lambda: call(other if dist.get_rank(group) == 0 else group))
    dist.barrier(group)
    with checked():
        return said, works(group) and works(other)


def test_ranks_in_different_groups(ranks4: ranks.Ranks) -> None:
    for said, then in ranks4.run(4, mix_groups):
        assert "did not come within 1 s" in said
        assert then


def ask(group: dist.ProcessGroup, name: str) -> tuple[str, bool]:
    """A sharded function, of which the last rank asks for something else."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    weight = torch.randn(300, 4, generator=torch.Generator().manual_seed(dist.get_rank(group)))
    hidden = torch.ones(3 if name == "rows" and last else 2, 4)
    if last and name in ("hidden", "gradient"):
        hidden = hidden + 1 if name == "hidden" else hidden.requires_grad_()
    key: Any = dlcore.rng.key(8 if name == "key" and last else 7)
    if last and name in ("no key", "bad key"):
        key = None if name == "no key" else torch.ones(2)
    options: dict[str, Any] = {"temperature": 0.5 if name == "temperature" and last else 1.0}
    if last:
        options |= {"softcap": {"softcap": -1.0}, "exclude": {"exclude": 600}}.get(name, {})
        if name == "temperature shape":
            options["temperature"] = torch.ones(3)
    sizes = (300 - last, 300 + last) if name == "sizes" else (300, 300)
    z = torch.full(hidden.shape[:1], 600 if name == "index" and last else 1)
    if last and name == "index shape":
        z = torch.ones(3, dtype=torch.int64)
    x = torch.randn(1, 8, 2, 32, generator=torch.Generator().manual_seed(1))

    def function() -> Any:
        if name == "attention":
            own = x[:, :4]
            return dlcore.distributed.attention.block_causal(
                own, own, own, block_size=2 + last * 2, length=8, group=group
            )
        head = dlcore.LinearLogits(hidden, weight, group=group, sizes=sizes)
        return dlcore.categorical.sample(head, z, **options, key=key)

    with checked():
        said = refusal(function)
        name, last, options = "", False, {}
        hidden, key, sizes = torch.ones(2, 4), dlcore.rng.key(7), (300, 300)
        z = torch.full((2,), 1)
        tokens = groups.gather(function().tokens, group)
    return said, bool((tokens == tokens[0]).all())


#: What each must be told of, besides what it names.
WANTED = {
    "rows": "rows must be the same",
    "key": "key must be the same",
    "sizes": "sizes[1] must be the 300 tokens of rank 1, got (299, 301)",
    "index": "index must lie in [0, 600), got 600",
    "temperature": "temperature must be the same",
    "attention": "block_size must be the same",
    "hidden": "hidden must be the same",
    "gradient": "hidden_requires_grad must be the same",
    "no key": "key must be the same on all ranks, got",
    "index shape": "index must have shape (2,), got (3,)",
    "temperature shape": "temperature must broadcast to (2,), got (3,)",
    "softcap": "softcap must be positive",
    "exclude": "exclude must lie in [0, 600), got 600",
    "bad key": "key must be an int64 Tensor",
}


@pytest.mark.parametrize("name", WANTED)
def test_sharded_functions(ranks4: ranks.Ranks, name: str) -> None:
    for said, then in ranks4.run(2, ask, name):
        assert said.startswith(("ValueError", "TypeError")), said
        assert WANTED[name] in said, said
        assert then


def not_mine(group: dist.ProcessGroup) -> str:
    other = dist.new_group([0])
    return refusal(lambda: process_group(OP, other))


def test_a_group_without_this_rank(ranks4: ranks.Ranks) -> None:
    said = ranks4.run(4, not_mine)
    assert said[1:] == [f"ValueError: {OP}: group must have this process among its ranks"] * 3


def many_calls(group: dist.ProcessGroup) -> int:
    store = dist.distributed_c10d._get_default_store()
    before = store.num_keys()
    with checked():
        for _ in range(20):
            call(group)
    return store.num_keys() - before


def test_the_store_does_not_fill_up(ranks4: ranks.Ranks) -> None:
    assert max(ranks4.run(2, many_calls)) <= 6


def unchecked(group: dist.ProcessGroup) -> bool:
    store = dist.distributed_c10d._get_default_store()
    before = store.num_keys()
    call(group, key=torch.tensor([dist.get_rank(group)]))
    return bool(store.num_keys() == before)


def test_nothing_is_compared_unasked(ranks4: ranks.Ranks) -> None:
    assert all(ranks4.run(2, unchecked))


def die(group: dist.ProcessGroup, check: bool, store: str) -> tuple[str, float]:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    alone = dlcore.categorical.sample(logits, key=dlcore.rng.key(7)).tokens
    call(group)
    if dist.get_rank(group) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        if check:
            with checked(1.0):
                call(group)
        else:
            call(group)
        said = "nothing"
    except (RuntimeError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - start
    # The survivors' own state: an unsharded call, and a job of their own.
    assert torch.equal(dlcore.categorical.sample(logits, key=dlcore.rng.key(7)).tokens, alone)
    rank = dist.get_rank(group) // 2
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    left = dist.group.WORLD
    assert left is not None
    assert call(left).flatten().tolist() == [0, 1]
    with checked():
        assert works(left)
    return said, seconds


@pytest.mark.slow
@pytest.mark.parametrize("check", [False, True])
def test_a_rank_that_dies(check: bool, tmp_path: Path) -> None:
    """The others get torch's own error, or under DLCORE_CHECK=1 one that names it; nothing else is harmed."""
    with ranks.ranks(3, seconds=10) as living:
        first, _, third = living.run(3, die, check, str(tmp_path / "store"), timeout=60, lost=(1,))
        for said, seconds in (first, third):
            assert "rank 1 did not come" in said if check else said.startswith("RuntimeError")
            assert seconds < 30


def refuse_others(group: dist.ProcessGroup) -> list[str]:
    """Other functions' own checks, failed on the last rank alone, and a good call after each."""
    last = dist.get_rank(group) == dist.get_world_size(group) - 1
    logits = distributed.ShardedLogits(torch.zeros(4, 300), group)
    z, bad = torch.zeros(4, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    x = bad if last else z
    table = torch.zeros(300, 3, dtype=torch.int64 if last else torch.float32)
    short = distributed.ShardedLogits(torch.zeros(4, 250 if last else 300), group, (300, 300))
    half = torch.tensor([2.0, 0, 1, 0, 1, 0])
    calls: list[Callable[[], Any]] = [
        lambda: dlcore.categorical.cross_entropy(logits, x),
        lambda: dlcore.categorical.expectation(logits, table),
        lambda: dlcore.categorical.sample_expectation(logits, table),
        lambda: dlcore.categorical.kl(logits, short),
        lambda: dlcore.categorical.kl(logits, logits, temperature=x + 1.0),
        lambda: dlcore.categorical.sample_mixture(logits, x, half),
        lambda: dlcore.categorical.stats(logits, x),
        lambda: distributed.shard_sizes(-1 if last else 1, group),
    ]
    said = []
    with checked(8.0):
        for function in calls:
            said.append(refusal(function))
            numbers = dlcore.categorical.stats(logits).logsumexp
            assert torch.allclose(numbers, torch.full_like(numbers, 600).log())
    return said


def test_what_one_rank_refuses_all_hear_of(ranks4: ranks.Ranks) -> None:
    first, last = ranks4.run(2, refuse_others)
    for heard, own in zip(first, last, strict=True):
        assert "rank 1 was refused" in heard, heard
        assert own.removeprefix("ValueError: ").removeprefix("TypeError: ") in heard


def backward_alone(group: dist.ProcessGroup) -> tuple[str, bool]:
    """Only rank 0 makes the backward pass, in which all sum the gradient of what they share."""
    weight = torch.randn(300, 4, requires_grad=True)
    hidden = torch.ones(2, 4, requires_grad=True)
    head = dlcore.LinearLogits(hidden, weight, group=group)
    with checked(5.0):
        loss = dlcore.categorical.cross_entropy(head, torch.tensor([1, 2])).sum()
        back = dist.get_rank(group) == 0
        return refusal(loss.backward if back else lambda: dlcore.categorical.stats(head)), works(group)


def test_a_backward_pass_that_one_rank_makes(ranks4: ranks.Ranks) -> None:
    for said, then in ranks4.run(2, backward_alone):
        assert "op must be the same on all ranks" in said
        assert "categorical.cross_entropy backward" in said
        assert then
