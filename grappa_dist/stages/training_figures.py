"""What is said in the report of how jobs trained, from the log that each of them has left."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

import numpy as np

from grappa_dist.artifacts import Artifact
from grappa_dist.observe import read_events

LOG_FILE = "metrics.jsonl"


def curve(artifact: Artifact) -> list[dict[str, float]]:
    """Steps with loss, accuracy, rates and, for fusions, the mean entropy of the attention over layers."""
    points = []
    for event in read_events(artifact.path / LOG_FILE):
        if event["name"] != "step":
            continue
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


def by_step(artifact: Artifact, figure: str) -> list[list[float]]:
    """The numbered values of a figure, a list for every step that has them."""
    steps = []
    for event in read_events(artifact.path / LOG_FILE):
        numbered = {int(k.rpartition(".")[2]): v for k, v in event.items() if re.fullmatch(rf"{figure}\.\d+", k)}
        steps += [[numbered[i] for i in sorted(numbered)]] if event["name"] == "step" and numbered else []
    return steps


def waiting_facts(trained: Iterable[Artifact]) -> dict[str, str]:
    """Which share of their time the jobs waited for data, in the mean of their steps."""
    said = []
    for artifact in trained:
        events = read_events(artifact.path / LOG_FILE)
        shares = [e["data_wait_share"] for e in events if e["name"] == "step" and "data_wait_share" in e]
        said += [f"{job_of(artifact)} {np.mean(shares):.1%}"] if shares else []
    return {"waiting for data": ", ".join(said)} if said else {}


def job_of(artifact: Artifact) -> str:
    """The name of the job that trained it: k=64, neighbours."""
    return artifact.kind.split("/")[1]
