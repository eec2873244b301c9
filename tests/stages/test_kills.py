"""SIGKILL at any step: what is resumed ends with the same bytes. Forks of one process, for speed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.stages.modelling import ADAPTORS_FILE
from tests.stages.test_packs import job_in

SEEDS, KS = 10, (3, 4)
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


def kill_and_resume(folder: Path) -> None:
    """A straight run, then for every seed one that is killed twice, between and at checkpoints, and goes on."""
    import torch

    torch.set_num_threads(1)  # no thread may run where a process forks
    assert in_a_fork(folder, "straight", None) == 0
    for seed in range(SEEDS):
        kills = sorted(random.Random(seed).sample(range(1, STEPS), 2))
        for step in kills:
            assert in_a_fork(folder, f"killed-{seed}", step) == -signal.SIGKILL, (seed, step)
        assert in_a_fork(folder, f"killed-{seed}", None) == 0, seed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.stages import tiny

    folder = tmp_path_factory.mktemp("kills")
    tiny.write_shards(folder / "images")
    code = (
        f"from pathlib import Path; from tests.stages import test_kills as t; t.kill_and_resume(Path({str(folder)!r}))"
    )
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    return folder


def weights(folder: Path, out: str) -> list[bytes]:
    sets = job_in(folder, out, KS, **SETTINGS).sets
    return [(one.artifact.path / ADAPTORS_FILE).read_bytes() for one in sets]


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_job_killed_at_two_random_steps_ends_with_the_same_bytes(folder: Path, seed: int) -> None:
    assert weights(folder, f"killed-{seed}") == weights(folder, "straight")
