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
from grappa_dist.stages.multi_set_jobs import job_folder
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "then"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.long), pytest.param(1, 2, marks=pytest.mark.long)]
)
def test_a_killed_job_whose_newest_checkpoint_is_cut_ends_as_if_it_had_only_the_one_before(
    tmp_path: Path, ranks: int, then: int
) -> None:
    tiny.write_shards(tmp_path / "images")
    killed_after = {"without": CHECKPOINT_STEPS + 1, "cut": 2 * CHECKPOINT_STEPS + 1}
    for out, steps in killed_after.items():
        with pytest.raises(RuntimeError, match="died without an error message"):
            run_ranks(train_until, ranks, tmp_path, out, steps)
        newest = max(job_folder(job_in(tmp_path, out, KS, **SETTINGS).sets).glob("checkpoints/step-*"))
        assert int(newest.name.removeprefix("step-")) == steps - 1
        if out == "cut":
            for file in newest.glob("*.safetensors"):
                os.truncate(file, file.stat().st_size // 2)
        run_ranks(train_until, then, tmp_path, out, None)
    assert weights(tmp_path, "cut") == weights(tmp_path, "without")
    if ranks == then:  # sums over other ranks end with other bits
        run_ranks(train_until, then, tmp_path, "straight", None)
        assert weights(tmp_path, "cut") == weights(tmp_path, "straight")


@pytest.mark.long
def test_a_job_killed_at_a_random_step_ends_with_the_same_bytes_for_ten_seeds(tmp_path: Path) -> None:
    ends_with_the_same_bytes(tmp_path, range(2, 12))
