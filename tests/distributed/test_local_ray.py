"""A Ray of the run's own: who can reach it, what its workers import, and what follows when a part of it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from grappa_dist.config import Resources
from grappa_dist.distributed import local_ray
from grappa_dist.distributed.connection import import_path
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Job, Runner
from grappa_dist.distributed.worker import RankContext

ROOT = Path(__file__).resolve().parents[2]
RESOURCES = Resources(workers=2, num_cpus=2, gpus_per_worker=0, collective_timeout_s=60)
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
JOIN = "import ray, sys; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False); print(len(ray.nodes()))"
DRIVER = """
import sys, time
from grappa_dist.distributed.ray_cluster import Cluster
from tests.distributed.test_local_ray import RESOURCES
cluster = Cluster(RESOURCES)
cluster.workers()
print(cluster.local.folder, flush=True)
time.sleep(600)
"""
PATIENCE_S = 90.0


def listening(pid: int) -> set[str]:
    """Addresses at which a process and those below it listen."""
    found = set()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return found


def look(context: RankContext, pid: int) -> tuple[set[str], list[str], str]:
    """What rank 0 sees while the ranks are connected; all ranks wait for it."""
    context.comm.sum_(torch.ones(1))
    found = listening(pid) if context.comm.rank == 0 else set()
    context.comm.barrier()
    return found, sys.path, os.getcwd()


def wait_until(happened: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while not (seen := happened()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return seen


@pytest.fixture(scope="module")
def connected() -> Iterator[Cluster]:
    """To a Ray that has no workers of ours until `cluster` starts them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        patch.setenv("RAY_AUTH_MODE", "disabled")  # of some cluster: not of a local Ray
        cluster = Cluster(RESOURCES)
        try:
            cluster.connect()
            assert os.environ["RAY_AUTH_MODE"] == "disabled"
            yield cluster
        finally:
            cluster.close()


@pytest.fixture(scope="module")
def cluster(connected: Cluster) -> Cluster:
    connected.workers()
    return connected


@pytest.mark.slow
def test_it_starts_no_process_for_work_before_the_workers_are_started(connected: Cluster) -> None:
    lines = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    assert not [line for line in lines if line[:1] == ["ray::IDLE"] or "default_worker.py" in " ".join(line[:3])]


@pytest.mark.slow
def test_it_listens_on_the_loopback_alone_and_workers_import_as_this_process(cluster: Cluster) -> None:
    runner = Runner(cluster, RESOURCES)
    with runner.handle_signals():
        (found, path, folder), _ = runner.run_jobs([Job("look", look, os.getpid(), 2)])["look"]
    assert found
    assert found <= LOOPBACK
    there = list(dict.fromkeys(map(os.path.abspath, path)))
    assert there[: len(import_path())] == import_path()
    assert there[len(import_path()) :] == []
    assert folder == os.getcwd()


