"""`bench.py knn`: the k-NN graph against brute force."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import knn
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "against brute force"
DESCRIPTION = """\
The exact k-NN graph against brute-force searches by faiss: the same rows, neighbours and threads, in turns.
With --approximate also the graph through lists, with the recall it measures of itself and the one found here. Prints
seconds, CPU seconds, and how many times as long as ours each side took (above 1, ours is faster)."""
EXAMPLE = """examples, a minute, and ten:
  python launch/bench.py knn --rows 20000 --neighbours 10 --workers 2
  python launch/bench.py knn --approximate --rows 200000 --judges faiss.knn --repeats 1 --json knn.json"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, metavar="N", help="default: 20000, 200000 with --approximate, or all of --features")
    add("--dim", type=int, default=384, metavar="D", help="of drawn rows; default: %(default)s")
    add("--neighbours", type=int, nargs="+", default=[10], metavar="K", help="default: %(default)s")
    add("--approximate", action="store_true", help="also the graph through lists")
    add("--recall-floor", type=float, default=0.95, metavar="R", help="of it; default: %(default)s")
    add("--judges", nargs="+", choices=list(knn.JUDGES), default=list(knn.JUDGES))
    add("--threads", type=int, default=2, metavar="N", help="of every side alike; default: %(default)s")
    add("--workers", type=int, default=1, metavar="N", help="of a thread each, against one of N threads; default: 1")
    add("--epoch", action="store_true", help="also what an epoch of fusion costs beside the graph")
    add("--features", type=Path, metavar="DIR_OR_NPY", help="real rows: a .npy file, or a folder with any")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    asked["neighbours"], asked["judges"] = tuple(asked["neighbours"]), tuple(asked["judges"])
    settings = knn.KnnSettings(**asked)
    header = machine(settings.threads)
    findings = knn.measure_knn(settings, tell)
    return knn.as_text(header, findings), knn.as_json(header, findings)
