"""The whole demo in this process, without Ray, against the tables that CPUs gave.

`demo_scores.json` has those of docs/experiments.md, as means over the tasks. The backbone's is the same on every
processor. The others depend on how products are rounded, as they do on the seed, so the nearest of the tables counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grappa_dist.artifacts import Store
from grappa_dist.config import Config
from grappa_dist.console import EVENTS_FILE, Console, Events
from grappa_dist.distributed.machine import origin
from grappa_dist.distributed.preflight import Checks
from grappa_dist.distributed.runner import Job
from grappa_dist.files import read_json
from grappa_dist.gpu_check.checks import Figure, Found, Machine
from grappa_dist.gpu_check.inputs import only_rank
from grappa_dist.output import choose_mode
from grappa_dist.pipeline import run_in
from grappa_dist.report.content import ScoreRow
from grappa_dist.stages.run import Run

SCORES = Path(__file__).with_name("demo_scores.json")
POINTS, TINY_POINTS = 0.5, 3.0  # of R-Precision in percent, that a mean may lie apart; of 84 queries for a test
DECODE_THREADS = 8
Status = Mapping[str, Any]


@dataclass(frozen=True)
class OneWorker:
    """What stages ask of a Runner, in this process: tasks one after the other, jobs of one rank."""

    device: torch.device
    log: Callable[[str], None]
    num_workers: int = 1
    sharing: int = 1

    def require(self, checks: Checks) -> None:
        """There is no other node to check."""

    def renew_workers(self) -> None:
        """There are none."""

    def map(
        self,
        function: Callable[[Any, Any], Any],
        tasks: Sequence[Any],
        progress: Callable[[int], None] = lambda index: None,
        running: Callable[[Sequence[Status]], None] = lambda reports: None,
    ) -> list[Any]:
        self.log(f"{function.__name__}, {len(tasks)}")
        results = []
        for index, task in enumerate(tasks):
            results.append(function(self.device, task))
            progress(index)
        return results

    def run_jobs(self, jobs: Sequence[Job], done: Callable[[str], None] = lambda name: None) -> dict[str, list[Any]]:
        results = {}
        for job in jobs:
            self.log(job.name)
            with only_rank(self.device) as context:
                results[job.name] = [job.function(context, job.spec)]
            done(job.name)
        return results


def settings(machine: Machine) -> Config:
    """Those of configs/demo.yaml; for a test few images and steps."""
    sections: dict[str, Any] = {
        "data": {"collection": "grappa_dist.demo.drawings:draw", "streams": 64},
        "backbone": {"name": "grappa_dist.demo.backbone:create", "precision": machine.precision},
        "clustering": {"num_labels": (32, 128, 512), "iterations": 15},
        "adapt": {"bottleneck": 32, "epochs": 6, "checkpoint_steps": 25},
        "fuse": {
            "epochs": 2,
            "global_batch": 256,
            "micro_batch": 128,
            "projector": (512, 512, 512),
            "checkpoint_steps": 5,
        },
        "resources": {"workers": 1, "decode_threads": DECODE_THREADS},
    }
    if machine.tiny:
        sections["data"]["collection_kwargs"] = {"scale": 0.1}
        sections["clustering"] = {"num_labels": (8, 32), "iterations": 5}
        sections["adapt"] |= {"epochs": 1}
        sections["fuse"] |= {"epochs": 1, "projector": (64, 64), "variants": ("average", "neighbours")}
    return Config.model_validate({"name": "demo", **sections})


def run_demo(machine: Machine) -> list[ScoreRow]:
    """The rows of the table of scores."""
    choose_mode(quiet=True, json=False)
    store = Store(machine.folder / "run")
    store.root.mkdir()
    console = Console(Events(store.root / EVENTS_FILE))
    run = Run(settings(machine), store, OneWorker(machine.device, machine.log), console)  # type: ignore[arg-type]
    with console.run():
        console.event("origin", **origin())
        finished = run_in(run)
    assert finished is not None
    return finished.rows


def means(rows: Sequence[ScoreRow]) -> dict[str, float]:
    """R-Precision of each model in percent, the mean over the tasks."""
    models = dict.fromkeys(row["model"] for row in rows)
    of = {model: [row["r_precision"] for row in rows if row["model"] == model] for model in models}
    return {model: 100 * sum(values) / len(values) for model, values in of.items()}


def demo(machine: Machine) -> Found:
    """Every mean within half a point of a CPU's."""
    found, allowed = means(run_demo(machine)), machine.sized(POINTS, TINY_POINTS)
    tables = read_json(SCORES)[machine.sized("full", "tiny")]
    apart = {
        model: min((value - table["means"][model] for table in tables if model in table["means"]), key=abs)
        for model, value in found.items()
        if any(model in table["means"] for table in tables)
    }
    missing = sorted({model for table in tables for model in table["means"]} - found.keys())
    wrong = [f"no scores of {', '.join(missing)}"] * bool(missing)
    wrong += [
        f"{model} has {found[model]:.1f}, {points:+.1f} from a CPU's, {allowed} allowed"
        for model, points in apart.items()
        if not abs(points) <= allowed
    ]
    farthest = max(apart.values(), key=abs)
    text = "means " + ", ".join(f"{model} {value:.1f}" for model, value in found.items())
    return Found(text, (Figure("farthest from a CPU's", farthest, "points"),), "; ".join(wrong))
