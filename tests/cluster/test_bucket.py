"""Machines that share nothing but a bucket make of the demo what one machine makes, though each of them is lost."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from grappa_dist.config import load
from grappa_dist.lease import LEASE_S
from tests.cluster.machines import Bench, Machine
from tests.cluster.rays import environment, ray_on, start_worker_node
from tests.cluster.s3 import S3, s3_on
from tests.cluster.sameness import CLUSTERED, digests, graph, on_one_machine
from tests.e2e.runs import ROOT, SMALL

pytestmark = [pytest.mark.cluster, pytest.mark.long, pytest.mark.timeout(1800)]
OUT = "s3://runs/mine"
# Many steps after a checkpoint, so that a job that lost a machine there is not done by the time the loss is noticed
LONG = ("adapt.epochs=20", "adapt.checkpoint_steps=10", "fuse.epochs=6", "fuse.checkpoint_steps=1")
MADE = (*CLUSTERED, "adaptors/*/*.safetensors", "fusion/*/*.safetensors", "models/*/model.safetensors")
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


@dataclass
class Driver:
    """The pipeline's driver on a machine, and what the store is sent while it runs."""

    process: subprocess.Popen[str]
    log: Path
    store: Path  # its log
    begun: int  # length of that log before

    def wait_for_checkpoint(self, job: str, patience_s: float = 600.0) -> None:
        """Until the bucket has been sent a whole checkpoint of a job."""
        marker = re.compile(rf"PUT /runs/mine/{job}\S*/checkpoints/step-\d+/checksums\.json")
        end = time.monotonic() + patience_s
        while not marker.search(self.store.read_text()[self.begun :]):
            said = f"no checkpoint of {job}: {self.log.read_text()[-3000:]}"
            assert self.process.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.2)


@contextmanager
def driver_on(machine: Machine, address: str, config: Path, s3: S3) -> Iterator[Driver]:
    program = [sys.executable, str(ROOT / "launch" / "full_pipeline.py"), "--config", str(config), "--out", OUT]
    variables = environment(RAY_ADDRESS=address, TMPDIR="/tmp", **s3.variables)
    begun = len(s3.log.read_text())
    with open(config.with_suffix(".log"), "a") as log:
        process = machine.popen(program, env=variables, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield Driver(process, config.with_suffix(".log"), s3.log, begun)
    finally:
        for pid, line in machine.processes().items() if process.poll() is None else ():
            if OUT in line:
                machine.run("kill", "-9", str(pid))
        process.wait(timeout=60)


def test_machines_that_share_only_a_bucket_make_the_demo_though_each_of_them_is_lost(
    bench: Bench, storage: Path, folder: Path, figure: Callable[..., None]
) -> None:
    """The driver's machine is lost in adapt, then a worker's there, and the other one's in fuse. Each comes back empty,
    so fuse has two ranks all the time, and the bytes are those of two workers on one machine."""
    config = folder / "demo.yaml"
    config.write_text(load(ROOT / "configs" / "demo.yaml", (*SMALL, *LONG, "resources.placement_timeout_s=600")).yaml())
    straight = Path(tempfile.mkdtemp(prefix="straight-", dir=storage)) / "run"
    on_one_machine(config, straight)
    head, *workers, store = [bench[number] for number in range(4)]
    with s3_on(store, folder / "s3.log") as s3, ExitStack() as ended:
        (folder / "empty").mkdir()
        s3.upload(folder / "empty", "runs")
        variables = {"TMPDIR": "/tmp", **s3.variables}
        with ray_on(head, workers, **variables) as (address, nodes), driver_on(head, address, config, s3) as driver:
            driver.wait_for_checkpoint("adaptors/")
            head.crash()
            for node in nodes:
                node.close()  # by themselves their workers would train on until they miss the driver
            driver.process.wait(timeout=60)
        lost = time.monotonic()
        head.boot()
        with ray_on(head, workers, **variables) as (address, _):
            time.sleep(max(0.0, lost + LEASE_S + 5 - time.monotonic()))
            with driver_on(head, address, config, s3) as driver:
                for worker, job in zip(workers, ("adaptors/", "fusion/neighbours"), strict=True):
                    driver.wait_for_checkpoint(job)
                    worker.reboot()
                    assert driver.process.poll() is None, f"{job}: done before {worker.name} was lost in it"
                    ended.callback(start_worker_node(worker, address, **variables).end)
                assert driver.process.wait(timeout=900) == 0, driver.log.read_text()[-3000:]
        log = driver.log.read_text()
        assert re.search(r"k=\d+ failed and is tried again", log), log[-3000:]
        assert "neighbours failed and is tried again" in log, log[-3000:]
        figure("from the loss of the driver's machine to the end of the run, two more lost", time.monotonic() - lost)
        run = Path(tempfile.mkdtemp(prefix="bucket-", dir=storage))
        store.output(sys.executable, "-c", DOWNLOAD, str(run), "runs", env=environment(**s3.variables), timeout_s=300)
    assert digests(run, *MADE) == digests(straight, *MADE)
    assert graph(run) == graph(straight)
    assert (run / "report" / "report.html").is_file()
    assert (run / "model" / "model.safetensors").is_file()
    assert not [path for path in run.rglob("*.partial") if any(path.rglob("*"))]
