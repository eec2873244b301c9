"""How the labels of rows lie on disk: a file of them per shard beside the centroids that they name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grappa_dist.artifacts import Artifact, RowArrays
from grappa_dist.data.shards import ImageShards

CENTROIDS_FILE = "centroids.npy"  # (K, D) float32


def rows_file(shard: int) -> str:
    """The labels of one shard's rows, (P,) int32."""
    return f"rows-{shard:06d}.npy"


def label_rows(artifact: Artifact, images: ImageShards) -> RowArrays:
    """The labels of all rows, memory-mapped; -1 for rows that do not decode."""
    return RowArrays.of((artifact.path / rows_file(i) for i in range(len(images.shards))), images.starts)


def own_shards(starts: Sequence[int], rank: int, size: int) -> range:
    """Consecutive shards for each rank, about equal in rows: shard i goes to the rank that its middle row falls to."""
    middles = (np.asarray(starts[:-1]) + np.asarray(starts[1:])) / 2
    owners = np.minimum((middles * size / max(1, starts[-1])).astype(int), size - 1)
    return range(int(np.searchsorted(owners, rank)), int(np.searchsorted(owners, rank, side="right")))
