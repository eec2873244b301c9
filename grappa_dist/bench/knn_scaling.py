"""The exact k-NN graph by several workers of one thread, against one process with as many threads: ours, and faiss.

All of it is timed in fresh processes, with libraries loaded and rows in the page cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Timing, add_run, turns
from grappa_dist.bench.processes import run_workers
from grappa_dist.data.progress import Tell
from grappa_dist.distributed.collectives import Comm
from grappa_dist.knn.exact import sharded_knn

ALONE, SEVERAL = "1 worker", "workers of 1 thread"
Judge = Callable[[np.ndarray, int, int], np.ndarray]  # rows, neighbours with the row itself, threads
_WARM_UP_ROWS = 2048


@dataclass(frozen=True)
class Scaling:
    """What is measured."""

    neighbours: int
    workers: int
    repeats: int


def measure_scaling(rows: np.ndarray, how: Scaling, judges: Mapping[str, Judge], tell: Tell) -> dict[str, Timing]:
    """Ours by one worker with as many threads as there are workers, by these, and each judge with as many threads."""
    found: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, rows)
        for order in turns([ALONE, SEVERAL, *judges], how.repeats):
            for name in order:
                tell(f"ring: {name}")
                size, threads = (how.workers, 1) if name == SEVERAL else (1, how.workers)
                told = run_workers(_clock, size, file, how.neighbours, threads, judges.get(name))
                slowest = Timing((max(wall for wall, _ in told),), (sum(cpu for _, cpu in told),))
                add_run(found, name, slowest)
    return found


def _clock(comm: Comm, file: Path, k: int, threads: int, judge: Judge | None) -> tuple[float, float]:
    """Wall and CPU seconds of this worker."""
    torch.set_num_threads(threads)
    mapped = np.load(file, mmap_mode="c")
    first, after = (rank * len(mapped) // comm.size for rank in (comm.rank, comm.rank + 1))
    own, ids = mapped[first:after], np.arange(first, after)
    float(own.sum())

    def search(num: int) -> None:
        if judge is None:
            sharded_knn(comm, own[:num], ids[:num], k)
        else:
            judge(own[:num], k + 1, threads)

    search(_WARM_UP_ROWS)
    comm.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    search(len(own))
    return time.perf_counter() - wall, time.process_time() - cpu


def scaling_text(found: Mapping[str, Timing], k: int, workers: int) -> str:
    """How many times faster several workers are than each other side."""
    several = found[SEVERAL]
    lines = [f"exact, k={k}: {workers} {SEVERAL} {several.seconds:.3f} s ({several.cpu:.3f} s of CPU); against"]
    for name, other in found.items():
        if name != SEVERAL:
            ratio, cpu = other.seconds / several.seconds, other.cpu / several.cpu
            lines.append(
                f"  {name} of {workers} threads {other.seconds:.3f} s: {ratio:.2f}x ({other.cpu:.3f} s: {cpu:.2f}x)"
            )
    return "\n".join(lines)
