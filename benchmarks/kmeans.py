"""k-means against faiss: the same rows, first centroids, iterations and threads, until every row has its label.

Ours gives exact labels, so the judges' final search for labels is in their time too. With `iterations` updates each
side looks at all rows `iterations` + 1 times. Ours stops when no centroid moves any more; the judges are then asked for
as many updates as ours made, and faiss may stop earlier still, when its objective does not change.

Shapes: P rows, K centroids, D dimensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.faiss_baselines import SUPER_MIN_DIM, judges, nearest_labels, seed_by_faiss, set_threads, starting_rows
from benchmarks.harness import CAN_WATCH_MEMORY, Timing, timed, turns
from grappa_dist.bench.arguments import check_least
from grappa_dist.bench.rows import (
    CLASSES,
    SHARD_ROWS,
    SUBCLASSES,
    TASKS,
    drawn_rows,
    in_shards,
    read_rows,
    squared_error,
)
from grappa_dist.bench.scaling import Memory, Scaling, measure_memory, measure_scaling
from grappa_dist.data.progress import Tell
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.oversampling import oversampled_centroids
from grappa_dist.distributed.sharded_rows import join_rows
from grappa_dist.kmeans.lloyd import KMeans, sharded_kmeans
from grappa_dist.kmeans.seeding import seed_centroids

OURS = "ours"
SAME_OBJECTIVE = 1e-3  # sides whose objectives differ by a larger share did not do the same work
_SAME_START = 1e-3  # faiss adds up in float32
_WARM_UP_ROWS = 1024
DRAWN_ROWS, DRAWN_DIM = 133_339, 384  # of the unlabelled images of four real tasks, by a small ViT


@dataclass(frozen=True)
class KMeansSettings:
    """What `bench.py kmeans` was asked for."""

    rows: int | None = None
    dim: int | None = None
    num_labels: tuple[int, ...] = (256, 4096, 16384)
    iterations: int = 10
    threads: int = 2
    features: Path | None = None
    workers: int = 2
    scaling_labels: tuple[int, ...] | None = None  # default: the middle one of num_labels
    repeats: int = 1
    shard_rows: int = SHARD_ROWS  # ours takes the rows in shards, as a run has them
    init: str = OURS  # of whom seeding is timed: none, ours, both
    seed: int = 0

    def check(self) -> None:
        check_least(self, rows=2, dim=SUPER_MIN_DIM)
        check_least(self, iterations=1, threads=1, workers=1, shard_rows=1, repeats=1, seed=0)
        if self.features is not None and self.dim is not None:
            raise ValueError("--dim is that of the rows of --features; give one of the two")

    def check_labels(self, num_rows: int) -> None:
        for name, nums in {"num-labels": self.num_labels, "scaling-labels": self.scaling_labels or ()}.items():
            for num in nums:
                if not 1 <= num < num_rows:
                    raise ValueError(f"--{name} must be from 1 to less than the number of rows, {num_rows}, got {num}")

    def to_scale(self) -> tuple[int, ...]:
        """The numbers of labels at which several workers are timed."""
        if self.workers == 1:
            return ()
        ranked = sorted(self.num_labels)
        return self.scaling_labels if self.scaling_labels is not None else (ranked[len(ranked) // 2],)


@dataclass(frozen=True)
class Side:
    """What ours or one judge did at one K."""

    name: str
    timing: Timing
    iterations: int  # updates of the centroids
    objective: float  # sum of squared distances to the own centroids, in float64 for all sides alike
    start: float  # that of the initial centroids, as the side itself says
    exact_share: float | None = None  # of ours: assignments that floats alone could not decide
    searched_share: float | None = None  # of ours: distances that bounds did not spare


@dataclass(frozen=True)
class Comparison:
    """Ours and the judges at one K."""

    num_labels: int
    ours: Side
    judges: list[Side]

    def ratio(self, judge: Side) -> float:
        return judge.timing.seconds / self.ours.timing.seconds

    def cpu_ratio(self, judge: Side) -> float:
        """The same in CPU seconds, which a busy machine disturbs less."""
        return judge.timing.cpu / self.ours.timing.cpu

    def difference(self, judge: Side) -> float:
        """By what share the objective of ours lies above (worse) or below (better) the judge's."""
        return self.ours.objective / judge.objective - 1

    @property
    def fastest(self) -> Side:
        return min(self.judges, key=lambda judge: judge.timing.seconds)


@dataclass(frozen=True)
class Drawn:
    """First centroids: seconds, and the sum of squared distances to the nearest of them."""

    seconds: float
    objective: float


@dataclass(frozen=True)
class Seeding:
    """First centroids at one K, drawn in several ways."""

    num_labels: int
    ways: dict[str, Drawn]


@dataclass(frozen=True)
class KMeansFindings:
    """All that was measured."""

    source: str
    shape: tuple[int, int]
    comparisons: list[Comparison]
    seedings: list[Seeding]
    scalings: list[Scaling]
    memory: Memory | None


