from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from grappa_dist.config import FuseConfig
from grappa_dist.console import read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.spec import FUSION_FILE
from grappa_dist.search.fixed_point import to_grid
from grappa_dist.stages import cached_features as reused
from grappa_dist.stages.cached_features import PassedFeatures
from grappa_dist.stages.fuse import FuseJob, train_fusion
from grappa_dist.training.batches import TrainingImages
from tests import reference
from tests.processes import run_ranks
from tests.stages import tiny
from tests.stages.test_fuse import fuse_until, job_in

EPOCHS, DIM, PER_EPOCH = 3, 6, tiny.STEPS_PER_EPOCH
GOOD = np.delete(np.arange(tiny.NUM_ROWS), tiny.BAD)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return tiny.write_shards(tmp_path_factory.mktemp("reused"))


def training_of(images: list[str]) -> TrainingImages:
    return tiny.training_images(tiny.config(images), ImageShards.open(images, None))


def computed(rows: np.ndarray, epoch: int, noise: float = 0.0) -> torch.Tensor:
    """What stands for the features of a training pass, a function of row and epoch; rows need not be unit."""
    draws = [np.random.default_rng((epoch, row)).standard_normal(DIM) for row in rows.tolist()]
    return torch.from_numpy(np.array(draws, dtype=np.float32).reshape(-1, DIM)) + noise


def pass_over(comm: Comm, images: list[str], folder: Path, span: tuple[int, int], noise: float = 0.0) -> None:
    """Steps [first, end), with a checkpoint at the end of them."""
    training = training_of(images)
    passed = PassedFeatures(tiny.Watcher().context(comm), training, folder, EPOCHS)
    passed.begin(span[0])
    for step in range(*span):
        epoch, t = divmod(step, PER_EPOCH)
        if step % PER_EPOCH == 0:
            passed.begin(step)
        elif passed.full(step):
            passed.save(step)
        rows = training.order(epoch).batch_share(t, tiny.BATCH, comm.rank, comm.size)
        passed.add(rows, computed(rows, epoch, noise))
    passed.save(span[1])


def read_back(comm: Comm, images: list[str], folder: Path, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    passed = PassedFeatures(tiny.Watcher().context(comm), training_of(images), folder, EPOCHS)
    ids, features = passed.read(epoch, folder / f"read-{comm.rank}-of-{comm.size}.npy")
    return ids, np.array(features)


def expected(epoch: int) -> np.ndarray:
    return to_grid(F.normalize(computed(GOOD, epoch), dim=1)).numpy()


def test_every_good_row_comes_back_once_whoever_wrote_and_reads_and_wherever_it_was_cut_off(
    images: list[str], tmp_path: Path
) -> None:
    run_ranks(pass_over, 2, images, tmp_path, (0, 2))
    run_ranks(pass_over, 3, images, tmp_path, (2, 3), 9.0)  # its checkpoint never came to be: step 2 is repeated
    pass_over(Comm(), images, tmp_path, (2, PER_EPOCH))
    for size in (1, 3, 5):
        parts = (
            run_ranks(read_back, size, images, tmp_path, 0) if size > 1 else [read_back(Comm(), images, tmp_path, 0)]
        )
        np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts]), GOOD)
        np.testing.assert_array_equal(np.concatenate([features for _, features in parts]), expected(0))
        counts = [len(ids) for ids, _ in parts]
        assert max(counts) - min(counts) <= 2  # even, but for the bad row


def test_parts_are_cut_where_memory_calls_for_it(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reused, "KEPT_ROWS", 2 * tiny.BATCH)
    pass_over(Comm(), images, tmp_path, (0, PER_EPOCH))
    spans = [(p["first"], p["end"]) for p in json.loads((tmp_path / "features-0" / "parts.json").read_text())]
    assert spans == [(0, 2), (2, 3)]
    np.testing.assert_array_equal(read_back(Comm(), images, tmp_path, 0)[1], expected(0))


def refused(comm: Comm, images: list[str], folder: Path, epoch: int) -> str:
    with pytest.raises(ValueError, match="to train this fusion from its start") as caught:
        read_back(comm, images, folder, epoch)
    return str(caught.value)


