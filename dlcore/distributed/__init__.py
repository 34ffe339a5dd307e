"""dlcore over torch.distributed: vocabularies, contexts and batches that are spread over ranks."""

from dlcore.distributed import rules
from dlcore.distributed.keys import row_keys, rows

__all__ = ["row_keys", "rows"]

rules.register()
