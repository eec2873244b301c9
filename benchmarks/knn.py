"""The k-NN graph against brute-force searches by faiss: the same rows, neighbours and threads.

Ours leaves out the row itself and decides ties by row id, the judges do neither. Each run is of all rows among
themselves. How many of the true neighbours a side found is counted on some of the rows.

Shapes: P rows, D dimensions, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faiss_baselines import brute_force_knn, flat_index_knn
from benchmarks.harness import Timing, in_turns
from grappa_dist.bench.arguments import check_least
from grappa_dist.bench.epoch import AT, EpochCost, measure_epoch
from grappa_dist.bench.knn_scaling import Judge, Scaling, measure_scaling, scaling_text
from grappa_dist.bench.rows import CLASSES, SUBCLASSES, TASKS, drawn_rows, read_rows
from grappa_dist.bench.table import aligned, aligned_header
from grappa_dist.data.progress import Tell
from grappa_dist.distributed.collectives import Comm
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Recall, listed_knn

EXACT, APPROXIMATE = "exact", "approximate"
JUDGES: dict[str, Judge] = {
    "faiss.knn": brute_force_knn,
    "faiss.IndexFlatIP": flat_index_knn,
}
_WARM_UP_ROWS = 2048
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
