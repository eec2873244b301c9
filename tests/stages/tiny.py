"""Inputs small enough for the stages' tests: drawn shards of uneven size, one bad image, a backbone of two blocks."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from grappa_dist.artifacts import Artifact, RowArrays, Store
from grappa_dist.config import Config
from grappa_dist.console import Console, Events, read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.preflight import Checks
from grappa_dist.distributed.runner import Job
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ADAPTORS_FILE, build_backbone
from grappa_dist.stages.adapt import adaptors_of
from grappa_dist.stages.adapt_job import AdaptJob
from grappa_dist.stages.embed import Embedding
from grappa_dist.stages.fuse import FuseJob, fusion_of
from grappa_dist.stages.multi_set_jobs import AdaptSet
from grappa_dist.stages.run import Run
from grappa_dist.training.batches import TrainingImages
from grappa_dist.variants import Variant
from tests.processes import run_ranks

SIZES = (13, 1, 17, 9)
NUM_ROWS = sum(SIZES)
BAD = 15  # inside the third shard
CPU = torch.device("cpu")
SIZE_PX = 32
BATCH = 16  # of adapt and fuse
STEPS_PER_EPOCH = 3
GROUPS = 5


def picture(row: int, seed: int = 0) -> bytes:
    """A PNG of a few hundred bytes: a bright box on a dark ground, by groups of alike colours."""
    rng = np.random.default_rng((seed, row))
    hues = np.random.default_rng(row % GROUPS).integers(0, 200, (2, 3))
    pixels = np.empty((40, 36, 3), dtype=np.uint8)
    pixels[:] = hues[0] + rng.integers(0, 50, 3)
    top, left = rng.integers(0, 20, 2)
    pixels[top : top + 18, left : left + 14] = hues[1] + rng.integers(0, 50, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shards(
    folder: Path,
    sizes: Sequence[int] = SIZES,
    *,
    bad: Sequence[int] = (BAD,),
    label: Callable[[int], str | None] = lambda row: None,
    task: Callable[[int], str | None] = lambda row: None,
    seed: int = 0,
) -> list[str]:
    """Folders of one shard each; the bytes of bad rows are no image."""
    paths, row = [], 0
    for number, size in enumerate(sizes):
        paths.append(str(folder / f"part-{number}"))
        with ShardWriter(paths[-1], rows_per_shard=None, prefix=f"part{number}") as writer:
            for _ in range(size):
                image = b"no image" if row in bad else picture(row, seed)
                writer.write(image, "png", label=label(row), task=task(row))
                row += 1
    return paths


def config(train: Sequence[str], **sections: Mapping[str, Any]) -> Config:
    """Settings of the tiny world; `sections` replace some of them."""
    given: dict[str, dict[str, Any]] = {
        "data": {"train": tuple(train), "streams": 4, "shuffle_window": 8, "max_bad_share": 0.05},
        "backbone": {"name": "tests.models.tiny:create", "kwargs": {"dim": 16, "depth": 2}, "image_size": SIZE_PX},
        "embed": {"batch_size": 8},
        "clustering": {"num_labels": (4, 6), "iterations": 3},
        "adapt": {"bottleneck": 4, "global_batch": BATCH, "epochs": 7, "checkpoint_steps": 5},
        "fuse": {
            "variants": ("average",),
            "global_batch": BATCH,
            "micro_batch": 64,
            "epochs": 4,
            "projector": (24, 24),
            "neighbours": 3,
            "checkpoint_steps": 2,
        },
        "evaluate": {"export": "average", "gallery_queries": 1, "gallery_hits": 2, "view_queries": 6},
        "resources": {"workers": 2, "decode_threads": 1, "num_cpus": 2},
    }
    for name, section in sections.items():
        given[name] = given[name] | dict(section)
    return Config.model_validate({"name": "tiny", **given})


def training_images(settings: Config, images: ImageShards, bad: Sequence[int] = (BAD,)) -> TrainingImages:
    return TrainingImages(images, np.array(bad, dtype=np.int64), settings.data, BATCH, settings.seed, 1)


def labels_in(folder: Path, images: ImageShards, num: int) -> RowArrays:
    """Labels of all rows, -1 for the bad one; nearly the groups that the pictures were drawn in."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(len(images.shards)):
        rows = np.array(images.shard_rows(shard))
        paths.append(str(folder / f"rows-{shard}.npy"))
        np.save(paths[-1], np.where(rows == BAD, -1, rows % GROUPS % num).astype(np.int32))
    return RowArrays(tuple(paths), tuple(images.starts.tolist()))


