"""dlcore over torch.distributed: vocabularies, contexts and batches that are spread over ranks."""

from dlcore.distributed.logits import ShardedLogits, shard_sizes

__all__ = ["ShardedLogits", "shard_sizes"]
