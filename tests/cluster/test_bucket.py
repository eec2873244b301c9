"""Machines that share nothing but a bucket make what one machine makes in a folder, also where each of them is lost."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.machines import Bench, Machine
from tests.cluster.rays import environment, ray_on
from tests.cluster.s3 import S3, s3_on
from tests.cluster.sameness import CLUSTERED, digests, graph, losses, on_one_machine
from tests.cluster.test_faults import write_config
from tests.e2e.runs import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]
SETS = (4, 6)
OUT = "s3://runs/mine"
WIPE = "rm -rf /tmp/grappa-runs-*"
DOWNLOAD = """
import sys
from pathlib import Path
import boto3
folder, bucket = Path(sys.argv[1]), sys.argv[2]
client = boto3.client("s3")
for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix="mine/"):
    for entry in page.get("Contents", []):
        path = folder / entry["Key"].removeprefix("mine/")
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(bucket, entry["Key"], str(path))
"""


@contextmanager
def driver_on(machine: Machine, address: str, config: Path, s3: S3) -> Iterator[subprocess.Popen[str]]:
    program = [sys.executable, str(ROOT / "launch" / "full_pipeline.py"), "--config", str(config), "--out", OUT]
    variables = environment(RAY_ADDRESS=address, TMPDIR="/tmp", **s3.variables)
    with open(config.with_suffix(".log"), "a") as log:
        process = machine.popen(program, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        for pid, line in machine.processes().items() if process.poll() is None else ():
            if OUT in line:
                machine.run("kill", "-9", str(pid))
        process.wait(timeout=60)


def wait_for_checkpoint(s3: S3, job: str, process: subprocess.Popen[str], log: Path, patience_s: float = 600.0) -> None:
    """Until the bucket has a whole checkpoint of a job."""
    marker = re.compile(rf"PUT /runs/mine/{job}\S*/checkpoints/step-\d+/checksums\.json")
    end = time.monotonic() + patience_s
    while not marker.search(s3.log.read_text()):
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


def test_machines_that_share_only_a_bucket_finish_a_run_though_each_of_them_is_lost(
    bench: Bench, storage: Path, folder: Path, figure: Callable[..., None]
) -> None:
    """A worker is lost in adapt, then the driver in fuse with all that lay on every machine."""
    fuse = {"epochs": 4, "checkpoint_steps": 5, "variants": ("average", "neighbours")}
    resources = {"elastic": True, "placement_timeout_s": 120, "adapt_ranks": 1}
    config = write_config(folder, resources=resources, clustering={"num_labels": SETS}, fuse=fuse)
    straight = Path(tempfile.mkdtemp(prefix="straight-", dir=storage)) / "run"
    on_one_machine(config, straight, "resources.num_cpus=1")
    head, *workers = [bench[number] for number in range(4)]
    log = config.with_suffix(".log")
    with s3_on(head, folder / "s3.log") as s3:
        (folder / "empty").mkdir()
        s3.upload(folder / "empty", "runs")
        with ray_on(head, workers, TMPDIR="/tmp", **s3.variables) as (address, _):
            try:
                with driver_on(head, address, config, s3) as process:
                    wait_for_checkpoint(s3, "adaptors/", process, log)
                    workers[2].crash()
                    wait_for_checkpoint(s3, "fusion/neighbours", process, log)
                lost = time.monotonic()
                for machine in (head, *workers[:2]):
                    machine.output("bash", "-c", WIPE)
                refused = 0
                while True:
                    with driver_on(head, address, config, s3) as process:
                        status = process.wait(timeout=900)
                    if status != 2 or "another run is writing to s3://runs/mine" not in log.read_text()[-3000:]:
                        break
                    refused += 1
                figure("a driver without its folder, refused by the lease of the one before", refused, "times")
                figure("from the loss of the driver to the end of the run", time.monotonic() - lost)
                assert status == 0, log.read_text()[-3000:]
            finally:
                workers[2].reboot()
        run = Path(tempfile.mkdtemp(prefix="bucket-", dir=storage))
        head.output(sys.executable, "-c", DOWNLOAD, str(run), "runs", env=environment(**s3.variables), timeout_s=300)
    made = (*CLUSTERED, "adaptors/*/*.safetensors")
    assert digests(run, *made) == digests(straight, *made)
    assert graph(run) == graph(straight)
    assert losses(run, "fusion/neighbours") == pytest.approx(losses(straight, "fusion/neighbours"), rel=1e-4)
    assert (run / "report" / "report.html").is_file()
    assert (run / "model" / "model.safetensors").is_file()
    assert not [path for path in run.rglob("*.partial") if any(path.rglob("*"))]
