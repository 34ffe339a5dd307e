"""`make bench-gpu`: every family on a GPU beside torch, by CUDA events with a flushed cache; one JSON.

dlcore's own calls are also captured in a CUDA graph and timed by its replays, without their host's part.
Ceilings (reading, copying, bfloat16 products) are measured in the same run, and every time is given as a
share of the one that binds it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import dlcore
from bench import peers, peers_attention, peers_bits, peers_sphere, peers_sphere_velocity
from dlcore import attention, bits, categorical, rng, sphere
from dlcore.process import uniform

Call = Callable[[], Any]


class Work(NamedTuple):
    """Calls by provider, and the least that any of them must move and multiply.

    A provider in `parts` takes one of so many parts of the rows, lest it run out of memory.
    """

    calls: dict[str, Call]
    bytes: int = 0
    flops: int = 0
    parts: dict[str, int] | None = None


class Case(NamedTuple):
    """What to build for a device, with small shapes for a smoke test."""

    name: str
    build: Callable[[str, bool], Work]


def _compiled(function: Callable[..., Any], *args: Any) -> Call:
    compiled = torch.compile(function, dynamic=False)
    return lambda: compiled(*args)


def _size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _logits(device: str, tiny: bool, rows: int = 8192) -> Tensor:
    shape = (4, 600) if tiny else (rows, 126_464)
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def _trained(function: Callable[..., Any], *inputs: Tensor) -> Call:
    """The call and the gradients of what it gives."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves).sum(), leaves)


def _sample(device: str, tiny: bool) -> Work:
    x, key = _logits(device, tiny), rng.key(1, device=device)
    calls = {
        "dlcore": lambda: categorical.sample(x, key=key),
        "eager": lambda: peers.sample(x),
        "compile": _compiled(peers.sample, x),
        "argmax": lambda: x.argmax(-1),
    }
    return Work(calls, _size(x))


def _few_rows(device: str, tiny: bool) -> Work:
    x, key = _logits(device, tiny)[:4].clone(), rng.key(1, device=device)
    calls = {"dlcore": lambda: categorical.sample(x, key=key), "compile": _compiled(peers.sample, x)}
    return Work(calls, _size(x))


def _top_p(device: str, tiny: bool) -> Work:
    x, key = _logits(device, tiny)[:1024], rng.key(1, device=device)
    calls = {
        "dlcore": lambda: categorical.sample(x, top_p=0.9, key=key),
        "dlcore, top_k": lambda: categorical.sample(x, top_k=50, key=key),
        "eager": lambda: peers.sample_top_p(x, 0.9),
    }
    return Work(calls, _size(x))


def _step(device: str, tiny: bool) -> Work:
    x, key = _logits(device, tiny), rng.key(1, device=device)
    z = torch.zeros(x.shape[:-1], dtype=torch.int64, device=device)
    alpha, then = torch.full((), 0.5, device=device), torch.full((), 0.6, device=device)
    parts = 1 if tiny else 8
    some = x.shape[0] // parts
    calls = {
        "dlcore": lambda: uniform.step(x, z, alpha, then, key=key),
        "eager": lambda: peers.loo_step(x[:some], z[:some], 0.5, 0.6),
    }
    return Work(calls, _size(x), parts={"eager": parts})


def _nelbo(device: str, tiny: bool) -> Work:
    x = _logits(device, tiny, 2048)
    z, clean = (torch.zeros(x.shape[:-1], dtype=torch.int64, device=device) for _ in range(2))
    level, slope = torch.full((), 0.5, device=device), torch.full((), -1.0, device=device)

    def torchs(x: Tensor) -> Tensor:
        return peers.duo_nelbo(x.float(), z, clean, 0.5, -1.0)

    calls = {
        "dlcore": _trained(lambda x: uniform.nelbo(x, z, clean, level, slope), x),
        "eager": _trained(torchs, x),
        "compile": _trained(torch.compile(torchs, dynamic=False), x),
    }
    return Work(calls, 4 * _size(x))


def _kl(device: str, tiny: bool) -> Work:
    p, q = _logits(device, tiny, 2048), _logits(device, tiny, 2048)

    def torchs(p: Tensor, q: Tensor) -> Tensor:
        return peers.kl(p.float(), q.float())

    calls = {
        "dlcore": _trained(categorical.kl, p, q),
        "eager": _trained(torchs, p, q),
        "compile": _trained(torch.compile(torchs, dynamic=False), p, q),
    }
    return Work(calls, 3 * _size(p, q))


def _expectation(device: str, tiny: bool) -> Work:
    x, width = _logits(device, tiny, 2048), 16 if tiny else 1024
    table = torch.randn(x.shape[-1], width, device=device, dtype=torch.bfloat16)
    calls = {
        "dlcore": lambda: categorical.expectation(x, table),
        "eager": lambda: peers.expectation(x, table),
        "compile": _compiled(peers.expectation, x, table),
    }
    return Work(calls, _size(x, table), 2 * x.shape[0] * table.numel())


