"""dlcore over torch.distributed: vocabularies, contexts and batches that are spread over ranks.

README.md beside this file says what is exchanged, how noise is keyed, and how far it carries.
"""

from __future__ import annotations

import torch

if not torch.distributed.is_available():
    raise ImportError("dlcore.distributed needs torch.distributed, which this build of torch does not have")

from dlcore.distributed import attention, rules
from dlcore.distributed.attention import SequenceShards, shard_sequence, unshard_sequence
from dlcore.distributed.keys import row_keys, rows
from dlcore.distributed.logits import ShardedLogits, shard_sizes

__all__ = [
    "SequenceShards",
    "ShardedLogits",
    "attention",
    "row_keys",
    "rows",
    "shard_sequence",
    "shard_sizes",
    "unshard_sequence",
]

rules.register()
