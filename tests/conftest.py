from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.stores import Door, door_to, s3_server, upstream


@dataclass
class Bucket:
    """A bucket that the code under test sees through the door alone; tests fill it behind its back."""

    name: str
    door: Door
    client: Any

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=data)

    def upload(self, folder: Path, prefix: str = "") -> str:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(f"{prefix}{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{self.url}/{prefix}".rstrip("/")


@pytest.fixture(scope="session")
def s3_door() -> Iterator[tuple[Door, Any]]:
    for package in ("s3fs", "moto", "boto3", "flask"):
        pytest.importorskip(package, reason=f"{package} is not installed: nothing is read from s3:// here")
    import boto3

    settings = {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with s3_server() as port, door_to(upstream(port)) as door, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_S3"))]:
            patch.delenv(name)
        for name, value in {**settings, "AWS_ENDPOINT_URL": door.url}.items():
            patch.setenv(name, value)
        yield door, boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")


@pytest.fixture
def bucket(s3_door: tuple[Door, Any], request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """An empty bucket of its own; writing through the door is refused."""
    door, client = s3_door
    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**12}"
    client.create_bucket(Bucket=name)
    door.reset()
    door.refuse = lambda method, path: None if method in ("GET", "HEAD") else 403
    yield Bucket(name, door, client)
    writes = [r for r in door.requests if r.method not in ("GET", "HEAD")]
    door.reset()
    assert writes == [], "a bucket of images may be read-only"
