"""adapt: images + one partition P_i -> the adaptor set of P_i (step 2 of the paper); N such jobs, each its own world.

Shapes: B images of this rank, S pixels a side, K classes, D channels.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from grappa_dist.artifacts import Artifact, RowArrays, Store, replacing
from grappa_dist.config import AdaptConfig, BackboneConfig, DataConfig
from grappa_dist.data.loader import load_images, read_batches
from grappa_dist.data.order import EpochOrder
from grappa_dist.data.randomness import generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Picture, view_generator
from grappa_dist.dist.classifier import Classifier, ClassifierSettings
from grappa_dist.dist.engine import Engine
from grappa_dist.dist.jobs import Job
from grappa_dist.dist.train import Schedule, train
from grappa_dist.dist.workers import RankContext
from grappa_dist.models import Grappa
from grappa_dist.ops.schedules import cosine
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.modelling import ADAPTORS_FILE, backbone_settings, build_backbone, preprocess_of
from grappa_dist.stages.pseudo_label import CENTROIDS_FILE, label_rows
from grappa_dist.stages.run import Run


@dataclass(frozen=True)
class TrainingImages:
    """The images of a training job and their order: the same global batches on any number of ranks."""

    images: ImageShards
    bad: NDArray[np.int64]
    data: DataConfig
    global_batch: int
    seed: int
    decode_threads: int

    def order(self, epoch: int) -> EpochOrder:
        data = self.data
        return EpochOrder(
            self.images, self.bad, seed=self.seed, epoch=epoch, streams=data.streams, window=data.shuffle_window
        )

    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.images) - len(self.bad), self.global_batch)


@dataclass(frozen=True)
class AdaptJob:
    """What every rank of an adaptor job is told."""

    num_labels: int
    labels: RowArrays
    training: TrainingImages
    backbone: BackboneConfig
    adapt: AdaptConfig
    artifact: Artifact
    centroids: Path | None = None  # (K, D) of the partition, where the classifier starts; None: at random

    @property
    def name(self) -> str:
        return f"k={self.num_labels}"


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    return -(-num_rows // global_batch)


def data_settings(data: DataConfig) -> dict[str, object]:
    """The settings of data that decide which rows are in a batch."""
    return data.model_dump(include={"streams", "shuffle_window"})


def adaptors_of(
    store: Store, backbone: BackboneConfig, adapt: AdaptConfig, data: DataConfig, seed: int, labels: Artifact
) -> Artifact:
    all_classes = {"sampled_classes"} if adapt.sampled_classes == 1 else set()  # goes without saying
    settings = {
        "backbone": backbone_settings(backbone),
        "adapt": adapt.model_dump(exclude={"checkpoint_steps", *all_classes}),
        "data": data_settings(data),
        "seed": seed,
    }
    return store.artifact(labels.kind.replace("labels/", "adaptors/"), settings, {"labels": labels})


def adapt(
    run: Run,
    adaptors: Mapping[int, Artifact],
    labels: Mapping[int, Artifact],
    images: ImageShards,
    bad: NDArray[np.int64],
) -> None:
    """Trains every adaptor set that does not exist yet, side by side as far as the workers go."""
    config = run.config
    missing = [k for k, artifact in adaptors.items() if not artifact.complete]
    if not missing:
        return
    training = TrainingImages(
        images, bad, config.data, config.adapt.global_batch, config.seed, config.resources.decode_threads
    )
    jobs = []
    for k in missing:
        centroids = labels[k].path / CENTROIDS_FILE if config.adapt.classifier == "centroids" else None
        rows = label_rows(labels[k], images)
        jobs.append(AdaptJob(k, rows, training, config.backbone, config.adapt, adaptors[k], centroids))
    ranks = config.resources.adapt_ranks
    side_by_side = max(1, run.runner.num_workers // ranks)
    steps = config.adapt.epochs * training.steps_per_epoch()
    what = f"{len(jobs)} adaptor sets of {steps} steps, {min(side_by_side, len(jobs))} at a time on {ranks} ranks each"
    with run.console.stage("adapt", what):
        run.runner.run_jobs(
            [Job(job.name, train_adaptors, job, ranks) for job in jobs],
            lambda name: run.console.say(f"adapt: {name} is trained"),
        )


def train_adaptors(context: RankContext, job: AdaptJob) -> None:
    """One rank of one adaptor job: builds, trains, and rank 0 saves."""
    if job.artifact.complete:
        return
    config, folder = job.adapt, job.artifact.begin()
    with ExitStack() as stack:
        objective = AdaptObjective(context, job)
        stack.callback(objective.close)
        optimizer = torch.optim.Adam(  # weight decay is L2 added to the gradient: the paper's Adam, not AdamW
            [p for p in objective.module.parameters() if p.requires_grad],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        steps = config.epochs * job.training.steps_per_epoch()
        schedule = Schedule(
            steps,
            config.checkpoint_steps,
            lambda step: config.learning_rate * cosine(step, steps, min(config.warmup_steps, steps - 1)),
        )
        beside = {"classifier": objective.classifier}
        done = train(context, objective, optimizer, schedule, folder=folder, job=job.name, beside=beside)
        if done and context.comm.rank == 0:
            with replacing(folder / ADAPTORS_FILE) as temporary:
                save_file(objective.grappa.adaptor_tensors(), temporary)
            job.artifact.commit(discard=["checkpoints"])


class AdaptObjective:
    """Norm-softmax classification of one partition, Eq. (2)."""

    def __init__(self, context: RankContext, job: AdaptJob) -> None:
        self._context, self._job = context, job
        backbone = build_backbone(job.backbone)
        self._preprocess = preprocess_of(backbone.pixels)
        self.grappa = Grappa(backbone, 1, job.adapt.bottleneck, attention=False)
        self.grappa.trainable_adaptors()
        draws = torch.Generator().manual_seed(torch_seed("adaptors", job.training.seed, job.num_labels))
        for layer in self.grappa.layers:
            layer.adaptors.initialise(draws)
        self.module = self.grappa.to(context.device)
        self.classifier = Classifier(
            context.comm,
            context.device,
            (job.num_labels, self.grappa.embed_dim),
            classifier_settings(job.adapt, torch_seed("classes", job.training.seed, job.num_labels)),
        )
        self.classifier.start(job.centroids, draws)
        self._batches: Generator[tuple[NDArray[np.uint8], NDArray[np.int64]], None, None] | None = None

    def begin(self, step: int) -> None:
        training, size = self._job.training, self._preprocess.image_size
        per_epoch = training.steps_per_epoch()
        comm = self._context.comm

        def read(at: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
            epoch, t = divmod(at, per_epoch)
            rows = orders[epoch].batch_share(t, training.global_batch, comm.rank, comm.size)

            def make(image: Picture, row: int) -> NDArray[np.uint8]:
                rng = view_generator(training.seed, epoch, row, 0)
                return self._preprocess.augment(image, rng, self._job.adapt.min_crop_area)

            return load_images(training.images, rows, make, (size, size, 3)), rows

        orders = [training.order(epoch) for epoch in range(self._job.adapt.epochs)]
        last = self._job.adapt.epochs * per_epoch
        self._batches = read_batches(range(step, last), read, threads=training.decode_threads)

    def backward(self, engine: Engine, step: int) -> dict[str, float]:
        assert self._batches is not None
        pixels, rows = next(self._batches)
        comm, device = self._context.comm, self._context.device
        labels = torch.from_numpy(self._job.labels.take(rows).astype(np.int64)).to(device)
        self.classifier.begin(step, labels)
        z = engine.forward(to_images(pixels, device))
        total, correct = self.classifier.score(z, labels)
        # The engine averages gradients over ranks, whose shares are uneven: a rank's loss weighs size / global rows.
        images = comm.sum_(torch.tensor([len(rows)], dtype=torch.int64, device=device)).item()
        engine.backward(total * (comm.size / images))
        return {"images": len(rows), "loss": total.item(), "accuracy": correct.item()}

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()


def classifier_settings(adapt: AdaptConfig, seed: int) -> ClassifierSettings:
    return ClassifierSettings(adapt.gamma, adapt.weight_decay, adapt.sampled_classes, seed)


def torch_seed(purpose: str, *numbers: int) -> int:
    """A seed named by what it is for."""
    return int(generator(purpose, *numbers).integers(2**62))
