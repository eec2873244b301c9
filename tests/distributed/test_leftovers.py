from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.distributed import leftovers

SLEEP = "import sys, time; print(flush=True); time.sleep(100)"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def sleeper(started: list[subprocess.Popen[bytes]], **settings: Any) -> subprocess.Popen[bytes]:
    """A process that has begun."""
    process = subprocess.Popen([sys.executable, "-c", SLEEP], stdout=subprocess.PIPE, **settings)
    started.append(process)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_folder_and_those_who_use_it_go_and_nobody_else(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    folder, lock = leftovers.make_folder(tmp_path)
    os.close(lock)
    token = {**os.environ, leftovers.TOKEN_VARIABLE: str(folder / leftovers.TOKEN)}
    with open(folder / "log", "w") as log:
        writing, named = sleeper(started, stderr=log), sleeper(started, env=token)
        other, spared = sleeper(started), sleeper(started, stderr=log)
    with open(folder / "log") as log:
        reading = sleeper(started, stdin=log)
    leftovers.remove(folder, sparing=[spared.pid])
    assert (writing.wait(10), named.wait(10)) == (-9, -9)
    assert (other.poll(), spared.poll(), reading.poll()) == (None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_only_folders_of_dead_runs_are_swept(tmp_path: Path) -> None:
    living, _ = leftovers.make_folder(tmp_path)
    dead, lock = leftovers.make_folder(tmp_path)
    os.close(lock)
    (dead / "r").mkdir()
    (dead / "r" / "log").touch()
    (tmp_path / "grappa-12345678").mkdir()  # of something else: it has no lock of a run
    (tmp_path / "grappa-linked00").symlink_to(dead)
    leftovers.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {living.name, "grappa-12345678", "grappa-linked00"}
    assert living.stat().st_mode & 0o777 == 0o700


def test_the_watcher_removes_the_folder_when_the_run_has_died(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    folder, lock = leftovers.make_folder(tmp_path)
    watcher = subprocess.Popen([sys.executable, "-I", "-S", leftovers.__file__, str(folder)])
    started.append(watcher)
    time.sleep(0.3)
    assert (watcher.poll(), folder.exists()) == (None, True)
    os.close(lock)  # as the death of this process would do
    assert (watcher.wait(30), folder.exists()) == (0, False)
