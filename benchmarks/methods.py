"""The approximate clustering methods against exact k-means: time and inertia on the same rows, seeding included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import (
    Log,
    Timing,
    aligned,
    aligned_header,
    check_positive,
    drawn_rows,
    in_shards,
    machine,
    timed,
)
from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import ShardedRows, join_rows
from grappa_dist.kmeans.methods import AssignmentKind, Choice, Clustering, ClusteringTask, MethodName, cluster

METHODS: tuple[tuple[MethodName, AssignmentKind], ...] = (
    ("exact", "exact"),
    ("approximate", "exact"),
    ("approximate", "approximate"),
    ("hierarchical", "exact"),
    ("hierarchical", "approximate"),
    ("sampled", "exact"),
)


@dataclass(frozen=True)
class MethodsSettings:
    """Options of `bench.py methods`."""

    rows: int
    dim: int
    num_labels: int
    iterations: int
    probes: tuple[int, ...]
    sample_rows_per_cluster: int
    balance: float
    threads: int

    def check(self) -> None:
        """Raises a ValueError that names the flag."""
        check_positive(self, "rows", "dim", "iterations", "sample_rows_per_cluster", "threads")
        if not 1 <= self.num_labels <= self.rows:
            raise ValueError(f"--num-labels must be from 1 to the number of rows, {self.rows}, got {self.num_labels}")
        if min(self.probes) < 1:
            raise ValueError(f"--probes must be at least 1, got {min(self.probes)}")
        if self.balance < 1:
            raise ValueError(f"--balance must be at least 1, got {self.balance}")


@dataclass(frozen=True)
class MethodFindings:
    """Results of one method."""

    title: str
    clustering: Clustering
    timing: Timing


def measure_methods(settings: MethodsSettings, log: Log) -> list[MethodFindings]:
    """All methods, exact k-means first, balanced k-means last."""
    settings.check()
    torch.set_num_threads(settings.threads)
    log("rows")
    rows = drawn_rows(settings.rows, settings.dim, 0)
    sharded = join_rows(Comm(), in_shards(rows), device=torch.device("cpu"))
    found = []
    for name, assignment in METHODS:
        inverted_lists = "approximate" in (name, assignment)
        for probes in settings.probes if inverted_lists else settings.probes[:1]:
            title = f"{name}, {assignment} labels" + (f", {probes} probes" if inverted_lists else "")
            log(title)
            found.append(_run(sharded, title, _task(settings, Choice(name, assignment, ""), probes)))
    title = f"exact, balance {settings.balance:g}"
    log(title)
    balanced = _task(settings, Choice("exact", "exact", ""), 1, settings.balance)
    return [*found, _run(sharded, title, balanced)]


def _task(settings: MethodsSettings, choice: Choice, probes: int, balance: float | None = None) -> ClusteringTask:
    config = ClusteringConfig(
        iterations=settings.iterations,
        sample_rows_per_cluster=settings.sample_rows_per_cluster,
        probes=probes,
        balance=balance,
    )
    return ClusteringTask(settings.num_labels, config, choice)


def _run(sharded: ShardedRows, title: str, task: ClusteringTask) -> MethodFindings:
    return MethodFindings(title, *timed(lambda: cluster(sharded, task)))


def as_json(header: dict[str, str], settings: MethodsSettings, found: Sequence[MethodFindings]) -> dict[str, Any]:
    return {"machine": header, "settings": vars(settings), "methods": [_figures(one, found[0]) for one in found]}


def _figures(found: MethodFindings, exact: MethodFindings) -> dict[str, Any]:
    result, agreement = found.clustering.result, found.clustering.agreement
    return {
        "name": found.title,
        "seconds": found.timing.seconds,
        "cpu_seconds": found.timing.cpu,
        "inertia_over_exact": result.inertia[-1] / exact.clustering.result.inertia[-1] - 1,
        "fitted_share": found.clustering.sampled_rows / int(result.counts.sum()),
        "exact_labels_share": 1.0 if agreement is None else agreement.share,
        "largest": int(result.counts.max()),
    }


def as_text(header: dict[str, str], settings: MethodsSettings, found: Sequence[MethodFindings]) -> str:
    shape = f"{settings.rows} drawn rows, {settings.dim} dimensions"
    size = f"K={settings.num_labels}, {settings.iterations} updates"
    lines = [["", "seconds", "CPU s", "inertia over exact", "fitted to", "exact labels", "largest"]]
    for one in found:
        figures = _figures(one, found[0])
        lines.append(
            [
                one.title,
                f"{figures['seconds']:.1f}",
                f"{figures['cpu_seconds']:.1f}",
                f"{figures['inertia_over_exact']:+.2%}",
                f"{figures['fitted_share']:.0%}",
                f"{figures['exact_labels_share']:.2%}",
                str(figures["largest"]),
            ]
        )
    return aligned_header({**header, "rows": f"{shape}, {size}"}) + "\n\n" + aligned(lines)


SHORT = "approximate methods against exact k-means"
DESCRIPTION = """\
The methods of `clustering.method` against exact k-means on the same drawn rows: time, seeding included, and the loss
in inertia and labels; and exact k-means with a bound on the size of clusters."""
EXAMPLE = """example, half a minute:
  python launch/bench.py methods --rows 20000 --num-labels 1024 --probes 4 --json methods.json"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, default=60_000, metavar="N", help="default: %(default)s")
    add("--dim", type=int, default=128, metavar="D", help="default: %(default)s")
    add("--num-labels", type=int, default=4096, metavar="K", help="default: %(default)s")
    add("--iterations", type=int, default=10, metavar="N", help="updates of the centroids; default: %(default)s")
    add("--probes", type=int, nargs="+", default=[4, 8, 16], metavar="N", help="inverted lists; default: %(default)s")
    add("--sample-rows-per-cluster", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--balance", type=float, default=1.5, metavar="B", help="of one more exact run; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = MethodsSettings(**{**options, "probes": tuple(options["probes"])})
    header = machine(settings.threads)
    found = measure_methods(settings, log)
    return as_text(header, settings, found), as_json(header, settings, found)
