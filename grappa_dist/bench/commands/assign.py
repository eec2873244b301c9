"""`bench.py assign`: one assignment against torch's matmul and argmin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import assign
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "against torch's matmul + argmin"
DESCRIPTION = """\
One assignment of all rows to their nearest centroids, exact, against float32 matrix products and argmin in
torch: on a CPU, or on a GPU, where one kernel makes products and their largest at once. Prints the ratio (judge / ours:
above 1, ours is faster) and what share of the machine's arithmetic limit ours reaches."""
EXAMPLE = """example, on a GPU:
  python launch/bench.py assign --device cuda --rows 1000000 --num-labels 131072"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, default=133_339, metavar="N", help="default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--num-labels", type=int, default=4096, metavar="K", help="default: %(default)s")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="on a CPU; default: %(default)s")
    add("--repeats", type=int, default=3, metavar="N", help="in alternating order, the fastest; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    settings = assign.AssignSettings(**asked)
    header = machine(settings.threads, *(["triton"] if settings.device == "cuda" else []))
    found = assign.measure_assign(settings, tell)
    return assign.as_text(header, settings, found), assign.as_json(header, settings, found)
