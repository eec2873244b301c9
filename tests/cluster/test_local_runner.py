"""How `cluster/local/cluster.py run` ends, with stand-ins for its nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.local.cluster import began
from tests.e2e.runs import ROOT

NODE = """
import os, signal, sys, threading
note = open(os.environ["NOTES"] + "/node", "a")
print(os.getpid(), file=note, flush=True)
print("node: head=127.0.0.1:1", flush=True)
print("node: alive=2", flush=True)
if "--until-eof" in sys.argv:
    os.read(0, 1)
else:
    threading.Event().wait(60)
"""
PROGRAM = """
import os, pathlib, time
pathlib.Path(os.environ["NOTES"], "program").write_text(str(os.getpid()))
time.sleep(60)
"""
RUN = """
import sys
from pathlib import Path
from cluster.local import cluster
cluster.NODE = Path(sys.argv.pop(1))
sys.exit(cluster.main())
"""


def wait_for(happened: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def _hears_hangups() -> None:
    """As from a terminal, also where the tests themselves run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run on two nodes whose program has begun."""
    (tmp_path / "node.py").write_text(NODE)
    command = [sys.executable, "-c", RUN, str(tmp_path / "node.py"), "run", "--nodes", "2", "--"]
    variables = {**os.environ, "NOTES": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    program = [*command, sys.executable, "-c", PROGRAM]
    process = subprocess.Popen(program, env=variables, preexec_fn=_hears_hangups)
    wait_for(lambda: pids(tmp_path / "program") and len(pids(tmp_path / "node")) == 2)
    yield process
    for pid in [*pids(tmp_path / "program"), *pids(tmp_path / "node")]:
        if began(pid):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_ends_program_and_nodes_as_sigterm_does(
    runner: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals
) -> None:
    runner.send_signal(number)
    assert runner.wait(timeout=20) == 143
    assert [pid for pid in [*pids(tmp_path / "program"), *pids(tmp_path / "node")] if began(pid)] == []
    assert list(tmp_path.glob("grappa-*")) == []


def test_nodes_end_when_their_runner_is_killed(runner: subprocess.Popen[bytes], tmp_path: Path) -> None:
    runner.kill()
    wait_for(lambda: not any(began(pid) for pid in pids(tmp_path / "node")))
    assert all(began(pid) for pid in pids(tmp_path / "program"))  # its Ray is gone; it is not ours to kill
