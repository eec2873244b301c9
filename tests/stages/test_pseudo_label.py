from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grappa_dist.artifacts import Artifact, RowArrays, Store, own_shards, rows_file
from grappa_dist.config import BackboneConfig, ClusteringConfig, Config, DataConfig
from grappa_dist.data.index import Shard
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext, Stopped
from grappa_dist.kmeans.lloyd import KMeansState
from grappa_dist.kmeans.methods import choose
from grappa_dist.report.content import Clustering
from grappa_dist.stages.kmeans_checkpoints import CHECKPOINT_FILE, PREVIOUS_FILE, load_checkpoint, save_checkpoint
from grappa_dist.stages.pseudo_label import (
    LabelJob,
    check_good_rows,
    describe_choices,
    describe_shortcuts,
    label_ranks,
    labels_of,
    ladder,
    num_labels,
    pseudo_label,
)
from tests.processes import run_ranks
from tests.stages.tiny import Here, run_in


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (133_339, (256, 512, 2048, 4096, 8192, 16384, 65536, 131072)),
        (9_573, (256, 512, 1024, 2048, 4096, 8192)),
        (2_100, (256, 512, 1024, 2048)),
        (1_100, (128, 256, 512, 1024)),
        (600, (64, 128, 256, 512)),
        (270, (32, 64, 128, 256)),
        (136, (16, 32, 64, 128)),
        (20, (2, 4, 8, 16)),
        (5, (2, 4)),
        (10**7, (256, 512, 2048, 4096, 8192, 16384, 65536, 131072)),
        (3, (2,)),
        (2, (2,)),
        (1, (1,)),
    ],
)
def test_the_ladder_climbs_in_powers_of_two_to_about_the_number_of_images(rows: int, expected: tuple[int, ...]) -> None:
    assert ladder(rows) == expected


@pytest.mark.parametrize("rows", [*range(2, 40), 255, 256, 257, 269, 270, 271, 511, 1023, 10**5, 10**8, 10**12])
def test_every_ladder_fits_the_images(rows: int) -> None:
    found = ladder(rows)
    assert 1 <= len(found) <= 8
    assert all(2 <= k <= rows and k & (k - 1) == 0 for k in found)
    assert found[-1] > min(rows * 0.47, 2**17 - 1) or rows < 5
    assert found[0] == max(2, min(256, found[-1] // 8))
    assert len(found) >= 4 or rows < 17
    assert list(found) == sorted(set(found))


def test_the_labels_asked_for_are_taken_in_their_order() -> None:
    assert num_labels(ClusteringConfig(num_labels=(8, 2, 4)), 8) == (8, 2, 4)
    assert num_labels(ClusteringConfig(num_labels="auto"), 600) == (64, 128, 256, 512)


def test_more_labels_than_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"clustering\.num_labels=9 is more than the 8 training images"):
        num_labels(ClusteringConfig(num_labels=(2, 9, 4)), 8)


def test_more_labels_than_good_images_are_refused_by_the_settings_name() -> None:
    auto, asked = ClusteringConfig(), ClusteringConfig(num_labels=(4, 9))
    words = r"^clustering\.num_labels=auto has K=256, but 60 of the 300 training images are bad or excluded and 240 "
    with pytest.raises(ValueError, match=words + r"are left: give numbers up to 240, such as \[16, 32, 64, 128\]$"):
        check_good_rows(auto, num_labels(auto, 300), 300, 60)
    with pytest.raises(ValueError, match=r"^clustering\.num_labels=\[4, 9\] has K=9, but 2 of the 10 .* 8 are left:"):
        check_good_rows(asked, (4, 9), 10, 2)
    with pytest.raises(ValueError, match="0 are left: there is nothing to cluster"):
        check_good_rows(asked, (4, 9), 10, 10)
    check_good_rows(asked, (4, 9), 10, 1)


def test_bad_images_are_counted_before_any_job_runs(tmp_path: Path) -> None:
    settings = Config(name="few", data=DataConfig(train=("none",)), backbone=BackboneConfig(name="no:backbone"))
    job, here = label_job(tmp_path, Store(tmp_path), (256,)), Here()
    images = ImageShards(tuple(Shard(name, "", n, 0, name) for name, n in (("a", 200), ("b", 100))), ())
    with pytest.raises(ValueError, match=r"^clustering\.num_labels=auto has K=256, but 60 of the 300"):
        pseudo_label(run_in(settings, tmp_path, here), job.labels, job.features, images, np.arange(60))
    assert here.asked == []


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


def test_shards_of_billions_of_rows_are_distributed_exactly() -> None:
    starts = np.cumsum([0] + [2**40] * 6).tolist()
    assert [list(own_shards(starts, rank, 3)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]


def label_job(folder: Path, store: Store, nums: tuple[int, ...] = (12,), **settings: Any) -> LabelJob:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 8)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    starts = (0, 100, 100, 137, 138, 300)  # uneven, one shard empty
    paths = tuple(str(folder / f"rows-{i}.npy") for i in range(len(starts) - 1))
    for path, first, after in zip(paths, starts, starts[1:], strict=False):
        np.save(path, rows[first:after])
    features = RowArrays(paths, starts)
    clustering = ClusteringConfig(num_labels=nums, iterations=8, **settings)
    labels = {num: labels_of(store, clustering, 0, num, [], num_rows=300) for num in nums}
    names = tuple(f"shard {i}" for i in range(len(paths)))
    return LabelJob(features, names, np.array([5, 70]), labels, clustering, 0)


def context(stop_after: int | None, reported: list[str]) -> RankContext:
    def report(status: dict[str, str]) -> None:
        reported.append(status["phase"])

    return RankContext(
        Comm(), torch.device("cpu"), report, lambda: stop_after is not None and len(reported) > stop_after
    )


def files_of(artifact: Artifact) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in artifact.path.iterdir() if p.name != "manifest.json"}


