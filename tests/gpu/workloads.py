"""Pieces of work whose operations, waits and copies are counted, on the pretend GPU. Each is given its `Comm`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.stages.adapt import adaptors_of
from grappa_dist.stages.adapt_job import AdaptJob, train_adaptors
from grappa_dist.stages.multi_set_jobs import AdaptSet
from grappa_dist.training.deepspeed_engine import Engine
from tests.gpu.counting import Counts, counting
from tests.stages import tiny

CUDA = torch.device("cuda", 0)
SHALLOW = 2  # blocks, in tests; operations grow with the blocks, and do not depend on the size of the images
WARM_UP = 2  # steps that load what later ones have


def context_of(comm: Comm, **watched: Any) -> RankContext:
    watcher = tiny.Watcher(**watched)
    return RankContext(comm, CUDA, watcher.report, watcher.stop_requested)


@contextmanager
def folder_of(comm: Comm) -> Iterator[Path]:
    """A folder of the job with the tiny world's images, the same on all ranks."""
    with tempfile.TemporaryDirectory() as own:
        name = torch.zeros(256, dtype=torch.uint8)
        name[: len(own)] = torch.tensor(list(own.encode()), dtype=torch.uint8)
        folder = Path(bytes(comm.broadcast(name.to(CUDA), 0).tolist()).rstrip(b"\0").decode())
        if comm.rank == 0:
            tiny.write_shards(folder / "images")
        comm.barrier()
        yield folder
        comm.barrier()


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
    backbone = {"name": "tests.gpu.workloads:untrained", "kwargs": shape, "image_size": shape["image_size"]}
    paths = [str(path) for path in sorted((folder / "images").iterdir())]
    return tiny.config(paths, backbone=backbone, **sections)


def adapt_job(folder: Path, sets: int, shape: dict[str, int], **adapt: Any) -> AdaptJob:
    """A job of partitions into 3, 4, ... clusters."""
    settings = settings_of(folder, shape, adapt={"epochs": 2, "checkpoint_steps": 1000, **adapt})
    images, store = ImageShards.open(settings.data.train, None), Store(folder / "out")
    made = []
    for k in range(3, 3 + sets):
        parent = store.artifact(f"labels/k={k}", {}, {})
        artifact = adaptors_of(store, settings.backbone, settings.adapt, settings.data, settings.seed, parent)
        made.append(AdaptSet(k, tiny.labels_in(folder / f"labels-{k}", images, k), artifact))
    return AdaptJob(tuple(made), tiny.training_images(settings, images), settings.backbone, settings.adapt)


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
    """The steps, but for the first, with fewest waits and with most: one that writes no log line and one that does."""
    later = sorted(steps[WARM_UP:], key=lambda counts: (counts.waits.total(), counts.operations.total()))
    reports = {"quiet_report": later[0].report(40), "logged_report": later[-1].report(40)}
    return {"quiet": later[0].as_json(), "logged": later[-1].as_json(), **reports}


def adapt_counts(comm: Comm, sets: int, depth: int = SHALLOW, image_size: int = 32, **adapt: Any) -> dict[str, Any]:
    with folder_of(comm) as folder:
        job = adapt_job(folder, sets, {"depth": depth, "image_size": image_size}, **adapt)
        with steps_counted() as steps:
            train_adaptors(context_of(comm), replace(job, sharing=1))
    return quiet_and_logged(steps)
