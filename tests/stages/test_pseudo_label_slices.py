"""pseudo_label with centroids sharded over ranks: the files of one process, also after a kill on another grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.artifacts import Store
from grappa_dist.config import ClusteringConfig, Resources
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.kmeans.methods import RankMemory, centroid_shards, choose, may_shard_centroids
from grappa_dist.stages.kmeans_checkpoints import CHECKPOINT_FILE
from grappa_dist.stages.pseudo_label import (
    LabelJob,
    check_slices,
    label_ranks,
    ranks_for,
)
from tests.processes import run_ranks
from tests.stages.test_pseudo_label import context, files_of, label, label_job


def noted(comm: Comm, job: LabelJob) -> list[str]:
    notes = list[str]()
    label_ranks(RankContext(comm, torch.device("cpu"), lambda status: None, lambda: False, notes.append), job)
    return notes


def test_a_killed_job_with_sharded_centroids_goes_on_on_another_grid_to_the_same_files(tmp_path: Path) -> None:
    killed, whole = (label_job(tmp_path, Store(tmp_path / name)) for name in ("killed", "whole"))
    with pytest.raises(RuntimeError, match="rank 1 of 2 died without an error message"):
        run_ranks(label, 2, replace(killed, centroid_shards=2), 9)
    assert (killed.labels[12].begin() / CHECKPOINT_FILE).exists()
    (note,) = run_ranks(noted, 3, replace(killed, centroid_shards=3))[0]
    assert note.startswith("K = 12: centroids in 3 slices, about ")
    label_ranks(context(None, []), whole)
    found, expected = files_of(killed.labels[12]), files_of(whole.labels[12])
    assert set(found) == set(expected)
    assert all(found[name] == expected[name] for name in found if name != "stats.json")


def test_a_method_that_keeps_all_centroids_on_every_rank_says_so(tmp_path: Path) -> None:
    job = label_job(tmp_path, Store(tmp_path), method="hierarchical")
    (note,) = noted(Comm(), replace(job, centroid_shards=2))
    assert note.startswith("K = 12: only exact k-means shards centroids, all are on every rank: ")
    balanced = label_job(tmp_path, Store(tmp_path / "balanced"), balance=2.0)
    assert noted(Comm(), balanced) == []


def test_slices_divide_the_ranks_and_are_as_few_as_memory_allows() -> None:
    four = RankMemory(4, 10**9)
    by_labels = [centroid_shards("auto", num, 384, four) for num in (10**4, 23_000, 24_000, 46_000, 47_000, 10**7)]
    assert by_labels == [1, 1, 2, 2, 4, 4]  # half of 10^9 bytes hold 23,251 centroids
    assert [centroid_shards(asked, 8, 384, RankMemory(6, 1)) for asked in (1, 2, 3, 4, 6, 9)] == [1, 2, 3, 6, 6, 6]
    assert centroid_shards("auto", 10**9, 384, RankMemory(4, 0)) == 1  # where the memory is not known


def test_only_plain_exact_k_means_shards_its_centroids() -> None:
    may = {}
    for settings in ({}, {"method": "sampled"}, {"method": "approximate"}, {"restarts": 2}, {"balance": 2.0}):
        config = ClusteringConfig.model_validate(settings)
        may[str(settings)] = may_shard_centroids(config, choose(config, 10, 1000))
    assert list(may.values()) == [True, False, False, False, False], may


def test_a_job_has_a_multiple_of_the_slices_asked_for_as_ranks() -> None:
    assert [ranks_for(asked, 7, 9) for asked in ("auto", 1, 2, 3, 7)] == [7, 7, 6, 6, 7]
    with pytest.raises(ValueError, match=r"^resources\.centroid_shards=4 is more than the 3 ranks of pseudo_label, "):
        ranks_for(4, 7, 3)


@pytest.mark.parametrize(
    ("where", "shards", "why"),
    [
        ({"workers": 2}, None, r"=3 is more than the 2 ranks of pseudo_label, which has 2 workers: lower it"),
        (
            {"workers": 2},
            9,
            r"=3 is more than the 2 ranks of pseudo_label, which has 2 workers and 9 shards of images: ",
        ),
        ({"workers": 9}, 1, r"=3 is more than the 1 rank of pseudo_label, which has 9 workers and 1 shard of images"),
        ({"workers": 9, "gpus_per_worker": 1}, 9, r"=3: a GPU holds all centroids, .*or resources\.gpus_per_worker=0"),
    ],
)
def test_more_slices_than_there_can_be_ranks_are_refused_before_anything_is_made(
    tmp_path: Path, where: dict[str, Any], shards: int | None, why: str
) -> None:
    resources = Resources(centroid_shards=3, **{"gpus_per_worker": 0, **where})
    artifact = Store(tmp_path).artifact("labels/k=2", {}, {})
    with pytest.raises(ValueError, match=rf"^resources\.centroid_shards{why}"):
        check_slices(resources, [artifact], shards)
    artifact.begin()
    artifact.commit()
    check_slices(resources, [artifact], shards)  # nothing is left to cluster


def test_slices_that_are_not_known_to_be_too_many_are_left_to_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:1")
    check_slices(Resources(centroid_shards=3))
    check_slices(Resources(centroid_shards=3), None, 3)
    check_slices(Resources(), None, 1)
    with pytest.raises(ValueError, match="is more than the 2 ranks of pseudo_label, which has 2 shards of images"):
        check_slices(Resources(centroid_shards=3), None, 2)