def random_adaptors(store: Store, settings: Config, seed: int) -> Artifact:
    """A finished adaptor set of random weights, none of them zero."""
    artifact = store.artifact(f"adaptors/k={seed}", {"random": seed}, {})
    if not artifact.complete:
        model = Grappa(build_backbone(settings.backbone), 1, settings.adapt.bottleneck, attention=False)
        draws = torch.Generator().manual_seed(seed)
        tensors = {k: 0.3 * torch.randn(t.shape, generator=draws) for k, t in model.adaptor_tensors().items()}
        save_file(tensors, artifact.begin() / ADAPTORS_FILE)
        artifact.commit()
    return artifact


def adapt_job(settings: Config, store: Store, labels: Mapping[int, Path]) -> AdaptJob:
    """A job of adaptor sets by their numbers of clusters, whose labels are in these folders."""
    images, sets = ImageShards.open(settings.data.train, None), []
    for k, folder in labels.items():
        parent = store.artifact(f"labels/k={k}", {}, {})
        artifact = adaptors_of(store, settings.backbone, settings.adapt, settings.data, settings.seed, parent)
        sets.append(AdaptSet(k, labels_in(folder, images, k), artifact))
    return AdaptJob(tuple(sets), training_images(settings, images), settings.backbone, settings.adapt)


def fuse_job(settings: Config, folder: Path, store: Store, variant: str, num_sets: int) -> FuseJob:
    """A job over random adaptor sets, which are in `folder`, as are the labels."""
    images = ImageShards.open(settings.data.train, None)
    sets = [random_adaptors(Store(folder), settings, seed) for seed in range(1, 1 + num_sets)]
    given = (settings.backbone, settings.fuse, settings.data, settings.seed)
    return FuseJob(
        variant=Variant.parse(variant),
        adaptors=tuple(sets),
        labels={4: labels_in(folder / "labels", images, 4)},
        training=training_images(settings, images),
        backbone=settings.backbone,
        bottleneck=settings.adapt.bottleneck,
        fuse=settings.fuse,
        embedding=Embedding(settings.embed.batch_size, 1),
        artifact=fusion_of(store, variant, *given, {f"set {i}": a for i, a in enumerate(sets)}),
    )


class Killed(BaseException):
    """Stands for a process that is gone between two steps."""


@dataclass
class Watcher:
    """Watches one rank, and may stop or kill it once a number of steps is behind it."""

    stop_after: int | None = None
    kill_after: int | None = None
    statuses: list[dict[str, Any]] = field(default_factory=list)

    def report(self, status: dict[str, Any]) -> None:
        self.statuses.append(status)
        if status.get("done") == self.kill_after and self.kill_after is not None:
            raise Killed

    def stop_requested(self) -> bool:
        done = max((s["done"] for s in self.statuses if "done" in s), default=0)
        return self.stop_after is not None and done >= self.stop_after

    def context(self, comm: Comm) -> RankContext:
        return RankContext(comm, CPU, self.report, self.stop_requested)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The steps that a job has logged."""
    return [event for event in read_events(folder / "metrics.jsonl") if event["name"] == "step"]


def losses_of(folder: Path) -> list[float]:
    return [float(event["loss"]) for event in steps_of(folder)]


def files_below(folder: Path) -> dict[str, int]:
    """Every file with its time of change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@dataclass
class Here:
    """A Runner without Ray: tasks in this process, jobs on real ranks; counts what it was asked to do."""

    num_workers: int = 2
    sharing: int = 2
    device: torch.device = CPU
    asked: list[str] = field(default_factory=list)
    checks: list[Checks] = field(default_factory=list)

    def require(self, checks: Checks) -> None:
        self.checks.append(checks)

    def has_gpus(self) -> bool:
        """They have none."""
        return False

    def renew_workers(self) -> None:
        """There are none."""

    def map(
        self,
        function: Any,
        tasks: Sequence[Any],
        progress: Callable[[int], None] = lambda index: None,
        running: Callable[[Sequence[Any]], None] = lambda reports: None,
    ) -> list[Any]:
        self.asked += [function.__name__] * len(tasks)
        results = []
        for index, task in enumerate(tasks):
            results.append(function(self.device, task))
            progress(index)
        return results

    def run_jobs(self, jobs: Sequence[Job], done: Callable[[str], None] = lambda name: None) -> dict[str, list[Any]]:
        self.asked += [job.name for job in jobs]
        results = {}
        for job in jobs:
            results[job.name] = run_ranks(_rank_of_job, job.ranks, job)
            done(job.name)
        return results


def _rank_of_job(comm: Comm, job: Job) -> Any:
    return job.function(Watcher().context(comm), job.spec)


def run_in(settings: Config, root: Path, here: Here) -> Run:
    return Run(settings, Store(root), here, Console(Events(root / "events.jsonl")))  # type: ignore[arg-type]
