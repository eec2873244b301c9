"""The ways to cluster against exact k-means: time and inertia on the same drawn rows, seeding included.

python -m grappa_dist.bench.methods --rows 60000 --dim 128 --num-labels 4096 --threads 1

Shapes: P rows, K centroids, D dimensions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch

from grappa_dist.bench.arguments import OneLineParser
from grappa_dist.bench.machine import machine
from grappa_dist.bench.rows import drawn_rows
from grappa_dist.bench.table import aligned, aligned_header
from grappa_dist.bench.timing import Timing, timed
from grappa_dist.dist.comm import Comm
from grappa_dist.dist.methods import Clustering, Method, cluster
from grappa_dist.dist.search import Rows
from grappa_dist.dist.share import Share, join_rows
from grappa_dist.ops.choice import Assignment, Choice, Name

WAYS: tuple[tuple[Name, Assignment], ...] = (
    ("exact", "exact"),
    ("approximate", "exact"),
    ("approximate", "approximate"),
    ("hierarchical", "exact"),
    ("hierarchical", "approximate"),
    ("sampled", "exact"),
)


def arguments() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=60_000, metavar="N", help="default: %(default)s")
    add("--dim", type=int, default=128, metavar="D", help="default: %(default)s")
    add("--num-labels", type=int, default=4096, metavar="K", help="default: %(default)s")
    add("--iterations", type=int, default=10, metavar="N", help="updates of the centroids; default: %(default)s")
    add("--probes", type=int, nargs="+", default=[4, 8, 16], metavar="N", help="of lists; default: %(default)s")
    add("--sample-rows-per-cluster", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--balance", type=float, default=1.5, metavar="B", help="of one more exact run; default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    return parser


def measure(asked: argparse.Namespace) -> list[tuple[str, Clustering, Timing]]:
    """Name, result and time of every way."""
    torch.set_num_threads(asked.threads)
    rows = drawn_rows(asked.rows, asked.dim, 0)
    share = join_rows(Comm(), Rows([rows], [np.ones(len(rows), dtype=bool)]), device=torch.device("cpu"))
    found = []
    for name, assignment in WAYS:
        through_lists = "approximate" in (name, assignment)
        for probes in asked.probes if through_lists else asked.probes[:1]:
            title = f"{name}, {assignment} labels" + (f", {probes} probes" if through_lists else "")
            found.append((title, *_run(share, asked, Choice(name, assignment, ""), probes=probes)))
    bounded = _run(share, asked, Choice("exact", "exact", ""), balance=asked.balance)
    return [*found, (f"exact, balance {asked.balance:g}", *bounded)]


def _run(
    share: Share, asked: argparse.Namespace, choice: Choice, *, probes: int = 1, balance: float | None = None
) -> tuple[Clustering, Timing]:
    method = Method(
        choice=choice,
        iterations=asked.iterations,
        sample_rows_per_cluster=asked.sample_rows_per_cluster,
        probes=probes,
        balance=balance,
    )
    return timed(lambda: cluster(share, asked.num_labels, method))


def as_text(found: Sequence[tuple[str, Clustering, Timing]]) -> str:
    best = found[0][1].result.inertia[-1]
    lines = [["", "seconds", "CPU s", "inertia over exact", "fitted to", "exact labels", "largest"]]
    for title, clustering, timing in found:
        result, agreement = clustering.result, clustering.agreement
        lines.append(
            [
                title,
                f"{timing.seconds:.1f}",
                f"{timing.cpu:.1f}",
                f"{result.inertia[-1] / best - 1:+.2%}",
                f"{clustering.sampled_rows / result.counts.sum():.0%}",
                "100%" if agreement is None else f"{agreement.share:.2%}",
                str(result.counts.max()),
            ]
        )
    return aligned(lines)


def main(argv: Sequence[str] | None = None) -> int:
    asked = arguments().parse_args(argv)
    shape = f"{asked.rows} drawn rows, {asked.dim} dimensions, K={asked.num_labels}, {asked.iterations} updates"
    print(aligned_header({**machine(asked.threads), "rows": shape}))
    print(as_text(measure(asked)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
