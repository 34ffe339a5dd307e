"""Argument checks that name the op, the argument, what it got and what it accepts.

ValueError for shapes and values, TypeError for dtypes.
"""

from __future__ import annotations

import math
import os
from typing import overload

import torch
from torch import Tensor

from dlcore._beside import is_dtensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    """A tensor by dtype and shape, anything else by its repr, cut to 80 characters."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    shown = repr(x)
    return f"{type(x).__name__} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def reads_data(x: Tensor) -> bool:
    """Whether checks that read values run: on the CPU, or under DLCORE_CHECK=1; never while tracing.

    Nor of a DTensor: what the op checks, each rank checks of its own part.
    """
    if torch.compiler.is_compiling() or is_dtensor(x):
        return False
    return x.numel() > 0 and (x.device.type == "cpu" or os.environ.get("DLCORE_CHECK") == "1")


def floating(op: str, name: str, x: object) -> None:
    """A tensor (..., n) of a floating dtype with at least one dimension and a non-empty last one."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {describe(x)}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense, got {x.layout}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: {name} must be (..., n) with n >= 1, got {tuple(x.shape)}")


def tokens(
    op: str, name: str, x: object, lead: torch.Size | None = None, device: torch.device | None = None
) -> None:
    """int64 token ids, of shape `lead` and on `device` if given."""
    if not isinstance(x, Tensor) or x.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be an int64 Tensor, got {describe(x)}")
    if lead is not None and x.shape != lead:
        raise ValueError(f"{op}: {name} must have shape {tuple(lead)}, got {tuple(x.shape)}")
    if device is not None:
        on_device(op, name, x, device)


def mask(
    op: str, name: str, x: object, shape: torch.Size | None = None, device: torch.device | None = None
) -> None:
    """A bool per position of each sequence, of `shape` and on `device` if given."""
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be a bool Tensor, got {describe(x)}")
    if x.dim() != 2 or (shape is not None and x.shape != shape):
        wanted = "(B, L)" if shape is None else tuple(shape)
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(x.shape)}")
    if device is not None:
        on_device(op, name, x, device)


def sequences(op: str, name: str, x: Tensor) -> None:
    """One value per position of each sequence."""
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} must be (B, L), got {tuple(x.shape)}")


def on_device(op: str, name: str, x: Tensor, device: torch.device) -> None:
    """A tensor on `device`."""
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {x.device}")


def token_range(op: str, name: str, x: Tensor | None, vocab: int, low: int = 0) -> None:
    """Every id in [low, vocab). Reads data."""
    if x is None or not reads_data(x):
        return
    smallest, largest = (int(v) for v in torch.aminmax(x))
    if smallest < low or largest >= vocab:
        got = smallest if smallest < low else largest
        raise ValueError(f"{op}: {name} must lie in [{low}, {vocab}), got {got}")


def value_range(op: str, name: str, x: Tensor | None, low: float, high: float = torch.inf) -> None:
    """Every value in [low, high]; NaN never is. Reads data."""
    if x is None or not reads_data(x):
        return
    ok = (x >= low) & (x <= high)
    if not bool(ok.all()):
        got = x[~ok].flatten()[0].item()
        raise ValueError(f"{op}: {name} must lie in [{low:g}, {high:g}], got {got:.8g}")


def room(op: str, max_len: int, needed: int) -> None:
    """As many rows of a cache as are needed."""
    if needed > max_len:
        raise ValueError(f"{op}: the cache is full: max_len is {max_len}, {needed} are needed")


def option(op: str, name: str, value: object, accepted: tuple[str, ...]) -> None:
    """One of a fixed set of strings."""
    if value not in accepted:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def integer(op: str, name: str, value: object) -> None:
    """An int of 64 bits, and no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {describe(value)}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}: {name} must fit in 64 bits, got {describe(value)}")


def real(op: str, name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """A number in [low, high], and no bool; NaN never is."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {describe(value)}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must lie in [{low:g}, {high:g}], got {value:.8g}")
    return value