WAYS: dict[str, tuple[dict[str, Any], int]] = {  # settings, and reports before the stop
    "exact": ({}, 12),  # the initialisation and some iterations
    "seeding": ({}, 5),
    "k-means||": ({"init": "k-means||"}, 5),
    "restarts": ({"restarts": 2, "balance": 1.2}, 30),
    "seeding of a restart": ({"restarts": 2}, 23),
    "sampled": ({"method": "sampled", "sample_rows_per_cluster": 9}, 13),
    "hierarchical": ({"method": "hierarchical"}, 15),
    "approximate": ({"method": "approximate", "assignment": "approximate", "probes": 1}, 24),
}


@pytest.fixture
def every_round_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grappa_dist.stages.kmeans_checkpoints.SEEDING_SAVE_S", 0.0)


@pytest.mark.usefixtures("every_round_saved")
@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_clustering_goes_on_from_its_last_update_to_the_same_files(tmp_path: Path, way: str) -> None:
    settings, stop_after = WAYS[way]
    whole, stopped = (label_job(tmp_path, Store(tmp_path / name), **settings) for name in ("whole", "stopped"))
    unbroken: list[str] = []
    label_ranks(context(None, unbroken), whole)
    before: list[str] = []
    with pytest.raises(Stopped):
        label_ranks(context(stop_after, before), stopped)
    artifact = stopped.labels[12]
    assert (artifact.begin() / CHECKPOINT_FILE).exists()
    assert not artifact.complete
    reported: list[str] = []
    label_ranks(context(None, reported), stopped)
    assert reported[1:] == unbroken[len(before) :]  # the last reported update had been saved
    found, expected = files_of(artifact), files_of(whole.labels[12])
    assert set(found) == {"stats.json", "centroids.npy", *map(rows_file, range(5))}
    assert all(found[rows_file(i)] == expected[rows_file(i)] for i in range(5))
    assert found["centroids.npy"] == expected["centroids.npy"]
    stats, as_before = (json.loads(files["stats.json"]) for files in (found, expected))
    for figure in ("exact_share", "searched_share"):  # of the passes made, which a resume makes fewer of
        del stats[figure], as_before[figure]
    assert stats == as_before
    assert Clustering(**json.loads(found["stats.json"])).method == stats["method"]  # the report takes them


def test_seeding_is_reported_and_stops_and_is_saved_now_and_then(tmp_path: Path) -> None:
    job, reported = label_job(tmp_path, Store(tmp_path / "run")), list[str]()
    with pytest.raises(Stopped):
        label_ranks(context(4, reported), job)
    assert reported == ["K=12 (1/1) initialisation", *(f"K=12 (1/1) seeding {found} of 12" for found in (1, 2, 3, 4))]
    found, problem = load_checkpoint(job.labels[12].begin() / CHECKPOINT_FILE)
    saved = found["0/fit"].seeded
    assert (problem, saved and len(saved.places)) == ("", 1)  # rounds that follow within half a minute are not saved


