"""cluster/slurm on a real Slurm of several machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.jobs import submit, write_config
from tests.cluster.slurm import Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_pipeline_on_two_nodes_succeeds_and_leaves_logs_and_nothing_else(cluster: Slurm, folder: Path) -> None:
    write_config(folder, resources={"adapt_ranks": 2})
    job = submit(cluster, folder)
    assert job.ends() == ("COMPLETED", 0), job.everything()
    assert json.loads((job.run / "report" / "metrics.json").read_text())["rows"]
    assert cluster.left_behind([1, 2, 3]) == {}
    logs = job.run / "slurm" / f"{job.number}.0"
    assert {path.name for path in logs.iterdir()} == {"head.log", "workers.log", "n1", "n2"}
    assert all(any(path.rglob("raylet*")) for path in logs.iterdir() if path.is_dir())
