"""What would wait for a GPU, told with a GPU and without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dlcore import _checks as checks
from dlcore import _tensors
from dlcore._dispatch import run
from dlcore.triton import launch

ON_GPU = DEVICE == "cuda"
#: Ops of torch that wait for a GPU: their result, or its shape, is read on the host.
WAITING = (
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_linalg_check_errors"),
    *("_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave"),
    # torch.tensor(...): a copy from the host.
    "lift_fresh",
)


class Watch(TorchDispatchMode):
    """Refuses what would wait, inside dlcore's own ops, too."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = op._schema.name.split("::")
        if space == "dlcore":
            with self:
                found = run(name.replace("_", ".", 1), *args)
            # No kernel has written them, and tokens are made of numbers, too.
            return tree_map_only(Tensor, lambda x: x.zero_(), found)
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        masked = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in masks)
        if masked or name in WAITING:
            raise AssertionError(f"{name} would wait for the GPU")
        return op(*args, **(kwargs or {}))


@contextmanager
def nothing_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU torch tells; without one, what would ask a tensor for its numbers raises, and nothing runs."""
    monkeypatch.setattr(checks, "reads_data", lambda x: False)  # as of a GPU's tensors
    if ON_GPU:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, that it may miss something
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return

    def refuse(*_: Any, what: str, **__: Any) -> Any:
        raise AssertionError(f"{what} would wait for the GPU")

    with monkeypatch.context() as patch, launch.recording(), Watch():
        # What no op of torch tells of.
        for name in ("tolist", "cpu", "numpy"):
            patch.setattr(Tensor, name, partial(refuse, what=name))
        # The one copy from the host that does not wait.
        patch.setattr(_tensors, "_of_host", partial(_tensors.filled, device=torch.device("cpu")))
        yield
