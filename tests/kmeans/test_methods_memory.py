"""With eight times the rows the driver holds the same, and a rank its share of flags and labels and a block of rows."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import ClusteringConfig, Config, Resources
from grappa_dist.console import Console
from grappa_dist.data.index import Shard
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed import sharded_rows
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.ray_cluster import Cluster
from grappa_dist.distributed.runner import Job, Runner
from grappa_dist.distributed.sharded_rows import Rows
from grappa_dist.distributed.worker import RankContext
from grappa_dist.kmeans import sampling
from grappa_dist.kmeans.lloyd import KMeansTask, sharded_kmeans
from grappa_dist.kmeans.seeding import Init
from grappa_dist.stages.bad_rows import BAD_FILE, bad_rows
from grappa_dist.stages.embed import ROWS_FILE, feature_rows
from grappa_dist.stages.pseudo_label import STATS_FILE, labels_of, num_labels, pseudo_label
from grappa_dist.stages.run import Run
from tests.processes import run_ranks
from tests.stages import tiny

DIM, BLOCK_ROWS, RANKS = 64, 2048, 2
FEW, MANY = 30_000, 240_000
NUM_LABELS = (16, 32)
MORE = (MANY - FEW) // RANKS  # rows of a rank
SHARE = MORE * (1 + 4 + 8 + 8)  # a flag, a label, and while seeding a weight and a running sum
ROW_IN_BLOCK = DIM * (4 + 8 + 8)  # as it was read, on the grid and in exact numbers
BLOCK = BLOCK_ROWS * ROW_IN_BLOCK
DRIVER = 1_000_000  # less than the new rows' labels of both K; measured: 0.1 to 0.3 MB
SHARD_ROWS = 2000
M_MMAP_THRESHOLD = -3  # of malloc.h
RESOURCES = Resources(workers=RANKS, num_cpus=RANKS, gpus_per_worker=0, max_restarts=0, collective_timeout_s=60)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def write_rows(path: Path, num: int, seed: int = 0) -> None:
    """Unit rows in one file, written piece by piece."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(num, DIM))
    draws = np.random.default_rng(seed)
    for start in range(0, num, SHARD_ROWS):
        piece = draws.standard_normal((SHARD_ROWS, DIM), dtype=np.float32)
        rows[start : start + SHARD_ROWS] = piece / np.linalg.norm(piece, axis=1, keepdims=True)
    rows.flush()


