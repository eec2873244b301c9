from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.processes import DRIVER, GCS, OTHER, RAYLET, STOPPED, WORKER, Look, Use, Watched, role_of, watch

MIB = 2**20


@pytest.mark.parametrize(
    ("command", "role"),
    [
        ("/venv/ray/core/src/ray/raylet/raylet\0--raylet_socket_name=/tmp/r", RAYLET),
        ("/venv/ray/core/src/ray/gcs/gcs_server\0--log_dir=/tmp/raylet", GCS),
        ("ray::Worker.run", WORKER),
        ("python\0-u\0/venv/ray/dashboard/agent.py\0--raylet-name=x", OTHER),
        ("", OTHER),
    ],
)
def test_a_process_is_told_by_its_program(command: str, role: str) -> None:
    assert role_of(command) == role


def test_memory_and_cpu_of_a_command_and_of_what_it_starts_are_seen(tmp_path: Path) -> None:
    child = "import time; held = bytearray(48 * 2**20); end = time.process_time() + 0.5\nwhile time.process_time() < end: pass\ntime.sleep(4)"  # noqa: E501
    code = (
        f"import subprocess, sys, time; held = bytearray(96 * 2**20); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    found = watch([sys.executable, "-c", code], tmp_path / "output.txt", os.environ)
    use = found.use()
    assert found.status == 0
    assert found.roles == {DRIVER, OTHER}
    assert 96 * MIB <= use.own[DRIVER] < 144 * MIB
    assert 48 * MIB <= use.own[OTHER] < 96 * MIB
    assert use.cpu_s >= 0.4
    assert use.seconds >= 4


def test_a_command_that_takes_too_long_is_asked_to_end(tmp_path: Path) -> None:
    code = f"import signal, sys, time; signal.signal(15, lambda *_: sys.exit({STOPPED})); print('on', flush=True)"
    code += "; time.sleep(60)"
    assert watch([sys.executable, "-c", code], tmp_path / "output.txt", os.environ, 3).status == STOPPED
    assert (tmp_path / "output.txt").read_text() == "on\n"


def test_what_happens_between_two_looks_counts_to_the_window_of_their_middle() -> None:
    def look(cpu_s: float, own: int) -> Look:
        return Look(WORKER, own, 0, cpu_s, int(10 * cpu_s))

    looks = [(1.0, {7: look(1, 5)}), (3.0, {7: look(4, 9), 8: look(2, 3)}), (5.0, {7: look(5, 4)}), (6.0, {})]
    found = Watched(0, 0.0, looks)
    assert found.use() == Use(6.0, 7.0, {WORKER: 9}, 0, 70)
    assert found.use([(0, 1.5)]) == Use(1.5, 1.0, {WORKER: 5}, 0, 10)
    assert found.use([(1.5, 3.5)]) == Use(2.0, 5.0, {WORKER: 9}, 0, 50)
    assert found.use([(1.5, 3.5)]) + found.use([(3.5, 6)]) == Use(4.5, 6.0, {WORKER: 9}, 0, 60)