def test_a_job_asked_to_stop_before_it_begins_makes_no_pass(tmp_path: Path) -> None:
    job, reported = label_job(tmp_path, Store(tmp_path / "run"), (12, 3)), list[str]()
    with pytest.raises(Stopped):
        label_ranks(context(0, reported), job)
    assert reported == ["K=3 (2/2) initialisation"]


@pytest.mark.parametrize("stop_after", [1, 4, 8, 15, 30])
@pytest.mark.usefixtures("every_round_saved")
def test_several_numbers_of_labels_are_fitted_at_once_and_end_as_alone(tmp_path: Path, stop_after: int) -> None:
    nums = (12, 3, 5)
    job = label_job(tmp_path, Store(tmp_path / "at once"), nums)
    reported: list[str] = []
    with pytest.raises(Stopped):
        label_ranks(context(stop_after, reported), job)
    label_ranks(context(None, reported), job)
    first = [line.split(" (")[0] for line in reported if "iteration 2" in line]
    assert first[:2] == ["K=3", "K=5"]  # in turns, and before the largest
    for num in nums:
        alone = label_job(tmp_path, Store(tmp_path / f"alone {num}"), (num,))
        label_ranks(context(None, []), alone)
        found, expected = files_of(job.labels[num]), files_of(alone.labels[num])
        assert set(found) == set(expected)
        assert all(found[name] == expected[name] for name in found if name != "stats.json")


def has_checkpoint(job: LabelJob) -> bool:
    """Whether an unfinished K has one: the newest or, while that is being written, the one before."""
    names = (CHECKPOINT_FILE, PREVIOUS_FILE)
    return any((artifact.partial / name).exists() for artifact in job.labels.values() for name in names)


def label(comm: Comm, job: LabelJob, killed_after: int | None) -> None:
    """A rank of the job; the last rank kills itself after so many reports, once rank 0 has saved a checkpoint."""
    reported = 0

    def report(status: dict[str, str]) -> None:
        nonlocal reported
        reported += 1
        is_last = comm.rank == comm.size - 1
        if is_last and killed_after is not None and reported >= killed_after and has_checkpoint(job):
            os.kill(os.getpid(), signal.SIGKILL)

    label_ranks(RankContext(comm, torch.device("cpu"), report, lambda: False), job)


@pytest.mark.parametrize("killed_after", [4, 24])
def test_killed_ranks_and_other_ranks_that_go_on_change_no_byte(tmp_path: Path, killed_after: int) -> None:
    nums = (3, 5, 12)
    killed, whole = (label_job(tmp_path, Store(tmp_path / name), nums) for name in ("killed", "whole"))
    with pytest.raises(RuntimeError, match="rank 1 of 2 died without an error message"):
        run_ranks(label, 2, killed, killed_after)
    assert has_checkpoint(killed)
    run_ranks(label, 3, killed, None)
    run_ranks(label, 1, whole, None)
    for num in nums:
        found, expected = files_of(killed.labels[num]), files_of(whole.labels[num])
        assert set(found) == set(expected)
        assert all(found[name] == expected[name] for name in found if name != "stats.json")


