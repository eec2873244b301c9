"""SIGKILL at any step: what is resumed ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models.spec import ADAPTORS_FILE
from grappa_dist.stages.adapt_job import train_adaptors
from tests.processes import run_ranks
from tests.stages import tiny
from tests.stages.multi_set import job_in

KS = (3, 4)
STEPS, CHECKPOINT_STEPS = 9, 3
SETTINGS: dict[str, Any] = {"epochs": 3, "checkpoint_steps": CHECKPOINT_STEPS}


def train_until(comm: Comm, folder: Path, out: str, kill_after: int | None) -> None:
    """Trains in its own process, which kills itself after a number of steps."""

    def report(status: dict[str, Any]) -> None:
        if status["done"] == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    train_adaptors(RankContext(comm, tiny.CPU, report, lambda: False), job_in(folder, out, KS, **SETTINGS))


def ends_with_the_same_bytes(folder: Path, seeds: Sequence[int]) -> None:
    """A straight run, then for every seed one that is killed at a random step, and goes on."""
    tiny.write_shards(folder / "images")
    run_ranks(train_until, 1, folder, "straight", None)
    for seed in seeds:
        step = random.Random(seed).randrange(1, STEPS)
        with pytest.raises(RuntimeError, match="rank 0 of 1 died without an error message"):
            run_ranks(train_until, 1, folder, f"killed-{seed}", step)
        run_ranks(train_until, 1, folder, f"killed-{seed}", None)
        assert weights(folder, f"killed-{seed}") == weights(folder, "straight"), (seed, step)


def weights(folder: Path, out: str) -> list[bytes]:
    sets = job_in(folder, out, KS, **SETTINGS).sets
    return [(one.artifact.path / ADAPTORS_FILE).read_bytes() for one in sets]


def test_a_job_killed_at_a_random_step_ends_with_the_same_bytes(tmp_path: Path) -> None:
    ends_with_the_same_bytes(tmp_path, range(2))


@pytest.mark.long
def test_a_job_killed_at_a_random_step_ends_with_the_same_bytes_for_ten_seeds(tmp_path: Path) -> None:
    ends_with_the_same_bytes(tmp_path, range(2, 12))