def no_gradient(op: str, name: str, value: object) -> None:
    """No tensor of which a gradient is asked, where the op would drop it."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: has no gradient in {name}: detach it")


def token_id(op: str, name: str, value: int | None, vocab: int) -> None:
    """One optional token id."""
    if value is None:
        return
    integer(op, name, value)
    if not 0 <= value < vocab:
        raise ValueError(f"{op}: {name} must lie in [0, {vocab}), got {value}")


def per_row(
    op: str,
    name: str,
    value: float | Tensor | None,
    lead: torch.Size,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """A number or a tensor that broadcasts to `lead`, as a tensor of `dtype` (not expanded)."""
    if value is None:
        return None
    real = (
        value.is_floating_point() if isinstance(value, Tensor) else isinstance(value, (float, torch.SymFloat))
    )
    if real and not dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must be an integer or an integer Tensor, got {describe(value)}")
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{op}: {name} must be a number or a Tensor, got {describe(value)}")
        if torch.compiler.is_compiling():
            # Arithmetic keeps a float symbolic, where full() would compile once per value.
            return (torch.ones((), dtype=torch.float64, device=device) * value).to(dtype)
        try:
            return torch.full((), value, dtype=dtype, device=device)
        except (RuntimeError, OverflowError) as error:
            raise ValueError(f"{op}: {name} is too large, got {describe(value)}") from error
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{op}: {name} must be a real Tensor, got {describe(value)}")
    if value.is_meta and device.type != "meta":
        raise ValueError(f"{op}: {name} must be on {device}, got meta")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be dense, got {value.layout}")
    if value.dim() > len(lead) or any(
        have not in (1, want) for have, want in zip(reversed(value.shape), reversed(lead), strict=False)
    ):
        raise ValueError(f"{op}: {name} must broadcast to {tuple(lead)}, got {tuple(value.shape)}")
    return value.to(device=device, dtype=dtype)


def number(
    op: str,
    name: str,
    value: float | Tensor,
    lead: torch.Size,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """A number per row, float64 unless told, broadcast over `lead` but not expanded."""
    x = per_row(op, name, value, lead, device, dtype)
    if x is None:
        raise TypeError(f"{op}: {name} must be a number or a Tensor, got {describe(value)}")
    return x


@overload
def within(op: str, name: str, x: Tensor, low: float, high: float, ends: str = "[]") -> Tensor: ...


@overload
def within(op: str, name: str, x: float, low: float, high: float, ends: str = "[]") -> float: ...


@overload
def within(
    op: str, name: str, x: float | Tensor, low: float, high: float, ends: str = "[]"
) -> float | Tensor: ...


def within(
    op: str, name: str, x: float | Tensor, low: float, high: float, ends: str = "[]"
) -> float | Tensor:
    """x itself, every value between low and high; `ends` says which of the two belong. Reads data."""
    if isinstance(x, Tensor) and not reads_data(x):
        return x
    # One number is compared in Python: each small operation of tensors takes microseconds.
    v = x.item() if isinstance(x, Tensor) and x.numel() == 1 else x
    ok = (v >= low if ends[0] == "[" else v > low) & (v <= high if ends[1] == "]" else v < high)
    if not bool(ok.all() if isinstance(ok, Tensor) else ok):
        got = first(x, ~ok) if isinstance(x, Tensor) and isinstance(ok, Tensor) else v
        raise ValueError(f"{op}: {name} must lie in {ends[0]}{low:g}, {high:g}{ends[1]}, got {got!r}")
    return x


def first(x: Tensor, where: Tensor) -> float:
    """The first value of x, broadcast, where `where` is true."""
    return float(x.expand(where.shape)[where][0])


def non_negative(op: str, name: str, value: Tensor) -> None:
    """Real numbers of any shape, at least 0."""
    if value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{op}: {name} must be a real Tensor, got {describe(value)}")
    value_range(op, name, value, 0.0)


def key(
    op: str,
    value: Tensor | None,
    generator: torch.Generator | None,
    lead: torch.Size | None,
    device: torch.device | None = None,
) -> Tensor:
    """The key as given, or a fresh one from torch's generator, on `device`. Without `lead` none is drawn."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {describe(generator)}")
    if value is None and lead is not None:
        if generator is None:
            fresh = torch.randint(-(2**63), 2**63 - 1, (2,))
        else:
            fresh = torch.randint(-(2**63), 2**63 - 1, (2,), generator=generator, device=generator.device)
        return fresh if device is None or fresh.device == device else fresh.to(device)
    if generator is not None:
        raise ValueError(f"{op}: give key or generator, not both")
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{op}: key must be an int64 Tensor, got {describe(value)}")
    shape = value.shape
    if shape != (2,) and (shape[-1:] != (2,) or (lead is not None and shape[:-1] != lead)):
        wanted = "(..., 2)" if lead is None else f"(2,) or {(*lead, 2)}"
        raise ValueError(f"{op}: key must have shape {wanted}, got {tuple(value.shape)}")
    return value if device is None or value.device == device else value.to(device)


def unused_key(op: str, value: Tensor | None, generator: torch.Generator | None, lead: torch.Size) -> None:
    """What a call that draws nothing was given to draw with: checked all the same."""
    if value is not None:
        key(op, value, generator, lead)
    elif generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{op}: generator must be a torch.Generator, got {describe(generator)}")
