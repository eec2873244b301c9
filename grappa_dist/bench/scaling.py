"""What more workers gain, and what more rows cost a worker in memory: each in processes of its own.

Shapes: P rows, K centroids.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Timing, add_run, anonymous_bytes, turns, watched_memory
from grappa_dist.bench.processes import run_workers
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.rows import Rows
from grappa_dist.kmeans.lloyd import KMeans, sharded_kmeans

MORE_ROWS = 8
_MEMORY_ITERATIONS = 2
_SCALING_WARM_UP_ROWS = 512


@dataclass(frozen=True)
class Scaling:
    """The same clustering by one worker of one thread and by several."""

    num_labels: int
    workers: int
    one: Timing
    several: Timing

    @property
    def speedup(self) -> float:
        return self.one.seconds / self.several.seconds


@dataclass(frozen=True)
class Memory:
    """What one worker holds at most beyond what it held before it began, in bytes, rows in a mapped file."""

    num_labels: int
    rows: int
    growth: int
    more_rows: int
    more_growth: int

    @property
    def per_row(self) -> float:
        return (self.more_growth - self.growth) / (self.more_rows - self.rows)


def measure_scaling(file: Path, starts: np.ndarray, iterations: int, *, workers: int, repeats: int) -> Scaling:
    """Times `sharded_kmeans` from the rows at `starts`, (K,), on one worker and on several, a thread each."""
    found: dict[int, Timing] = {}
    for order in turns(["one", "several"], repeats):
        for side in order:
            size = 1 if side == "one" else workers
            ranks = run_workers(_clock, size, file, starts, iterations)
            slowest = Timing((max(wall for wall, _ in ranks),), (sum(cpu for _, cpu in ranks),))
            add_run(found, size, slowest)
    return Scaling(len(starts), workers, found[1], found[workers])


def measure_memory(file: Path, num_labels: int) -> Memory:
    """One worker, seeding included, on the rows once and as if there were eight times as many of them."""
    rows = len(np.load(file, mmap_mode="r"))
    less, more = (run_workers(_growth, 1, file, num_labels, times)[0] for times in (1, MORE_ROWS))
    return Memory(num_labels, rows, less, rows * MORE_ROWS, more)


def _clock(comm: Comm, file: Path, starts: np.ndarray, iterations: int) -> tuple[float, float]:
    """Wall and CPU seconds of this worker, libraries loaded and rows in the page cache."""
    mapped = np.load(file, mmap_mode="r")
    initial = mapped[np.sort(starts)].copy()
    own = mapped[comm.rank * len(mapped) // comm.size : (comm.rank + 1) * len(mapped) // comm.size]
    float(own.sum())  # reads every page, so that no side waits for the disk
    warm_up = Rows([own[:_SCALING_WARM_UP_ROWS]], [np.ones(len(own[:_SCALING_WARM_UP_ROWS]), dtype=bool)])
    sharded_kmeans(comm, warm_up, 2, KMeans(iterations=1))
    rows = Rows([own], [np.ones(len(own), dtype=bool)])
    comm.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    sharded_kmeans(comm, rows, len(initial), KMeans(iterations=iterations, initial=initial))
    return time.perf_counter() - wall, time.process_time() - cpu


def _growth(comm: Comm, file: Path, num_labels: int, times: int) -> int:
    mapped = np.load(file, mmap_mode="r")
    few = mapped[:_SCALING_WARM_UP_ROWS]
    sharded_kmeans(comm, Rows([few], [np.ones(len(few), dtype=bool)]), 2, KMeans(iterations=1))  # loads libraries
    good = np.ones(len(mapped), dtype=bool)
    rows = Rows([mapped] * times, [good] * times)  # the same file again: pages of it are not counted anyway
    before = anonymous_bytes()
    with watched_memory() as peak:
        sharded_kmeans(comm, rows, num_labels, KMeans(iterations=_MEMORY_ITERATIONS))
    return peak[0] - before
