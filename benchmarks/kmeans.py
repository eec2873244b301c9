"""k-means against faiss: the same rows, first centroids, iterations and threads, until every row has its label.

Ours gives exact labels, so the baselines' time includes their final search for labels. With `iterations` updates each
side reads all rows `iterations` + 1 times. Ours stops when no centroid moves any more; the baselines then run as many
updates as ours did, and faiss may stop earlier still, when its objective does not change.

Also measured: seeding, and, in separate processes, the speedup of several workers, the memory of one worker as rows
grow, and time and memory of workers that hold a slice of the centroids each.

Shapes: P rows, K centroids, D dimensions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faiss_baselines import (
    SUPER_MIN_DIM,
    kmeans_baselines,
    nearest_labels,
    seed_by_faiss,
    set_threads,
    starting_rows,
)
from benchmarks.harness import (
    CAN_WATCH_MEMORY,
    MIB,
    SHARD_ROWS,
    Log,
    Timing,
    add_run,
    aligned,
    aligned_header,
    anonymous_bytes,
    check_least,
    in_shards,
    machine,
    over_ranks,
    rows_to_measure,
    run_workers,
    squared_error,
    timed,
    turns,
    watched_memory,
)
from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm, Grid
from grappa_dist.distributed.sharded_rows import BLOCK_ROWS, GridRows, Rows, join_rows
from grappa_dist.kmeans.lloyd import KMeansTask, run_fit, sharded_kmeans, start_fit, start_sliced_fit
from grappa_dist.kmeans.seeding import oversampled_places, rows_at, seed_places

OURS = "ours"
ONE, SEVERAL = "one worker", "several workers"
DRAWN_ROWS, DRAWN_DIM = 133_339, 384  # like the unlabelled images of four real tasks, by a small ViT
SAME_OBJECTIVE = 1e-3  # sides whose objectives differ by a larger share did not do the same work
MORE_ROWS = 8  # times the rows, for the memory of a worker
_MEMORY_ITERATIONS = 2
_SAME_START = 1e-3  # faiss adds up in float32
_WARM_UP_ROWS, _WORKER_WARM_UP_ROWS = 1024, 512
_NONE = "-"


@dataclass(frozen=True)
class KMeansSettings:
    """Options of `bench.py kmeans`."""

    rows: int | None = None
    dim: int | None = None
    num_labels: tuple[int, ...] = (256, 4096, 16384)
    iterations: int = 10
    threads: int = 2
    features: Path | None = None
    workers: int = 2
    scaling_labels: tuple[int, ...] | None = None  # default: the middle one of num_labels
    repeats: int = 1
    shard_rows: int = SHARD_ROWS  # ours takes the rows in shards, as in a run
    centroid_shards: tuple[int, ...] = ()  # slices of the centroids, each number on all workers
    init: str = OURS  # whose seeding is timed: none, ours, both
    seed: int = 0

    def check(self) -> None:
        check_least(self, rows=2, dim=SUPER_MIN_DIM)
        check_least(self, iterations=1, threads=1, workers=1, shard_rows=1, repeats=1, seed=0)
        if self.features is not None and self.dim is not None:
            raise ValueError("--dim is that of the rows of --features; give one of the two")
        if wrong := [n for n in self.centroid_shards if n < 1 or self.workers % n]:
            raise ValueError(f"--centroid-shards must divide the {self.workers} --workers, got {wrong[0]}")

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
    """Ours or one baseline at one K."""

    name: str
    timing: Timing
    iterations: int  # updates of the centroids
    objective: float  # sum of squared distances to the own centroids, in float64 for all sides alike
    start: float  # that of the initial centroids, as the side itself computes it
    exact_share: float | None = None  # of ours: assignments that needed exact scores
    searched_share: float | None = None  # of ours: distances that bounds did not spare


@dataclass(frozen=True)
class Comparison:
    """Ours and the baselines at one K."""

    num_labels: int
    ours: Side
    baselines: list[Side]

    def ratio(self, baseline: Side) -> float:
        return baseline.timing.seconds / self.ours.timing.seconds

    def cpu_ratio(self, baseline: Side) -> float:
        """The same in CPU seconds, which other work on the machine disturbs less."""
        return baseline.timing.cpu / self.ours.timing.cpu

    def difference(self, baseline: Side) -> float:
        """By what share the objective of ours lies above (worse) or below (better) the baseline's."""
        return self.ours.objective / baseline.objective - 1

    @property
    def fastest(self) -> Side:
        return min(self.baselines, key=lambda baseline: baseline.timing.seconds)


