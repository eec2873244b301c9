"""Steps of training and batches that are embedded, on the pretend GPU, with what they ask for; rows.py has k-means.

Each function is given its `Comm`, and returns JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models.spec import ModelSpec, cached_model
from grappa_dist.stages.adapt_job import AdaptJob, train_adaptors
from grappa_dist.stages.embed import Embedding, embed_rows
from grappa_dist.stages.fuse import FuseJob, train_fusion
from grappa_dist.stages.supervised import SupervisedJob, train_supervised_fusion
from grappa_dist.training.deepspeed_engine import Engine
from grappa_dist.training.figures import Pace
from tests.gpu.counting import Counts, counting
from tests.stages import tiny

Job = TypeVar("Job")
CUDA = torch.device("cuda", 0)
SHALLOW = 2  # blocks, in tests; operations grow with the blocks, and do not depend on the size of the images
WARM_UP = 2  # steps that load what later ones have
RARELY = Pace(log_s=1e6)  # figures are read at the end, however slow this machine is


def context_of(comm: Comm, **watched: Any) -> RankContext:
    watcher = tiny.Watcher(**watched)
    return RankContext(comm, CUDA, watcher.report, watcher.stop_requested)


@contextmanager
def folder_of(comm: Comm) -> Iterator[Path]:
    """A folder of the job with the tiny world's images, the same on all ranks."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        name = torch.zeros(256, dtype=torch.uint8)
        name[: len(own)] = torch.tensor(list(own.encode()), dtype=torch.uint8)
        folder = Path(bytes(comm.broadcast(name.to(CUDA), 0).tolist()).rstrip(b"\0").decode())
        if comm.rank == 0:
            tiny.write_shards(folder / "images")
        comm.barrier()
        yield folder
        comm.barrier()


def made_once(comm: Comm, make: Callable[[], Job]) -> Job:
    """What `make` gives on each rank; the files that it writes are rank 0's before another rank reads them."""
    if comm.rank == 0:
        made = make()
    comm.barrier()
    if comm.rank:
        made = make()
    comm.barrier()
    return made


def untrained(depth: int, image_size: int) -> nn.Module:
    """A ViT-S of random weights, with so many blocks; `backbone.name` of what is counted."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_small_patch16_224", pretrained=False, num_classes=0, img_size=image_size, depth=depth
    )
    return model


def settings_of(folder: Path, shape: dict[str, int], **sections: Any) -> Config:
    """The tiny world with such a ViT."""
    backbone = {
        "name": "tests.gpu.workloads:untrained",
        "kwargs": shape,
        "image_size": shape["image_size"],
        "precision": "bf16",
    }
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    return tiny.config(paths, backbone=backbone, **sections)


def adapt_job(folder: Path, sets: int, shape: dict[str, int], **adapt: Any) -> AdaptJob:
    """A job of partitions into 3, 4, ... clusters."""
    settings = settings_of(folder, shape, adapt={"epochs": 2, "checkpoint_steps": 1000, **adapt})
    labels = {k: folder / f"labels-{k}" for k in range(3, 3 + sets)}
    return tiny.adapt_job(settings, Store(folder / "out"), labels)


@contextmanager
def steps_counted() -> Iterator[list[Counts]]:
    """The counts of every step of a job: from the end of one update of the engine to the end of the next."""
    steps, step = list[Counts](), Engine.step
    with counting() as meter:

        def observed(engine: Engine, *given: Any, **more: Any) -> None:
            step(engine, *given, **more)
            steps.append(meter.take())

        with patch.object(Engine, "step", observed):
            yield steps


def quiet_and_logged(steps: list[Counts]) -> dict[str, Any]:
    """Those with fewest waits and with most, but for the first and the last: a step that writes no log line, and one
    that does."""
    later = sorted(steps[WARM_UP:-1], key=lambda counts: (counts.waits.total(), counts.operations.total()))
    reports = {"quiet_report": later[0].report(40), "logged_report": later[-1].report(40)}
    return {"quiet": later[0].as_json(), "logged": later[-1].as_json(), **reports}


def adapt_counts(comm: Comm, sets: int, depth: int = SHALLOW, image_size: int = 32, **adapt: Any) -> dict[str, Any]:
    with folder_of(comm) as folder:
        shape = {"depth": depth, "image_size": image_size}
        job = made_once(comm, lambda: adapt_job(folder, sets, shape, **adapt))
        with steps_counted() as steps:
            train_adaptors(context_of(comm), replace(job, pace=RARELY))
    return quiet_and_logged(steps)


def fuse_job(folder: Path, sets: int, shape: dict[str, int], variant: str, **fuse: Any) -> FuseJob:
    settings = settings_of(folder, shape, fuse={"epochs": 2, "checkpoint_steps": 1000, **fuse})
    return tiny.fuse_job(settings, folder, Store(folder / "out"), variant, sets)


def fuse_counts(
    comm: Comm, sets: int, depth: int = SHALLOW, image_size: int = 32, variant: str = "transforms", **fuse: Any
) -> dict[str, Any]:
    with folder_of(comm) as folder:
        shape = {"depth": depth, "image_size": image_size}
        job = made_once(comm, lambda: fuse_job(folder, sets, shape, variant, **fuse))
        with steps_counted() as steps:
            train_fusion(context_of(comm), replace(job, pace=RARELY))
    return quiet_and_logged(steps)


def supervised_job(folder: Path, sets: int, shape: dict[str, int]) -> SupervisedJob:
    settings = settings_of(folder, shape, adapt={"epochs": 2, "checkpoint_steps": 1000})
    images = ImageShards.open(settings.data.train, None)
    return SupervisedJob(
        adaptors=tuple(tiny.random_adaptors(Store(folder), settings, seed) for seed in range(1, 1 + sets)),
        labels=tiny.labels_in(folder / "labels", images, 4),
        num_classes=4,
        centroids=None,
        training=tiny.training_images(settings, images),
        backbone=settings.backbone,
        adapt=settings.adapt,
        micro_batch=64,
        artifact=Store(folder / "out").artifact("fusion/supervised", {}, {}),
    )


def supervised_counts(comm: Comm, sets: int, depth: int = SHALLOW, image_size: int = 32) -> dict[str, Any]:
    """A step of the fusion that true classes train; the set that they train is one of `adapt_counts`."""
    with folder_of(comm) as folder:
        job = made_once(comm, lambda: supervised_job(folder, sets, {"depth": depth, "image_size": image_size}))
        with steps_counted() as steps:
            train_supervised_fusion(context_of(comm), replace(job, pace=RARELY))
    return quiet_and_logged(steps)


def embed_counts(
    comm: Comm, sets: int, depth: int = SHALLOW, image_size: int = 32, batch_size: int = 4
) -> dict[str, Any]:
    """A batch of the adapted model, its sets averaged."""
    with folder_of(comm) as folder:
        settings = settings_of(folder, {"depth": depth, "image_size": image_size})
        adaptors = tuple(tiny.random_adaptors(Store(folder), settings, seed) for seed in range(1, 1 + sets))
        spec = ModelSpec("average", settings.backbone, settings.adapt.bottleneck, adaptors)
        model = cached_model(spec, CUDA)
        images = ImageShards.open(tiny.write_shards(folder / "many", (10 * batch_size,), bad=()), None)
        batches, how = [], Embedding(batch_size, 1)
        with counting() as meter:
            for _ in embed_rows(model, images, np.arange(len(images)), device=CUDA, how=how):
                batches.append(meter.take())
    return quiet_and_logged(batches)
