"""What is said in the report of how jobs trained, from the log that each of them has left."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grappa_dist.artifacts import Artifact
from grappa_dist.console import METRICS_FILE, read_events

Steps = Sequence[Mapping[str, Any]]


def steps_of(artifact: Artifact) -> Steps:
    """All that the job's log says of its steps."""
    return [event for event in read_events(artifact.path / METRICS_FILE) if event["name"] == "step"]


def curve(steps: Steps) -> list[dict[str, float]]:
    """Steps with loss, accuracy, rates and, for fusions, the mean entropy of the attention over layers."""
    points = []
    for event in steps:
        point = {k: v for k, v in event.items() if k in ("step", "loss", "accuracy", "lr", "images_per_s")}
        for figure in ("entropy", "decay_to_gradient"):
            layers = [v for k, v in event.items() if re.fullmatch(rf"{figure}\.\d+", k) and math.isfinite(v)]
            if layers:
                point[figure] = sum(layers) / len(layers)
        points.append(point)
    return points


def median(values: Sequence[float]) -> float:
    """Of those that are known; NaN where none is."""
    known = [v for v in values if math.isfinite(v)]
    return float(np.median(known)) if known else math.nan


def by_step(steps: Steps, figure: str) -> list[list[float]]:
    """The numbered values of a figure, a list for every step that has them."""
    found = []
    for event in steps:
        numbered = {int(k.rpartition(".")[2]): v for k, v in event.items() if re.fullmatch(rf"{figure}\.\d+", k)}
        found += [[numbered[i] for i in sorted(numbered)]] if numbered else []
    return found


def waiting_facts(logs: Mapping[str, Steps]) -> dict[str, str]:
    """Which share of their time the jobs waited for data, in the mean of their steps."""
    said = []
    for job, steps in logs.items():
        shares = [step["data_wait_share"] for step in steps if "data_wait_share" in step]
        said += [f"{job} {np.mean(shares):.1%}"] if shares else []
    return {"waiting for data": ", ".join(said)} if said else {}


def job_of(artifact: Artifact) -> str:
    """The name of the job that trained it: k=64, neighbours."""
    return artifact.kind.split("/")[1]
