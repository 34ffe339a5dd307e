"""What ranks send and how long a call takes, sharded and by gathering: vocabulary, context, cache.

torchrun --nproc-per-node 2 -m bench.distributed [--tiny] [--out DIR] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dlcore
from bench.case import nbytes, normal, random_tokens
from bench.run import slug
from dlcore import attention, categorical
from dlcore import distributed as sharded
from dlcore.distributed import groups

Call = Callable[[], Any]
Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
KEY = dlcore.rng.key(20261126)


class Traffic(TorchDispatchMode):
    """Counts what this rank sends, in bytes, from the tensors that collectives are given.

    A collective of n ranks is counted as on a ring, the least that a rank can send: its part n - 1 times to
    gather, twice (n - 1)/n of the tensor to reduce, once to scatter a sum; a point-to-point message as it is.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks, self.bytes, self.messages = ranks, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = func._schema.name.split("::")
        if space in ("_c10d_functional", "c10d"):
            self._count(name.strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        n = self.ranks
        shares = {
            "all_gather_into_tensor": n - 1,
            "allgather": n - 1,
            "all_reduce": 2 * (n - 1) / n,
            "allreduce": 2 * (n - 1) / n,
            "reduce_scatter_tensor": (n - 1) / n,
            "send": 1,
        }
        if name in ("wait_tensor", "recv", "barrier"):
            return
        if name not in shares:
            raise NotImplementedError(f"bench.distributed: does not know what {name} sends")
        given = args[1] if name == "allgather" else args[0]
        tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
        self.messages += 1
        self.bytes += round(shares[name] * nbytes(*tensors))


@dataclass(frozen=True)
class Sizes:
    """Rows, hidden size and vocabulary of a head; positions, block, heads and head dimension of attention."""

    rows: int
    hidden: int
    vocab: int
    length: int
    block: int
    heads: int
    head_dim: int


TINY = Sizes(4, 16, 600, 64, 4, 2, 32)
HERE = Sizes(256, 512, 65_536, 2048, 32, 8, 64)
ON_GPU = Sizes(256, 2816, 262_144, 32_768, 256, 16, 128)


class _Whole(torch.autograd.Function):
    """Every rank's columns side by side; each gets its own part of the gradient."""

    @staticmethod
    def forward(ctx: Any, columns: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.rank, ctx.size = dist.get_rank(group), columns.shape[-1]
        return torch.cat(list(groups.gather(columns, group)), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].narrow(-1, ctx.rank * ctx.size, ctx.size), None


class _Shared(torch.autograd.Function):
    """What all ranks have; its gradients are summed over them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return groups.total(grads[0], ctx.group), None


def vocabulary(
    sizes: Sizes, group: dist.ProcessGroup, device: torch.device
) -> Iterator[tuple[str, dict[str, Call]]]:
    """A linear head, its tokens spread over the ranks, and the same with gathered logits."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    each = sizes.vocab // ranks
    hidden = normal((sizes.rows, sizes.hidden)).to(device)
    weight = normal((sizes.vocab, sizes.hidden), seed=1)[rank * each : (rank + 1) * each].to(device)
    target = random_tokens((sizes.rows,), each * ranks).to(device)

    def head(x: Tensor, w: Tensor) -> dlcore.LinearLogits:
        return dlcore.LinearLogits(x, w, group=group)

    def gathered(x: Tensor, w: Tensor) -> Tensor:
        return _Whole.apply(_Shared.apply(x, group) @ w.mT, group)  # type: ignore[no-any-return]

    def pair(function: Callable[[Any], Any]) -> dict[str, Call]:
        return {
            "sharded": lambda: function(head(hidden, weight)),
            "logits gathered": lambda: function(gathered(hidden, weight)),
        }

    def trained(logits: Callable[[Tensor, Tensor], Any]) -> Call:
        def step() -> Any:
            x, w = (t.detach().requires_grad_() for t in (hidden, weight))
            loss = categorical.cross_entropy(logits(x, w), target)
            return (loss.detach(), *torch.autograd.grad(loss.sum(), (x, w)))

        return step

    yield "sample", pair(lambda logits: categorical.sample(logits, key=KEY).tokens)
    yield "sample top_k = 50", pair(lambda logits: categorical.sample(logits, top_k=50, key=KEY).tokens)
    yield "stats", pair(lambda logits: categorical.stats(logits).entropy)
    yield "cross_entropy", pair(lambda logits: categorical.cross_entropy(logits, target))
    yield "cross_entropy forward + backward", {"sharded": trained(head), "logits gathered": trained(gathered)}


def context(
    sizes: Sizes, group: dist.ProcessGroup, device: torch.device
) -> Iterator[tuple[str, dict[str, Call]]]:
    """Block diffusion's training mask over a spread sequence, and decoding with a spread cache."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    length, block, shape = sizes.length, sizes.block, (sizes.heads, sizes.head_dim)
    halves = [normal((1, 2, length, *shape), seed=s).to(device) for s in range(3)]
    # Of [x_t; x_0] this rank's part of either half.
    own = [sharded.shard_sequence(x, 2, group, block).flatten(1, 2) for x in halves]

    def by(memory: int) -> Callable[..., Any]:
        return lambda q, k, v: sharded.attention.block_diffusion(
            q, k, v, block_size=block, length=length, group=group, memory=memory
        )

    def all_gathered(q: Tensor, k: Tensor, v: Tensor) -> Any:
        whole = [
            sharded.unshard_sequence(x.unflatten(1, (2, -1)), 2, group, block, length).flatten(1, 2)
            for x in (q, k, v)
        ]
        return attention.block_diffusion(whole[0], whole[1], whole[2], block_size=block)

    def forward(function: Callable[..., Any]) -> Call:
        return lambda: function(*own)

    def trained(function: Callable[..., Any]) -> Call:
        def step() -> Any:
            leaves = [x.detach().requires_grad_() for x in own]
            out = function(*leaves)
            return (out.detach(), *torch.autograd.grad(out.sum(), leaves))

        return step

    gather, ring = by(1 << 40), by(0)
    yield (
        "block_diffusion",
        {"gather": forward(gather), "ring": forward(ring), "q, k, v gathered": forward(all_gathered)},
    )
    yield "block_diffusion forward + backward", {"gather": trained(gather), "ring": trained(ring)}

    caches = [
        attention.KVCache(1, 1, size + block, *shape, device=device, dtype=torch.float32)
        for size in (length // ranks, length)
    ]
    for cache, size in zip(caches, (length // ranks, length), strict=True):
        rows = normal((1, size, *shape), seed=4 + rank).to(device)
        cache.write(0, rows, rows)
        cache.commit(size)
    here, everything = caches
    q, k, v = (normal((1, block, *shape), seed=s).to(device) for s in (7, 8, 9))

    def cache_gathered() -> Any:
        kept = slice(0, length // ranks)
        for name in ("k", "v"):
            part = here.view(0)[0 if name == "k" else 1][:, kept]
            whole = groups.gather(part, group).transpose(0, 1).flatten(1, 2)
            everything.view(0)[0 if name == "k" else 1][:, : whole.shape[1]].copy_(whole)
        return attention.decode(q, k, v, everything, 0)

    yield (
        "decode",
        {
            "sharded": lambda: sharded.attention.decode(q, k, v, here, 0, group=group, owner=0),
            "cache gathered": cache_gathered,
        },
    )


def measured(call: Call, group: dist.ProcessGroup, device: torch.device, repeats: int) -> Row:
    """The most bytes and messages that a rank sends in a call, and the slowest rank's time, a median."""
    call()
    with Traffic(dist.get_world_size(group)) as traffic:
        call()
    times = []
    for _ in range(repeats):
        groups.total(torch.zeros(1, device=device), group)  # all start together
        _finish(device)
        start = perf_counter()
        call()
        _finish(device)
        times.append(perf_counter() - start)
    seconds = groups.gather(torch.tensor(times, device=device, dtype=torch.float64), group).amax(0)
    most = groups.gather(torch.tensor([traffic.bytes, traffic.messages], device=device), group).amax(0)
    return {
        "bytes": int(most[0]),
        "messages": int(most[1]),
        "seconds": statistics.median(seconds.tolist()),
        "least_seconds": float(seconds.min()),
    }


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(
    group: dist.ProcessGroup,
    sizes: Sizes,
    device: torch.device,
    names: tuple[str, ...] = (),
    repeats: int = 5,
) -> list[Row]:
    """Every case by each of its ways; the same rows on all ranks."""
    rows = []
    for family in (vocabulary, context):
        for name, ways in family(sizes, group, device):
            if names and not any(n in name for n in names):
                continue
            for way, call in ways.items():
                rows.append({"case": name, "way": way, **measured(call, group, device, repeats)})
    return rows


def table(rows: list[Row]) -> str:
    """Bytes and time of each case, and over those of its first way."""
    lines = [f"{'case':<36} {'way':<18} {'bytes sent':>14} {'÷':>8} {'messages':>9} {'ms':>10} {'÷':>6}"]
    first: Row = {}
    for row in rows:
        first = row if row["case"] != first.get("case") else first
        more, longer = row["bytes"] / max(first["bytes"], 1), row["seconds"] / first["seconds"]
        lines.append(
            f"{row['case']:<36} {row['way']:<18} {row['bytes']:>14,} {more:>8.1f} {row['messages']:>9} "
            f"{row['seconds'] * 1e3:>10.2f} {longer:>6.2f}"
        )
    return "\n".join(lines)


def processor() -> str:
    """The name of the CPU."""
    from cpuinfo import get_cpu_info

    return str(get_cpu_info().get("brand_raw", platform.machine()))


def about(sizes: Sizes, group: dist.ProcessGroup, device: torch.device) -> Row:
    """What the numbers were measured on."""
    return {
        "datetime": datetime.now().isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor(),
        "ranks": dist.get_world_size(group),
        "backend": dist.get_backend(group),
        "threads": torch.get_num_threads(),
        "versions": {
            "dlcore": dlcore.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "sizes": vars(sizes),
    }


def main() -> None:
    """The command line, on every rank that torchrun starts."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node N -m bench.distributed", description=__doc__
    )
    parser.add_argument("names", nargs="*", help="parts of cases' names; all if none")
    parser.add_argument("--tiny", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    group = dist.group.WORLD
    assert group is not None
    sizes = TINY if options.tiny else ON_GPU if on_gpu else HERE
    rows = run(group, sizes, device, tuple(options.names), repeats=1 if options.tiny else 5)
    if dist.get_rank() == 0:
        record = {**about(sizes, group, device), "results": rows}
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"{slug(record['device'])}-{record['datetime'][:10]}-distributed-{record['ranks']}.json"
        (options.out / name).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        print(table(rows), options.out / name, sep="\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
