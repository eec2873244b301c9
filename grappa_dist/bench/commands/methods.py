"""`bench.py methods`: the shortcuts of k-means against the exact one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import methods
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "shortcuts against exact k-means"
DESCRIPTION = """\
The methods of `clustering.method` against exact k-means: time, seeding included, and what they cost in
inertia and labels, on the same drawn rows; and exact k-means with a bound on the size of clusters."""
EXAMPLE = """example, half a minute:
  python launch/bench.py methods --rows 20000 --num-labels 1024 --probes 4 --json methods.json"""


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
    settings = methods.MethodsSettings(**{**asked, "probes": tuple(asked["probes"])})
    header = machine(settings.threads)
    ways = methods.measure_methods(settings, tell)
    return methods.as_text(header, settings, ways), methods.as_json(header, settings, ways)
