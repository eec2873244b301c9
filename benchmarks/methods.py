"""The ways to cluster against exact k-means: time and inertia on the same drawn rows, seeding included.

Shapes: P rows, K centroids, D dimensions.

`bench.py methods`: the shortcuts of k-means against the exact one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Timing, aligned, aligned_header, check_positive, drawn_rows, in_shards, machine, timed
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import ShardedRows, join_rows
from grappa_dist.kmeans.methods import AssignmentKind, Choice, Clustering, Method, Name, Wanted, cluster
from grappa_dist.make_shards.building import Tell

WAYS: tuple[tuple[Name, AssignmentKind], ...] = (
    ("exact", "exact"),
    ("approximate", "exact"),
    ("approximate", "approximate"),
    ("hierarchical", "exact"),
    ("hierarchical", "approximate"),
    ("sampled", "exact"),
)


@dataclass(frozen=True)
class MethodsSettings:
    """What to measure."""

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
class Way:
    """What one way to cluster did."""

    title: str
    clustering: Clustering
    timing: Timing


def measure_methods(settings: MethodsSettings, tell: Tell) -> list[Way]:
    """Every way, exact k-means first."""
    settings.check()
    torch.set_num_threads(settings.threads)
    tell("rows")
    rows = drawn_rows(settings.rows, settings.dim, 0)
    share = join_rows(Comm(), in_shards(rows), device=torch.device("cpu"))
    ways = []
    for name, assignment in WAYS:
        through_lists = "approximate" in (name, assignment)
        for probes in settings.probes if through_lists else settings.probes[:1]:
            title = f"{name}, {assignment} labels" + (f", {probes} probes" if through_lists else "")
            tell(title)
            ways.append(_run(share, settings, title, _method(settings, Choice(name, assignment, ""), probes)))
    title = f"exact, balance {settings.balance:g}"
    tell(title)
    return [*ways, _run(share, settings, title, _method(settings, Choice("exact", "exact", ""), 1, settings.balance))]


def _method(settings: MethodsSettings, choice: Choice, probes: int, balance: float | None = None) -> Method:
    return Method(
        choice=choice,
        iterations=settings.iterations,
        sample_rows_per_cluster=settings.sample_rows_per_cluster,
        probes=probes,
        balance=balance,
    )


def _run(share: ShardedRows, settings: MethodsSettings, title: str, method: Method) -> Way:
    return Way(title, *timed(lambda: cluster(share, Wanted(settings.num_labels, method))))


def as_json(header: dict[str, str], settings: MethodsSettings, ways: Sequence[Way]) -> dict[str, Any]:
    return {"machine": header, "settings": vars(settings), "methods": [_figures(way, ways[0]) for way in ways]}


def _figures(way: Way, exact: Way) -> dict[str, Any]:
    result, agreement = way.clustering.result, way.clustering.agreement
    return {
        "name": way.title,
        "seconds": way.timing.seconds,
        "cpu_seconds": way.timing.cpu,
        "inertia_over_exact": result.inertia[-1] / exact.clustering.result.inertia[-1] - 1,
        "fitted_share": way.clustering.sampled_rows / int(result.counts.sum()),
        "exact_labels_share": 1.0 if agreement is None else agreement.share,
        "largest": int(result.counts.max()),
    }


def as_text(header: dict[str, str], settings: MethodsSettings, ways: Sequence[Way]) -> str:
    shape = f"{settings.rows} drawn rows, {settings.dim} dimensions"
    size = f"K={settings.num_labels}, {settings.iterations} updates"
    lines = [["", "seconds", "CPU s", "inertia over exact", "fitted to", "exact labels", "largest"]]
    for way in ways:
        found = _figures(way, ways[0])
        lines.append(
            [
                way.title,
                f"{found['seconds']:.1f}",
                f"{found['cpu_seconds']:.1f}",
                f"{found['inertia_over_exact']:+.2%}",
                f"{found['fitted_share']:.0%}",
                f"{found['exact_labels_share']:.2%}",
                str(found["largest"]),
            ]
        )
    return aligned_header({**header, "rows": f"{shape}, {size}"}) + "\n\n" + aligned(lines)


SHORT = "shortcuts against exact k-means"
DESCRIPTION = """\
The methods of `clustering.method` against exact k-means: time, seeding included, and what they cost in
inertia and labels, on the same drawn rows; and exact k-means with a bound on the size of clusters."""
EXAMPLE = """example, half a minute:
  python launch/bench.py methods --rows 20000 --num-labels 1024 --probes 4 --json json"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, default=60_000, metavar="N", help="default: %(default)s")
    add("--dim", type=int, default=128, metavar="D", help="default: %(default)s")
    add("--num-labels", type=int, default=4096, metavar="K", help="default: %(default)s")
    add("--iterations", type=int, default=10, metavar="N", help="updates of the centroids; default: %(default)s")
    add("--probes", type=int, nargs="+", default=[4, 8, 16], metavar="N", help="of lists; default: %(default)s")
    add("--sample-rows-per-cluster", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--balance", type=float, default=1.5, metavar="B", help="of one more exact run; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    settings = MethodsSettings(**{**asked, "probes": tuple(asked["probes"])})
    header = machine(settings.threads)
    ways = measure_methods(settings, tell)
    return as_text(header, settings, ways), as_json(header, settings, ways)
