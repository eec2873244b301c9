"""SIGKILL at any step: what is resumed ends with the same bytes. Forks of one process, for speed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.stages.modelling import ADAPTORS_FILE
from tests.stages import tiny
from tests.stages.packed import job_in

KS = (3, 4)
STEPS, CHECKPOINT_STEPS = 9, 3
SETTINGS: dict[str, Any] = {"epochs": 3, "checkpoint_steps": CHECKPOINT_STEPS}


def in_a_fork(folder: Path, out: str, kill_after: int | None) -> int:
    """Trains in a process of its own, which kills itself once so many steps are behind it; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    from grappa_dist.dist.comm import process_group
    from grappa_dist.dist.workers import RankContext
    from grappa_dist.stages.adapting import train_adaptors
    from tests.processes import free_address
    from tests.stages.tiny import CPU

    def report(status: dict[str, Any]) -> None:
        if status["done"] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    with process_group(0, 1, free_address()) as comm:
        train_adaptors(RankContext(comm, CPU, report, lambda: False), job_in(folder, out, KS, **SETTINGS))
    os._exit(0)


def kill_and_resume(folder: Path, seeds: Iterable[int]) -> None:
    """A straight run, then for every seed one that is killed at a random step, and goes on."""
    import torch

    from grappa_dist.dist.engine import _deepspeed
    from grappa_dist.stages import adapting  # noqa: F401 - imported once, for all forks

    torch.set_num_threads(1)  # no thread may run where a process forks
    _deepspeed(torch.device("cpu"))
    assert in_a_fork(folder, "straight", None) == 0
    for seed in seeds:
        step = random.Random(seed).randrange(1, STEPS)
        assert in_a_fork(folder, f"killed-{seed}", step) == -signal.SIGKILL, (seed, step)
        assert in_a_fork(folder, f"killed-{seed}", None) == 0, seed


def ends_with_the_same_bytes(folder: Path, seeds: Sequence[int]) -> None:
    tiny.write_shards(folder / "images")
    code = f"import pathlib, tests.stages.test_kills as t; t.kill_and_resume(pathlib.Path({str(folder)!r}), {seeds!r})"
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=550)
    assert found.returncode == 0, found.stderr[-3000:]
    for seed in seeds:
        assert weights(folder, f"killed-{seed}") == weights(folder, "straight"), seed


def weights(folder: Path, out: str) -> list[bytes]:
    sets = job_in(folder, out, KS, **SETTINGS).sets
    return [(one.artifact.path / ADAPTORS_FILE).read_bytes() for one in sets]


def test_a_job_killed_at_a_random_step_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ends_with_the_same_bytes(tmp_path, range(2))


@pytest.mark.long
def test_a_job_killed_at_a_random_step_ends_with_the_same_bytes_for_ten_seeds(tmp_path: Path) -> None:
    ends_with_the_same_bytes(tmp_path, range(2, 12))
