"""What a model is used for, in one process and without Ray: evaluation, search, near-duplicates."""