def _velocity(device: str, tiny: bool) -> Work:
    count, vocab, width = (4, 600, 16) if tiny else (2048, 50_257, 768)
    logits = torch.randn(count, vocab, device=device, dtype=torch.bfloat16)
    x = F.normalize(torch.randn(count, width, device=device), dim=-1)
    table = F.normalize(torch.randn(vocab, width, device=device), dim=-1).bfloat16()
    narrow = x.bfloat16()
    calls = {
        "dlcore": lambda: sphere.velocity(x, logits, table),
        "eager": lambda: peers_sphere_velocity.slerp(logits, narrow, table),
        "compile": _compiled(peers_sphere_velocity.slerp, logits, narrow, table),
    }
    return Work(calls, _size(logits, table), 4 * count * table.numel())


def _cross_entropy(device: str, tiny: bool) -> Work:
    x = _logits(device, tiny)
    target = torch.zeros(x.shape[:-1], dtype=torch.int64, device=device)

    def torchs(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), target, reduction="none")

    calls = {
        "dlcore": _trained(lambda x: categorical.cross_entropy(x, target), x),
        "eager": _trained(torchs, x),
        "compile": _trained(torch.compile(torchs, dynamic=False), x),
    }
    return Work(calls, 3 * _size(x))


def _head(rows: int) -> Callable[[str, bool], Work]:
    def build(device: str, tiny: bool) -> Work:
        count, width, vocab = (4, 16, 600) if tiny else (rows, 4096, 126_464)
        hidden = torch.randn(count, width, device=device, dtype=torch.bfloat16)
        weight = torch.randn(vocab, width, device=device, dtype=torch.bfloat16) / width**0.5
        head, key = dlcore.LinearLogits(hidden, weight), rng.key(1, device=device)
        calls = {
            "dlcore": lambda: categorical.sample(head, key=key),
            "eager": lambda: peers.sample(hidden @ weight.mT),
            "product alone": lambda: hidden @ weight.mT,
        }
        return Work(calls, _size(hidden, weight), 2 * count * width * vocab)

    return build


def _block_diffusion(device: str, tiny: bool, backward: bool = False) -> Work:
    batch, length, block, heads, width = (1, 32, 8, 2, 16) if tiny else (2, 4096, 32, 16, 128)
    made = _trained if backward else lambda function, *inputs: lambda: function(*inputs)
    q, k, v = (
        torch.randn(batch, 2 * length, heads, width, device=device, dtype=torch.bfloat16) for _ in range(3)
    )
    t = [x.transpose(1, 2) for x in (q, k, v)]

    calls = {
        "dlcore": made(partial(attention.block_diffusion, block_size=block), q, k, v),
        "SDPA, unmasked": made(peers_attention.unmasked, *t),
    }
    if not tiny:
        rule = peers_attention.training_rule(length, block)
        calls["flex_attention"] = made(peers_attention.flex(rule, 2 * length, 2 * length, device), *t)
    # A row of block i, noisy or clean, sees i + 1 blocks.
    pairs = length * (length + block)
    products = 14 if backward else 4
    return Work(calls, (8 if backward else 4) * _size(q), products * batch * heads * width * pairs)


def _decode(device: str, tiny: bool) -> Work:
    batch, cached, block, heads, width = (1, 32, 8, 2, 16) if tiny else (16, 4096, 32, 8, 128)
    shape = (batch, block, heads, width)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    cache = dlcore.attention.KVCache(
        1, batch, cached + 2 * block, heads, width, dtype=torch.bfloat16, device=device
    )
    cache.lengths.fill_(cached)
    keys = torch.randn(batch, heads, cached + block, width, device=device, dtype=torch.bfloat16)
    calls = {
        "dlcore": lambda: attention.decode(q, k, v, cache, 0),
        "SDPA": lambda: F.scaled_dot_product_attention(q.transpose(1, 2), keys, keys),
    }
    if not tiny:
        room = keys.transpose(1, 2).contiguous()
        calls |= peers_attention.serving(q, k, v, room, room.clone(), cache.lengths)
    return Work(calls, 2 * _size(keys))


def _bits(device: str, tiny: bool) -> Work:
    x = torch.randn((4, 64) if tiny else (4096, 16_384), device=device)
    residual, key = torch.randn_like(x), rng.key(1, device=device)
    calls = {
        "dlcore": lambda: bits.step(x, residual, 1.0, 0.9, key=key),
        "compile": _compiled(peers_bits.step, x, residual, 1.0, 0.9),
        "eager": lambda: peers_bits.step(x, residual, 1.0, 0.9),
    }
    return Work(calls, 4 * _size(x))


def _slerp(device: str, tiny: bool) -> Work:
    shape = (4, 64) if tiny else (65_536, 768)
    x, y = (F.normalize(torch.randn(shape, device=device), dim=-1) for _ in range(2))
    t = torch.full(shape[:1], 0.4, device=device)
    calls = {
        "dlcore": lambda: sphere.slerp(x, y, t),
        "compile": _compiled(peers_sphere.slerp, x, y, t),
        "eager": lambda: peers_sphere.slerp(x, y, t),
    }
    return Work(calls, 3 * _size(x))