@pytest.mark.usefixtures("every_round_saved")
@pytest.mark.parametrize("damage", ["cut", "zeros", "a bit", "of another K", "older", "all"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_ends_with_the_same_files(
    tmp_path: Path, damage: str
) -> None:
    whole, stopped = (label_job(tmp_path, Store(tmp_path / name)) for name in ("whole", "stopped"))
    label_ranks(context(None, []), whole)
    with pytest.raises(Stopped):
        label_ranks(context(14, []), stopped)
    newest, before = (stopped.labels[12].begin() / name for name in (CHECKPOINT_FILE, PREVIOUS_FILE))
    content = newest.read_bytes()
    if damage == "of another K":
        save_checkpoint(tmp_path / "k=13.partial" / newest.name, load_checkpoint(newest)[0])
        newest.write_bytes((tmp_path / "k=13.partial" / newest.name).read_bytes())
    else:
        flipped = content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]
        newest.write_bytes({"cut": content[:-9], "zeros": bytes(len(content)), "a bit": flipped}.get(damage, content))
    if damage in ("older", "all"):
        before.write_bytes(b"half")
    if damage == "all":
        newest.write_bytes(b"")
    notes, reported = list[str](), list[str]()
    label_ranks(replace(context(None, reported), note=notes.append), stopped)
    named = {"older": [], "all": [newest, before]}.get(damage, [newest])
    assert [note.partition(" is not used: ")[0] for note in notes] == [f"k-means checkpoint {path}" for path in named]
    assert all(f"set aside as .damaged-{path.name}-1" in note for note, path in zip(notes, named, strict=True))
    assert any("seeding" in phase for phase in reported) == (damage == "all")
    found, expected = files_of(stopped.labels[12]), files_of(whole.labels[12])
    assert set(found) == set(expected)
    assert all(found[name] == expected[name] for name in found if name != "stats.json")


@pytest.mark.parametrize(("value", "fault"), [(np.nan, "is not finite"), (0.1, "is off the grid")])
def test_a_checkpoint_with_numbers_that_no_update_makes_is_damaged(tmp_path: Path, value: float, fault: str) -> None:
    centroids = np.full((12, 8), 0.25, np.float32)
    centroids[3, 1] = value
    save_checkpoint(tmp_path / CHECKPOINT_FILE, {"0/fit": KMeansState(centroids, (7,))})
    found, problem = load_checkpoint(tmp_path / CHECKPOINT_FILE)
    assert (found, problem.startswith(f"0/fit: centroid 3 {fault}")) == ({}, True)


def name_of(tmp_path: Path, num_rows: int = 300, **settings: Any) -> str:
    return labels_of(Store(tmp_path), ClusteringConfig(**settings), 0, 12, [], num_rows=num_rows).fingerprint


def test_only_settings_that_the_method_uses_name_the_labels(tmp_path: Path) -> None:
    plain = name_of(tmp_path)
    for same in ({"method": "exact"}, {"probes": 3}, {"sample_rows_per_cluster": 3}, {"assignment": "approximate"}):
        assert name_of(tmp_path, **same) == plain
    sampled = name_of(tmp_path, method="sampled")
    assert name_of(tmp_path, method="sampled", assignment="exact", probes=3) == sampled
    others = [
        {"balance": 2.0},
        {"init": "k-means||"},
        {"restarts": 2},
        {"method": "hierarchical"},
        {"method": "approximate"},
        {"method": "approximate", "probes": 3},
        {"method": "sampled", "sample_rows_per_cluster": 3},
        {"method": "sampled", "assignment": "approximate"},
    ]
    names = [plain, sampled, *(name_of(tmp_path, **other) for other in others)]
    assert len(set(names)) == len(names)


def test_auto_has_the_name_of_what_it_chose(tmp_path: Path) -> None:
    num_rows = 10**12
    chosen = choose(ClusteringConfig(), 12, num_rows)
    assert chosen.name != "exact"
    assert name_of(tmp_path, num_rows) == name_of(tmp_path, num_rows, method=chosen.name, assignment=chosen.assignment)


def test_exact_labels_keep_the_name_they_had_before_there_were_methods(tmp_path: Path) -> None:
    settings = labels_of(Store(tmp_path), ClusteringConfig(), 0, 12, [], num_rows=300).settings
    assert settings == {"iterations": 20, "tolerance": 0.0, "spherical": False, "num_labels": 12, "seed": 0}


def test_choices_and_shortcuts_are_described(tmp_path: Path) -> None:
    lines = describe_choices(ClusteringConfig(), (10**6, 256, 4096), 10**8)
    assert lines[0].startswith("K = 256, 4096: exact (exact k-means takes 8.6 trillion pairs")
    assert lines[1].startswith("K = 1000000: approximate (exact k-means would take 2.1 x 10^15 pairs")
    job = label_job(tmp_path, Store(tmp_path / "run"), method="sampled", sample_rows_per_cluster=5,
                    assignment="approximate", probes=1, balance=1.1)  # fmt: skip
    label_ranks(context(None, []), job)
    stats = json.loads(files_of(job.labels[12])["stats.json"])
    lines = describe_shortcuts(stats)
    assert lines[0] == f"centroids were fitted to a sample of {100 * 60 / 298:.3g} % of the rows"
    assert lines[1].startswith("labels agree with the exact ones on")
    assert "298 rows drawn, WARNING: less than 95 %, raise clustering.probes" in lines[1]
    assert lines[2].startswith(f"{stats['moved']} rows moved, no cluster has more than 28; inertia")
    assert 0 < stats["largest"] <= 28
