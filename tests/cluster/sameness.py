"""What two runs have alike, to the bit or nearly."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.cluster.rays import environment
from tests.e2e.runs import ROOT, metrics

CLUSTERED = ("features/backbone/*/rows.npy", "labels/*/rows-*.npy", "labels/*/centroids.npy")


def digests(run: Path, *patterns: str) -> dict[str, str]:
    """sha256 of every file of these names, which hold fingerprints of settings and inputs."""
    found = {}
    for pattern in patterns:
        paths = sorted(run.glob(pattern))
        assert paths, f"no {pattern} in {run}"
        found |= {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return found


def graph(run: Path) -> dict[str, str]:
    """The k-NN graph that the fusion begins with."""
    return digests(run, "fusion/neighbours-*/knn/epoch-0/*.npy")


def losses(run: Path, job: str) -> list[float]:
    """Of each step that counts, once."""
    return [float(str(event["loss"])) for event in metrics(run, job) if event["name"] == "step"]


def scores(run: Path) -> dict[tuple[str, str], float]:
    """R-Precision in percent, by model and task."""
    rows = json.loads((run / "report" / "metrics.json").read_text())["rows"]
    assert rows
    return {(row["model"], row["task"]): 100 * row["r_precision"] for row in rows}


def on_one_machine(config: Path, run: Path, *settings: str) -> None:
    """The pipeline on a separate Ray, outside of all namespaces."""
    program = [sys.executable, str(ROOT / "launch" / "full_pipeline.py"), "--config", str(config), "--out", str(run)]
    kept = {k: v for k, v in environment().items() if k in os.environ or k == "PYTHONPATH"}
    ended = subprocess.run([*program, *settings], env=kept, text=True, capture_output=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-3000:]
