"""The same program as a job on a running Ray cluster."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import runs

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))


def _environment() -> dict[str, str]:
    """As after activating the environment: a job's `python` is looked up on the PATH that the head was started with."""
    path = f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}"
    return {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "RAY_AUTH_MODE": "disabled", "PATH": path}


def _free_ports(count: int) -> list[int]:
    """Free ports below those that the system hands out by itself, so that no other part of Ray takes one meanwhile."""
    ports: list[int] = []
    for port in random.sample(range(20000, 30000), 200):
        with socket.socket() as probe:
            if len(ports) < count and probe.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports


@pytest.fixture
def dashboard() -> Iterator[str]:
    """A head node of our own, with its own ports and temp folder; ended by its process group, not by `ray stop`."""
    port, dashboard_port, client_port, agent_port = _free_ports(4)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        start = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--temp-dir={folder}", "--disable-usage-stats"]
        start += [f"--port={port}", f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"]
        start += [
            f"--dashboard-agent-listen-port={agent_port}"
        ]  # its default clashes with any other cluster of the machine
        environment = _environment()
        head = subprocess.Popen(
            start, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        address = f"http://127.0.0.1:{dashboard_port}"
        try:
            _wait_until_it_answers(f"{address}/api/version", head)
            _wait_until_it_answers(f"http://127.0.0.1:{agent_port}/api/healthz", head)
            yield address
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            try:
                head.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)


def _wait_until_it_answers(url: str, head: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except urllib.error.HTTPError:  # it answers
            return
        except OSError:
            assert head.poll() is None, "the head node ended"
            assert time.monotonic() < end, "the dashboard does not answer"
            time.sleep(0.5)


def test_the_pipeline_runs_as_a_submitted_job(dashboard: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["adapt.epochs=1", "fuse.epochs=1", "clustering.num_labels=[8]", "data.collection_kwargs={scale: 0.1}"]
    program = ["python", "launch/full_pipeline.py", "--config", "configs/demo.yaml", "--out", str(out)]
    environment = _environment()
    submit = [RAY, "job", "submit", "--address", dashboard, "--working-dir", "."]
    ended = subprocess.run(
        [*submit, "--", *program, *runs.SMALL, *settings],
        cwd=runs.ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=runs.PATIENCE_S,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    assert "succeeded" in ended.stdout + ended.stderr
    assert json.loads((out / "report" / "metrics.json").read_text())["rows"]
