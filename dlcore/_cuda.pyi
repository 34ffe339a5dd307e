"""The CUDA kernels: what `dlcore._C` has, on a device, with workspaces and the stream last."""

from typing import Any

#: What kind of torch device the addresses are of.
DEVICE: str

class Error(RuntimeError): ...

def __getattr__(name: str) -> Any: ...
