"""Whole stages on the pretend GPU: a run from images to the exported model, and jobs on several ranks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from grappa_dist import pipeline
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.runner import Job
from grappa_dist.export import load_model
from grappa_dist.models.spec import ModelSpec
from grappa_dist.stages import evaluate
from grappa_dist.stages.adapt_job import train_adaptors
from grappa_dist.stages.embed import embed, feature_rows, features_of
from grappa_dist.stages.fuse import train_fusion
from grappa_dist.stages.ground_truth import ground_truth_of, write_ground_truth
from tests.gpu.counting import Counts, counting
from tests.gpu.rows import differing_graphs, differing_methods, kernel_by_torch
from tests.gpu.workloads import CUDA, SHALLOW, context_of, folder_of, made_once, settings_of
from tests.stages import multi_set, test_fuse, tiny

VARIANTS = ("average", "gallery", "transforms", "neighbours", "random-all", "supervised")
ADAPT: dict[str, dict[str, Any]] = {  # jobs of two sets
    "plain": {},
    "micro-batches, sampled": {"micro_batch": 5, "sampled_classes": 0.5},
    "automatic": {"micro_batch": "auto"},
    "recomputed": {"activation_checkpointing": True},
    "zero 1": {"zero_stage": 1},
    "zero 2": {"zero_stage": 2},
}
FUSE: dict[str, tuple[str, dict[str, Any]]] = {
    "transforms": ("transforms", {}),
    "neighbours": ("neighbours", {"micro_batch": 5}),
    "through lists": ("neighbours", {"graph": "approximate", "recall_floor": 0.5}),
    "by rows": ("transforms", {"projector": (24, 64)}),
    "by Adam": ("transforms-adam", {}),
}


@dataclass
class OnDevice(tiny.Here):
    """A Runner without Ray: tasks and the one rank of a job in this process, on the device."""

    num_workers: int = 1
    sharing: int = 1
    device: torch.device = CUDA
    comm: Comm = field(default_factory=Comm)

    def has_gpus(self) -> bool:
        return True

    def run_jobs(self, jobs: Sequence[Job], done: Callable[[str], None] = lambda name: None) -> dict[str, list[Any]]:
        results = {}
        for job in jobs:
            self.asked.append(job.name)
            results[job.name] = [
                job.function(context_of(self.comm), job.spec) if job.ranks else job.function(CUDA, job.spec)
            ]
            done(job.name)
        return results


def whole_run(comm: Comm) -> dict[str, Any]:
    """Scores of every model of a run, and how far the exported one, on the device, is from itself on the CPU."""
    with tempfile.TemporaryDirectory() as made, kernel_by_torch():
        folder, here = Path(made), OnDevice(comm=comm)
        labels: dict[str, Any] = {"label": lambda row: str(row % tiny.GROUPS)}
        train, test = (tiny.write_shards(folder / name, seed=seed, **labels) for seed, name in enumerate(("a", "b")))
        settings = tiny.config(
            train,
            data={"test": tuple(test)},
            adapt={"epochs": 2, "supervised": True},
            fuse={"variants": VARIANTS, "epochs": 2},
            evaluate={"export": "transforms"},
            resources={"workers": 1},
        )
        finished = pipeline.run_in(tiny.run_in(settings, folder / "run", here))
        assert finished is not None
        model = load_model(finished.model, trust_modules=True)
        images = torch.rand(3, 3, tiny.SIZE_PX, tiny.SIZE_PX, generator=torch.Generator().manual_seed(0))
        alone = model(images)
        on_device = model.to(CUDA)(images.to(CUDA)).cpu()
        apart = float((alone - on_device).abs().max())
        return {"asked": here.asked, "scores": list(finished.rows), "apart": apart}


def evaluate_job(folder: Path, comm: Comm) -> evaluate.EvaluateJob:
    """The backbone and an average of two sets, whose features are there."""
    settings = settings_of(folder, {"depth": SHALLOW, "image_size": tiny.SIZE_PX})
    given: dict[str, Any] = {"label": lambda row: str(row % tiny.GROUPS), "task": lambda row: ("even", "odd")[row % 2]}
    images = ImageShards.open(tuple(tiny.write_shards(folder / "labelled", bad=(), **given)), None)
    run = tiny.run_in(settings, folder / "run", OnDevice(comm=comm))
    store = run.store
    sets = tuple(tiny.random_adaptors(store, settings, seed) for seed in (1, 2))
    ground_truth, models = ground_truth_of(store, images, labelled=True), []
    write_ground_truth(run, images, ground_truth, "evaluate")
    for spec in (
        ModelSpec("backbone", settings.backbone),
        ModelSpec("average", settings.backbone, settings.adapt.bottleneck, sets),
    ):
        features = features_of(store, spec, settings.embed, images)
        embed(run, images, spec, features)
        scores = evaluate.scores_of(store, ground_truth, spec.name, features)
        insight = evaluate.insight_of(store, ground_truth, spec.name, settings.evaluate, settings.seed, features)
        models.append(evaluate.ModelTask(spec, feature_rows(images, features), scores, insight))
    return evaluate.EvaluateJob(images, np.zeros(0, np.int64), ground_truth, tuple(models), settings)


def evaluate_counts(comm: Comm) -> dict[str, Any]:
    """The stage for one model of two tasks, the second one, with its figures without labels."""
    with folder_of(comm) as folder:
        job = evaluate_job(folder, comm)
        models = list[Counts]()
        with counting() as meter:

            def done(progress: Any) -> None:
                models.append(meter.take())

            with patch.object(evaluate._Progress, "model_done", done):
                evaluate.evaluate_models(context_of(comm), job)
    return {"model": models[1].as_json(), "report": models[1].report(40)}


def losses_of_adapt(comm: Comm, names: list[str]) -> dict[str, list[float]]:
    """The loss of every step of each job, which is stopped by its last rank and goes on from its checkpoint."""
    with folder_of(comm) as folder:
        found = {}
        for name in names:
            make = partial(multi_set.job_in, folder, name.replace(" ", "-"), (3, 4), **ADAPT[name])
            job = made_once(comm, make)
            train_adaptors(context_of(comm, stop_after=3 if comm.rank == comm.size - 1 else None), job)
            train_adaptors(context_of(comm), job)
            comm.barrier()
            steps = tiny.steps_of(job.sets[0].artifact.path)
            found[name] = [float(step["loss"]) for step in steps]
    return found


def losses_of_fuse(comm: Comm, names: list[str]) -> dict[str, list[float]]:
    with folder_of(comm) as folder:
        found = {}
        for name in names:
            variant, fuse = FUSE[name]
            make = partial(test_fuse.job_in, folder, name.replace(" ", "-"), variant, epochs=2, **fuse)
            job = made_once(comm, make)
            train_fusion(context_of(comm, stop_after=4 if comm.rank == comm.size - 1 else None), job)
            train_fusion(context_of(comm), job)
            comm.barrier()
            found[name] = tiny.losses_of(job.artifact.path)
    return found


def on_ranks(comm: Comm, adapt: list[str], fuse: list[str], methods: list[str]) -> dict[str, Any]:
    """All of these, on the ranks of a job."""
    return {
        "adapt": losses_of_adapt(comm, adapt),
        "fuse": losses_of_fuse(comm, fuse),
        "methods": differing_methods(comm, methods, kernel=True),
        "graphs": differing_graphs(comm),
    }


def lasting(comm: Comm, seconds: float) -> float:
    """Takes this long."""
    time.sleep(seconds)
    return seconds


def refused(comm: Comm) -> dict[str, str]:
    """What the pretend GPU says of what CUDA refuses."""
    x = torch.ones(3, 3, device=CUDA)
    calls: dict[str, Callable[[], Any]] = {
        "two devices": lambda: x + torch.ones(3, 3),
        "a scalar of the host": lambda: x + torch.tensor(1.0),
        "a generator of the host": lambda: torch.rand(3, device=CUDA, generator=torch.Generator()),
        "numpy": lambda: x.numpy(),
        "integer products": lambda: x.long() @ x.long(),
        "another rank's tensor of the host": lambda: torch.distributed.all_reduce(torch.ones(3)),
        "what another stream wrote": _unordered,
        "what has not arrived": lambda: x.to("cpu", non_blocking=True).numpy(),
        "what has arrived": _ordered,
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = ""
        except (RuntimeError, TypeError) as error:
            found[name] = str(error).partition(" [")[0]
    host = torch.zeros(4).pin_memory()
    device = host.to(CUDA, non_blocking=True)
    host.fill_(1)  # too early
    found["a copy that the host has overtaken"] = str(device.tolist())
    mask = torch.tensor([True, False], device=CUDA)
    y = torch.zeros(2, device=CUDA)
    y[mask] = 3.0
    found["one value into a mask"] = str(y.tolist())
    np.testing.assert_array_equal(torch.ones(2, device=CUDA).cpu().numpy(), 1)
    return found


def _unordered() -> None:
    other, host = torch.cuda.Stream(), torch.zeros(4).pin_memory()
    with torch.cuda.stream(other):
        device = host.to(CUDA, non_blocking=True)
    device.add_(1)


def _ordered() -> None:
    other, host = torch.cuda.Stream(), torch.zeros(4).pin_memory()
    with torch.cuda.stream(other):
        device = host.to(CUDA, non_blocking=True)
    torch.cuda.current_stream().wait_stream(other)
    device.add_(1)
    found = device.to("cpu", non_blocking=True)
    torch.cuda.current_stream().record_event().synchronize()
    assert found.tolist() == [1.0] * 4
