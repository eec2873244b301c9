from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from grappa_dist.artifacts import Artifact, RowArrays, Store
from grappa_dist.config import ClusteringConfig
from grappa_dist.dist.comm import Comm
from grappa_dist.dist.workers import RankContext, Stopped
from grappa_dist.stages.pseudo_label import (
    PROGRESS_FILE,
    LabelJob,
    label_ranks,
    labels_of,
    ladder,
    num_labels,
    own_shards,
    rows_file,
)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (133_339, (256, 512, 2048, 4096, 8192, 16384, 65536, 131072)),
        (9_573, (256, 512, 1024, 2048, 4096, 8192)),
        (600, (256, 512)),
        (300, (256,)),
        (100, (64,)),
        (3, (2,)),
    ],
)
def test_the_ladder_climbs_in_powers_of_two_to_about_the_number_of_images(rows: int, expected: tuple[int, ...]) -> None:
    assert ladder(rows) == expected


@pytest.mark.parametrize("rows", [*range(2, 40), 255, 256, 257, 269, 270, 271, 511, 1023, 10**5, 10**8, 10**12])
def test_every_ladder_fits_the_images(rows: int) -> None:
    found = ladder(rows)
    assert 1 <= len(found) <= 8
    assert all(2 <= k <= rows and k & (k - 1) == 0 for k in found)
    assert found[-1] > rows * 0.47 or rows < 5
    assert found[0] == min(256, found[-1])
    assert list(found) == sorted(set(found))


def test_the_labels_asked_for_are_taken_in_their_order() -> None:
    assert num_labels(ClusteringConfig(num_labels=(8, 2, 4)), 8) == (8, 2, 4)
    assert num_labels(ClusteringConfig(num_labels="auto"), 600) == (256, 512)


def test_more_labels_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clustering\.num_labels=9 is more than the 8 training images"):
        num_labels(ClusteringConfig(num_labels=(2, 9, 4)), 8)


SIZES = [
    (5,),
    (5, 0),
    (0, 5),
    (0, 0, 0),
    (3, 3, 3, 3),
    (1, 0, 100, 0, 1),
    (100, 1, 1, 1),
    (1, 1, 1, 100),
    (7, 2, 9, 4, 4),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_shard_has_one_rank_and_ranks_follow_one_another(sizes: tuple[int, ...], ranks: int) -> None:
    starts = np.cumsum([0, *sizes]).tolist()
    shares = [own_shards(starts, rank, ranks) for rank in range(ranks)]
    assert [shard for share in shares for shard in share] == list(range(len(sizes)))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_have_about_as_many_rows_each(ranks: int) -> None:
    sizes = np.random.default_rng(0).integers(0, 100, 200)
    starts = np.cumsum([0, *sizes]).tolist()
    rows = [sum(sizes[i] for i in own_shards(starts, rank, ranks)) for rank in range(ranks)]
    assert max(rows) - min(rows) <= 2 * sizes.max()


def test_shards_of_billions_of_rows_are_shared_out_exactly() -> None:
    starts = np.cumsum([0] + [2**40] * 6).tolist()
    assert [list(own_shards(starts, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def label_job(folder: Path, store: Store) -> LabelJob:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(folder / "rows.npy", rows)
    features = RowArrays((str(folder / "rows.npy"),), (0, 300))
    clustering = ClusteringConfig(num_labels=(12,), iterations=8)
    labels = {12: labels_of(store, clustering, 0, 12, [])}
    return LabelJob(features, ("shard",), np.array([5, 70]), labels, clustering, 0)


def context(stop_after: int | None, heard: list[str]) -> RankContext:
    def report(status: dict[str, str]) -> None:
        heard.append(status["phase"])

    return RankContext(Comm(), torch.device("cpu"), report, lambda: stop_after is not None and len(heard) > stop_after)


def files_of(artifact: Artifact) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in artifact.path.iterdir() if p.name != "manifest.json"}


def test_a_stopped_clustering_goes_on_from_its_last_update_to_the_same_files(tmp_path: Path) -> None:
    whole, stopped = (label_job(tmp_path, Store(tmp_path / name)) for name in ("whole", "stopped"))
    label_ranks(context(None, []), whole)
    with pytest.raises(Stopped):
        label_ranks(context(4, []), stopped)  # the initialisation and three iterations were reported
    artifact = stopped.labels[12]
    assert (artifact.begin() / PROGRESS_FILE).exists()
    assert not artifact.complete
    heard: list[str] = []
    label_ranks(context(None, heard), stopped)
    assert [phase.split(",")[0] for phase in heard[1:3]] == ["K=12 (1/1) iteration 3", "K=12 (1/1) iteration 4"]
    found, expected = files_of(artifact), files_of(whole.labels[12])
    assert set(found) == {"stats.json", "centroids.npy", rows_file(0)}
    assert found[rows_file(0)] == expected[rows_file(0)]
    assert found["centroids.npy"] == expected["centroids.npy"]
    stats, as_before = (json.loads(files["stats.json"]) for files in (found, expected))
    for figure in ("exact_share", "searched_share"):  # of the passes made, which a resume makes fewer of
        del stats[figure], as_before[figure]
    assert stats == as_before


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    job = label_job(tmp_path, Store(tmp_path / "run"))
    (job.labels[12].begin() / PROGRESS_FILE).write_bytes(b"half")
    with pytest.raises(ValueError, match=rf"{PROGRESS_FILE} is damaged .*; delete it"):
        label_ranks(context(None, []), job)
