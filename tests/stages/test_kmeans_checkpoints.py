from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grappa_dist.kmeans.lloyd import KMeansState
from grappa_dist.stages import kmeans_checkpoints
from grappa_dist.stages.kmeans_checkpoints import CHECKPOINT_FILE, load_checkpoint, save_checkpoint


def test_a_checkpoint_is_written_and_read_by_pieces_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_checkpoints, "PIECE_ROWS", 3)
    centroids = np.arange(-50, 50, dtype=np.float32).reshape(10, 10) / 64
    save_checkpoint(tmp_path / CHECKPOINT_FILE, {"0/fit": KMeansState(centroids, (7, 2**70), 4)})
    monkeypatch.undo()
    found, problem = load_checkpoint(tmp_path / CHECKPOINT_FILE)
    state = found["0/fit"]
    assert (problem, state.inertia, state.repaired) == ("", (7, 2**70), 4)
    assert np.array_equal(state.centroids, centroids)
    assert not state.centroids.flags.owndata
