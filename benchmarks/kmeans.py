"""k-means against faiss: the same rows, first centroids, iterations and threads, until every row has its label.

Ours gives exact labels, so the judges' final search for labels is in their time too. With `iterations` updates each
side looks at all rows `iterations` + 1 times. Ours stops when no centroid moves any more; the judges are then asked for
as many updates as ours made, and faiss may stop earlier still, when its objective does not change.

Shapes: P rows, K centroids, D dimensions.

`bench.py kmeans`: k-means against faiss.

What more workers gain, and what more rows cost a worker in memory: each in processes of its own.

Shapes: P rows, K centroids.

Findings as text for a terminal and as JSON.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faiss_baselines import SUPER_MIN_DIM, judges, nearest_labels, seed_by_faiss, set_threads, starting_rows
from benchmarks.harness import (
    CAN_WATCH_MEMORY,
    CLASSES,
    SHARD_ROWS,
    SUBCLASSES,
    TASKS,
    Timing,
    add_run,
    aligned,
    aligned_header,
    anonymous_bytes,
    check_least,
    drawn_rows,
    in_shards,
    machine,
    read_rows,
    run_workers,
    squared_error,
    timed,
    turns,
    watched_memory,
)
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import Rows, join_rows
from grappa_dist.kmeans.lloyd import KMeans, sharded_kmeans
from grappa_dist.kmeans.seeding import oversampled_centroids, seed_centroids
from grappa_dist.make_shards.building import Tell

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


_NONE = "-"
_MIB = 2**20


def as_text(header: dict[str, str], findings: KMeansFindings) -> str:
    blocks = [aligned_header({**header, "rows": f"{findings.source}, {findings.shape[1]} dimensions"})]
    blocks += [_comparison(comparison) for comparison in findings.comparisons]
    blocks += [_seedings(findings.seedings)] if findings.seedings else []
    ends = [_scaling(scaling) for scaling in findings.scalings]
    ends.append(_memory(findings.memory) if findings.memory else "memory: not measured, there is no /proc here")
    return "\n\n".join([*blocks, "\n".join(ends)])


def _comparison(found: Comparison) -> str:
    titles = ["seconds", "judge/ours", "CPU s", "CPU ratio", "updates", "objective", "ours worse by"]
    titles += ["decided exactly", "searched"]
    lines = [[f"K={found.num_labels}", *titles], _line(found, found.ours)]
    lines += [_line(found, judge) for judge in found.judges]
    flagged = [judge.name for judge in found.judges if abs(found.difference(judge)) > SAME_OBJECTIVE]
    notes = [f"!! objectives differ by more than {SAME_OBJECTIVE:.1%}: {', '.join(flagged)}"] if flagged else []
    return "\n".join([aligned(lines), *notes, verdict(found)])


def verdict(found: Comparison) -> str:
    ratio = found.ratio(found.fastest)
    return f"K={found.num_labels}: ours {ratio:.{1 if ratio >= 1 else 2}f}x the faster judge ({found.fastest.name})"


def _line(found: Comparison, side: Side) -> list[str]:
    own = side is found.ours
    return [
        side.name,
        f"{side.timing.seconds:.3f}",
        _NONE if own else f"{found.ratio(side):.2f}",
        f"{side.timing.cpu:.3f}",
        _NONE if own else f"{found.cpu_ratio(side):.2f}",
        str(side.iterations),
        f"{side.objective:.6g}",
        _NONE if own else f"{found.difference(side):+.4%}",
        _NONE if side.exact_share is None else f"{side.exact_share:.3%}",
        _NONE if side.searched_share is None else f"{side.searched_share:.1%}",
    ]


def _seedings(seedings: list[Seeding]) -> str:
    lines = [["first centroids", "", "seconds", "time/first", "objective"]]
    for found in seedings:
        first = next(iter(found.ways.values())).seconds
        lines += [
            [
                f"K={found.num_labels}",
                way,
                f"{drawn.seconds:.3f}",
                _ratio(drawn.seconds, first),
                f"{drawn.objective:.6g}",
            ]
            for way, drawn in found.ways.items()
        ]
    return aligned(lines)


def _ratio(above: float, below: float) -> str:
    return f"{above / below:.2f}" if below > 0 else _NONE


def _scaling(found: Scaling) -> str:
    return (
        f"K={found.num_labels}: {found.workers} workers {found.several.seconds:.3f} s, 1 worker "
        f"{found.one.seconds:.3f} s, a thread each: {found.speedup:.2f}x "
        f"({found.several.cpu:.3f} and {found.one.cpu:.3f} s of CPU)"
    )


def _memory(found: Memory) -> str:
    return (
        f"K={found.num_labels}: one worker grew by {found.growth / _MIB:.1f} MiB at {found.rows} mapped rows, by "
        f"{found.more_growth / _MIB:.1f} MiB at {MORE_ROWS} times as many: {found.per_row:.0f} bytes per further row"
    )


def as_json(header: dict[str, str], findings: KMeansFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "rows": {"source": findings.source, "rows": findings.shape[0], "dim": findings.shape[1]},
        "kmeans": [_comparison_json(found) for found in findings.comparisons],
        "seeding": [asdict(found) for found in findings.seedings],
        "scaling": [
            {
                "num_labels": found.num_labels,
                "workers": found.workers,
                "one_s": found.one.runs,
                "several_s": found.several.runs,
                "one_cpu_s": found.one.cpu_runs,
                "several_cpu_s": found.several.cpu_runs,
                "speedup": found.speedup,
            }
            for found in findings.scalings
        ],
        "memory": {**vars(findings.memory), "bytes_per_row": findings.memory.per_row} if findings.memory else None,
    }


def _comparison_json(found: Comparison) -> dict[str, Any]:
    return {
        "num_labels": found.num_labels,
        "exact_share": found.ours.exact_share,
        "searched_share": found.ours.searched_share,
        "sides": [_side_json(side) for side in (found.ours, *found.judges)],
        "ratio": {judge.name: found.ratio(judge) for judge in found.judges},
        "cpu_ratio": {judge.name: found.cpu_ratio(judge) for judge in found.judges},
        "objective_difference": {judge.name: found.difference(judge) for judge in found.judges},
        "faster_judge": found.fastest.name,
        "ratio_to_faster_judge": found.ratio(found.fastest),
    }


def _side_json(side: Side) -> dict[str, Any]:
    return {
        "name": side.name,
        "runs_s": side.timing.runs,
        "seconds": side.timing.seconds,
        "cpu_runs_s": side.timing.cpu_runs,
        "updates": side.iterations,
        "objective": side.objective,
    }


SHORT = "against faiss"
DESCRIPTION = """\
k-means of ours against faiss.Kmeans and faiss.SuperKmeans: the same rows, first centroids, updates and
threads, until every row has its label. Prints seconds, and ratios (judge / ours: above 1, ours is faster); then the
time of drawing first centroids, what more workers gain, and what a worker holds in memory. Progress goes to stderr."""
EXAMPLE = """example, a minute or two:
  python launch/bench.py kmeans --rows 20000 --num-labels 64 1024 --init both --repeats 2 --json kmeans.json