@pytest.mark.slow
def test_another_process_needs_the_token_and_other_users_cannot_read_it(cluster: Cluster) -> None:
    import ray

    assert cluster.local is not None
    folder, address = cluster.local.folder, ray.get_runtime_context().gcs_address
    token = folder / "token"
    assert [path.stat().st_mode & 0o777 for path in (folder, token)] == [0o700, 0o600]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # The second: else a driver looks for 127.0.0.1 at the machine's address, where nothing listens
    plain |= {"HOME": str(folder), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    tries = [{}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a guess"}]
    tries += [{"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}]
    others = [
        subprocess.Popen([sys.executable, "-c", JOIN, address], env=plain | given, stdout=-1, stderr=-1, text=True)
        for given in tries
    ]
    ended = [(*other.communicate(timeout=PATIENCE_S), other.returncode) for other in others]
    for _, errors, status in ended[:2]:
        assert status == 1
        assert "Authentication token is missing or incorrect" in errors
    assert ended[2][::2] == ("1\n", 0), ended[2]


def square_late(device: torch.device, task: tuple[int, str]) -> int:
    number, marker = task
    Path(f"{marker}-{number}").touch()
    while not Path(marker).exists():
        time.sleep(0.02)
    return number**2


@pytest.mark.long  # its tasks may end before their workers notice the death, and then none is reported
def test_after_the_death_of_a_part_ray_starts_again_and_the_work_is_done(cluster: Cluster, tmp_path: Path) -> None:
    """The last of this module that uses the cluster: afterwards it is another one."""
    assert cluster.local is not None
    folder, marker, logged = cluster.local.folder, tmp_path / "go", list[str]()
    cluster.log = logged.append
    runner, part = Runner(cluster, RESOURCES), None

    def kill(begun: int) -> None:
        nonlocal part
        if part is None and len(list(tmp_path.glob("go-*"))) == begun:
            below = psutil.Process().children(recursive=True)
            part = next(process for process in below if process.name() == "raylet")
            part.kill()
            marker.touch()

    poll = cluster.arrived
    cluster.arrived = lambda timeout_s=0.0: (kill(2), poll(timeout_s))[1]  # type: ignore[method-assign]
    with runner.handle_signals():
        assert runner.map(square_late, [(number, str(marker)) for number in range(3)]) == [0, 1, 4]
    assert logged[0] == "Ray's raylet on this machine has died; starting Ray again and going on from what is saved"
    assert cluster.local.folder != folder
    assert not folder.exists()


@pytest.mark.slow
def test_nothing_is_left_of_a_driver_that_is_killed(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="gr-") as short:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": short}
        driver = subprocess.Popen([sys.executable, "-c", DRIVER], env=environment, stdout=subprocess.PIPE, text=True)
        try:
            assert driver.stdout is not None
            folder = Path(driver.stdout.readline().strip())
            below = psutil.Process(driver.pid).children(recursive=True)
            driver.send_signal(signal.SIGKILL)
            wait_until(lambda: not folder.exists() and not any(map(lives, below)))
            assert folder.parent == Path(short)
            assert list(Path(short).iterdir()) == []
        finally:
            driver.kill()
            driver.wait()


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_its_folder_is_below_tmpdir_or_where_a_name_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = list[str]()
    with tempfile.TemporaryDirectory(prefix="gr-") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        folder, lock = local_ray._folder(logged.append)
        os.close(lock)
        assert (folder.parent, logged) == (Path(short), [])
        longest = len(str(folder)) + local_ray.BELOW_FOLDER
        long = tmp_path / ("x" * max(1, local_ray.LONGEST_SOCKET - longest + len(short)))
        long.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(long))
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        folder, lock = local_ray._folder(logged.append)
        os.close(lock)
        assert folder.parent == Path(short)
    assert logged[0].startswith(f"Ray's folder is {folder}: {long} has more than ")


def test_no_place_for_its_folder_is_a_wrong_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def refuse(parent: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(local_ray.leftovers, "make_folder", refuse)
    monkeypatch.setattr(local_ray.leftovers, "sweep", lambda parent: None)
    with pytest.raises(ValueError, match=f"^TMPDIR={tmp_path}: no place for Ray's folder"):
        local_ray._folder(lambda text: None)


class SlowRay:
    """Says what Ray does where its processes do not answer in time, some times; then it is refused."""

    def __init__(self, *errors: str) -> None:
        self.errors = list(errors)

    def init(self, **settings: object) -> None:
        raise RuntimeError(self.errors.pop(0))


@pytest.mark.parametrize("late", ["The current node timed out during startup. This could", "Deadline Exceeded"])
def test_a_ray_that_is_too_slow_to_start_is_started_once_more(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = list[str]()
    monkeypatch.setattr(local_ray, "_loopback", lambda ray: nullcontext())
    # Which a connection that another test has left would take for its own token's
    monkeypatch.setattr(local_ray, "read_authentication", lambda: None)
    with tempfile.TemporaryDirectory(prefix="gr-") as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        for errors in ((late, "no such setting"), (late, late), ("no such setting",)):
            ray = SlowRay(*errors)
            with pytest.raises(RuntimeError, match=f"^Ray did not start on this machine: {errors[-1]}"):
                local_ray.start(ray, 1, logged.append)
            assert ray.errors == []
            assert list(Path(short).glob("*/*/token")) == []  # each try has removed its folder
            assert [line.endswith("; trying once more") for line in logged] == [True] * (len(errors) - 1)
            logged.clear()
