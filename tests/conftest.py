from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from grappa_dist.output import choose_mode
from tests.stores import StoreProxy, proxy_to, s3_server, upstream

THREADS = torch.get_num_threads()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole pipelines first: files go to processes in this order (Makefile), and these take longest."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.hookimpl(tryfirst=True)  # before fixtures, some of which are whole runs
def pytest_runtest_setup(item: pytest.Item) -> None:
    """SLOW_UNTIL, in seconds since 1970, bounds what slow tests take of a push on a slow machine."""
    until = float(os.environ.get("SLOW_UNTIL", "inf"))
    if item.get_closest_marker("slow") and time.time() > until:
        pytest.skip("slow, and the time for such tests is over on this machine (SLOW_UNTIL): make test-all")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """Heard here and by the programs that tests start, which a shell that runs the tests in the background prevents."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As a rank or a worker of one CPU has, and whatever the module before has set.

    Threads that wait for each other take several times as long over tensors this small, most of all on a busy machine.
    """
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def lines() -> None:
    """What a test shows of a run is its own choice, whatever the test before has chosen."""
    choose_mode()


@pytest.fixture(scope="module")
def two_threads(one_thread: None) -> None:
    """For modules on what computes side by side."""
    torch.set_num_threads(2)


@dataclass
class Bucket:
    """A bucket that the code under test sees through the proxy alone; tests fill it behind its back."""

    name: str
    proxy: StoreProxy
    client: Any
    writable: bool = False  # through the proxy

    def allow_writing(self) -> None:
        self.writable, self.proxy.refuse = True, lambda method, path: None

    def names(self) -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]

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
def s3_door() -> Iterator[tuple[StoreProxy, Any]]:
    for package in ("s3fs", "moto", "boto3", "flask"):
        pytest.importorskip(package, reason=f"{package} is not installed: nothing is read from s3:// here")
    import boto3

    settings = {
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",  # by botocore itself: it would wait for seconds
    }
    with s3_server() as port, proxy_to(upstream(port)) as proxy, pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_S3"))]:
            patch.delenv(name)
        for name, value in {**settings, "AWS_ENDPOINT_URL": proxy.url}.items():
            patch.setenv(name, value)
        yield proxy, boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")


@pytest.fixture
def bucket(s3_door: tuple[StoreProxy, Any], request: pytest.FixtureRequest) -> Iterator[Bucket]:
    """An empty bucket of its own; writing through the proxy is refused."""
    proxy, client = s3_door
    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**12}"
    client.create_bucket(Bucket=name)
    proxy.reset()
    proxy.refuse = lambda method, path: None if method in ("GET", "HEAD") else 403
    bucket = Bucket(name, proxy, client)
    yield bucket
    writes = [r for r in proxy.requests if r.method not in ("GET", "HEAD")]
    proxy.reset()
    assert bucket.writable or writes == [], "a bucket of images may be read-only"
