"""Several adaptor sets packed in one job against as many jobs one after the other: steps with decoding included.

Both sides read the same images with the same threads and do the same steps, in one process, in turns. Starting up is
outside of the clock, although a packed job does it once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Timing, add_run, timed, turns
from grappa_dist.artifacts import RowArrays, Store
from grappa_dist.bench.arguments import check_device, check_positive
from grappa_dist.bench.limit import wait_for
from grappa_dist.bench.photos import drawn_shards
from grappa_dist.bench.processes import group_of_one, run_workers
from grappa_dist.bench.table import aligned
from grappa_dist.config import AdaptConfig, BackboneConfig, DataConfig
from grappa_dist.data.progress import Tell
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models import create_backbone
from grappa_dist.ops.adam import adam
from grappa_dist.stages.adapt_job import AdaptJob, AdaptObjective
from grappa_dist.stages.adapt_packs import AdaptSet
from grappa_dist.training.batches import TrainingImages
from grappa_dist.training.deepspeed_engine import Engine

PACKED, ALONE = "packed in one job", "one job after the other"
PHOTO_PX, FIRST_K = (500, 375), 64


@dataclass(frozen=True)
class PackingSettings:
    """What to measure."""

    sets: int
    backbone: str
    image_size: int
    images: int
    threads: int
    steps: int
    repeats: int
    device: str = "cpu"
    compiled: bool = False  # of the step alone: layers, if that pays

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_positive(self, "sets", "image_size", "images", "threads", "steps", "repeats")
        check_device(self.device)

    @property
    def in_words(self) -> str:
        where = f"at {self.image_size} px, {self.images} images a step on {self.device}"
        return f"{self.sets} sets of {self.backbone} {where}"


def measure_packing(settings: PackingSettings, tell: Tell) -> dict[str, Timing]:
    """Seconds of a step of all sets, either way."""
    settings.check()
    tell(f"{settings.sets} adaptor sets of {settings.backbone}")
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Timing] = run_workers(_measured_packing, 1, settings, Path(folder))[0]
    return found


def untrained(name: str, image_size: int) -> torch.nn.Module:
    """A timm model without weights: steps take as long with any."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return create_backbone(f"timm:{name}", {}, {"image_size": image_size}, pretrained=False).model


def _measured_packing(comm: Comm, settings: PackingSettings, folder: Path) -> dict[str, Timing]:
    torch.set_num_threads(settings.threads)
    found: dict[str, Timing] = {}
    with group_of_one(torch.device(settings.device)):
        whole = _job(settings, folder)
        jobs = {PACKED: [whole], ALONE: [_of_one(whole, index) for index in range(settings.sets)]}
        sides = {name: [_steps(job, settings) for job in of_side] for name, of_side in jobs.items()}
        for order in turns(list(sides), settings.repeats):
            for name in order:
                _, timing = timed(lambda name=name: [step() for step in sides[name]])  # type: ignore[misc]
                per_step = Timing((timing.seconds / settings.steps,), (timing.cpu / settings.steps,))
                add_run(found, name, per_step)
    return found


def _of_one(whole: AdaptJob, index: int) -> AdaptJob:
    return AdaptJob(whole.sets[index : index + 1], whole.training, whole.backbone, whole.adapt)


def _job(settings: PackingSettings, folder: Path) -> AdaptJob:
    rounds = settings.repeats * settings.steps + 1  # one that warms up
    images, _ = drawn_shards(folder, settings.images, PHOTO_PX, 0)
    store, sets = Store(folder), []
    for index in range(settings.sets):
        k = FIRST_K + index
        artifact = store.artifact(f"adaptors/k={k}", {}, {})
        sets.append(AdaptSet(k, _labels(folder, images, k), artifact))
    data = DataConfig(train=(str(folder),), streams=8)
    training = TrainingImages(images, np.empty(0, dtype=np.int64), data, settings.images, 0, settings.threads)
    backbone = BackboneConfig(
        name="benchmarks.adapt:untrained",
        kwargs={"name": settings.backbone, "image_size": settings.image_size},
        image_size=settings.image_size,
    )
    adapt = AdaptConfig(epochs=rounds, global_batch=settings.images, classifier="random")
    return AdaptJob(tuple(sets), training, backbone, adapt)


def _labels(folder: Path, images: ImageShards, num_labels: int) -> RowArrays:
    paths = []
    for shard in range(len(images.shards)):
        paths.append(folder / f"labels-{num_labels}-{shard}.npy")
        np.save(paths[-1], (np.array(images.shard_rows(shard)) % num_labels).astype(np.int32))
    return RowArrays.of(paths, images.starts)


def _steps(job: AdaptJob, settings: PackingSettings) -> Callable[[], None]:
    """What does the next steps of a job; one is done before, which loads what it needs."""
    comm, device = Comm(), torch.device(settings.device)
    objective = AdaptObjective(RankContext(comm, device, lambda status: None, lambda: False), job)
    learning = [p for p in objective.module.parameters() if p.requires_grad]
    engine = Engine(objective.module, adam(learning, 1e-3), comm, device)
    at = 0

    def steps(count: int = settings.steps) -> None:
        """Opens its stream of images and closes it, so that nothing is read ahead on the other side's time."""
        nonlocal at
        objective.begin(at)
        for _ in range(count):
            objective.backward(engine, at)
            engine.step(1e-3)
            for classifier in objective.classifiers:
                classifier.step(1e-3)
            at += 1
        wait_for(device)
        objective.close()

    steps(1)
    return steps


def packing_json(settings: PackingSettings, found: dict[str, Timing]) -> dict[str, Any]:
    packed, alone = found[PACKED], found[ALONE]
    return {
        "settings": vars(settings),
        "sides": [{"name": n, "seconds": t.seconds, "runs_s": t.runs, "cpu_seconds": t.cpu} for n, t in found.items()],
        "ratio": min(alone.runs) / min(packed.runs),
        "cpu_ratio": min(alone.cpu_runs) / min(packed.cpu_runs),
    }


def packing_text(settings: PackingSettings, found: dict[str, Timing]) -> str:
    ratios = packing_json(settings, found)
    lines: list[Sequence[str]] = [["packing", "s a step of all sets", "CPU s"]]
    lines += [[name, f"{min(t.runs):.2f}", f"{min(t.cpu_runs):.2f}"] for name, t in found.items()]
    notes = [
        f"{settings.in_words}; the least of {settings.repeats} runs of {settings.steps} steps",
        f"packed: {ratios['ratio']:.2f}x one after the other ({ratios['cpu_ratio']:.2f}x by CPU)",
    ]
    return "\n".join([aligned(lines), *notes])
