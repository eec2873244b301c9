"""Whole stages on the pretend GPU: a run from images to the exported model, and jobs on several ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grappa_dist import pipeline
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.runner import Job
from grappa_dist.export import load_model
from grappa_dist.stages.adapt_job import train_adaptors
from grappa_dist.stages.fuse import train_fusion
from tests.gpu.rows import differing_graphs, differing_methods, kernel_by_torch
from tests.gpu.workloads import CUDA, context_of, folder_of, made_once
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