def anonymous_bytes() -> int:
    """What this process holds itself; pages of mapped files are the kernel's to drop."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024


@dataclass
class Seen:
    """The bytes of this process at first and at most, and how often it was looked at."""

    first: int
    most: int
    looks: int = 0

    @property
    def rise(self) -> int:
        return self.most - self.first


@contextmanager
def watched() -> Iterator[Seen]:
    """What this process takes from now on, looked at every millisecond."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)  # an array is a map of its own: seen when taken, gone when dropped
    libc.malloc_trim(0)  # else pages that were free before could hide what is taken now
    held, over = anonymous_bytes(), threading.Event()
    seen = Seen(held, held)

    def look() -> None:
        while not over.wait(0.001):
            seen.most, seen.looks = max(seen.most, anonymous_bytes()), seen.looks + 1

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def peaks(comm: Comm, folder: Path, init: Init) -> dict[int, int]:
    """The bytes that this rank takes for k-means, seeding included, by number of rows."""
    found = {}
    sharded_rows.PIECE = sampling.PIECE = BLOCK_ROWS  # pieces that a rank of few rows fills too
    for num in (FEW, FEW, MANY):  # the first time also loads libraries
        mapped = np.load(folder / f"{num}.npy", mmap_mode="r")
        own = mapped[comm.rank * num // comm.size : (comm.rank + 1) * num // comm.size]
        with watched() as seen:
            rows = Rows([own], [np.ones(len(own), dtype=bool)])
            sharded_kmeans(comm, rows, 16, KMeansTask(ClusteringConfig(iterations=2), init=init), block_rows=BLOCK_ROWS)
        assert seen.looks > 20
        found[num] = seen.rise
    return found


@pytest.mark.slow
@pytest.mark.parametrize("init", get_args(Init))
def test_memory_of_k_means_grows_by_labels_and_not_by_rows(tmp_path: Path, init: Init) -> None:
    for num in (FEW, MANY):
        write_rows(tmp_path / f"{num}.npy", num)
    assert SHARE + BLOCK < MORE * DIM * 4 / 4  # the bound would not let the rows pass
    for rank in run_ranks(peaks, RANKS, tmp_path, init, timeout_s=400):
        assert rank[MANY] - rank[FEW] < SHARE + BLOCK


def embedded(folder: Path, num: int) -> tuple[ImageShards, list[Artifact]]:
    """Shards of which only the features exist; one row does not decode."""
    names = [f"{num}-{i:03d}" for i in range(num // SHARD_ROWS)]
    features = []
    for seed, name in enumerate(names):
        features.append(Store(folder).artifact(f"features/{name}", {}, {}))
        features[-1].path.mkdir(parents=True)  # no manifest: completeness is not checked here
        write_rows(features[-1].path / ROWS_FILE, SHARD_ROWS, seed)
        (features[-1].path / BAD_FILE).write_text(json.dumps({"7": "is cut"} if name == names[-1] else {}))
    return ImageShards(tuple(Shard(f"{name}.tar", "", SHARD_ROWS, 0, name) for name in names), ()), features


def taken_by_rank(function: Callable[[RankContext, Any], None], context: RankContext, spec: Any) -> int:
    with watched() as seen:
        function(context, spec)
    return seen.rise


@dataclass
class MeasuringRunner:
    """A runner that measures how many bytes each rank of its jobs takes."""

    runner: Runner
    taken: list[int] = field(default_factory=list)

    @property
    def num_workers(self) -> int:
        return self.runner.num_workers

    def run_jobs(self, jobs: Sequence[Job]) -> None:
        found = self.runner.run_jobs([replace(job, function=partial(taken_by_rank, job.function)) for job in jobs])
        self.taken = [taken for ranks in found.values() for taken in ranks]


def stage(
    config: Config, root: Path, runner: MeasuringRunner, images: ImageShards, features: list[Artifact]
) -> list[int]:
    """The bytes that the driver takes for pseudo_label, from finished features on, then those of its ranks."""
    store = Store(root)
    with watched() as seen:
        numbers = num_labels(config.clustering, len(images))
        labels = {
            k: labels_of(store, config.clustering, config.seed, k, features, num_rows=len(images)) for k in numbers
        }
        run = Run(config, store, runner, Console())  # type: ignore[arg-type]
        pseudo_label(run, labels, feature_rows(images, features), images, bad_rows(images, features))
    assert all((artifact.path / STATS_FILE).exists() for artifact in labels.values())
    assert seen.looks > 20
    return [seen.rise, *runner.taken]


def drive(comm: Comm, folder: Path) -> dict[int, list[int]]:
    """A driver in a process of its own, with workers of its own; bytes of the driver and of its ranks by rows."""
    os.environ.pop("RAY_ADDRESS", None)
    config = tiny.config(["none"], clustering={"num_labels": NUM_LABELS, "iterations": 1})
    inputs = {num: embedded(folder / str(num), num) for num in (FEW, MANY)}
    cluster = Cluster(RESOURCES)
    try:
        runner, found = MeasuringRunner(Runner(cluster, RESOURCES)), {}
        for number, num in enumerate(
            (MANY, FEW, MANY)
        ):  # the first loads libraries and allocates memory for small objects
            found[num] = stage(config, folder / f"run-{number}", runner, *inputs[num])
        return found
    finally:
        cluster.close()


@pytest.mark.long
def test_eight_times_the_rows_leave_the_driver_as_it_was_and_give_each_rank_its_share(tmp_path: Path) -> None:
    (taken,) = run_ranks(drive, 1, tmp_path, timeout_s=200)
    (driver, *ranks), (more_driver, *more_ranks) = taken[FEW], taken[MANY]
    assert len(ranks) == len(more_ranks) == RANKS
    assert more_driver - driver < DRIVER < (MANY - FEW) * 4 * len(NUM_LABELS)
    bound = SHARE + sharded_rows.BLOCK_ROWS * ROW_IN_BLOCK
    assert bound < MORE * DIM * 4  # it would not let the rows pass
    for before, after in zip(ranks, more_ranks, strict=True):
        assert after - before < bound
