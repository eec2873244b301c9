"""What a model is used for, in one process and without Ray: evaluation, search, near-duplicates."""

BATCH_SIZE, DECODE_THREADS = 64, 2  # of images that are embedded in this process