def measure_kmeans(settings: KMeansSettings, tell: Tell) -> KMeansFindings:
    settings.check()
    torch.set_num_threads(settings.threads)  # before any work: threads that idle spin for a while
    set_threads(settings.threads)
    tell("rows")
    rows, source = _rows(settings)
    settings.check_labels(len(rows))
    comparisons = [_compare(rows, num, settings, tell) for num in settings.num_labels]
    seedings = [_seed(rows, num, settings, tell) for num in settings.num_labels if settings.init != "none"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, rows)
        shape = (rows.shape[0], rows.shape[1])
        scalings = []
        for num in settings.to_scale():
            tell(f"K={num}: 1 and {settings.workers} workers of one thread")
            starts = starting_rows(len(rows), num, settings.seed)
            scalings.append(
                measure_scaling(file, starts, settings.iterations, workers=settings.workers, repeats=settings.repeats)
            )
        tell("memory of one worker")
        memory = measure_memory(file, min(settings.num_labels)) if CAN_WATCH_MEMORY else None
    return KMeansFindings(source, shape, comparisons, seedings, scalings, memory)


def _rows(settings: KMeansSettings) -> tuple[np.ndarray, str]:
    if settings.features is not None:
        rows, source = read_rows(settings.features, settings.rows)
        if rows.shape[1] < SUPER_MIN_DIM:
            raise ValueError(f"--features: rows have {rows.shape[1]} dimensions, expected at least {SUPER_MIN_DIM}")
        return rows, source
    num, dim = settings.rows or DRAWN_ROWS, settings.dim or DRAWN_DIM
    source = f"drawn: {num} rows, {TASKS} tasks > {CLASSES} classes > {SUBCLASSES} sub-classes, seed {settings.seed}"
    return drawn_rows(num, dim, settings.seed), source


def _compare(rows: np.ndarray, num_labels: int, settings: KMeansSettings, tell: Tell) -> Comparison:
    initial = rows[starting_rows(len(rows), num_labels, settings.seed)]
    _warm_up(rows, settings.seed)
    found: dict[str, Side] = {}
    updates = settings.iterations
    for repeat, order in enumerate(turns([OURS, *judges()], settings.repeats)):
        for name in order:
            tell(f"K={num_labels}, run {repeat + 1} of {settings.repeats}: {name}")
            side = _run(name, rows, initial, updates, settings.seed, settings.shard_rows)
            updates = min(updates, side.iterations) if name == OURS else updates
            found[name] = _joined(found.get(name), side)
    ours = found.pop(OURS)
    for side in found.values():
        if abs(side.start / ours.start - 1) > _SAME_START:  # this faiss draws other rows than starting_rows says
            raise RuntimeError(f"{side.name} began at an objective of {side.start:.6g}, ours at {ours.start:.6g}")
    return Comparison(num_labels, ours, list(found.values()))


def _joined(before: Side | None, side: Side) -> Side:
    if before is None:
        return side
    return replace(side, timing=before.timing.and_then(side.timing))


def _run(name: str, rows: np.ndarray, initial: np.ndarray, *counts: int) -> Side:
    iterations, seed, shard_rows = counts
    if name == OURS:
        shares = in_shards(rows, shard_rows)
        found, timing = timed(
            lambda: sharded_kmeans(Comm(), shares, len(initial), KMeans(iterations=iterations, initial=initial))
        )
        objective = squared_error(rows, found.centroids, np.concatenate(found.labels))
        shares_of = (found.exact_share, found.searched_share)
        return Side(name, timing, len(found.inertia) - 1, objective, found.inertia[0], *shares_of)
    judge = judges()[name]
    said, timing = timed(lambda: judge(rows, initial, iterations, seed))
    objective = squared_error(rows, said.centroids, said.labels)
    return Side(name, timing, len(said.objectives), objective, said.objectives[0])


def _warm_up(rows: np.ndarray, seed: int) -> None:
    """Loads libraries and starts threads before any clock runs."""
    few = rows[:_WARM_UP_ROWS]
    for name in [OURS, *judges()]:
        _run(name, few, few[starting_rows(len(few), 1, seed)], 1, seed, len(few))


def _seed(rows: np.ndarray, num_labels: int, settings: KMeansSettings, tell: Tell) -> Seeding:
    share = join_rows(Comm(), in_shards(rows, settings.shard_rows), device=torch.device("cpu"))
    ways: dict[str, Callable[[], np.ndarray]] = {
        "k-means++": lambda: seed_centroids(share, num_labels, settings.seed).numpy(),
        "k-means||": lambda: oversampled_centroids(share, num_labels, settings.seed).numpy(),
    }
    if settings.init == "both":
        ways["k-means++ of faiss"] = lambda: seed_by_faiss(rows, num_labels, settings.seed)
    found = {}
    for name, draw in ways.items():
        tell(f"K={num_labels}: {name}")
        centroids, timing = timed(draw)
        found[name] = Drawn(timing.seconds, squared_error(rows, centroids, nearest_labels(rows, centroids)))
    return Seeding(num_labels, found)
