"""The same program as a job on a running Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from grappa_dist.distributed.runner import STOP_GRACE_S
from tests.e2e import runs
from tests.processes import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
RAY = str(Path(sys.executable).with_name("ray"))


def _environment() -> dict[str, str]:
    """As after activating the environment: a job's `python` is looked up on the PATH that the head was started with."""
    path = f"{Path(RAY).parent}{os.pathsep}{os.environ['PATH']}"
    return {**{k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}, "RAY_AUTH_MODE": "disabled", "PATH": path}


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """A head node of our own, with its own ports and temp folder; ended by its process group, not by `ray stop`."""
    port, dashboard_port, client_port, agent_port = free_ports(4)
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


def _submit(dashboard: str, out: Path, *settings: str, options: tuple[str, ...] = ()) -> list[str]:
    program = ["python", "launch/full_pipeline.py", "--config", "configs/demo.yaml", "--out", str(out)]
    environment = ["--runtime-env", "cluster/runtime_env.yaml", "--working-dir", "."]
    return [
        RAY,
        "job",
        "submit",
        "--address",
        dashboard,
        *environment,
        *options,
        "--",
        *program,
        *runs.SMALL,
        *settings,
    ]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=runs.ROOT, env=_environment(), text=True, capture_output=True, timeout=runs.PATIENCE_S
    )


def _job(dashboard: str, name: str) -> dict[str, str]:
    """The cluster's record of a job."""
    return _asked(f"{dashboard}/api/jobs/{name}")


def _asked(url: str) -> dict[str, str]:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return dict(json.load(answer))


SMALLER = ("clustering.num_labels=[8]", "data.collection_kwargs={scale: 0.1}")


@pytest.fixture(scope="module")
def finished(dashboard: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On a head of two CPUs with a worker on each: the driver takes none, or there would be no place for both."""
    out = tmp_path_factory.mktemp("submitted") / "run"
    ended = _run(_submit(dashboard, out, *SMALLER, "adapt.epochs=1", "fuse.epochs=1", "resources.workers=2"))
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-2000:]
    assert "succeeded" in ended.stdout + ended.stderr
    return out


def test_the_pipeline_runs_as_a_submitted_job(finished: Path) -> None:
    assert json.loads((finished / "report" / "metrics.json").read_text())["rows"]


@pytest.mark.long
def test_exit_status_and_error_of_a_failing_job_are_in_its_message(dashboard: str, tmp_path: Path) -> None:
    ended = _run(_submit(dashboard, tmp_path / "run", "resources.workers=9", options=("--submission-id", "too-wide")))
    assert ended.returncode == 1
    job = _job(dashboard, "too-wide")
    assert job["status"] == "FAILED"
    assert "exit code 2" in job["message"]
    assert "error: 9 workers need 9 CPU, the Ray cluster has 2; lower resources.workers" in job["message"]
    assert "Traceback" not in job["message"]


@pytest.mark.long
def test_a_stopped_job_has_saved_its_state(dashboard: str, finished: Path, tmp_path: Path) -> None:
    out = runs.without_training(finished, tmp_path / "run")
    endless = ["adapt.epochs=10000", "adapt.checkpoint_steps=1000000"]  # no checkpoint but that of the stop
    options = ("--no-wait", "--submission-id", "stopped")
    started = _run(_submit(dashboard, out, *SMALLER, *endless, options=options))
    assert started.returncode == 0, started.stderr
    end = time.monotonic() + runs.PATIENCE_S
    while runs.last_step(out, "adaptors/k=8") < 3:
        job = _job(dashboard, "stopped")
        assert job["status"] in ("PENDING", "RUNNING"), job["message"]
        assert time.monotonic() < end
        time.sleep(0.2)
    assert list(out.glob("adaptors/*/checkpoints/*")) == []
    stopped = _run([RAY, "job", "stop", "--address", dashboard, "stopped"])
    assert stopped.returncode == 0, stopped.stderr
    assert _job(dashboard, "stopped")["status"] == "STOPPED"
    (saved,) = out.glob("adaptors/*/checkpoints/*")
    assert int(saved.stem.removeprefix("step-")) == runs.last_step(out, "adaptors/k=8") + 1
    assert "terminated; state is saved" in _asked(f"{dashboard}/api/jobs/stopped/logs")["logs"]


def test_what_is_sent_with_a_job_is_small_and_a_stop_leaves_time_to_save() -> None:
    settings = yaml.safe_load((runs.ROOT / "cluster" / "runtime_env.yaml").read_text())
    assert {"/.git", "/runs", "/shards"} <= set(settings["excludes"])
    assert float(settings["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > STOP_GRACE_S + 10