@dataclass(frozen=True)
class FirstCentroids:
    """One way of seeding: its seconds, and the sum of squared distances to the nearest of its centroids."""

    seconds: float
    objective: float


@dataclass(frozen=True)
class Seeding:
    """All ways of seeding at one K."""

    num_labels: int
    ways: dict[str, FirstCentroids]


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
class Sliced:
    """A clustering whose workers hold a slice of the centroids each."""

    num_labels: int
    workers: int
    slices: int  # 1: all centroids in each worker
    timing: Timing
    growth: int  # bytes by which the worker that grew most did


@dataclass(frozen=True)
class Memory:
    """Bytes by which one worker grew at most, with rows in a mapped file, at two numbers of rows."""

    num_labels: int
    rows: int
    growth: int
    more_rows: int
    more_growth: int

    @property
    def per_row(self) -> float:
        return (self.more_growth - self.growth) / (self.more_rows - self.rows)


@dataclass(frozen=True)
class KMeansFindings:
    """Results of `bench.py kmeans`."""

    source: str
    shape: tuple[int, int]
    comparisons: list[Comparison]
    seedings: list[Seeding]
    scalings: list[Scaling]
    sliced: list[Sliced]
    memory: Memory | None


def measure_kmeans(settings: KMeansSettings, log: Log) -> KMeansFindings:
    settings.check()
    torch.set_num_threads(settings.threads)  # before any work: threads that idle spin for a while
    set_threads(settings.threads)
    log("rows")
    drawn = settings.rows or DRAWN_ROWS, settings.dim or DRAWN_DIM
    rows, source = rows_to_measure(settings.features, settings.rows, drawn, settings.seed)
    if rows.shape[1] < SUPER_MIN_DIM:
        raise ValueError(f"--features: rows have {rows.shape[1]} dimensions, expected at least {SUPER_MIN_DIM}")
    settings.check_labels(len(rows))
    comparisons = [_compare(rows, num, settings, log) for num in settings.num_labels]
    seedings = [_seed(rows, num, settings, log) for num in settings.num_labels if settings.init != "none"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, rows)
        scalings = []
        for num in settings.to_scale():
            log(f"K={num}: 1 and {settings.workers} workers of one thread")
            scalings.append(_scale(file, starting_rows(len(rows), num, settings.seed), settings))
        sliced = [one for num in settings.to_scale() for one in _slice(file, num, settings, log)]
        log("memory of one worker")
        memory = _memory(file, min(settings.num_labels)) if CAN_WATCH_MEMORY else None
    return KMeansFindings(source, (rows.shape[0], rows.shape[1]), comparisons, seedings, scalings, sliced, memory)


def _compare(rows: np.ndarray, num_labels: int, settings: KMeansSettings, log: Log) -> Comparison:
    initial = rows[starting_rows(len(rows), num_labels, settings.seed)]
    _warm_up(rows, settings.seed)
    found: dict[str, Side] = {}
    updates = settings.iterations
    for repeat, order in enumerate(turns([OURS, *kmeans_baselines()], settings.repeats)):
        for name in order:
            log(f"K={num_labels}, run {repeat + 1} of {settings.repeats}: {name}")
            side = _run_side(name, rows, initial, (updates, settings.seed, settings.shard_rows))
            updates = min(updates, side.iterations) if name == OURS else updates
            found[name] = replace(side, timing=found[name].timing + side.timing) if name in found else side
    ours = found.pop(OURS)
    for side in found.values():
        if abs(side.start / ours.start - 1) > _SAME_START:  # this faiss draws other rows than starting_rows gives
            raise RuntimeError(f"{side.name} began at an objective of {side.start:.6g}, ours at {ours.start:.6g}")
    return Comparison(num_labels, ours, list(found.values()))


def _run_side(name: str, rows: np.ndarray, initial: np.ndarray, counts: tuple[int, int, int]) -> Side:
    """One run; `counts` = (iterations, seed, rows of a shard)."""
    iterations, seed, shard_rows = counts
    if name == OURS:
        config = ClusteringConfig(iterations=max(1, iterations))  # without any update, ours stops by itself
        shards, task = in_shards(rows, shard_rows), KMeansTask(config, initial=initial)
        ours, timing = timed(lambda: sharded_kmeans(Comm(), shards, len(initial), task))
        objective = squared_error(rows, ours.centroids, np.concatenate(ours.labels))
        shares = ours.exact_share, ours.searched_share
        return Side(name, timing, len(ours.inertia) - 1, objective, ours.inertia[0], *shares)
    baseline = kmeans_baselines()[name]
    found, timing = timed(lambda: baseline(rows, initial, iterations, seed))
    objective = squared_error(rows, found.centroids, found.labels)
    return Side(name, timing, len(found.objectives), objective, found.objectives[0])


