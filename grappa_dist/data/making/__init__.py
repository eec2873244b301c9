"""Making shards: files as people keep them, or a published benchmark -> deterministic tars, in parallel, resumable."""
