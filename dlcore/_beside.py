"""What stands beside a DTensor: plain tensors that an op takes together with one.

Nothing here imports torch.distributed where no DTensor is given.
"""

from __future__ import annotations

import torch
from torch import Tensor


def is_dtensor(x: Tensor) -> bool:
    """A tensor that is spread over a DeviceMesh."""
    return type(x) is not Tensor and hasattr(x, "device_mesh")


def beside(x: Tensor, y: Tensor) -> Tensor:
    """y as it is; where x is a DTensor and y is plain, replicated on its mesh."""
    return _replicated(x, y) if is_dtensor(x) and not is_dtensor(y) else y


def keys_beside(x: Tensor, key: Tensor, lead: torch.Size) -> Tensor:
    """The key as it is; where x is a DTensor, the same noise's key per row, sharded as x's rows are."""
    if not is_dtensor(x) or is_dtensor(key):
        return key
    from torch.distributed.tensor import Replicate, Shard

    from dlcore import rng

    whole = _replicated(x, rng.row_keys(key, lead))
    rows = [
        p if isinstance(p, Shard) and p.dim < len(lead) else Replicate()
        for p in x.placements  # type: ignore[attr-defined]
    ]
    keys: Tensor = whole.redistribute(placements=rows)  # type: ignore[attr-defined]
    return keys


def _replicated(x: Tensor, y: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(y, mesh, [Replicate()] * mesh.ndim, run_check=False)
