"""The k-NN graph against brute-force searches by faiss: the same rows, neighbours and threads.

Ours leaves out the row itself and decides ties by row id, the judges do neither. Each run is of all rows among
themselves. How many of the true neighbours a side found is counted on some of the rows.

Shapes: P rows, D dimensions, k neighbours.

`bench.py knn`: the k-NN graph against brute force.

What an epoch of fusion costs per image beside its graph: CPU seconds to embed an image, and of the step of a pair.

A step goes forward twice where a rank's pairs come in several micro-batches, and once where they are one.

The model is the fused ViT-S/16 at 224 pixels, of random weights. Decoding, projector and loss are left out of the step,
so the graph's share of an epoch comes out too large rather than too small.

The exact k-NN graph by several workers of one thread, against one process with as many threads: ours, and faiss.

All of it is timed in fresh processes, with libraries loaded and rows in the page cache.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faiss_baselines import brute_force_knn, flat_index_knn
from benchmarks.harness import (
    CLASSES,
    SUBCLASSES,
    TASKS,
    Timing,
    add_run,
    aligned,
    aligned_header,
    check_least,
    drawn_rows,
    in_turns,
    machine,
    read_rows,
    run_workers,
    turns,
)
from grappa_dist.distributed.collectives import Comm
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Recall, listed_knn
from grappa_dist.make_shards.building import Tell
from grappa_dist.models import Grappa
from grappa_dist.models.backbone import create_backbone

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


SETS, BOTTLENECK, MICRO_BATCH = 8, 64, 16
EMBED, STEP, WHOLE = "embed", "step", "whole"
AT = 10**6  # images that shares are told for


@dataclass(frozen=True)
class EpochCost:
    """CPU seconds, the least of the runs."""

    embed: float  # of an image
    step: float  # of a pair: both images forward, and forward and backward again
    whole: float  # of a pair whose rank has one micro-batch: both images forward and backward

    def shares(self, pairs_per_cpu_s: float, num: int = AT, *, accumulates: bool = True) -> tuple[float, float]:
        """Of an epoch of `num` images: search, and embedding and search together; by arithmetic."""
        search = num / 2 / pairs_per_cpu_s  # per image
        whole = (self.step if accumulates else self.whole) + self.embed + search
        return search / whole, (self.embed + search) / whole


def measure_epoch(repeats: int) -> EpochCost:
    backbone = create_backbone("timm:vit_small_patch16_224", {}, {}, pretrained=False)
    model = Grappa(backbone, SETS, BOTTLENECK, attention=True)
    model.trainable_attention()
    images = torch.rand(MICRO_BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def embed() -> None:
        with torch.inference_mode():
            model(images)

    def whole() -> None:
        model(images).square().sum().backward()

    def step() -> None:
        with torch.no_grad():
            model(images)
        whole()

    work: dict[str, Callable[[], None]] = {EMBED: embed, STEP: step, WHOLE: whole}
    best = dict.fromkeys(work, float("inf"))
    for order in turns(list(work), repeats + 1):  # the first is a warm-up, and never the fastest
        for name in order:
            before = time.process_time()
            work[name]()
            best[name] = min(best[name], time.process_time() - before)
    pairs = MICRO_BATCH / 2
    return EpochCost(best[EMBED] / MICRO_BATCH, best[STEP] / pairs, best[WHOLE] / pairs)


EXACT, APPROXIMATE = "exact", "approximate"
JUDGES: dict[str, Judge] = {
    "faiss.knn": brute_force_knn,
    "faiss.IndexFlatIP": flat_index_knn,
}
_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class KnnSettings:
    """What `bench.py knn` was asked for."""

    rows: int | None = None
    dim: int = 384
    neighbours: tuple[int, ...] = (10,)
    approximate: bool = False
    recall_floor: float = 0.95
    judges: tuple[str, ...] = tuple(JUDGES)
    threads: int = 2
    workers: int = 1
    epoch: bool = False
    features: Path | None = None
    repeats: int = 3
    seed: int = 0

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_least(self, rows=2, dim=1, threads=1, workers=1, repeats=1, seed=0)
        if min(self.neighbours) < 1:
            raise ValueError(f"--neighbours must be at least 1, got {min(self.neighbours)}")
        if not 0 <= self.recall_floor < 1:
            raise ValueError(f"--recall-floor must be from 0 to less than 1, got {self.recall_floor}")


@dataclass(frozen=True)
class Side:
    """How one side searched, so many times."""

    name: str
    timing: Timing
    found: float  # share of the true neighbours


@dataclass(frozen=True)
class Comparison:
    """All sides at one k."""

    neighbours: int
    sides: dict[str, Side]
    recall: Recall | None  # what the approximate graph says of itself

    def ratio(self, ours: str, judge: str) -> float:
        return self.sides[judge].timing.seconds / self.sides[ours].timing.seconds

    def cpu_ratio(self, ours: str, judge: str) -> float:
        """The same in CPU seconds, which a busy machine disturbs less."""
        return self.sides[judge].timing.cpu / self.sides[ours].timing.cpu


@dataclass(frozen=True)
class KnnFindings:
    """All that was measured."""

    source: str
    shape: tuple[int, int]
    settings: KnnSettings
    comparisons: list[Comparison]
    scaling: dict[str, Timing]  # of the exact search by one worker, by several, and of the judges; on as many cores
    epoch: EpochCost | None = None

    @property
    def pairs_per_cpu_s(self) -> float:
        """Pairs of rows that the exact search settles in a CPU second, each for both of its rows."""
        return self.shape[0] ** 2 / 2 / self.comparisons[0].sides[EXACT].timing.cpu


def measure_knn(settings: KnnSettings, tell: Tell) -> KnnFindings:
    settings.check()
    torch.set_num_threads(settings.threads)
    tell("rows")
    num = settings.rows or (200_000 if settings.approximate else 20_000)
    if settings.features is not None:
        rows, source = read_rows(settings.features, settings.rows)
    else:
        rows = drawn_rows(num, settings.dim, settings.seed)
        source = (
            f"drawn: {num} rows, {TASKS} tasks > {CLASSES} classes > {SUBCLASSES} sub-classes, seed {settings.seed}"
        )
    comparisons = [_compare(rows, k, settings, tell) for k in settings.neighbours]
    scaling = {}
    if settings.workers > 1:
        judges = {name: JUDGES[name] for name in settings.judges}
        how = Scaling(settings.neighbours[0], settings.workers, settings.repeats)
        scaling = measure_scaling(rows, how, judges, tell)
    epoch = None
    if settings.epoch:
        tell("an epoch beside it")
        epoch = measure_epoch(settings.repeats)
    return KnnFindings(source, (len(rows), rows.shape[1]), settings, comparisons, scaling, epoch)


def _compare(rows: np.ndarray, k: int, settings: KnnSettings, tell: Tell) -> Comparison:
    work = _Work(k, settings)
    sides: dict[str, Callable[[np.ndarray], np.ndarray]] = {EXACT: work.exact}
    sides |= {APPROXIMATE: work.approximate} if settings.approximate else {}
    sides |= {name: partial(work.judge, JUDGES[name]) for name in settings.judges}
    for run in sides.values():  # loads libraries, and lets them choose their ways
        run(rows[:_WARM_UP_ROWS])
    of_all = {name: partial(run, rows) for name, run in sides.items()}
    lists, runs = in_turns(of_all, settings.repeats, lambda text: tell(f"k={k}, {text}"))
    some = np.linspace(0, len(rows) - 1, min(len(rows), _COMPARED_ROWS)).astype(np.int64)
    true = lists[EXACT][some]
    found = {name: _found(lists[name][some], true, some) for name in sides}
    return Comparison(k, {name: Side(name, runs[name], found[name]) for name in sides}, work.recall)


class _Work:
    """Ours at one k."""

    def __init__(self, k: int, settings: KnnSettings) -> None:
        self._k, self._settings = k, settings
        self.recall: Recall | None = None

    def exact(self, rows: np.ndarray) -> np.ndarray:
        return sharded_knn(Comm(), rows, np.arange(len(rows)), self._k)[0]

    def approximate(self, rows: np.ndarray) -> np.ndarray:
        floor, key = self._settings.recall_floor, (self._settings.seed, 0)
        graph = listed_knn(Comm(), rows, np.arange(len(rows)), self._k, floor=floor, key=key)
        self.recall = graph.recall
        return graph.ids

    def judge(self, search: Judge, rows: np.ndarray) -> np.ndarray:
        return search(rows, self._k + 1, self._settings.threads)  # of which one is the row itself


def _found(ids: np.ndarray, true: np.ndarray, rows: np.ndarray) -> float:
    """The share of the true neighbours among those found, a row itself left out."""
    hits = sum(len(np.intersect1d(a[a != row], b[b >= 0])) for a, b, row in zip(ids, true, rows, strict=True))
    return hits / max(1, int((true >= 0).sum()))


def as_text(header: dict[str, str], findings: KnnFindings) -> str:
    blocks = [aligned_header({**header, "rows": f"{findings.source}, {findings.shape[1]} dimensions"})]
    blocks += [_table(found) for found in findings.comparisons]
    if findings.scaling:
        blocks.append(scaling_text(findings.scaling, findings.settings.neighbours[0], findings.settings.workers))
    if findings.epoch is not None:
        blocks.append(_epoch(findings.epoch, findings.pairs_per_cpu_s))
    return "\n\n".join(blocks)


def _table(found: Comparison) -> str:
    ours = [name for name in (EXACT, APPROXIMATE) if name in found.sides]
    titles = ["seconds", "CPU s", *(f"/ {name}{of}" for name in ours for of in ("", ", CPU")), "found"]
    lines = [[f"k={found.neighbours}", *titles]]
    for side in found.sides.values():
        ratios = [f"{r(name, side.name):.2f}" for name in ours for r in (found.ratio, found.cpu_ratio)]
        lines.append([side.name, f"{side.timing.seconds:.3f}", f"{side.timing.cpu:.3f}", *ratios, f"{side.found:.2%}"])
    told = found.recall
    notes = (
        []
        if told is None
        else [
            f"approximate: {told.probes} of {told.lists} lists, {told.searched_share:.2%} of all pairs, "
            f"measured recall {told.recall:.2%} on {told.recall_rows} rows, standard error {told.recall_error:.2%}, "
            f"widened {told.widened} times"
        ]
    )
    return "\n".join([aligned(lines), *notes])


def _epoch(cost: EpochCost, pairs_per_cpu_s: float) -> str:
    lines = [
        f"exact: {pairs_per_cpu_s:.3g} pairs a CPU second; fused ViT-S/16: {cost.embed:.3f} CPU s to embed an image, "
        f"the step of a pair {cost.step:.3f} in several micro-batches and {cost.whole:.3f} in one"
    ]
    for name, accumulates in (("several", True), ("one", False)):
        search, both = cost.shares(pairs_per_cpu_s, accumulates=accumulates)
        lines.append(
            f"so at {AT:.0e} images, {name}: search {search:.2%} of an epoch, embedding and search {both:.1%}; "
            f"reused features save {both - search:.1%}"
        )
    return "\n".join(lines)


def as_json(header: dict[str, str], findings: KnnFindings) -> dict[str, Any]:
    return {
        "machine": header,
        "rows": {"source": findings.source, "rows": findings.shape[0], "dim": findings.shape[1]},
        "knn": [
            {
                "neighbours": found.neighbours,
                "sides": [
                    {
                        "name": side.name,
                        "runs_s": side.timing.runs,
                        "cpu_runs_s": side.timing.cpu_runs,
                        "seconds": side.timing.seconds,
                        "found_share": side.found,
                        "ratio_to_exact": found.ratio(EXACT, side.name),
                        "cpu_ratio_to_exact": found.cpu_ratio(EXACT, side.name),
                    }
                    for side in found.sides.values()
                ],
                "recall": None if found.recall is None else vars(found.recall),
            }
            for found in findings.comparisons
        ],
        "pairs_per_cpu_s": findings.pairs_per_cpu_s,
        "epoch": None if findings.epoch is None else vars(findings.epoch),
        "scaling": {name: {"runs_s": t.runs, "cpu_runs_s": t.cpu_runs} for name, t in findings.scaling.items()},
    }


SHORT = "against brute force"
DESCRIPTION = """\
The exact k-NN graph against brute-force searches by faiss: the same rows, neighbours and threads, in turns.
With --approximate also the graph through lists, with the recall it measures of itself and the one found here. Prints
seconds, CPU seconds, and how many times as long as ours each side took (above 1, ours is faster)."""
EXAMPLE = """examples, a minute, and ten:
  python launch/bench.py knn --rows 20000 --neighbours 10 --workers 2
  python launch/bench.py knn --approximate --rows 200000 --judges faiss.knn --repeats 1 --json json"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, metavar="N", help="default: 20000, 200000 with --approximate, or all of --features")
    add("--dim", type=int, default=384, metavar="D", help="of drawn rows; default: %(default)s")
    add("--neighbours", type=int, nargs="+", default=[10], metavar="K", help="default: %(default)s")
    add("--approximate", action="store_true", help="also the graph through lists")
    add("--recall-floor", type=float, default=0.95, metavar="R", help="of it; default: %(default)s")
    add("--judges", nargs="+", choices=list(JUDGES), default=list(JUDGES))
    add("--threads", type=int, default=2, metavar="N", help="of every side alike; default: %(default)s")
    add("--workers", type=int, default=1, metavar="N", help="of a thread each, against one of N threads; default: 1")
    add("--epoch", action="store_true", help="also what an epoch of fusion costs beside the graph")
    add("--features", type=Path, metavar="DIR_OR_NPY", help="real rows: a .npy file, or a folder with any")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    asked["neighbours"], asked["judges"] = tuple(asked["neighbours"]), tuple(asked["judges"])
    settings = KnnSettings(**asked)
    header = machine(settings.threads)
    findings = measure_knn(settings, tell)
    return as_text(header, findings), as_json(header, findings)
