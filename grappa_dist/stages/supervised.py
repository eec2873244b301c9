"""supervise: two rows of the report trained with the labels of the training images, as a comparison for the others.

First, the JSON members of the training images become a class for every row. A class is a (task, label); an image
without a label has none and takes no part. The supervised set (Table 3 of the paper) is step 2 on these classes in
place of a partition. The supervised fusion (Table 5) is attention over the N sets of the partitions, trained to tell
the classes apart: the recipe is that of step 2 as well, as the paper names none; Q and K are trained where an adaptor
set would be. No pairs, no projector.

No other training reads a label, and this runs only where a setting asks for it.

Shapes: P rows of one shard, K classes, N sets, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import (
    CENTROIDS_FILE,
    Artifact,
    RowArrays,
    Store,
    label_rows,
    numbered,
    own_shards,
    rows_file,
    wait_for_files,
    wait_until_seen,
)
from grappa_dist.bucket import send
from grappa_dist.checksums import load_json
from grappa_dist.config import AdaptConfig, BackboneConfig, Config
from grappa_dist.console import pluralize
from grappa_dist.data.rng import Purpose, torch_seed
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.runner import Job
from grappa_dist.distributed.sharded_rows import scratch
from grappa_dist.distributed.worker import RankContext
from grappa_dist.files import save_array, save_tensors, write_json
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, build_backbone, load_weights, release_cached_model
from grappa_dist.stages.adapt import train_sets
from grappa_dist.stages.adapt_job import Classes, ClassificationObjective, classifier_for, starting_centroids
from grappa_dist.stages.exclude import excluding
from grappa_dist.stages.fuse import AttentionStatistics
from grappa_dist.stages.ground_truth import ROWS_PER_TASK, load_ground_truth, write_ground_truth
from grappa_dist.stages.multi_set_jobs import AdaptSet
from grappa_dist.stages.pseudo_label import STATS_FILE
from grappa_dist.stages.run import Run
from grappa_dist.training.batches import TrainingImages, Turns, describe_idle_ranks, trained_by
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.figures import DEFAULT_PACE, Figures, Pace
from grappa_dist.training.loop import Reporting, Schedule, train
from grappa_dist.training.memory import fuse_advice, fusion_micro_batch, naming_lack_of_memory
from grappa_dist.training.optim import adam
from grappa_dist.variants import SUPERVISED, SUPERVISED_SET

ASKED_BY = "adapt.supervised or the variant supervised of fuse.variants"
NAMED = 3  # shards, in a message
CLASSES_AT_ONCE = 4096  # whose sums are in memory


def true_labels_of(
    store: Store, ground_truth: Artifact, features: Sequence[Artifact], *, excluded: Artifact | None = None
) -> Artifact:
    """The artefact of the classes, in the layout of a partition's."""
    inputs = {"truth": ground_truth, **numbered("shard", features), **excluding(excluded)}
    return store.artifact("labels/true", {}, inputs)


def read_true_labels(run: Run, images: ImageShards, ground_truth: Artifact, classes: Artifact) -> None:
    """Reads the labels before anything else is done, so that a run that lacks them ends at once.

    Args:
        classes: the artefact of their classes; where both are complete, labels are not read again.

    Raises:
        ValueError: there are fewer than two classes; names the shards and how many labels they lack.
    """
    if classes.complete and ground_truth.complete:
        return
    with run.console.stage(
        "true_labels", f"{ASKED_BY} asks for the labels of {pluralize(len(images), 'training image')}"
    ):
        write_ground_truth(run, images, ground_truth, "true_labels")
        labels = load_ground_truth(ground_truth).labels
        found = len(np.unique(labels[labels >= 0]))
        if found < 2:
            raise ValueError(_too_few(images, labels, found))
        missing = int((labels < 0).sum())
        without = f"; {missing} have none and take no part: {_by_shard(images, labels)}" if missing else ""
        of = pluralize(len(labels) - missing, "image")
        run.console.log(f"true_labels: {pluralize(found, 'class', 'classes')} of {of}{without}")


