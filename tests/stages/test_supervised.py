from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from grappa_dist.artifacts import CENTROIDS_FILE, Store, label_rows
from grappa_dist.console import read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, build_backbone
from grappa_dist.stages.adapt import adaptors_of
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.ground_truth import ground_truth_of
from grappa_dist.stages.supervised import (
    SupervisedJob,
    SupervisedObjective,
    adapt_supervised,
    class_counts,
    supervised_fusion_of,
    train_supervised_fusion,
    true_labels_of,
    without_class,
)
from grappa_dist.training.batches import TrainingImages, augmented
from grappa_dist.training.norm_softmax_loss import norm_softmax
from tests.processes import run_ranks
from tests.stages import tiny
from tests.stages.test_supervised_true_labels import World

EPOCHS, STEPS = 3, 9
UNLABELLED = (2, 13, 20, 21, 39)  # 13 is all of its shard
SETTINGS: dict[str, Any] = {"epochs": EPOCHS, "checkpoint_steps": 4, "learning_rate": 0.02}


def label(row: int) -> str | None:
    return None if row in UNLABELLED else f"group {row % tiny.GROUPS}"


def job_in(folder: Path, out: str, micro_batch: int = 64, **adapt: Any) -> SupervisedJob:
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    settings, images = tiny.config(paths, adapt={**SETTINGS, **adapt}), ImageShards.open(paths, None)
    store = Store(folder / "run")
    classes = true_labels_of(store, ground_truth_of(store, images, labelled=True), [])
    sets = [tiny.random_adaptors(Store(folder), settings, seed) for seed in (1, 2, 3)]
    return SupervisedJob(
        adaptors=tuple(sets),
        labels=label_rows(classes, images.starts),
        num_classes=class_counts(classes)["classes"],
        centroids=classes.path / CENTROIDS_FILE,
        training=TrainingImages(images, without_class(classes, images), settings.data, tiny.BATCH, settings.seed, 1),
        backbone=settings.backbone,
        adapt=settings.adapt,
        micro_batch=micro_batch,
        artifact=supervised_fusion_of(Store(folder / out), settings, classes, sets),
    )


def train_until(comm: Comm, job: SupervisedJob, kill_after: int | None = None) -> None:
    watcher = tiny.Watcher(kill_after=kill_after)
    if kill_after is None:
        train_supervised_fusion(watcher.context(comm), job)
    else:
        with pytest.raises(tiny.Killed):
            train_supervised_fusion(watcher.context(comm), job)


def train_all_ways(comm: Comm, folder: Path) -> None:
    out = str(comm.size)
    train_until(comm, job_in(folder, out))
    train_until(comm, job_in(folder, f"{out}-killed"), kill_after=6)
    if comm.size == 1:
        train_until(comm, job_in(folder, "1-killed"))
    else:
        train_until(comm, job_in(folder, "2-micro", micro_batch=3, clip_norm=0.05, epochs=1))
        train_until(comm, job_in(folder, "2-whole", clip_norm=0.05, epochs=1))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("supervised")
    made = World(folder, label)
    made.read()
    made.name()
    job_in(folder, "prepare")  # the adaptor sets, before several ranks need them
    for size in (1, 2):
        run_ranks(train_all_ways, size, folder, timeout_s=400)
    run_ranks(train_until, 1, job_in(folder, "2-killed"), timeout_s=400)  # goes on on one rank
    return folder


def losses(folder: Path, out: str, **adapt: Any) -> list[float]:
    return tiny.losses_of(job_in(folder, out, **adapt).artifact.path)


def weights(folder: Path, out: str) -> Path:
    return job_in(folder, out).artifact.path / FUSION_FILE


def test_losses_do_not_depend_on_ranks_nor_on_a_kill_nor_on_both(world: Path) -> None:
    alone = losses(world, "1")
    assert len(alone) == STEPS
    for out in ("2", "2-killed"):
        np.testing.assert_allclose(losses(world, out), alone, rtol=0, atol=1e-5)
        for name, tensor in load_file(weights(world, "1")).items():
            torch.testing.assert_close(load_file(weights(world, out))[name], tensor, rtol=0, atol=1e-3)
    begins = [e for e in read_events(weights(world, "2-killed").parent / "metrics.jsonl") if e["name"] == "begins"]
    assert [(e["ranks"], e["at_step"]) for e in begins] == [(2, 0), (1, 4)]


