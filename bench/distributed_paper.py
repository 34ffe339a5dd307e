"""What sharding costs on paper: bytes over each link and times a step, for 8, 64 and 1,024 GPUs.

python -m bench.distributed_paper prints the tables of dlcore/distributed/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

#: GPUs of a node, behind one NVSwitch; each has a network adapter of its own.
NODE = 8
#: Bytes a second and direction of a GPU's NVLink and of its adapter, of its memory; flops a second, half of
#: the dense bfloat16 peak. H100 SXM in a DGX H100.
NVLINK, INFINIBAND, MEMORY, FLOPS = 450e9, 50e9, 3.35e12, 0.5 * 989.4e12
#: Seconds that a collective takes that carries nothing, within a node and across nodes: assumed.
LATENCY = (20e-6, 60e-6)
GPUS = (8, 64, 1024)

#: DiffusionGemma: tokens, hidden size, canvas; a full-attention layer's query heads, key heads, head size.
VOCAB, HIDDEN, CANVAS = 262_144, 2816, 256
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 512
#: Positions of context, 392 blocks; tokens of a training step.
CONTEXT, TOKENS = 100_352, 8192
NARROW, WIDE = 2, 4  # bytes of bfloat16 and float32

#: Bytes a rank says of a row: ten float64; and of a candidate, logit and id.
SUMMARY, CANDIDATE = 80, 8


class Sent(NamedTuple):
    """Bytes over one GPU's NVLink and one adapter in one direction."""

    nvlink: float
    adapter: float

    def __add__(self, other: object) -> Sent:
        assert isinstance(other, Sent)
        return Sent(self.nvlink + other.nvlink, self.adapter + other.adapter)

    @property
    def seconds(self) -> float:
        """Both links work at once."""
        return max(self.nvlink / NVLINK, self.adapter / INFINIBAND)


def gather(n: int, part: float) -> Sent:
    """Every rank's part to all. A node takes in all other nodes' parts by eight adapters, each part once."""
    return Sent((n - 1) * part, max(n - NODE, 0) * part / NODE)


def scatter_sum(n: int, whole: float) -> Sent:
    """The sum of every rank's tensor, each rank its part: a gather run backwards."""
    return gather(n, whole / n)


def total(n: int, whole: float) -> Sent:
    """The sum of every rank's tensor on all."""
    return scatter_sum(n, whole) + gather(n, whole / n)


def ring(n: int, part: float, hops: int) -> Sent:
    """Every rank's part from neighbour to neighbour; between nodes by one adapter."""
    return Sent(hops * part, hops * part if n > NODE else 0)


class Way(NamedTuple):
    """Something to do: what n GPUs send, in how many collectives, and how long each computes."""

    name: str
    sent: Callable[[int], Sent]
    messages: int
    compute: Callable[[int], float]


def product(rows: int, n: int, passes: int = 1) -> float:
    """Seconds of a head's product, or of reading its weight if that takes longer."""
    flops = 2 * rows * HIDDEN * VOCAB / n * passes
    return max(flops / FLOPS, VOCAB / n * HIDDEN * NARROW * passes / MEMORY)


def attention(pairs: float, n: int, factor: float = 1.0) -> float:
    """Seconds of the two products over visible pairs; backward is 2.5 times forward."""
    return factor * 4 * HEADS * HEAD_DIM * pairs / n / FLOPS