def test_what_is_lacking_is_an_error_on_every_rank(images: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "job" / "knn"
    for span in ((0, 1), (1, 3)):
        pass_over(Comm(), images, folder, span)
    first, second = sorted((folder / "features-0").glob("steps-*"))
    kept = first.read_bytes()
    shutil.copy(second, first)  # rows twice, others not at all
    for said in run_ranks(refused, 2, images, folder, 0):
        assert f"{folder / 'features-0'} has not one feature each of" in said
        assert f"remove {tmp_path / 'job'}" in said
    first.unlink()
    assert all(f"{first} is missing" in said for said in run_ranks(refused, 2, images, folder, 0))
    first.write_bytes(kept)
    np.testing.assert_array_equal(read_back(Comm(), images, folder, 0)[1], expected(0))
    (folder / "features-0" / "parts.json").unlink()
    assert "lacks features of the steps from 0 to 2" in refused(Comm(), images, folder, 0)
    with pytest.raises(ValueError, match="lacks features of the steps from 0 to 1"):
        pass_over(Comm(), images, folder, (2, 3))  # resumed in the middle of an epoch


def test_nothing_is_kept_that_no_graph_will_need(images: list[str], tmp_path: Path) -> None:
    last = (EPOCHS - 1) * PER_EPOCH
    pass_over(Comm(), images, tmp_path, (last, last + PER_EPOCH))
    (tmp_path / "epoch-1").mkdir()  # made by an attempt that was killed before its next checkpoint
    pass_over(Comm(), images, tmp_path, (1, PER_EPOCH))
    assert not list(tmp_path.glob("features-*"))


def test_the_setting_is_part_of_the_result_of_neighbours_alone_and_only_when_chosen() -> None:
    fresh, chosen = FuseConfig(), FuseConfig(graph_features="reused")
    for variant in ("neighbours", "neighbours-adam"):
        assert chosen.of_variant(variant) == {**fresh.of_variant(variant), "graph_features": "reused"}
        assert "graph_features" not in fresh.of_variant(variant)
    assert chosen.of_variant("transforms") == fresh.of_variant("transforms")
    with pytest.raises(ValueError, match=r"fuse\.graph_features=reused needs fuse\.refresh=true"):
        FuseConfig(graph_features="reused", refresh=False)


REUSED: dict[str, Any] = {"graph_features": "reused", "epochs": EPOCHS, "checkpoint_steps": 2}
STEPS = EPOCHS * PER_EPOCH
SEEN: dict[int, dict[int, torch.Tensor]] = {}  # of one process: what training computed, by epoch and row


class Recorded(PassedFeatures):
    """Remembers what it was given."""

    def add(self, rows: np.ndarray, z: torch.Tensor) -> None:
        SEEN.setdefault(self._since // PER_EPOCH, {}).update(zip(rows.tolist(), z, strict=True))
        super().add(rows, z)


def fuse_alone(comm: Comm, folder: Path, kills: Sequence[int]) -> dict[str, Any]:
    """A straight job, then one for each kill, after as many steps, that goes on."""
    straight, watcher = job_in(folder, "straight", "neighbours", **REUSED), tiny.Watcher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grappa_dist.stages.fuse_pairs.PassedFeatures", Recorded)
        train_fusion(watcher.context(comm), straight)
    phases = [str(status["phase"]) for status in watcher.statuses if "phase" in status]
    for kill in kills:
        job = job_in(folder, f"killed-{kill}", "neighbours", **REUSED)
        for kill_after in (kill, None):
            fuse_until(comm, job, kill_after)
    return {"phases": phases, "seen": {e: torch.stack([z[r] for r in GOOD.tolist()]) for e, z in SEEN.items()}}


KILLS = (1, 3, 4, 5, 7)
World = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("reusing")
    tiny.write_shards(folder / "images")
    return folder, run_ranks(fuse_alone, 1, folder, KILLS, timeout_s=400)[0]


def near_of(folder: Path, out: str, epoch: int) -> np.ndarray:
    tables = sorted((job_of(folder, out).artifact.path / "knn" / f"epoch-{epoch}").glob("rows-*.npy"))
    return np.concatenate([np.load(table) for table in tables])


def job_of(folder: Path, out: str) -> FuseJob:
    return job_in(folder, out, "neighbours", **REUSED)


def test_a_graph_of_reused_features_is_that_of_brute_force_on_what_training_computed(world: World) -> None:
    folder, found = world
    knn = job_of(folder, "straight").artifact.path / "knn"
    for epoch in range(EPOCHS):
        told = json.loads((knn / f"epoch-{epoch}" / "statistics.json").read_text())
        assert told["features"] == ("reused" if epoch else "fresh")
    for epoch in range(1, EPOCHS):
        unit = to_grid(F.normalize(found["seen"][epoch - 1], dim=1)).double()
        near = GOOD[np.array(reference.knn((unit @ unit.T).tolist(), 3))]
        np.testing.assert_array_equal(near_of(folder, "straight", epoch)[GOOD], near)


def test_rows_are_embedded_for_the_first_graph_alone_and_the_scratch_goes(world: World) -> None:
    folder, found = world
    assert [p for p in found["phases"] if "embedding" in p] == ["epoch 0: embedding for the k-NN graph"]
    assert sum("reusing features" in p for p in found["phases"]) == EPOCHS - 1
    assert not list((job_of(folder, "straight").artifact.path / "knn").glob("features-*"))


@pytest.mark.parametrize("kill", KILLS)
def test_a_job_killed_at_any_step_ends_with_the_same_bytes(world: World, kill: int) -> None:
    folder, _ = world
    straight, killed = (job_of(folder, out).artifact.path for out in ("straight", f"killed-{kill}"))
    assert tiny.losses_of(killed) == tiny.losses_of(straight)
    assert len(tiny.losses_of(killed)) == STEPS
    assert (killed / FUSION_FILE).read_bytes() == (straight / FUSION_FILE).read_bytes()
    for epoch in range(EPOCHS):
        np.testing.assert_array_equal(near_of(folder, f"killed-{kill}", epoch), near_of(folder, "straight", epoch))


def test_a_job_killed_on_two_ranks_then_on_one_goes_on_on_three_with_the_same_losses(world: World) -> None:
    folder, _ = world
    job = job_of(folder, "moving")
    for ranks, kill_after in ((2, 3), (1, 5), (3, None)):  # in the first and in the second epoch
        run_ranks(fuse_until, ranks, job, kill_after, timeout_s=400)
    begins = [e["at_step"] for e in read_events(job.artifact.path / "metrics.jsonl") if e["name"] == "begins"]
    assert begins == [0, 2, 4]
    alone = job_of(folder, "straight").artifact.path
    np.testing.assert_allclose(tiny.losses_of(job.artifact.path), tiny.losses_of(alone), rtol=0, atol=1e-5)
    ours, theirs = (load_file(path / FUSION_FILE) for path in (job.artifact.path, alone))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-3)