def _too_few(images: ImageShards, labels: NDArray[np.int64], classes: int) -> str:
    return (
        f'{ASKED_BY} needs the labels of at least two classes, from members <key>.json with "label" beside the '
        f"training images; found {pluralize(classes, 'class', 'classes')} on {int((labels >= 0).sum())} of "
        f"{len(labels)} images: {_by_shard(images, labels)}"
    )


def _by_shard(images: ImageShards, labels: NDArray[np.int64]) -> str:
    """How many labels the shards lack, and the first image of each that has none."""
    lacks = []
    for number, shard in enumerate(images.shards):
        rows = images.shard_rows(number)
        missing = np.flatnonzero(labels[rows.start : rows.stop] < 0)
        if len(missing):
            first = images.where(rows.start + int(missing[0]))
            lacks.append(f"{len(missing)} of {shard.rows} lack one, the first is {first}")
    more = f"; and {pluralize(len(lacks) - NAMED, 'more shard')}" if len(lacks) > NAMED else ""
    return "; ".join(lacks[:NAMED]) + more


def name_classes(
    run: Run, ground_truth: Artifact, features: RowArrays, bad: NDArray[np.int64], artifact: Artifact
) -> None:
    """Numbers the classes of the rows that can be read, unless that is done."""
    if not artifact.complete:
        with run.console.stage("true_labels", f"classes of {pluralize(features.starts[-1], 'training image')}"):
            workers = run.runner.num_workers if features.starts[-1] > ROWS_PER_TASK else 1
            parts = [own_shards(features.starts, rank, workers) for rank in range(workers)]
            task = TrueLabelsTask(ground_truth, features, bad, artifact, tuple(part for part in parts if len(part)))
            if len(task.parts) > 1:
                run.runner.map(add_up_classes, [(task, part) for part in task.parts])
            run.runner.map(write_true_labels, [task])
            wait_until_seen([artifact])


@dataclass(frozen=True)
class TrueLabelsTask:
    """What `write_true_labels` needs."""

    ground_truth: Artifact
    features: RowArrays
    bad: NDArray[np.int64]
    artifact: Artifact
    parts: tuple[range, ...]  # shards that are read side by side

    def numbers(self) -> NDArray[np.int32]:
        """The class of every row, (n,), -1 for none.

        Raises:
            ValueError: there are fewer than two.
        """
        labels = np.array(load_ground_truth(self.ground_truth).labels)
        labels[self.bad] = -1
        classes = np.unique(labels[labels >= 0])
        if len(classes) < 2:
            raise ValueError(f"{ASKED_BY} needs two classes at least, found {len(classes)} on images that can be read")
        return np.where(labels >= 0, np.searchsorted(classes, labels), -1).astype(np.int32)


def add_up_classes(device: torch.device, task: tuple[TrueLabelsTask, range]) -> None:
    """Writes the classes of the rows of some shards, and the sum of the features of each class, (K, D) float64."""
    whole, part = task
    _add_up(whole, part, whole.numbers())


def _add_up(task: TrueLabelsTask, part: range, numbers: NDArray[np.int32]) -> None:
    folder, starts = task.artifact.begin(), task.features.starts
    sums = scratch((int(numbers.max()) + 1, task.features.shard(0).shape[1]), torch.float64)
    for shard in part:
        own = numbers[starts[shard] : starts[shard + 1]]
        save_array(folder / rows_file(shard), own)
        send(folder / rows_file(shard))
        known = np.flatnonzero(own >= 0)
        sums.index_add_(0, torch.from_numpy(own[known]), torch.from_numpy(task.features.shard(shard)[known]).double())
    save_array(folder / _sums_file(part), sums.numpy())
    send(folder / _sums_file(part))


def _sums_file(part: range) -> str:
    return f"sums-{part.start}-{part.stop}.npy"


