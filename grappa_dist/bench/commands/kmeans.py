"""`bench.py kmeans`: k-means against faiss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kmeans import DRAWN_DIM, DRAWN_ROWS, KMeansSettings, measure_kmeans
from grappa_dist.bench.machine import machine
from grappa_dist.bench.table import as_json, as_text
from grappa_dist.data.progress import Tell

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
