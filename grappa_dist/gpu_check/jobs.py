"""Small jobs of adapt and fuse on drawn images, as the checks of training run them: in this process, as its only rank.

A job has the settings of a run; what differs between two jobs that must agree is in `AdaptConfig` or `FuseConfig`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from grappa_dist.artifacts import Artifact, RowArrays, Store
from grappa_dist.config import AdaptConfig, BackboneConfig, DataConfig, FuseConfig
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import save_tensors
from grappa_dist.gpu_check.checks import Machine
from grappa_dist.gpu_check.inputs import only_rank, write_photos
from grappa_dist.models import Grappa
from grappa_dist.models.precision import Precision
from grappa_dist.models.spec import ADAPTORS_FILE, FUSION_FILE, build_backbone
from grappa_dist.stages.adapt_job import AdaptJob, train_adaptors
from grappa_dist.stages.embed import Embedding
from grappa_dist.stages.fuse import FuseJob, train_fusion
from grappa_dist.stages.multi_set_jobs import AdaptSet
from grappa_dist.training.batches import TrainingImages
from grappa_dist.training.figures import Pace
from grappa_dist.variants import Variant

LABELS = (5, 6, 7)  # classes of the sets
DISTINCT = 64  # drawn images


class Killed(BaseException):
    """Stands for a process that is gone between two steps."""


@dataclass
class Watcher:
    """Takes the reports of a job; kills it after a number of steps, or asks it to stop after some seconds of steps."""

    kill_after: int | None = None
    stop_after_s: float | None = None
    steps: list[tuple[int, float]] = field(default_factory=list)  # steps that are done, and when

    def report(self, status: dict[str, Any]) -> None:
        if "done" not in status:
            return
        self.steps.append((int(status["done"]), time.monotonic()))
        if self.kill_after is not None and self.steps[-1][0] >= self.kill_after:
            raise Killed

    def stop_requested(self) -> bool:
        if self.stop_after_s is None or not self.steps:
            return False
        return time.monotonic() - self.steps[0][1] > self.stop_after_s


@dataclass(frozen=True)
class World:
    """Images, their labels and settings, in a folder."""

    machine: Machine
    images: ImageShards
    backbone: BackboneConfig
    batch: int
    epochs: int
    threads: int = 1

    @classmethod
    def small(cls, machine: Machine, precision: Precision = "fp32") -> World:
        """Of the demo's ViT, which has trained weights: a few steps of each job."""
        rows, batch, epochs = machine.sized((384, 64, 2), (20, 8, 1))
        images = write_photos(machine.folder / "images", rows, (60, 56), DISTINCT)
        backbone = BackboneConfig(name="grappa_dist.demo.backbone:create", precision=precision)
        return cls(machine, images, backbone, batch, epochs)

    @property
    def _data(self) -> DataConfig:
        return DataConfig(train=(str(self.machine.folder / "images"),), streams=8, shuffle_window=16)

    @property
    def _training(self) -> TrainingImages:
        none = np.empty(0, dtype=np.int64)
        return TrainingImages(self.images, none, self._data, self.batch, 0, self.threads)

    def labels(self, num: int) -> RowArrays:
        folder, paths = self.machine.folder / f"labels-{num}", []
        folder.mkdir(exist_ok=True)
        for shard in range(len(self.images.shards)):
            paths.append(folder / f"{shard}.npy")
            np.save(paths[-1], (np.array(self.images.shard_rows(shard)) % DISTINCT % num).astype(np.int32))
        return RowArrays.of(paths, self.images.starts)

    def adapt_job(self, out: str, labels: Sequence[int] = LABELS, **adapt: Any) -> AdaptJob:
        store = Store(self.machine.folder / out)
        sets = [AdaptSet(k, self.labels(k), store.artifact(f"adaptors/k={k}", {}, {})) for k in labels]
        given = {"global_batch": self.batch, "epochs": self.epochs, "classifier": "random", "bottleneck": 16, **adapt}
        pace = Pace(log_s=0)  # each step is reported
        return AdaptJob(tuple(sets), self._training, self.backbone, AdaptConfig(**given), pace=pace)

    def fuse_job(self, out: str, variant: str = "transforms", **fuse: Any) -> FuseJob:
        store = Store(self.machine.folder / out)
        sets = [self._random_set(seed) for seed in range(3)]
        given = {
            "global_batch": self.batch,
            "projector": (64, 64),
            "neighbours": 3,
            "variants": (variant,),
            "lars_learning_rate": 20.0,  # a few steps change something
            **fuse,
        }
        return FuseJob(
            variant=Variant.parse(variant),
            adaptors=tuple(sets),
            labels={LABELS[0]: self.labels(LABELS[0])},
            training=self._training,
            backbone=self.backbone,
            bottleneck=16,
            fuse=FuseConfig(**given),
            embedding=Embedding(self.batch, self.threads),
            artifact=store.artifact(f"fusion/{variant}", {}, {}),
        )

    def _random_set(self, seed: int) -> Artifact:
        artifact = Store(self.machine.folder).artifact(f"adaptors/random={seed}", {}, {})
        if not artifact.complete:
            model, rng = Grappa(build_backbone(self.backbone), 1, 16, attention=False), torch.Generator()
            rng.manual_seed(seed)
            tensors = {k: 0.1 * torch.randn(t.shape, generator=rng) for k, t in model.adaptor_tensors().items()}
            save_tensors(artifact.begin() / ADAPTORS_FILE, tensors, summed=True)
            artifact.commit()
        return artifact

    def run(self, job: AdaptJob | FuseJob, watcher: Watcher | None = None) -> list[dict[str, Tensor]]:
        """Trains; the tensors of each set, or Q and K of the fusion. [] where it was killed or asked to stop."""
        watcher = watcher or Watcher()
        with only_rank(self.machine.device, watcher.report, watcher.stop_requested) as context:
            try:
                if isinstance(job, FuseJob):
                    train_fusion(context, job)
                else:
                    train_adaptors(context, job)
            except Killed:
                return []
        if isinstance(job, FuseJob):
            return [load_file(job.artifact.path / FUSION_FILE)] if job.artifact.complete else []
        files = [one.artifact.path / ADAPTORS_FILE for one in job.sets if one.artifact.complete]
        return [load_file(file) for file in files]


def alone(job: AdaptJob, index: int) -> AdaptJob:
    """The job of one of its sets."""
    return replace(job, sets=job.sets[index : index + 1])


def distance(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> float:
    """How far trained sets lie apart: the largest, over sets, of |a - b| / |b|, in what starts at zero or, of a fusion,
    in all; 0: the same bits."""
    if [one.keys() for one in found] != [one.keys() for one in expected] or not expected:
        raise ValueError(f"{len(found)} trained sets to compare with {len(expected)}")
    return max(_distance(a, b) for a, b in zip(found, expected, strict=True))


def _distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    names = [name for name in b if name.endswith("up.weight")] or list(b)
    left, right = (torch.cat([of[name].flatten().double() for name in names]) for of in (a, b))
    return float((left - right).norm() / right.norm().clamp_min(1e-30))


def same_bits(found: Sequence[dict[str, Tensor]], expected: Sequence[dict[str, Tensor]]) -> bool:
    return len(found) == len(expected) > 0 and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
        for a, b in zip(found, expected, strict=True)
    )