def write_true_labels(device: torch.device, task: TrueLabelsTask) -> None:
    """Classes of all rows, -1 for none, and the mean feature of each class, where a classifier may start."""
    numbers, folder = task.numbers(), task.artifact.begin()
    if len(task.parts) == 1:
        _add_up(task, task.parts[0], numbers)
    files = [folder / _sums_file(part) for part in task.parts]
    wait_for_files(files)
    counts = np.bincount(numbers[numbers >= 0])
    save_array(folder / CENTROIDS_FILE, _means(files, counts))
    labelled, images = int(counts.sum()), len(numbers)
    write_json(folder / STATS_FILE, {"classes": len(counts), "labelled": labelled, "images": images})
    task.artifact.commit(discard=["sums-*"], expected=[rows_file(i) for i in range(len(task.features.starts) - 1)])


def _means(files: Sequence[Path], counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """The mean feature of each class, (K, D), in scratch: sums of all files, by the classes' numbers of rows, (K,).

    Features lie on a grid of 2**-24, so float64 rounds none of these sums, and their order does not matter.
    """
    parts = [np.load(file, mmap_mode="r", allow_pickle=False) for file in files]
    means: NDArray[np.float32] = scratch(parts[0].shape, torch.float32).numpy()
    for start in range(0, len(counts), CLASSES_AT_ONCE):
        some = slice(start, start + CLASSES_AT_ONCE)
        means[some] = sum(part[some] for part in parts) / counts[some, None]
    return means


def class_counts(artifact: Artifact) -> dict[str, int]:
    """The numbers of `classes`, of `labelled` images and of all `images`."""
    found: dict[str, int] = load_json(artifact.path / STATS_FILE)
    return found


def without_class(artifact: Artifact, images: ImageShards) -> NDArray[np.int64]:
    """Row ids, ascending, of images that cannot be read or have no label."""
    labels = label_rows(artifact, images.starts)
    found = [np.flatnonzero(labels.shard(i) < 0) + labels.starts[i] for i in range(len(images.shards))]
    return np.concatenate(found).astype(np.int64)


def adapt_supervised(
    run: Run, adaptors: Artifact, labels: Artifact, images: ImageShards, *, turns: Turns | None = None
) -> None:
    """Trains the supervised set, by a job like those of the partitions."""
    if not adaptors.complete:
        classes = class_counts(labels)["classes"]
        start = starting_centroids(run.config.adapt, labels)
        one = AdaptSet(classes, label_rows(labels, images.starts, classes), adaptors, start, SUPERVISED_SET)
        train_sets(run, [one], images, without_class(labels, images), turns=turns)


def supervised_fusion_of(store: Store, config: Config, labels: Artifact, sets: Sequence[Artifact]) -> Artifact:
    """The artefact of the supervised fusion, which depends on no setting of `fuse`."""
    settings = trained_by(config.backbone, config.data, config.seed, adapt=config.adapt.of_result())
    return store.artifact(f"fusion/{SUPERVISED}", settings, {"labels": labels, **numbered("adaptors", sets)})


def fuse_supervised(
    run: Run,
    fusion: Artifact,
    adaptors: Sequence[Artifact],
    labels: Artifact,
    images: ImageShards,
    *,
    turns: Turns | None = None,
) -> None:
    """Trains the supervised fusion, by one job on all workers."""
    if fusion.complete:
        return
    config, classes = run.config, class_counts(labels)["classes"]
    training = TrainingImages.of(config, images, without_class(labels, images), config.adapt.global_batch, turns=turns)
    job = SupervisedJob(
        adaptors=tuple(adaptors),
        labels=label_rows(labels, images.starts, classes),
        num_classes=classes,
        centroids=starting_centroids(config.adapt, labels),
        training=training,
        backbone=config.backbone,
        adapt=config.adapt,
        micro_batch=config.fuse.micro_batch,
        artifact=fusion,
        pace=Pace.of(config.resources),
        sharing=run.runner.sharing if config.fuse.micro_batch == "auto" else 1,
    )
    ranks, steps = run.runner.num_workers, training.num_steps(config.adapt.epochs)
    what = f"{SUPERVISED}, {pluralize(classes, 'class', 'classes')}, {pluralize(steps, 'step')}"
    with run.console.stage("fuse", f"{what} on {pluralize(ranks, 'rank')}"):
        if idle := describe_idle_ranks(config.data, ranks):
            run.console.log(f"fuse: {idle}")
        run.runner.run_jobs([Job(SUPERVISED, train_supervised_fusion, job, ranks)])
        wait_until_seen([fusion])


@dataclass(frozen=True)
class SupervisedJob:
    """What every rank of the supervised fusion needs."""

    adaptors: tuple[Artifact, ...]
    labels: RowArrays  # -1: none
    num_classes: int
    centroids: Path | None  # (K, D), where the classifier starts; None: at random
    training: TrainingImages  # the images with a label
    backbone: BackboneConfig
    adapt: AdaptConfig
    micro_batch: int | Literal["auto"]  # images at a time per rank: that of the other fusions, which have as many sets
    artifact: Artifact
    pace: Pace = DEFAULT_PACE
    sharing: int = 1  # most workers of a node, which share its memory


def train_supervised_fusion(context: RankContext, job: SupervisedJob) -> None:
    """One rank: builds and trains; rank 0 saves Q and K. The classifier is discarded."""
    if context.of_rank_0(job.artifact.complete):
        return
    release_cached_model()
    config, folder, peak = job.adapt, job.artifact.begin(), job.adapt.learning_rate
    steps = job.training.num_steps(config.epochs)
    with naming_lack_of_memory(SUPERVISED, fuse_advice(job.micro_batch)), ExitStack() as stack:
        objective = SupervisedObjective(context, job)
        stack.callback(objective.close)
        optimizer = adam(objective.learning, peak, config.weight_decay)
        done = train(
            context,
            objective,
            optimizer,
            Schedule.falling(steps, config.checkpoint_steps, peak=peak, warmup_steps=config.warmup_steps),
            folder=folder,
            job=SUPERVISED,
            sharded={"classifier": objective.classifier},
            reporting=Reporting(objective.suspects),
            pace=job.pace,
        )
        if done and context.comm.rank == 0:
            save_tensors(folder / FUSION_FILE, objective.module.attention_tensors())
            job.artifact.commit(discard=["checkpoints"])


class SupervisedObjective(ClassificationObjective):
    """Norm-softmax, Eq. (2), of fused features against the true classes, which trains Q and K."""

    def __init__(self, context: RankContext, job: SupervisedJob) -> None:
        self._job, config, seed = job, job.adapt, job.training.seed
        backbone = build_backbone(job.backbone)
        self.module = Grappa(backbone, len(job.adaptors), config.bottleneck, attention=True)
        self.module.load_adaptors([load_weights(a.path / ADAPTORS_FILE) for a in job.adaptors])
        self.module.trainable_attention()
        rng = torch.Generator().manual_seed(torch_seed(Purpose.FUSION, seed))  # all fusions start alike
        for layer in self.module.layers:
            assert layer.attention is not None
            layer.attention.initialise(rng)
        self.module.to(context.device)
        self.learning = [p for p in self.module.parameters() if p.requires_grad]
        shape = (job.num_classes, backbone.embed_dim)
        self.classifier = classifier_for(context, config, shape, seed=seed, centroids=job.centroids, rng=rng)
        classes = [Classes(job.labels, self.classifier)]
        super().__init__(context, config, job.training, backbone.preprocess, classes=classes)
        self._attention = AttentionStatistics(self.module)
        self._micro_batch = fusion_micro_batch(
            context,
            job.micro_batch,
            self.module,
            job.artifact.partial,
            most=job.training.rank_share(context.comm.size),
            weights=sum(p.numel() for p in self.learning),
            sharing=job.sharing,
        )

    def backward(self, engine: Engine, step: int) -> Figures:
        sums = self.gradients(engine, step, self._micro_batch, self._attention.add)
        (norm,) = engine.clip([self.learning], self._job.adapt.clip_norm)
        attention = self._attention.take(1, self._job.adapt.weight_decay, sums.images)
        return {**sums.figures, "gradient_norm": norm * sums.images, **attention}
