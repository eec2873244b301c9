"""Retrieval metrics against pytorch-metric-learning: seconds, memory, and the largest difference of scores.

The baseline is given the number of neighbours that the metrics need ("max_bin_count"). On `--default-rows` rows it also
runs with its default, all rows as neighbours of every row; it then holds tables of rows x rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.faiss_baselines import set_threads
from benchmarks.harness import (
    MIB,
    Log,
    Timing,
    aligned,
    aligned_header,
    check_least,
    machine,
    memory_growth,
    timed,
    turns,
)
from grappa_dist.metrics import retrieval_scores

OURS, BASELINE, DEFAULT = "ours", "pytorch-metric-learning", "the same, its default k"
_NAMES = {"recall_at_1": "precision_at_1", "r_precision": "r_precision", "map_at_r": "mean_average_precision_at_r"}
_SPREAD = 0.1  # of an image around its class, per dimension, as a share of the distance of classes

Side = Callable[[Tensor, Tensor], dict[str, float]]


@dataclass(frozen=True)
class EvaluateSettings:
    """Options of `bench.py evaluate`."""

    rows: int
    default_rows: int
    classes: int
    dim: int
    threads: int
    repeats: int
    seed: int

    def check(self) -> None:
        check_least(self, rows=2, default_rows=0, classes=1, dim=1, threads=1, repeats=1, seed=0)


@dataclass(frozen=True)
class Scored:
    """Runs of one side on the same rows."""

    timing: Timing
    memory: int  # bytes by which the process grew at most
    scores: dict[str, float]


@dataclass(frozen=True)
class EvaluateFindings:
    """All sides on one set of rows."""

    rows: int
    classes: int
    sides: dict[str, Scored]

    def ratio(self, baseline: str) -> float:
        return self.sides[baseline].timing.seconds / self.sides[OURS].timing.seconds

    def difference(self, baseline: str) -> float:
        """The largest difference of a score."""
        ours, theirs = self.sides[OURS].scores, self.sides[baseline].scores
        return max(abs(ours[name] - theirs[name]) for name in _NAMES)


def measure_evaluate(settings: EvaluateSettings, log: Log) -> list[EvaluateFindings]:
    settings.check()
    torch.set_num_threads(settings.threads)
    set_threads(settings.threads)
    sides: dict[str, Side] = {OURS: retrieval_scores, BASELINE: _baseline("max_bin_count")}
    found = [_compare(settings, settings.rows, sides, log)]
    if settings.default_rows:
        found.append(_compare(settings, settings.default_rows, {**sides, DEFAULT: _baseline(None)}, log))
    return found


def labelled_rows(rows: int, classes: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    """Unit rows (rows, dim) around their class centres, and their classes (rows,), of uneven sizes."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=draws)
    centres = F.normalize(torch.randn(classes, dim, generator=draws), dim=1)
    return F.normalize(centres[labels] + _SPREAD * torch.randn(rows, dim, generator=draws), dim=1), labels


def _baseline(k: str | None) -> Side:
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    calculator = AccuracyCalculator(include=tuple(_NAMES.values()), k=k, device=torch.device("cpu"))

    def scores(z: Tensor, labels: Tensor) -> dict[str, float]:
        found = calculator.get_accuracy(z, labels)
        return {ours: float(found[theirs]) for ours, theirs in _NAMES.items()}

    return scores


def _compare(settings: EvaluateSettings, rows: int, sides: dict[str, Side], log: Log) -> EvaluateFindings:
    classes = max(1, settings.classes * rows // settings.rows)
    z, labels = labelled_rows(rows, classes, settings.dim, settings.seed)
    found: dict[str, Scored] = {}
    for repeat, order in enumerate(turns(list(sides), settings.repeats)):
        for name in order:
            log(f"{rows} rows, run {repeat + 1} of {settings.repeats}: {name}")
            (scores, timing), memory = memory_growth(lambda name=name: timed(lambda: sides[name](z, labels)))  # type: ignore[misc]
            if name in found:
                timing, memory = found[name].timing + timing, max(found[name].memory, memory)
            found[name] = Scored(timing, memory, scores)
    return EvaluateFindings(rows, classes, found)


def as_text(header: dict[str, str], findings: Sequence[EvaluateFindings]) -> str:
    return "\n\n".join([aligned_header(header), *map(_text, findings)])


def _text(found: EvaluateFindings) -> str:
    lines = [[f"{found.rows} rows, {found.classes} classes", "seconds", "baseline/ours", "CPU s", "MiB", "R-Precision"]]
    for name, side in found.sides.items():
        ratio = "-" if name == OURS else f"{found.ratio(name):.2f}"
        figures = [f"{side.timing.seconds:.3f}", ratio, f"{side.timing.cpu:.3f}", f"{side.memory / MIB:.0f}"]
        lines.append([name, *figures, f"{side.scores['r_precision']:.6f}"])
    most = max(found.difference(name) for name in found.sides if name != OURS)
    return f"{aligned(lines)}\nscores differ by {most:.1e} at most"


def as_json(header: dict[str, str], findings: Sequence[EvaluateFindings]) -> dict[str, Any]:
    return {"machine": header, "comparisons": [_json(found) for found in findings]}


def _json(found: EvaluateFindings) -> dict[str, Any]:
    baselines = [name for name in found.sides if name != OURS]
    return {
        "rows": found.rows,
        "classes": found.classes,
        "sides": [
            {"name": name, "runs_s": s.timing.runs, "cpu_runs_s": s.timing.cpu_runs, "bytes": s.memory, **s.scores}
            for name, s in found.sides.items()
        ],
        "ratio": {name: found.ratio(name) for name in baselines},
        "difference": {name: found.difference(name) for name in baselines},
    }


SHORT = "against pytorch-metric-learning"
DESCRIPTION = """\
R-Precision, MAP@R and recall at 1 of drawn features, every row a query: ours against pytorch-metric-learning (which
must be installed; it searches by faiss), given the number of neighbours it needs, and on fewer rows also with its
default. Prints seconds (baseline / ours: above 1, ours is faster), memory above the features, and by how much scores
differ."""
EXAMPLE = """example, half a minute:
  python launch/bench.py evaluate --rows 12000 --classes 2000 --default-rows 3000"""


def arguments(add: Callable[..., Any]) -> None:
    add("--rows", type=int, default=60_502, metavar="N", help="default: %(default)s, of Products' test set")
    add(
        "--default-rows",
        type=int,
        default=6_000,
        metavar="N",
        help="of the default k; default: %(default)s",
    )
    add("--classes", type=int, default=11_316, metavar="C", help="of --rows; default: %(default)s")
    add("--dim", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--threads", type=int, default=2, metavar="N", help="of a side; default: %(default)s")
    add("--repeats", type=int, default=1, metavar="N", help="in alternating order, medians; default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def run(options: dict[str, Any], log: Log) -> tuple[str, dict[str, Any]]:
    settings = EvaluateSettings(**options)
    header = machine(settings.threads, "faiss-cpu", "pytorch-metric-learning")
    findings = measure_evaluate(settings, log)
    return as_text(header, findings), as_json(header, findings)
