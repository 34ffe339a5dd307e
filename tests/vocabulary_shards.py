"""Logits and heads over ranks, beside the same whole: what tests of a sharded vocabulary share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import dlcore
from dlcore import LinearLogits
from dlcore.distributed import ShardedLogits

ROWS, WIDTH, VOCAB = 6, 8, 1000
#: Tokens per rank: groups whole and cut, several ranks in one group, ranks without any.
SIZES = (
    (1000,),
    (512, 488),
    (100, 900),
    (600, 0, 400),
    (300, 300, 400),
    (250, 250, 250, 250),
    (20, 30, 50, 900),
    (0, 900, 100, 0),
)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5, torch.float64: 1e-11}
KINDS = pytest.mark.parametrize("kind", ["dense", "head"])


def every_split() -> Any:
    return pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "+".join(map(str, s)))


def columns(group: dist.ProcessGroup, sizes: tuple[int, ...]) -> slice:
    first = sum(sizes[: dist.get_rank(group)])
    return slice(first, first + sizes[dist.get_rank(group)])


def inputs(
    kind: str, dtype: torch.dtype, *, rows: int = ROWS, vocab: int = VOCAB, seed: int = 0
) -> tuple[Any, ...]:
    """Logits, or hidden, weight and bias."""
    made = torch.Generator().manual_seed(seed)
    if kind == "dense":
        return ((3 * torch.randn(2, rows // 2, vocab, generator=made)).to(dtype),)
    hidden = torch.randn(2, rows // 2, WIDTH, generator=made)
    weight, bias = torch.randn(vocab, WIDTH, generator=made), torch.randn(vocab, generator=made)
    return tuple(x.to(dtype) for x in (hidden, weight, bias))


def whole(parts: tuple[Any, ...]) -> Any:
    return parts[0] if len(parts) == 1 else LinearLogits(*parts)


def sharded(parts: tuple[Any, ...], group: dist.ProcessGroup, sizes: tuple[int, ...]) -> Any:
    here = columns(group, sizes)
    if len(parts) == 1:
        return ShardedLogits(parts[0][..., here], group, sizes)
    return LinearLogits(parts[0], *(x[here] for x in parts[1:]), group=group, sizes=sizes)


def close(got: Any, wanted: Any, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(got, wanted, rtol=limit, atol=limit, equal_nan=True)


def row_options(z: torch.Tensor) -> list[dict[str, Any]]:
    shift = torch.linspace(-2, 3, z.numel()).view(z.shape)
    return [
        {},
        {"index": z, "shift": shift, "temperature": 0.7},
        {"index": z, "softcap": 4.0, "exclude": 20, "temperature": torch.tensor([0.5, 1.0, 2.0])},
    ]


def tokens_of(vocab: int = VOCAB, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, (2, ROWS // 2), generator=torch.Generator().manual_seed(seed))


def both(parts: tuple[Any, ...], group: dist.ProcessGroup, sizes: tuple[int, ...]) -> tuple[Any, Any]:
    return sharded(parts, group, sizes), whole(parts)


def keys_of(z: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A shared key, and one per row."""
    return dlcore.rng.key(seed), dlcore.rng.split(dlcore.rng.key(seed), z.shape)


def leaves(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in parts)


def equal_gradients(
    group: dist.ProcessGroup, sizes: tuple[int, ...], dtype: torch.dtype, function: Any, *operands: Any
) -> None:
    """function(*heads) of operands that are parts, and what it gives back to each of their tensors."""
    here, one = columns(group, sizes), [leaves(parts) for parts in operands]
    many = [leaves(parts) for parts in operands]
    wanted = function(*map(whole, one))
    got = function(*(sharded(parts, group, sizes) for parts in many))
    close(got, wanted, dtype)
    weights = torch.linspace(-1, 2, wanted.numel(), dtype=wanted.dtype).view(wanted.shape)
    torch.autograd.backward([wanted], [weights])
    torch.autograd.backward([got], [weights])
    for mine, theirs in zip(many, one, strict=True):
        for i, (x, y) in enumerate(zip(mine, theirs, strict=True)):
            assert x.grad is not None
            assert y.grad is not None
            only = (..., here) if len(mine) == 1 else here if i else ...
            # Of what a rank does not hold it gives no gradient.
            close(x.grad[only], y.grad[only], dtype)
            if only is not ...:
                rest = x.grad.clone()
                rest[only] = 0
                assert not rest.any()


ALONE = pytest.mark.parametrize("named", ["cpu", "reference"])


class Payload(TorchDispatchMode):
    """Counts the bytes that a rank hands to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "_c10d_functional" and "wait" not in str(function):
            self.sent += args[0].numel() * args[0].element_size()
        return function(*args, **(kwargs or {}))