def _vmf(device: str, tiny: bool) -> Work:
    shape = (4, 64) if tiny else (65_536, 768)
    mean, kappa = (
        F.normalize(torch.randn(shape, device=device), dim=-1),
        torch.full(shape[:1], 50.0).to(device),
    )
    key = rng.key(1, device=device)
    calls = {
        "dlcore": lambda: sphere.vmf.sample(mean, kappa, key=key),
        "eager": lambda: peers_sphere.sample_vmf(mean, kappa),
    }
    return Work(calls, 2 * _size(mean))


CASES = (
    Case("categorical.sample", _sample),
    Case("categorical.sample, 4 rows", _few_rows),
    Case("categorical.sample, truncated, 1024 rows", _top_p),
    Case("uniform.step", _step),
    Case("categorical.cross_entropy, backward", _cross_entropy),
    Case("categorical.kl, backward", _kl),
    Case("categorical.expectation", _expectation),
    Case("uniform.nelbo, backward", _nelbo),
    Case("LinearLogits sample, 8192 rows", _head(8192)),
    Case("LinearLogits sample, 8 rows", _head(8)),
    Case("attention.block_diffusion", _block_diffusion),
    Case("attention.block_diffusion, backward", partial(_block_diffusion, backward=True)),
    Case("attention.decode", _decode),
    Case("bits.step", _bits),
    Case("sphere.slerp", _slerp),
    Case("sphere.velocity", _velocity),
    Case("vmf.sample", _vmf),
)


def seconds(call: Call, repeats: int = 20) -> float:
    """The median time of a call on the device, each after a write that pushes everything else out of L2."""
    flush = torch.empty(1 << 28, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return float(statistics.median(times))


def graph_of(call: Call) -> Call:
    """The replay of a CUDA graph of the call, which has been made before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ceilings() -> dict[str, float]:
    """Bytes per second of reading and copying, floating-point operations per second of bfloat16 products."""
    return {"read": _read(), "copy": _copy(), "bfloat16": _product()}


def _read(size: int = 1 << 31) -> float:
    x = torch.ones(size // 4, device="cuda")
    return size / seconds(x.amax)


def _copy(size: int = 1 << 31) -> float:
    x = torch.ones(size // 4, device="cuda")
    y = torch.empty_like(x)
    return 2 * size / seconds(lambda: y.copy_(x))


def _product(size: int = 8192) -> float:
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b)


def measured(ceiling: dict[str, float], names: list[str]) -> Iterator[dict[str, Any]]:
    """A row per case and provider: seconds, and the share of the ceiling that binds."""
    bandwidth = max(ceiling["read"], ceiling["copy"])
    for case in CASES:
        if names and not any(n in case.name for n in names):
            continue
        work = case.build("cuda", False)
        bound = max(work.bytes / bandwidth, work.flops / ceiling["bfloat16"])
        for provider, call in _with_cuda(work.calls):
            times = {provider: seconds(call) * (work.parts or {}).get(provider, 1)}
            if provider.startswith("dlcore"):
                times[f"{provider}, graph"] = seconds(graph_of(call))
            for name, time in times.items():
                print(f"{case.name:<42} {name:<21} {time * 1e6:>10.1f} µs {bound / time:>6.0%}", flush=True)
                yield {"case": case.name, "provider": name, "seconds": time, "share": bound / time}
        del work
        torch.cuda.empty_cache()


def _with_cuda(calls: dict[str, Call]) -> Iterator[tuple[str, Call]]:
    """The calls, dlcore's once more on the CUDA kernels where there are any for all of their ops."""

    def on_cuda(call: Call) -> Any:
        with dlcore.use_backend("cuda"):
            return call()

    for provider, call in calls.items():
        yield provider, call
        if not provider.startswith("dlcore"):
            continue
        try:
            on_cuda(call)
        except NotImplementedError:
            continue
        yield f"{provider}, cuda", partial(on_cuda, call)


def main(names: list[str]) -> int:
    """Measure the cases whose names hold one of `names`, or all; 2 without a GPU."""
    if not torch.cuda.is_available():
        print("bench.gpu: needs a CUDA device", file=sys.stderr)
        return 2
    import triton

    ceiling = ceilings()
    print(*(f"{k}: {v / 1e12:.2f} T/s" for k, v in ceiling.items()), sep="\n")
    device = torch.cuda.get_device_name()
    found = {
        "device": device,
        "versions": {"dlcore": dlcore.__version__, "torch": torch.__version__, "triton": triton.__version__},
        "cuda": torch.version.cuda,
        "ceilings": ceiling,
        "results": list(measured(ceiling, names)),
    }
    name = f"{device.lower().replace(' ', '-')}-{date.today()}.json"
    path = Path(__file__).parent / "results" / name
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of cases' names; all if none")
    sys.exit(main(parser.parse_args().names))
