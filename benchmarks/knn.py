"""The k-NN graph against brute-force searches by faiss: the same rows, neighbours and threads.

Ours leaves out the row itself and breaks ties by row id, the baselines do neither. Each run searches the neighbours of
all rows. The share of true neighbours found is counted on a sample of the rows. Optional measurements:

- scaling: the exact graph by several workers of one thread, against one process with as many threads (ours and faiss),
  each in fresh processes with libraries loaded and rows in the page cache;
- epoch: the CPU seconds of an epoch of fusion beside its graph, per image to embed and per pair of a step, on a fused
  ViT-S/16 at 224 px with random weights. Decoding, projector and loss are left out, so the graph's share of an epoch is
  over- rather than underestimated.

Shapes: P rows, D dimensions, k neighbours.
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
    Log,
    Timing,
    add_run,
    aligned,
    aligned_header,
    check_least,
    in_turns,
    machine,
    over_ranks,
    rows_to_measure,
    run_workers,
    timed,
    turns,
)
from grappa_dist.distributed.collectives import Comm
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Recall, approximate_knn
from grappa_dist.models import Grappa
from grappa_dist.models.backbone import create_backbone

KnnBaseline = Callable[[np.ndarray, int, int], np.ndarray]
"""(rows (P, D), neighbours with the row itself k, threads) -> ids (P, k)."""

EXACT, APPROXIMATE = "exact", "approximate"
ALONE, SEVERAL = "1 worker", "workers of 1 thread"
BASELINES: dict[str, KnnBaseline] = {
    "faiss.knn": brute_force_knn,
    "faiss.IndexFlatIP": flat_index_knn,
}
EPOCH_IMAGES = 10**6  # for which shares of an epoch are given
_SETS, _BOTTLENECK, _MICRO_BATCH = 8, 64, 16  # of the fused ViT
_WARM_UP_ROWS = 2048
_COMPARED_ROWS = 4096  # on which the share of true neighbours is counted


@dataclass(frozen=True)
class KnnSettings:
    """Options of `bench.py knn`."""

    rows: int | None = None
    dim: int = 384
    neighbours: tuple[int, ...] = (10,)
    approximate: bool = False
    recall_floor: float = 0.95
    baselines: tuple[str, ...] = tuple(BASELINES)
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
    """Runs of one side at one k."""

    name: str
    timing: Timing
    found: float  # share of the true neighbours


@dataclass(frozen=True)
class Comparison:
    """All sides at one k."""

    neighbours: int
    sides: dict[str, Side]
    recall: Recall | None  # as the approximate graph measures it

    def ratio(self, ours: str, baseline: str) -> float:
        return self.sides[baseline].timing.seconds / self.sides[ours].timing.seconds

    def cpu_ratio(self, ours: str, baseline: str) -> float:
        """The same in CPU seconds, which other work on the machine disturbs less."""
        return self.sides[baseline].timing.cpu / self.sides[ours].timing.cpu


@dataclass(frozen=True)
class EpochCost:
    """CPU seconds, the least of the runs."""

    embed: float  # of an image
    step: float  # of a pair in one of several micro-batches: both images forward, then forward and backward
    whole: float  # of a pair in a rank's only micro-batch: both images forward and backward

    def shares(
        self, pairs_per_cpu_s: float, num: int = EPOCH_IMAGES, *, accumulates: bool = True
    ) -> tuple[float, float]:
        """Shares of an epoch of `num` images, by arithmetic: of the search, and of embedding and search together."""
        search = num / 2 / pairs_per_cpu_s  # per image
        whole = (self.step if accumulates else self.whole) + self.embed + search
        return search / whole, (self.embed + search) / whole


@dataclass(frozen=True)
class KnnFindings:
    """Results of `bench.py knn`."""

    source: str
    shape: tuple[int, int]
    settings: KnnSettings
    comparisons: list[Comparison]
    scaling: dict[str, Timing]  # of the exact search on as many cores: by one worker, by several, by the baselines
    epoch: EpochCost | None = None

    @property
    def pairs_per_cpu_s(self) -> float:
        """Pairs of rows that the exact search compares in a CPU second; a pair serves both of its rows."""
        return self.shape[0] ** 2 / 2 / self.comparisons[0].sides[EXACT].timing.cpu


def measure_knn(settings: KnnSettings, log: Log) -> KnnFindings:
    settings.check()
    torch.set_num_threads(settings.threads)
    log("rows")
    num = settings.rows or (200_000 if settings.approximate else 20_000)
    rows, source = rows_to_measure(settings.features, settings.rows, (num, settings.dim), settings.seed)
    comparisons = [_compare(rows, k, settings, log) for k in settings.neighbours]
    scaling = measure_scaling(rows, settings, log) if settings.workers > 1 else {}
    epoch = None
    if settings.epoch:
        log("an epoch of fusion")
        epoch = measure_epoch(settings.repeats)
    return KnnFindings(source, (len(rows), rows.shape[1]), settings, comparisons, scaling, epoch)


def _compare(rows: np.ndarray, k: int, settings: KnnSettings, log: Log) -> Comparison:
    recalls: list[Recall] = []

    def exact(x: np.ndarray) -> np.ndarray:
        return sharded_knn(Comm(), x, np.arange(len(x)), k)[0]

    def approximate(x: np.ndarray) -> np.ndarray:
        recall_floor, key = settings.recall_floor, (settings.seed, 0)
        graph = approximate_knn(Comm(), x, np.arange(len(x)), k, recall_floor=recall_floor, key=key)
        recalls.append(graph.recall)
        return graph.ids

    def baseline(search: KnnBaseline) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: search(x, k + 1, settings.threads)  # the row itself is one of k + 1

    sides: dict[str, Callable[[np.ndarray], np.ndarray]] = {EXACT: exact}
    sides |= {APPROXIMATE: approximate} if settings.approximate else {}
    for name in settings.baselines:
        sides[name] = baseline(BASELINES[name])
    for search in sides.values():  # loads libraries and runs their one-time trials
        search(rows[:_WARM_UP_ROWS])
    on_all_rows = {name: partial(search, rows) for name, search in sides.items()}
    ids, runs = in_turns(on_all_rows, settings.repeats, lambda line: log(f"k={k}, {line}"))
    sample = np.linspace(0, len(rows) - 1, min(len(rows), _COMPARED_ROWS)).astype(np.int64)
    true = ids[EXACT][sample]
    found = {name: _share_found(ids[name][sample], true, sample) for name in sides}
    recall = recalls[-1] if recalls else None
    return Comparison(k, {name: Side(name, runs[name], found[name]) for name in sides}, recall)


def _share_found(ids: np.ndarray, true: np.ndarray, rows: np.ndarray) -> float:
    """The share of the true neighbours among those found, a row itself left out."""
    hits = sum(len(np.intersect1d(a[a != row], b[b >= 0])) for a, b, row in zip(ids, true, rows, strict=True))
    return hits / max(1, int((true >= 0).sum()))


def measure_scaling(rows: np.ndarray, settings: KnnSettings, log: Log) -> dict[str, Timing]:
    """The exact graph by several workers of one thread, and by single processes with as many threads."""
    baselines = {name: BASELINES[name] for name in settings.baselines}
    found: dict[str, Timing] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.npy"
        np.save(file, rows)
        for order in turns([ALONE, SEVERAL, *baselines], settings.repeats):
            for name in order:
                log(f"scaling: {name}")
                size, threads = (settings.workers, 1) if name == SEVERAL else (1, settings.workers)
                args = file, settings.neighbours[0], threads, baselines.get(name)
                add_run(found, name, over_ranks(run_workers(_time_search, size, *args)))
    return found


def _time_search(comm: Comm, file: Path, k: int, threads: int, baseline: KnnBaseline | None) -> Timing:
    """One run on this worker."""
    torch.set_num_threads(threads)
    mapped = np.load(file, mmap_mode="c")
    first, after = (rank * len(mapped) // comm.size for rank in (comm.rank, comm.rank + 1))
    own, ids = mapped[first:after], np.arange(first, after)
    float(own.sum())  # reads every page, so that no side waits for the disk

    def search(num: int) -> None:
        if baseline is None:
            sharded_knn(comm, own[:num], ids[:num], k)
        else:
            baseline(own[:num], k + 1, threads)

    search(_WARM_UP_ROWS)
    comm.barrier()
    return timed(lambda: search(len(own)))[1]


def measure_epoch(repeats: int) -> EpochCost:
    backbone = create_backbone("timm:vit_small_patch16_224", {}, {}, pretrained=False)
    model = Grappa(backbone, _SETS, _BOTTLENECK, attention=True)
    model.trainable_attention()
    images = torch.rand(_MICRO_BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def embed() -> None:
        with torch.inference_mode():
            model(images)

    def whole() -> None:
        model(images).square().sum().backward()

    def step() -> None:
        with torch.no_grad():
            model(images)
        whole()

    work: dict[str, Callable[[], None]] = {"embed": embed, "step": step, "whole": whole}
    best = dict.fromkeys(work, float("inf"))
    for order in turns(list(work), repeats + 1):  # the first round is a warm-up, and never the fastest
        for name in order:
            before = time.process_time()
            work[name]()
            best[name] = min(best[name], time.process_time() - before)
    pairs = _MICRO_BATCH / 2
    return EpochCost(best["embed"] / _MICRO_BATCH, best["step"] / pairs, best["whole"] / pairs)


def as_text(header: dict[str, str], findings: KnnFindings) -> str:
    blocks = [aligned_header({**header, "rows": f"{findings.source}, {findings.shape[1]} dimensions"})]
    blocks += [_comparison_text(found) for found in findings.comparisons]
    if findings.scaling:
        blocks.append(scaling_text(findings.scaling, findings.settings.neighbours[0], findings.settings.workers))
    if findings.epoch is not None:
        blocks.append(_epoch_text(findings.epoch, findings.pairs_per_cpu_s))
    return "\n\n".join(blocks)


def _comparison_text(found: Comparison) -> str:
    ours = [name for name in (EXACT, APPROXIMATE) if name in found.sides]
    titles = ["seconds", "CPU s", *(f"/ {name}{of}" for name in ours for of in ("", ", CPU")), "found"]
    lines = [[f"k={found.neighbours}", *titles]]
    for side in found.sides.values():
        ratios = [f"{r(name, side.name):.2f}" for name in ours for r in (found.ratio, found.cpu_ratio)]
        lines.append([side.name, f"{side.timing.seconds:.3f}", f"{side.timing.cpu:.3f}", *ratios, f"{side.found:.2%}"])
    return "\n".join([aligned(lines), *([_recall_text(found.recall)] if found.recall else [])])


def _recall_text(recall: Recall) -> str:
    return (
        f"approximate: {recall.probes} of {recall.lists} inverted lists, {recall.searched_share:.2%} of all pairs, "
        f"measured recall {recall.recall:.2%} on {recall.recall_rows} rows, standard error {recall.recall_error:.2%}, "
        f"widened {recall.widened} times"
    )


def scaling_text(found: Mapping[str, Timing], k: int, workers: int) -> str:
    """The speedup of several workers over each other side."""
    several = found[SEVERAL]
    lines = [f"exact, k={k}: {workers} {SEVERAL} {several.seconds:.3f} s ({several.cpu:.3f} s of CPU); against"]
    for name, other in found.items():
        if name != SEVERAL:
            ratio, cpu = other.seconds / several.seconds, other.cpu / several.cpu
            lines.append(
                f"  {name} of {workers} threads {other.seconds:.3f} s: {ratio:.2f}x ({other.cpu:.3f} s: {cpu:.2f}x)"
            )
    return "\n".join(lines)


def _epoch_text(cost: EpochCost, pairs_per_cpu_s: float) -> str:
    lines = [
        f"exact: {pairs_per_cpu_s:.3g} pairs a CPU second; fused ViT-S/16: {cost.embed:.3f} CPU s to embed an image, "
        f"the step of a pair {cost.step:.3f} in several micro-batches and {cost.whole:.3f} in one"
    ]
    for name, accumulates in (("several", True), ("one", False)):
        search, both = cost.shares(pairs_per_cpu_s, accumulates=accumulates)
        lines.append(
            f"so at {EPOCH_IMAGES:.0e} images, {name}: search {search:.2%} of an epoch, embedding and search {both:.1%}"
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
With --approximate also the graph by inverted lists, with the recall that it reports and the recall found here. Prints
seconds, CPU seconds, and the ratios of both to ours (baseline / ours: above 1, ours is faster)."""
EXAMPLE = """examples, a minute, and ten:
  python launch/bench.py knn --rows 20000 --neighbours 10 --workers 2
  python launch/bench.py knn --approximate --rows 200000 --baselines faiss.knn --repeats 1 --json knn.json"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, metavar="N", help="default: 20000, 200000 with --approximate, or all of --features")
    add("--dim", type=int, default=384, metavar="D", help="of drawn rows; default: %(default)s")
    add("--neighbours", type=int, nargs="+", default=[10], metavar="K", help="default: %(default)s")
    add("--approximate", action="store_true", help="also the graph by inverted lists")
    add("--recall-floor", type=float, default=0.95, metavar="R", help="its least recall; default: %(default)s")
    add("--baselines", nargs="+", choices=list(BASELINES), default=list(BASELINES), help="default: all")
    add("--threads", type=int, default=2, metavar="N", help="of every side alike; default: %(default)s")
    add("--workers", type=int, default=1, metavar="N", help="of a thread each, against one of N threads; default: 1")
    add("--epoch", action="store_true", help="also what an epoch of fusion costs beside the graph")
    add("--features", type=Path, metavar="DIR_OR_NPY", help="real rows: a .npy file, or a folder with any")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    lists = {name: tuple(options[name]) for name in ("neighbours", "baselines")}
    settings = KnnSettings(**{**options, **lists})
    header = machine(settings.threads)
    findings = measure_knn(settings, log)
    return as_text(header, findings), as_json(header, findings)
