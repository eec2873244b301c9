"""From the values of single queries: intervals of every figure, gains by class, queries that changed most.

Pure functions of `TaskQueries`. Shapes: q queries of a task.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from grappa_dist.significance import bootstrap_intervals
from grappa_dist.variants import BACKBONE
from grappa_dist.verdict import TaskQueries

ORACLE = "oracle"
MOST_CHANGED, MOST_PER_TASK = 24, 3  # queries of a kind: of all tasks together, and of one
MANY = 20_000  # queries
Z95 = 1.959964  # standard errors
Why = Literal["improved", "worsened", "worst"]
Intervals = dict[tuple[str, str | None], tuple[float, float]]  # by model and task; None: the mean over tasks


def intervals_of(tasks: Sequence[TaskQueries]) -> Intervals:
    """The 95 % interval over queries of every model's R-Precision, on each task and in the mean, by bootstrap.

    The oracle's are those of the set that is best on each task, its choice taken as given.
    """
    if not tasks:
        return {}
    values = {model: [task.r_precision[model] for task in tasks] for model in tasks[0].r_precision}
    if sets := [model for model in values if model.startswith("k=")]:
        best = [max(sets, key=lambda m: math.fsum(values[m][place])) for place in range(len(tasks))]
        values[ORACLE] = [values[model][place] for place, model in enumerate(best)]
    columns = [np.stack([of_model[place] for of_model in values.values()], axis=1) for place in range(len(tasks))]
    found: Intervals = {}
    for name, of_tasks in [*((task.task, [one]) for task, one in zip(tasks, columns, strict=True)), (None, columns)]:
        found |= {(model, name): bounds for model, bounds in zip(values, _intervals(of_tasks), strict=True)}
    return found


def _intervals(tasks: Sequence[NDArray[np.float64]]) -> list[tuple[float, float]]:
    """The interval of the mean over tasks of each column of (q, m) values; m intervals.

    Of many queries by the standard error, which is the bootstrap's bounds to a hundredth of their distance: that of
    10^5 queries takes 1.5 s for each column and task.
    """
    if sum(map(len, tasks)) <= MANY:
        return bootstrap_intervals(tasks)
    means = np.mean([task.mean(0) for task in tasks], axis=0)
    errors = np.sqrt(np.sum([task.var(0) / len(task) for task in tasks], axis=0)) / len(tasks)
    return [
        (mean - Z95 * error, mean + Z95 * error) for mean, error in zip(means.tolist(), errors.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class ClassGain:
    """R-Precision of two models on the queries of one class; fractions in [0, 1]."""

    task: str
    label: int
    queries: int
    value: float
    baseline: float

    @property
    def gain(self) -> float:
        return self.value - self.baseline


def class_gains(tasks: Sequence[TaskQueries], model: str, baseline: str = BACKBONE) -> list[ClassGain]:
    """How much better one model is than another on each class, by task and label."""
    found = []
    for task in tasks:
        labels, place, counts = np.unique(task.classes, return_inverse=True, return_counts=True)
        of_model, of_other = (np.bincount(place, task.r_precision[m]) / counts for m in (model, baseline))
        columns = (labels.tolist(), counts.tolist(), of_model.tolist(), of_other.tolist())
        found += [ClassGain(task.task, *row) for row in zip(*columns, strict=True)]
    return found


@dataclass(frozen=True)
class Pick:
    """A query that is shown."""

    why: Why
    place: int  # among the queries of its task
    value: float  # R-Precision of the model
    baseline: float  # and of the other one


def changed_most(task: TaskQueries, model: str, baseline: str, num_tasks: int) -> list[Pick]:
    """The queries of a task that improved most, worsened most, and those that the model is worst on.

    Of equals the first ones of every class come first, so that no class fills the list.

    Args:
        num_tasks: that share the page.
    """
    count = min(MOST_PER_TASK, max(1, MOST_CHANGED // num_tasks))
    values, others = task.r_precision[model], task.r_precision[baseline]
    gains, found = values - others, list[Pick]()
    keys: dict[Why, NDArray[np.float64]] = {"improved": -gains, "worsened": gains, "worst": values}
    for why, key in keys.items():
        shown = np.flatnonzero(key < 1 - 1e-9 if why == "worst" else key < -1e-9)  # of what is no rounding
        order = shown[np.lexsort((_turns(task.classes[shown], key[shown]), np.round(key[shown], 9)))][:count]
        found += [Pick(why, int(place), float(values[place]), float(others[place])) for place in order]
    return found


def _turns(classes: NDArray[np.int64], key: NDArray[np.float64]) -> NDArray[np.int64]:
    """The how-many-th of its class each query is, by key: (q,)."""
    seen, turns = Counter[int](), np.zeros(len(classes), np.int64)
    for place in np.argsort(np.round(key, 9), kind="stable").tolist():
        turns[place] = seen[classes[place]]
        seen[classes[place]] += 1
    return turns
