"""A training's state in one safetensors file, written so that a kill leaves the old one or the new one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.systems.system import System
from dlcore.demo.options import UserError

_MODEL, _OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True)
class Reached:
    """How far a training is: steps made and seconds spent in them."""

    step: int = 0
    seconds: float = 0.0


def save(path: Path, system: System, optimizer: torch.optim.Optimizer, reached: Reached, corpus: str) -> None:
    """Write everything that training needs to go on. `corpus` names the text."""
    tensors = {_MODEL + name: value.contiguous() for name, value in system.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": value for name, value in state.items()}
    metadata = _identity(system, corpus) | {"step": str(reached.step), "seconds": repr(reached.seconds)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # Shared weights would be refused; a copy of each is written.
    save_file({name: value.clone() for name, value in tensors.items()}, partial, metadata)
    with open(partial, "rb") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)


def load(path: Path, system: System, optimizer: torch.optim.Optimizer | None, corpus: str) -> Reached:
    """Restore what `save` wrote; nothing happens where there is no file.

    Raises:
        UserError: the file is another system's or text's, or no checkpoint.
    """
    if not path.exists():
        return Reached()
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no checkpoint ({error}); delete it or choose another --out") from None
    wanted = _identity(system, corpus)
    if got := {name: metadata.get(name) for name in wanted if metadata.get(name) != wanted[name]}:
        raise UserError(
            f"{path}: another training's checkpoint, {_words(got)} instead of "
            f"{_words({name: wanted[name] for name in got})}; delete it or choose another --out"
        )
    try:
        system.load_state_dict(_under(tensors, _MODEL))
        if optimizer is not None:
            _restore(optimizer, _under(tensors, _OPTIMIZER))
        return Reached(int(metadata["step"]), float(metadata["seconds"]))
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: does not fit ({error}); delete it or choose another --out") from None


def _identity(system: System, corpus: str) -> dict[str, str]:
    sizes = {"vocab_size": str(system.vocab_size), "length": str(system.length)}
    return {"system": system.name, "text": corpus, **sizes}


def _words(items: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {value}" for name, value in items.items())


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _restore(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
