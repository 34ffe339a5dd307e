"""dlcore inside Hugging Face transformers: `accelerate` a DiffusionGemma, `unmask` with a masked model.

Importing this registers the attention "dlcore" with transformers (``attn_implementation="dlcore"``). It needs
``pip install 'dlcore[transformers]'`` and raises ImportError without.
"""

from __future__ import annotations

try:
    from transformers import __version__

    if tuple(map(int, __version__.split(".")[:2])) < (5, 13):
        raise ImportError(f"this is transformers {__version__}")
except ImportError as error:
    raise ImportError(
        f"dlcore.integrations.transformers needs transformers 5.13 or newer ({error}): "
        "pip install 'dlcore[transformers]'"
    ) from error

from dlcore.integrations.transformers import attention
from dlcore.integrations.transformers.masked_lm import unmask
from dlcore.integrations.transformers.swap import accelerate, restore

__all__ = ["accelerate", "restore", "unmask"]

attention.register()
