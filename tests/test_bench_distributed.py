"""bench.distributed: every case runs, and its bytes are those on paper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist

import dlcore
from bench import distributed
from bench import distributed_paper as paper


def tiny(group: dist.ProcessGroup) -> list[dict[str, Any]]:
    return distributed.run(group, distributed.TINY, torch.device("cpu"), repeats=1)


def test_every_case_runs_and_says_what_it_sends(ranks4: ranks.Ranks) -> None:
    first, second = ranks4.run(2, tiny)
    assert [r["bytes"] for r in first] == [r["bytes"] for r in second]
    sent = {(r["case"], r["way"]): r["bytes"] for r in first}
    sizes = distributed.TINY
    # One of two ranks sends its half of the logits, of float32, once.
    logits = sizes.rows * sizes.vocab // 2 * 4
    assert sent["sample", "logits gathered"] == logits
    # Backward, half of the sum of hidden's gradient goes around twice.
    assert (
        sent["cross_entropy forward + backward", "logits gathered"] == logits + sizes.rows * sizes.hidden * 4
    )
    # A summary a row; a draw has two, as the boundary at token 300 cuts a group of 256.
    assert sent["stats", "sharded"] == sent["cross_entropy", "sharded"] == sizes.rows * paper.SUMMARY
    assert sent["sample", "sharded"] == 2 * sizes.rows * paper.SUMMARY
    assert sent["sample top_k = 50", "sharded"] == sizes.rows * (paper.SUMMARY + 50 * paper.CANDIDATE)
    hidden = paper.total(2, sizes.rows * sizes.hidden * 4).nvlink
    assert sent["cross_entropy forward + backward", "sharded"] == sizes.rows * paper.SUMMARY + hidden
    # Keys and values of the clean half of the other rank; the ring sends as much.
    keys = sizes.length // 2 * sizes.heads * sizes.head_dim * 2 * 4
    assert sent["block_diffusion", "gather"] == sent["block_diffusion", "ring"] == keys
    assert sent["block_diffusion", "q, k, v gathered"] == 3 * keys
    training = "block_diffusion forward + backward"
    assert sent[training, "gather"] == 2 * keys + paper.scatter_sum(2, 2 * keys).nvlink
    assert sent[training, "ring"] == 2 * keys + paper.ring(2, keys, 2).nvlink
    assert sent["decode", "cache gathered"] == keys
    lse = sizes.block * sizes.heads * 4
    assert sent["decode", "sharded"] == lse + paper.total(2, lse * sizes.head_dim).nvlink
    table = distributed.table(first)
    assert len(table.splitlines()) == len(first) + 1


def test_the_tables_on_paper() -> None:
    """README has what the arithmetic gives."""
    readme = (Path(dlcore.__file__).parent / "distributed" / "README.md").read_text()
    for ways in (paper.vocabulary(), paper.context()):
        assert "\n".join(paper.table(ways)) in readme


def test_arithmetic() -> None:
    """A gather in each node's eight adapters, a sum twice as much as a gather of parts."""
    assert paper.gather(8, 10) == (70, 0)
    assert paper.gather(16, 8) == (120, 8)
    assert paper.total(16, 16) == (30, 2)
    assert paper.ring(16, 8, 15) == (120, 120)
    assert paper.product(8192, 1) == pytest.approx(2 * 8192 * 2816 * 262144 / 494.7e12)
    assert paper.product(1, 1) == pytest.approx(262144 * 2816 * 2 / 3.35e12)


def torchrun(*arguments: str) -> str:
    """What two ranks print."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_ten_lines(tmp_path: Path) -> None:
    """README's first example runs on two ranks."""
    readme = (Path(dlcore.__file__).parent / "distributed" / "README.md").read_text()
    script = tmp_path / "this.py"
    code = readme.split("```python\n")[1].split("```")[0].replace("262_144", "2_000")
    # A file a rank: what two ranks print may come mixed.
    code += "torch.save((draw.tokens, weight.grad), __file__ + str(rank))\n"
    script.write_text(code)
    torchrun(str(script))
    (tokens, grad), (others, other_grad) = (torch.load(f"{script}{rank}") for rank in range(2))
    assert torch.equal(tokens, others)
    assert bool(grad.isfinite().all() & other_grad.isfinite().all())
    assert not torch.equal(grad, other_grad)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    printed = torchrun("-m", "bench.distributed", "--tiny", "--out", str(tmp_path), "sample", "decode")
    (file,) = tmp_path.glob("*-distributed-2.json")
    record = json.loads(file.read_text())
    assert record["ranks"] == 2
    assert {r["case"] for r in record["results"]} == {"sample", "sample top_k = 50", "decode"}
    assert "decode" in printed