def _warm_up(rows: np.ndarray, seed: int) -> None:
    """Loads libraries and starts threads before any clock runs."""
    few = rows[:_WARM_UP_ROWS]
    for name in [OURS, *kmeans_baselines()]:
        _run_side(name, few, few[starting_rows(len(few), 1, seed)], (1, seed, len(few)))


def _seed(rows: np.ndarray, num_labels: int, settings: KMeansSettings, log: Log) -> Seeding:
    sharded = join_rows(Comm(), in_shards(rows, settings.shard_rows), device=torch.device("cpu"))
    ways: dict[str, Callable[[], np.ndarray]] = {
        "k-means++": lambda: rows_at(sharded, seed_places(sharded, num_labels, settings.seed)).numpy(),
        "k-means||": lambda: rows_at(sharded, oversampled_places(sharded, num_labels, settings.seed)).numpy(),
    }
    if settings.init == "both":
        ways["k-means++ of faiss"] = lambda: seed_by_faiss(rows, num_labels, settings.seed)
    found = {}
    for name, seed in ways.items():
        log(f"K={num_labels}: {name}")
        centroids, timing = timed(seed)
        objective = squared_error(rows, centroids, nearest_labels(rows, centroids))
        found[name] = FirstCentroids(timing.seconds, objective)
    return Seeding(num_labels, found)


def _scale(file: Path, starts: np.ndarray, settings: KMeansSettings) -> Scaling:
    """Times `sharded_kmeans` from the rows at `starts`, (K,), on one worker and on several, a thread each."""
    sizes = {ONE: 1, SEVERAL: settings.workers}
    found: dict[str, Timing] = {}
    for order in turns(list(sizes), settings.repeats):
        for name in order:
            ranks = run_workers(_time_kmeans, sizes[name], file, starts, settings.iterations)
            add_run(found, name, over_ranks(ranks))
    return Scaling(len(starts), settings.workers, found[ONE], found[SEVERAL])


