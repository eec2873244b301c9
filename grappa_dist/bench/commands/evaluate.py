"""`bench.py evaluate`: retrieval metrics against pytorch-metric-learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import evaluate
from grappa_dist.bench.machine import machine
from grappa_dist.data.progress import Tell

SHORT = "against pytorch-metric-learning"
DESCRIPTION = """\
R-Precision, MAP@R and recall at 1 of drawn features, every row a query: ours against pytorch-metric-learning (which
must be installed; it searches by faiss), told how many neighbours it needs, and on fewer rows also as it comes. Prints
seconds, memory above the features, and by how much scores differ (judge / ours: above 1, ours is faster)."""
EXAMPLE = """example, half a minute:
  python launch/bench.py evaluate --rows 12000 --classes 2000 --default-rows 3000"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, default=60_502, metavar="N", help="default: %(default)s, of Products' test set")
    add("--default-rows", type=int, default=6_000, metavar="N", help="for the judge as it comes; default: %(default)s")
    add("--classes", type=int, default=11_316, metavar="C", help="of --rows; default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="of a side; default: %(default)s")
    add("--repeats", type=int, default=1, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="all numbers, also of single runs")


def run(asked: dict[str, Any], tell: Tell) -> tuple[str, dict[str, Any]]:
    settings = evaluate.EvaluateSettings(**asked)
    header = machine(settings.threads, "faiss-cpu", "pytorch-metric-learning")
    findings = evaluate.measure_evaluate(settings, tell)
    return evaluate.as_text(header, findings), evaluate.as_json(header, findings)