def vocabulary() -> list[Way]:
    """A denoising step's draw of a canvas, and the loss of a training step."""
    draw, loss = (lambda n: product(CANVAS, n)), (lambda n: product(TOKENS, n, passes=4))
    kept = lambda n: product(TOKENS, n, passes=3)  # noqa: E731  (logits that are kept are not computed anew)
    logits = VOCAB * NARROW
    hidden = TOKENS * HIDDEN * WIDE
    return [
        Way("draw, sharded", lambda n: gather(n, CANVAS * SUMMARY), 1, draw),
        Way("draw, top_k = 50", lambda n: gather(n, CANVAS * (SUMMARY + 50 * CANDIDATE)), 2, draw),
        Way("draw, top_p", lambda n: gather(n, CANVAS * (SUMMARY + 256 * CANDIDATE)), 2, draw),
        Way("draw, logits gathered", lambda n: gather(n, CANVAS * logits / n), 1, draw),
        Way("loss, sharded", lambda n: gather(n, TOKENS * SUMMARY) + total(n, hidden), 2, loss),
        Way("loss, logits gathered", lambda n: gather(n, TOKENS * logits / n) + total(n, hidden), 2, kept),
    ]


def context() -> list[Way]:
    """A full-attention layer: block diffusion's training pass, and a denoising step over a cache."""
    keys = CONTEXT * KV_HEADS * HEAD_DIM * 2 * NARROW
    training, denoising = CONTEXT**2, CANVAS * CONTEXT
    lse, partial = CANVAS * HEADS * WIDE, CANVAS * HEADS * HEAD_DIM * WIDE
    forward, both = (lambda n: attention(training, n)), (lambda n: attention(training, n, 3.5))
    step = lambda n: max(attention(denoising, n), keys / n / MEMORY)  # noqa: E731
    # Backward keys travel again, and their gradients in float32, around a ring to where they began.
    grads = keys * WIDE / NARROW
    return [
        Way("training forward, gather", lambda n: gather(n, keys / n), 1, forward),
        Way("training forward, ring", lambda n: ring(n, keys / n, n - 1), 1, forward),
        Way(
            "forward + backward, gather",
            lambda n: gather(n, keys / n) + gather(n, keys / n) + scatter_sum(n, grads),
            3,
            both,
        ),
        Way(
            "forward + backward, ring",
            lambda n: ring(n, keys / n, n - 1) + ring(n, keys / n, n - 1) + ring(n, grads / n, n),
            3,
            both,
        ),
        Way("decode, sharded cache", lambda n: gather(n, lse) + total(n, partial), 2, step),
        Way("decode, keys gathered", lambda n: gather(n, keys / n), 1, lambda n: step(1)),
    ]


def exchange(way: Way, n: int) -> float:
    """Seconds of what is sent, where nothing is computed meanwhile."""
    return way.sent(n).seconds + way.messages * LATENCY[n > NODE]


def limit(way: Way) -> str:
    """The first power of two of GPUs that spend longer in exchange than in computing."""
    n = next((n for n in (2**i for i in range(1, 15)) if exchange(way, n) > way.compute(n)), None)
    return f"{n:,}" if n else "> 16,384"


def size(x: float) -> str:
    """Bytes in units of 1,000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if x >= scale:
            return f"{x / scale:.3g} {unit}"
    return f"{x:.0f} B"


def time(x: float) -> str:
    """Seconds."""
    return f"{x * 1e3:.3g} ms" if x >= 1e-3 else f"{x * 1e6:.3g} µs"


def table(ways: list[Way]) -> Iterator[str]:
    """A row per way: of each number of GPUs bytes by NVLink and adapter, exchange and computing."""
    columns = [f"{n:,} GPUs: NVLink, adapter" for n in GPUS]
    yield "| | " + " | ".join(f"{c} | exchange, computing" for c in columns) + " | exchange prevails from |"
    yield "|---|" + "---:|---:|" * len(GPUS) + "---:|"
    for way in ways:
        cells = []
        for n in GPUS:
            sent = way.sent(n)
            cells.append(f"{size(sent.nvlink)}, {size(sent.adapter)}")
            cells.append(f"{time(exchange(way, n))}, {time(way.compute(n))}")
        yield f"| {way.name} | " + " | ".join(cells) + f" | {limit(way)} |"


def main() -> None:
    """Both tables."""
    print(*table(vocabulary()), "", *table(context()), sep="\n")


if __name__ == "__main__":
    main()
