"""Long jobs stay flat: no step and no graph leaves an object, an open file or a thread behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.worker import RankContext
from grappa_dist.stages.adapt_job import train_adaptors
from grappa_dist.stages.fuse import train_fusion
from tests.processes import run_ranks
from tests.stages import multi_set, test_fuse, tiny

pytestmark = pytest.mark.slow


@dataclass
class Flatness:
    """What a process holds at some steps of a job."""

    steps: Sequence[int]
    found: dict[int, dict[str, int]] = field(default_factory=dict)

    def report(self, status: dict[str, Any]) -> None:
        done = status.get("done")
        if done in self.steps and done not in self.found:
            gc.collect()
            self.found[done] = {
                "blocks": sys.getallocatedblocks(),  # of Python's allocator: every object and its parts
                "files": len(os.listdir("/proc/self/fd")),
                "threads": threading.active_count(),
            }

    def context(self, comm: Comm) -> RankContext:
        return RankContext(comm, tiny.CPU, self.report, lambda: False)


def adapt(comm: Comm, folder: Path, epochs: int) -> dict[int, dict[str, int]]:
    job = multi_set.job_in(folder, f"flat-{epochs}", (3,), epochs=epochs, checkpoint_steps=50)
    flat = Flatness(_thirds(epochs))
    train_adaptors(flat.context(comm), job)
    return flat.found


def fuse(comm: Comm, folder: Path, epochs: int) -> dict[int, dict[str, int]]:
    flat = Flatness(_thirds(epochs))
    train_fusion(flat.context(comm), test_fuse.job_in(folder, f"flat-{epochs}", "neighbours", epochs=epochs))
    return flat.found


def _thirds(epochs: int) -> list[int]:
    """Steps in the middle of epochs: warming up, one third later, and near the end."""
    return [tiny.STEPS_PER_EPOCH * epoch + 2 for epoch in (epochs // 3, 2 * epochs // 3, epochs - 1)]


def check(found: dict[int, dict[str, int]]) -> None:
    """Between the last two looks, neither blocks (but for pools of small objects), files nor threads grew."""
    _, (_, before), (_, after) = sorted(found.items())
    assert after["blocks"] - before["blocks"] < 600, found
    assert after["files"] <= before["files"] + 2, found
    assert after["threads"] <= before["threads"] + 1, found


def test_steps_of_an_adaptor_job_leave_nothing_behind(tmp_path: Path) -> None:
    tiny.write_shards(tmp_path / "images")
    for found in run_ranks(adapt, 1, tmp_path, 90):
        check(found)


def test_graphs_of_a_fusion_leave_nothing_behind(tmp_path: Path) -> None:
    tiny.write_shards(tmp_path / "images")
    test_fuse.job_in(tmp_path, "prepare", "transforms")
    for found in run_ranks(fuse, 1, tmp_path, 40):
        check(found)
