"""What a rank takes for its centroids, by the number of slices that these have."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm, Grid
from grappa_dist.distributed.sharded_rows import GridRows, Rows, join_rows
from grappa_dist.kmeans.lloyd import KMeansTask, run_fit, start_fit, start_sliced_fit
from grappa_dist.kmeans.methods import CENTROID_BYTES
from tests.kmeans.test_methods_memory import DIM, watched, write_rows
from tests.processes import run_ranks

ROWS, NUM_LABELS, BLOCK_ROWS = 24_000, 20_000, 512

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def rows_of(parts: list[np.ndarray]) -> Rows:
    return Rows(parts, [np.ones(len(part), dtype=bool) for part in parts])


def taken(comm: Comm, path: Path, num_labels: int, slices: int) -> int:
    """The bytes that this rank takes at most, first centroids left out."""
    mapped = np.load(path, mmap_mode="r")
    parts = [mapped[ROWS * rank // comm.size : ROWS * (rank + 1) // comm.size] for rank in range(comm.size)]
    task = KMeansTask(ClusteringConfig(iterations=1), initial=mapped[:num_labels])
    own = join_rows(comm, rows_of([parts[comm.rank]]), block_rows=BLOCK_ROWS, device=torch.device("cpu"))
    grid = Grid.of(comm, slices)
    with watched() as seen:
        if slices == 1:
            run_fit(start_fit(own, num_labels, task))
        else:
            run_fit(start_sliced_fit(GridRows.of(own, grid, rows_of(parts)), num_labels, task))
    return seen.rise


def test_few_centroids_take_little_of_a_rank_with_or_without_slices(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.npy", ROWS)
    for slices in (1, 2):
        assert max(run_ranks(taken, 2, tmp_path / "rows.npy", 4, slices)) < CENTROID_BYTES * NUM_LABELS * DIM / 2


@pytest.mark.slow
def test_a_slice_of_the_centroids_takes_its_part_of_what_all_take(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.npy", ROWS)
    whole, sliced = (max(run_ranks(taken, 2, tmp_path / "rows.npy", NUM_LABELS, n)) for n in (1, 2))
    assert whole > CENTROID_BYTES * NUM_LABELS * DIM / 2  # else other things are measured
    assert sliced < 0.65 * whole
