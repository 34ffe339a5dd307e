"""dlcore over torch.distributed: vocabularies, contexts and batches that are spread over ranks."""

from dlcore.distributed import attention, rules
from dlcore.distributed.keys import row_keys, rows
from dlcore.distributed.logits import ShardedLogits, shard_sizes

__all__ = ["ShardedLogits", "attention", "row_keys", "rows", "shard_sizes"]

rules.register()
