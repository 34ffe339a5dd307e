"""dlcore over torch.distributed: vocabularies, contexts and batches that are spread over ranks."""
