"""A real S3 protocol server on a machine in a namespace, and who has read from it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.machines import Machine
from tests.cluster.rays import environment

PORT = 9000  # each machine has its own
START_S = 120.0
SERVER = "import sys; from moto.server import main; main(sys.argv[1:])"
UPLOAD = """
import sys
from pathlib import Path
import boto3
folder, bucket = Path(sys.argv[1]), sys.argv[2]
client = boto3.client("s3")
client.create_bucket(Bucket=bucket)
for path in sorted(path for path in folder.rglob("*") if path.is_file()):
    client.put_object(Bucket=bucket, Key=path.relative_to(folder).as_posix(), Body=path.read_bytes())
"""


@dataclass
class S3:
    machine: Machine
    log: Path

    @property
    def variables(self) -> dict[str, str]:
        """What a program on any machine needs to read from it."""
        return {
            "AWS_ACCESS_KEY_ID": "test-key",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://{self.machine.address}:{PORT}",
        }

    def upload(self, folder: Path, bucket: str) -> None:
        """Makes a bucket of all files below a folder."""
        program = [sys.executable, "-c", UPLOAD, str(folder), bucket]
        self.machine.output(*program, env=environment(**self.variables), timeout_s=120)

    def ranges_sent(self) -> Counter[str]:
        """How many parts of tars each address was given."""
        plain = re.sub(r"\x1b\[\d+m", "", self.log.read_text())  # all but 200 is written in colours
        return Counter(re.findall(r'^(\S+) .*"GET \S+[.]tar\S* HTTP/[\d.]+".* 206 ', plain, re.M))


@contextmanager
def s3_on(machine: Machine, log: Path) -> Iterator[S3]:
    """The server, empty at first; requests are recorded in `log`."""
    for package in ("s3fs", "moto", "boto3", "flask"):
        pytest.importorskip(package, reason=f"{package} is not installed: there is no S3 here")
    with open(log, "w") as file:
        command = [sys.executable, "-c", SERVER, "-H", machine.address, "-p", str(PORT)]
        process = machine.popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + START_S
        while "Running on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, f"no S3 server on {machine.name} after {START_S:g} s"
            time.sleep(0.1)
        yield S3(machine, log)
    finally:
        process.terminate()
        process.wait(timeout=30)