The machine should do nothing else: where `CPU s` is far below seconds x threads, a side was kept waiting, and only the
ratio of CPU seconds says something."""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, metavar="N", help=f"default: {DRAWN_ROWS} drawn ones, or all of --features")
    add("--dim", type=int, metavar="D", help=f"dimensions of drawn rows; default: {DRAWN_DIM}")
    add("--num-labels", type=int, nargs="+", default=[256, 4096, 16384], metavar="K", help="default: %(default)s")
    add("--iterations", type=int, default=10, metavar="N", help="updates of the centroids; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="of every side alike; default: %(default)s")
    add("--features", type=Path, metavar="DIR_OR_NPY", help="real rows: a .npy file, or a folder with any")
    add("--shard-rows", type=int, default=1000, metavar="N", help="of the shards that ours reads; default: %(default)s")
    add("--workers", type=int, default=2, metavar="N", help="against one, a thread each; 1: leave out; default: 2")
    add("--scaling-labels", type=int, nargs="+", metavar="K", help="for --workers; default: the middle --num-labels")
    add("--repeats", type=int, default=1, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--init", choices=("none", "ours", "both"), default="ours", help="whose first centroids to time; default: ours")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    asked["num_labels"] = tuple(asked["num_labels"])
    asked["scaling_labels"] = tuple(asked["scaling_labels"]) if asked["scaling_labels"] else None
    settings = KMeansSettings(**asked)
    header = machine(settings.threads)
    findings = measure_kmeans(settings, tell)
    return as_text(header, findings), as_json(header, findings)
