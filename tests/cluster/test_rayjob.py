"""The RayJob of cluster/kubernetes as far as it runs without Kubernetes: its commands, volumes and submit line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import kuberay, manifests
from tests.cluster.machines import Bench
from tests.cluster.test_faults import write_config

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(600)]
SMALL = {"workers": 2, "gpus": 0, "cpus": 1, "memory": "2Gi", "shm": "256Mi", "interface": "eth0", "claim": "tests"}
SMALL |= {"object_store": 10**8}


def job_of(folder: Path, **settings: object) -> dict[str, Any]:
    """The manifest that a settings file gives."""
    if not manifests.kustomize():
        pytest.skip("neither kustomize nor kubectl is installed: the manifests are not rendered")
    copy = folder / "kubernetes"
    shutil.copytree(manifests.FOLDER, copy)
    file = copy / "settings" / "settings.env"
    lines = dict(line.split("=", 1) for line in file.read_text().splitlines() if line and line[0] != "#")
    file.write_text("\n".join(f"{name}={value}" for name, value in (lines | SMALL | settings).items()))
    (job,) = manifests.render(copy / "job")
    return job


@pytest.fixture
def claim(folder: Path) -> Path:
    """The folder behind the shared claim, with a config whose paths are those of the pods."""
    short = {"epochs": 3, "checkpoint_steps": 5}
    config = write_config(folder, adapt=short, fuse={**short, "variants": ("average",)}, resources={"adapt_ranks": 1})
    config.write_text(config.read_text().replace(str(folder), "/mnt/grappa"))
    return folder


def test_the_job_runs_on_its_pods_and_leaves_its_run_on_the_claim(
    bench: Bench, claim: Path, figure: Callable[[str, float], None], tmp_path: Path
) -> None:
    job = job_of(tmp_path, arguments="--config /mnt/grappa/tiny.yaml --out /mnt/grappa/run")
    status, output = kuberay.run_job(job, bench, {"tests": claim}, tmp_path)
    assert status == 0, output[-3000:]
    assert (claim / "run" / "report" / "report.html").exists()
    hosts = {
        json.loads(line)["host"]
        for path in claim.glob("run/adaptors/*/metrics.jsonl")
        for line in path.read_text().splitlines()
        if '"begins"' in line
    }
    assert hosts == {"n1", "n2"}  # a worker on each, none on the head


def test_a_job_that_fails_logs_why_and_is_marked_as_failed(bench: Bench, claim: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, arguments="--config /mnt/grappa/tiny.yaml --out /mnt/grappa/run resources.workers=5")
    status, output = kuberay.run_job(job, bench, {"tests": claim}, tmp_path)
    assert status != 0
    assert "error: 5 workers need 5 CPU, the Ray cluster has 2" in output
    assert "exit code 2" in output
