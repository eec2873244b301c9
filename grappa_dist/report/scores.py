"""The score rows as a grid of models by tasks, with gains over the backbone.

A task of None stands for the mean over all tasks. What was not measured is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from grappa_dist.report.content import ScoreRow

Metric = Literal["r_precision", "map_at_r", "recall_at_1"]
BACKBONE, ORACLE, AVERAGE = "backbone", "oracle", "average"
FUSIONS = (AVERAGE, "gallery", "transforms", "neighbours")
RANDOM = ("random-one", "random-all")
SAW_LABELS = ("supervised-set", "supervised")
_GROUPS = {BACKBONE: 0, "set": 1, ORACLE: 2, "fusion": 3, "random": 4, "supervised": 5, "other": 6}


def kind(model: str) -> str:
    """The family of a model: "backbone", "set", "oracle", "fusion", "random", "supervised" or "other"."""
    if model in (BACKBONE, ORACLE):
        return model
    if model.startswith("k=") and model[2:].isdecimal():
        return "set"
    if model in (*RANDOM, *SAW_LABELS):
        return "random" if model in RANDOM else "supervised"
    return "fusion" if model.split("-")[0] in FUSIONS else "other"


def ordered(models: Iterable[str]) -> list[str]:
    """Models as a table lists them: backbone, sets from coarse to fine, oracle, fusions, others."""

    def rank(model: str) -> tuple[int, int, str]:
        family = kind(model)
        within = 0
        if family == "set":
            within = int(model[2:])
        elif family == "fusion":
            within = FUSIONS.index(model.split("-")[0])
        elif family in ("random", "supervised"):
            within = (*RANDOM, *SAW_LABELS).index(model)
        return _GROUPS[family], within, model

    return sorted(set(models), key=rank)


@dataclass(frozen=True)
class Scores:
    """Look-ups in the score rows; the last row wins where a model and task come twice."""

    cells: dict[tuple[str, str], ScoreRow]
    models: list[str]
    tasks: list[str]

    @classmethod
    def of(cls, rows: list[ScoreRow]) -> Scores:
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        return cls({(row["model"], row["task"]): row for row in rows}, ordered(row["model"] for row in rows), tasks)

    @property
    def columns(self) -> list[str | None]:
        """The tasks, and their mean where there are several."""
        return [*self.tasks, None] if len(self.tasks) > 1 else [*self.tasks]

    def queries(self, model: str, task: str) -> int:
        cell = self.cells.get((model, task))
        return cell["queries"] if cell else 0

    def value(self, model: str, task: str | None, metric: Metric = "r_precision") -> float:
        """The score, or NaN where the model has no queries there. The mean asks for every task that anyone has."""
        if task is None:
            scored = [t for t in self.tasks if any(self.queries(m, t) for m in self.models)]
            values = [self.value(model, t, metric) for t in scored]
            return sum(values) / len(values) if values else math.nan
        cell = self.cells.get((model, task))
        return float(cell[metric]) if cell and cell["queries"] > 0 else math.nan

    def gain(self, model: str, task: str | None, over: str = BACKBONE) -> float:
        """R-Precision above another model's: the difference of what tables print of them, so that figures agree."""
        return (round(100 * self.value(model, task), 1) - round(100 * self.value(over, task), 1)) / 100

    def best(self, task: str | None, metric: Metric = "r_precision") -> set[str]:
        """The models on top, at the precision a table prints; what saw labels, the oracle too, does not compete."""
        rivals = [m for m in self.models if m != ORACLE and m not in SAW_LABELS]
        shown = {m: round(100 * self.value(m, task, metric), 1) for m in rivals}
        top = max((v for v in shown.values() if math.isfinite(v)), default=math.nan)
        return {m for m, v in shown.items() if v == top}

    def leader(self, family: str) -> str | None:
        """The model of a family with the best mean R-Precision; names break ties by table order."""
        rivals = [m for m in self.models if kind(m) == family and math.isfinite(self.value(m, None))]
        return max(rivals, key=lambda m: self.value(m, None), default=None)