def test_a_killed_job_ends_with_the_same_bytes(world: Path) -> None:
    assert weights(world, "1-killed").read_bytes() == weights(world, "1").read_bytes()
    assert losses(world, "1-killed") == losses(world, "1")


def test_the_micro_batch_changes_nothing(world: Path) -> None:
    micro, whole = ({"clip_norm": 0.05, "epochs": 1, **more} for more in ({"micro_batch": 3}, {}))
    np.testing.assert_allclose(losses(world, "2-micro", **micro), losses(world, "2-whole", **whole), rtol=0, atol=1e-5)


def test_the_first_loss_is_the_softmax_over_class_means_of_images_that_have_a_label(world: Path) -> None:
    job = job_in(world, "1")
    objective = SupervisedObjective(tiny.Watcher().context(Comm()), job)
    rows = job.training.order(0).batch(0, tiny.BATCH)
    assert not set(rows.tolist()) & {*UNLABELLED, tiny.BAD}
    preprocess = build_backbone(job.backbone).preprocess
    pixels = augmented(job.training, preprocess, rows, epoch=0, area=job.adapt.min_crop_area)
    labels = torch.from_numpy(job.labels.take(rows).astype(np.int64))
    assert job.centroids is not None
    start = F.normalize(torch.from_numpy(np.load(job.centroids)), dim=1)
    expected = norm_softmax(objective.module(to_images(pixels, tiny.CPU)), start, labels, job.adapt.gamma)
    assert losses(world, "1")[0] == pytest.approx(float(expected.detach()), abs=1e-5)


def test_only_queries_and_keys_learn_and_they_learn_in_every_layer(world: Path) -> None:
    objective = SupervisedObjective(tiny.Watcher().context(Comm()), job_in(world, "1"))
    start = objective.module.attention_tensors()
    assert sum(p.numel() for p in objective.learning) == sum(t.numel() for t in start.values())
    found = load_file(weights(world, "1"))
    assert set(found) == set(start)
    assert all(not torch.equal(tensor, start[name]) for name, tensor in found.items())


def test_it_learns_and_logs_how_its_attention_moves(world: Path) -> None:
    steps = tiny.steps_of(weights(world, "1").parent)
    assert sum(s["loss"] for s in steps[-3:]) < sum(s["loss"] for s in steps[:3])
    for step in steps:
        assert 0 <= step["accuracy"] <= 1
        assert sum(step[f"attention.{i}"] for i in range(3)) == pytest.approx(1)
        assert all(0 < step[f"entropy.{i}"] <= 1 for i in range(2))
        assert all(step[f"decay_to_gradient.{i}"] > 0 for i in range(2))


def test_every_image_with_a_label_is_seen_once_an_epoch_and_no_other(world: Path) -> None:
    training = job_in(world, "1").training
    order = training.order(1)
    seen = np.concatenate([order.batch(t, tiny.BATCH) for t in range(training.steps_per_epoch())])
    assert sorted(seen.tolist()) == [row for row in range(tiny.NUM_ROWS) if row not in (*UNLABELLED, tiny.BAD)]


def test_the_supervised_set_is_trained_like_one_of_a_partition(world: Path, tmp_path: Path) -> None:
    job, here = job_in(world, "1"), tiny.Here()
    settings = tiny.config(["elsewhere"], adapt=SETTINGS | {"epochs": 1})
    run, store = tiny.run_in(settings, tmp_path, here), Store(world / "run")
    classes = true_labels_of(store, ground_truth_of(store, job.training.images, labelled=True), [])
    adaptors = adaptors_of(run.store, job.backbone, settings.adapt, settings.data, 0, classes, name="supervised-set")
    adapt_supervised(run, adaptors, classes, job.training.images)
    adapt_supervised(run, adaptors, classes, job.training.images)
    assert here.asked == ["supervised-set"]
    assert adaptors.kind == "adaptors/supervised-set"
    assert len(tiny.steps_of(adaptors.path)) == job.training.steps_per_epoch()
    assert {step["images"] for step in tiny.steps_of(adaptors.path)} <= {11, 12}  # 34 of them in 3 batches
    assert set(load_file(adaptors.path / ADAPTORS_FILE)) == set(load_file(job.adaptors[0].path / ADAPTORS_FILE))
