"""Several machines give what one gives: the same bits where that is promised, and work is spread over them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.machines import Bench
from tests.cluster.rays import environment, pipeline_on, ray_on
from tests.cluster.test_faults import write_config
from tests.e2e.runs import ROOT, metrics

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(900)]


def digests(run: Path, pattern: str) -> dict[str, str]:
    found = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(run.glob(pattern))}
    assert found, f"no {pattern} in {run}"
    return found


def on_one_machine(config: Path, run: Path, *settings: str) -> None:
    program = [sys.executable, str(ROOT / "launch" / "full_pipeline.py"), "--config", str(config), "--out", str(run)]
    kept = {k: v for k, v in environment().items() if k in os.environ or k == "PYTHONPATH"}
    ended = subprocess.run([*program, *settings], env=kept, text=True, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]


def losses(run: Path, job: str) -> list[float]:
    return [float(str(event["loss"])) for event in metrics(run, job) if event["name"] == "step"]


def test_partitions_and_graph_of_three_machines_are_those_of_one_to_the_bit(
    bench: Bench, folder: Path, figure: Callable[[str, float], None]
) -> None:
    short = {"epochs": 4, "checkpoint_steps": 5}
    config = write_config(
        folder,
        clustering={"num_labels": (4, 6, 9)},
        adapt=short,
        fuse={**short, "variants": ("average", "neighbours")},
        resources={"adapt_ranks": 1},
    )
    head, *workers = [bench[number] for number in range(4)]
    three, one = folder / "three", folder / "one"
    with ray_on(head, workers) as (address, _), pipeline_on(head, address, config, three) as pipeline:
        figure("tiny pipeline on three machines", pipeline.wait_for(lambda: (three / "model").exists()))
        assert pipeline.ends() == 0
    begun = {k: next(e for e in metrics(three, f"adaptors/k={k}") if e["name"] == "begins") for k in (4, 6, 9)}
    assert {str(event["host"]) for event in begun.values()} == {"n1", "n2", "n3"}  # each set on a machine of its own

    # The same features and adaptor sets, all else made anew by one worker.
    one.mkdir()
    for part in ("features/backbone", "adaptors"):
        shutil.copytree(three / part, one / part)
    on_one_machine(config, one, "resources.num_cpus=1", "resources.workers=1")
    for pattern in ("labels/*/rows-*.npy", "labels/*/centroids.npy"):
        assert digests(one, pattern) == digests(three, pattern)
    graphs = [digests(run, "fusion/neighbours-*/knn/epoch-0/*.npy") for run in (one, three)]
    assert graphs[0] == graphs[1]
    assert losses(one, "fusion/neighbours") == pytest.approx(losses(three, "fusion/neighbours"), rel=1e-5)
    said = [json.loads((run / "report" / "metrics.json").read_text()) for run in (one, three)]
    assert said[0] == said[1] == {"rows": []}  # these images have no labels