def _time_kmeans(comm: Comm, file: Path, starts: np.ndarray, iterations: int) -> Timing:
    """One run on this worker, libraries loaded and rows in the page cache."""
    mapped = np.load(file, mmap_mode="r")
    initial = mapped[np.sort(starts)].copy()
    own = mapped[comm.rank * len(mapped) // comm.size : (comm.rank + 1) * len(mapped) // comm.size]
    float(own.sum())  # reads every page, so that no side waits for the disk
    _warm_up_worker(comm, own)
    rows, how = _all_good([own]), KMeansTask(ClusteringConfig(iterations=iterations), initial=initial)
    comm.barrier()
    return timed(lambda: sharded_kmeans(comm, rows, len(initial), how))[1]


def _slice(file: Path, num_labels: int, settings: KMeansSettings, log: Log) -> list[Sliced]:
    """Time and memory of all workers by the number of slices, from the first rows as centroids."""
    found: dict[int, list[list[tuple[Timing, int]]]] = {}
    for order in turns([str(n) for n in settings.centroid_shards], settings.repeats):
        for slices in map(int, order):
            log(f"K={num_labels}: {settings.workers} workers, {slices} slices of the centroids")
            ranks = run_workers(_run_sliced, settings.workers, file, (num_labels, slices, settings.iterations))
            found.setdefault(slices, []).append(ranks)
    sides = []
    for slices, runs in found.items():
        timing = sum((over_ranks([rank[0] for rank in ranks]) for ranks in runs), Timing((), ()))
        growth = max(rank[1] for ranks in runs for rank in ranks)
        sides.append(Sliced(num_labels, settings.workers, slices, timing, growth))
    return sides


def _run_sliced(comm: Comm, file: Path, counts: tuple[int, int, int]) -> tuple[Timing, int]:
    """One run; `counts` = (K, slices, iterations)."""
    num_labels, slices, iterations = counts
    mapped = np.load(file, mmap_mode="r")
    edges = [len(mapped) * rank // comm.size for rank in range(comm.size + 1)]
    parts = [mapped[edges[rank] : edges[rank + 1]] for rank in range(comm.size)]
    float(sum(part.sum() for part in parts))  # reads every page
    _warm_up_worker(comm, parts[comm.rank])
    task = KMeansTask(ClusteringConfig(iterations=iterations), initial=mapped[:num_labels])

    def cluster() -> None:
        own = join_rows(comm, _all_good([parts[comm.rank]]), device=torch.device("cpu"))
        if slices == 1:
            run_fit(start_fit(own, num_labels, task))
            return
        first = comm.rank // slices * slices
        shared = GridRows.of(own, Grid.of(comm, slices), _all_good(parts[first : first + slices]))
        run_fit(start_sliced_fit(shared, num_labels, task))

    before = anonymous_bytes() if CAN_WATCH_MEMORY else 0
    comm.barrier()
    if not CAN_WATCH_MEMORY:
        return timed(cluster)[1], 0
    with watched_memory() as peak:
        timing = timed(cluster)[1]
    return timing, peak[0] - before


def _memory(file: Path, num_labels: int) -> Memory:
    """One worker, seeding included, on the rows once and as if there were eight times as many of them.

    Blocks are of even size, so fewer than BLOCK_ROWS rows each where these do not divide the number of rows. The rows
    are cut to whole blocks: else what grows with a block would count as if it grew with the rows.
    """
    rows = len(np.load(file, mmap_mode="r"))
    rows -= rows % BLOCK_ROWS if rows > BLOCK_ROWS else 0
    less, more = (run_workers(_growth, 1, file, num_labels, (rows, times))[0] for times in (1, MORE_ROWS))
    return Memory(num_labels, rows, less, rows * MORE_ROWS, more)


def _growth(comm: Comm, file: Path, num_labels: int, counts: tuple[int, int]) -> int:
    """Bytes; `counts` = (rows, how often each of them counts)."""
    num, times = counts
    mapped = np.load(file, mmap_mode="r")[:num]
    _warm_up_worker(comm, mapped)
    rows = _all_good([mapped] * times)  # the same file several times: its pages are not counted anyway
    before = anonymous_bytes()
    with watched_memory() as peak:
        sharded_kmeans(comm, rows, num_labels, KMeansTask(ClusteringConfig(iterations=_MEMORY_ITERATIONS)))
    return peak[0] - before


def _warm_up_worker(comm: Comm, rows: np.ndarray) -> None:
    """Loads libraries."""
    sharded_kmeans(comm, _all_good([rows[:_WORKER_WARM_UP_ROWS]]), 2, KMeansTask(ClusteringConfig(iterations=1)))


def _all_good(shards: list[np.ndarray]) -> Rows:
    return Rows(shards, [np.ones(len(shard), dtype=bool) for shard in shards])


def as_text(header: dict[str, str], findings: KMeansFindings) -> str:
    blocks = [aligned_header({**header, "rows": f"{findings.source}, {findings.shape[1]} dimensions"})]
    blocks += [_comparison_text(comparison) for comparison in findings.comparisons]
    blocks += [_seedings_text(findings.seedings)] if findings.seedings else []
    ends = [_scaling_text(scaling) for scaling in findings.scalings]
    ends += [_sliced_text(found, findings.sliced) for found in findings.sliced]
    ends.append(_memory_text(findings.memory) if findings.memory else "memory: not measured, there is no /proc here")
    return "\n\n".join([*blocks, "\n".join(ends)])


def _comparison_text(found: Comparison) -> str:
    titles = ["seconds", "baseline/ours", "CPU s", "CPU ratio", "updates", "objective", "ours worse by"]
    titles += ["decided exactly", "searched"]
    lines = [[f"K={found.num_labels}", *titles], _line(found, found.ours)]
    lines += [_line(found, side) for side in found.baselines]
    flagged = [side.name for side in found.baselines if abs(found.difference(side)) > SAME_OBJECTIVE]
    notes = [f"!! objectives differ by more than {SAME_OBJECTIVE:.1%}: {', '.join(flagged)}"] if flagged else []
    return "\n".join([aligned(lines), *notes, verdict(found)])


def verdict(found: Comparison) -> str:
    ratio = found.ratio(found.fastest)
    return f"K={found.num_labels}: ours {ratio:.{1 if ratio >= 1 else 2}f}x the faster baseline ({found.fastest.name})"


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


def _seedings_text(seedings: list[Seeding]) -> str:
    lines = [["first centroids", "", "seconds", "time/first", "objective"]]
    for found in seedings:
        first = next(iter(found.ways.values())).seconds
        for name, way in found.ways.items():
            ratio = f"{way.seconds / first:.2f}" if first > 0 else _NONE
            lines.append([f"K={found.num_labels}", name, f"{way.seconds:.3f}", ratio, f"{way.objective:.6g}"])
    return aligned(lines)


def _scaling_text(found: Scaling) -> str:
    return (
        f"K={found.num_labels}: {found.workers} workers {found.several.seconds:.3f} s, 1 worker "
        f"{found.one.seconds:.3f} s, a thread each: {found.speedup:.2f}x "
        f"({found.several.cpu:.3f} and {found.one.cpu:.3f} s of CPU)"
    )


def _sliced_text(found: Sliced, every: list[Sliced]) -> str:
    same = next(other for other in every if other.num_labels == found.num_labels)
    ratio = found.timing.seconds / same.timing.seconds
    return (
        f"K={found.num_labels}: {found.workers} workers, {found.slices} slices of the centroids: "
        f"{found.timing.seconds:.3f} s, {found.timing.cpu:.3f} s of CPU, {ratio:.2f}x the time of the first; a worker "
        f"grew by {found.growth / MIB:.1f} MiB at most"
    )


def _memory_text(found: Memory) -> str:
    return (
        f"K={found.num_labels}: one worker grew by {found.growth / MIB:.1f} MiB at {found.rows} mapped rows, by "
        f"{found.more_growth / MIB:.1f} MiB at {MORE_ROWS} times as many: {found.per_row:.0f} bytes per further row"
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
        "sliced": [asdict(found) for found in findings.sliced],
        "memory": {**vars(findings.memory), "bytes_per_row": findings.memory.per_row} if findings.memory else None,
    }


def _comparison_json(found: Comparison) -> dict[str, Any]:
    return {
        "num_labels": found.num_labels,
        "exact_share": found.ours.exact_share,
        "searched_share": found.ours.searched_share,
        "sides": [_side_json(side) for side in (found.ours, *found.baselines)],
        "ratio": {side.name: found.ratio(side) for side in found.baselines},
        "cpu_ratio": {side.name: found.cpu_ratio(side) for side in found.baselines},
        "objective_difference": {side.name: found.difference(side) for side in found.baselines},
        "faster_baseline": found.fastest.name,
        "ratio_to_faster_baseline": found.ratio(found.fastest),
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
threads, until every row has its label. Prints seconds, and ratios (baseline / ours: above 1, ours is faster); then the
time of seeding, the speedup of several workers, and the memory of one worker. Progress goes to stderr."""
EXAMPLE = """example, a minute or two:
  python launch/bench.py kmeans --rows 20000 --num-labels 64 1024 --init both --repeats 2 --json kmeans.json

The machine should do nothing else: where `CPU s` is far below seconds x threads, a side had to wait, and only the ratio
of CPU seconds is meaningful."""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, metavar="N", help=f"default: {DRAWN_ROWS} drawn ones, or all of --features")
    add("--dim", type=int, metavar="D", help=f"dimensions of drawn rows; default: {DRAWN_DIM}")
    add("--num-labels", type=int, nargs="+", default=[256, 4096, 16384], metavar="K", help="default: %(default)s")
    add("--iterations", type=int, default=10, metavar="N", help="updates of the centroids; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="of every side alike; default: %(default)s")
    add("--features", type=Path, metavar="DIR_OR_NPY", help="real rows: a .npy file, or a folder with any")
    add(
        "--shard-rows",
        type=int,
        default=SHARD_ROWS,
        metavar="N",
        help="of a shard of ours; default: %(default)s",
    )
    add("--workers", type=int, default=2, metavar="N", help="against one, a thread each; 1: leave out; default: 2")
    add("--scaling-labels", type=int, nargs="+", metavar="K", help="for --workers; default: the middle --num-labels")
    add(
        "--centroid-shards", type=int, nargs="+", default=[], metavar="N", help="slices of the centroids; default: none"
    )
    add("--repeats", type=int, default=1, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--init", choices=("none", "ours", "both"), default="ours", help="whose seeding to time; default: ours")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    options["num_labels"] = tuple(options["num_labels"])
    options["scaling_labels"] = tuple(options["scaling_labels"]) if options["scaling_labels"] else None
    options["centroid_shards"] = tuple(options["centroid_shards"])
    settings = KMeansSettings(**options)
    header = machine(settings.threads)
    findings = measure_kmeans(settings, log)
    return as_text(header, findings), as_json(header, findings)
