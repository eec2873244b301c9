"""The ways to cluster against exact k-means: time and inertia on the same drawn rows, seeding included.

Shapes: P rows, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import Timing, timed
from grappa_dist.bench.arguments import check_positive
from grappa_dist.bench.rows import drawn_rows, in_shards
from grappa_dist.bench.table import aligned, aligned_header
from grappa_dist.data.progress import Tell
from grappa_dist.distributed.clustering import Wanted, cluster
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import Share, join_rows
from grappa_dist.kmeans.methods import Clustering, Method
from grappa_dist.ops.choice import AssignmentKind, Choice, Name

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


def _run(share: Share, settings: MethodsSettings, title: str, method: Method) -> Way:
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
