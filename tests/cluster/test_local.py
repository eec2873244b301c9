"""cluster/local: several Ray nodes on this machine; needs no root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.runs import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
PROGRAM = str(ROOT / "cluster" / "local" / "cluster.py")
COUNT = "import ray, sys; ray.init(address='auto'); sys.exit(10 + sum(n['Alive'] for n in ray.nodes()))"


def _environment(folder: Path) -> dict[str, str]:
    """Its folders lie in one of ours, with a name short enough for sockets."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("RAY_")}, "TMPDIR": str(folder)}


def _children(marked: Path) -> list[int]:
    """Processes that were started with this TMPDIR."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if f"TMPDIR={marked}".encode() in variables:
                found.append(int(entry.name))
    return found


@pytest.fixture
def folder() -> Path:
    folder = Path(f"/tmp/gl{os.getpid()}")
    folder.mkdir()
    return folder


def test_run_keeps_the_commands_status_and_leaves_nothing(folder: Path) -> None:
    command = [sys.executable, PROGRAM, "run", "--nodes", "3", "--", sys.executable, "-c", COUNT]
    ended = subprocess.run(command, env=_environment(folder), text=True, capture_output=True)
    assert ended.returncode == 13, ended.stdout + ended.stderr
    assert _children(folder) == []
    folder.rmdir()  # empty


def test_start_and_stop_and_a_stop_that_kills_no_other_process(folder: Path) -> None:
    environment = _environment(folder)
    start = [sys.executable, PROGRAM, "start", "--nodes", "1"]
    started = subprocess.run(start, env=environment, text=True, capture_output=True)
    assert started.returncode == 0, started.stderr
    assert started.stdout.startswith("export RAY_ADDRESS=127.0.0.1:")
    again = subprocess.run(start, env=environment, text=True, capture_output=True)
    assert again.returncode == 2
    assert "see `stop`" in again.stderr
    stranger = subprocess.Popen(["sleep", "60"])
    (record,) = folder.glob("*/nodes.jsonl")
    with open(record, "a") as file:  # a pid that was used again since
        file.write(f'{{"pid": {stranger.pid}, "began": "1"}}\n')
    stopped = subprocess.run([sys.executable, PROGRAM, "stop"], env=environment, text=True, capture_output=True)
    assert stopped.returncode == 0, stopped.stderr
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    assert _children(folder) == []
    folder.rmdir()


def test_a_terminated_run_ends_its_program_and_its_nodes(folder: Path) -> None:
    program = f"import pathlib, time; pathlib.Path('{folder}/up').touch(); time.sleep(600)"
    command = [sys.executable, PROGRAM, "run", "--nodes", "1", "--", sys.executable, "-c", program]
    process = subprocess.Popen(command, env=_environment(folder))
    end = time.monotonic() + 120
    while not (folder / "up").exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert _children(folder) == []
    (folder / "up").unlink()
    folder.rmdir()
