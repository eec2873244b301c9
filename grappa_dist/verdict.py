"""Which model of a run is exported, and whether it is better than the backbone, by the labels of test images.

The figure is R-Precision: the mean over a task's queries, then over tasks. To choose among models and to say how good
the chosen one is takes two sets of queries, as the best of many is in part the luckiest: half of the queries, the
validation half, chooses, and the other half is reported. Both are searched among the same images, and both have every
class. Where nothing is chosen, all queries are reported.

Shapes: q queries of a task.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from grappa_dist.config import AUTO
from grappa_dist.data.rng import Purpose, permutation
from grappa_dist.significance import bootstrap_interval, mean_over_tasks, paired_test
from grappa_dist.variants import BACKBONE, VARIANTS, split_strength

FEW = 30  # queries of a task, fewer than which are said to be few
TRAINED_ON = "the models were adapted to test images too, without their labels: nothing is known of new images"
LARGEST_P = 0.05  # from which on nothing is called better or worse
RULE = 1  # of candidates, validation half and choice; part of the name of a model that was chosen


@dataclass(frozen=True)
class TaskQueries:
    """The queries of one task, and how each model did on each of them."""

    task: str
    classes: NDArray[np.int64]  # (q,) the label of each query
    r_precision: Mapping[str, NDArray[np.float64]]  # by model, (q,) in [0, 1]
    rows: NDArray[np.int64] | None = None  # (q,) the image of each query, where these are numbered

    def some(self, kept: NDArray[np.bool_]) -> TaskQueries:
        """Those of the queries that `kept` (q,) marks."""
        values = {m: of_model[kept] for m, of_model in self.r_precision.items()}
        return TaskQueries(self.task, self.classes[kept], values, None if self.rows is None else self.rows[kept])

    def less(self, model: str, baseline: str) -> NDArray[np.float64]:
        """R-Precision of a model less that of another, (q,)."""
        return self.r_precision[model] - self.r_precision[baseline]


@dataclass(frozen=True)
class Gain:
    """How much better a model is than the backbone, on one task or in the mean; fractions in [0, 1]."""

    task: str | None  # None: the mean over tasks
    queries: int
    classes: int
    value: float  # R-Precision of the model
    baseline: float  # and of the backbone, on the same queries
    low: float  # of the gain, the 95 % bootstrap interval over queries
    high: float
    p_value: float  # of the paired permutation test of no difference, two-sided

    @property
    def gain(self) -> float:
        return self.value - self.baseline

    @property
    def shown_gain(self) -> float:
        """The difference of the two as percent with one digit are shown, so that figures agree."""
        return (round(100 * self.value, 1) - round(100 * self.baseline, 1)) / 100

    @property
    def outcome(self) -> Literal["better", "worse", "unsure"]:
        """Better or worse where interval and test agree: of few queries the interval alone is often too narrow."""
        if self.p_value >= LARGEST_P:
            return "unsure"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unsure"


@dataclass(frozen=True)
class Verdict:
    """What a run has come to. Without labelled test images there is none."""

    exported: str  # the model in `<run>/model`
    compared: str  # with the backbone: the exported model, or the best other one where the backbone is exported
    asked: str  # evaluate.export
    mean: Gain
    tasks: tuple[Gain, ...]
    validation: Mapping[str, float]  # mean R-Precision on the half that chose; {} where nothing was chosen
    validation_queries: int
    caveats: tuple[str, ...]  # as sentences


def candidates(models: Iterable[str]) -> list[str]:
    """The models that may be chosen, the simplest first: backbone, average, single sets, trained fusions; of a fusion
    at several strengths of adaptation the weakest first.

    No baseline and nothing that saw labels; and not `gallery`, which as a model is the average until it is given the
    images that are searched, so its scores are not those of what would be exported.
    """
    at = {m: split_strength(m) for m in models}
    sets = sorted((m for m in at if m.startswith("k=")), key=lambda m: int(m[2:]))
    variants = [v.name for v in VARIANTS.values() if v.has_strengths]
    fusions = sorted((m for m in at if at[m][0] in variants), key=lambda m: (variants.index(at[m][0]), at[m][1]))  # type: ignore[arg-type]
    averages = [m for m in fusions if at[m][0] == variants[0]]
    return [*([BACKBONE] if BACKBONE in at else []), *averages, *sets, *fusions[len(averages) :]]


def validation_half(classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which queries of a task are of the validation half, (q,): of each class every second one, in a shuffled order.

    A function of the labels (q,) alone, so that runs with other settings or seeds have the same one.
    """
    shuffled = permutation(len(classes), Purpose.VALIDATION_HALF)
    order = shuffled[np.argsort(classes[shuffled], kind="stable")]
    chosen = np.zeros(len(classes), dtype=np.bool_)
    chosen[order[1::2]] = True
    return chosen


def choose(tasks: Sequence[TaskQueries], models: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The best by mean R-Precision over tasks, the first of equals; and that figure of all of them."""
    means = {m: math.fsum(math.fsum(t.r_precision[m]) / len(t.classes) for t in tasks) / len(tasks) for m in models}
    return max(models, key=lambda m: means[m]), means


def verdict_on(tasks: Sequence[TaskQueries], models: Iterable[str], asked: str, *, trained_on: bool = False) -> Verdict:
    """The verdict on a run.

    Args:
        tasks: with queries in each; at least one.
        models: all models of the run.
        asked: evaluate.export: AUTO, or the model that is exported.
        trained_on: whether test images are among those that the models were adapted to.
    """
    more = (TRAINED_ON,) if trained_on else ()
    if asked not in (AUTO, BACKBONE):
        mean, each = gains(tasks, asked)
        return Verdict(asked, asked, asked, mean, each, {}, 0, caveats_on(each) + more)
    chosen_by = [validation_half(task.classes) for task in tasks]
    validation = [task.some(half) for task, half in zip(tasks, chosen_by, strict=True)]
    reported = [task.some(~half) for task, half in zip(tasks, chosen_by, strict=True)]
    possible = candidates(models)
    best, means = choose(validation, possible)
    exported = BACKBONE if asked == BACKBONE else best
    adapted = [m for m in possible if m != BACKBONE]
    compared = best if best != BACKBONE else choose(validation, adapted)[0]
    mean, each = gains(reported, compared)
    num_queries = sum(len(task.classes) for task in validation)
    return Verdict(exported, compared, asked, mean, each, means, num_queries, caveats_on(each) + more)


@dataclass(frozen=True)
class SeedsVerdict:
    """What several runs that differ in their seed alone have come to."""

    seeds: tuple[int, ...]
    compared: tuple[str, ...]  # the exported model of each; where evaluate.export is the backbone, the best other one
    each: tuple[float, ...]  # the gain of each, in the mean over tasks
    asked: str  # evaluate.export
    mean: Gain  # of the mean over seeds of what each query reached; its interval is over queries
    tasks: tuple[Gain, ...]
    caveats: tuple[str, ...]

    @property
    def outcome(self) -> Literal["better", "worse", "unsure"]:
        """Better or worse where the interval and every seed are on one side of zero."""
        if self.mean.outcome == "better" and min(self.each) > 0:
            return "better"
        return "worse" if self.mean.outcome == "worse" and max(self.each) < 0 else "unsure"


def verdict_over(runs: Mapping[int, tuple[Sequence[TaskQueries], Verdict]]) -> SeedsVerdict:
    """The verdict on runs of the same test images by their seeds: the model of each against the backbone.

    Where the queries have chosen, those of the other half are taken, the same in all runs.
    """
    first = next(iter(runs.values()))[1]
    models = [v.compared if v.asked == BACKBONE else v.exported for _, v in runs.values()]
    combined = []
    for same in zip(*(tasks for tasks, _ in runs.values()), strict=True):
        found = [task.r_precision[model] for task, model in zip(same, models, strict=True)]
        values = {BACKBONE: same[0].r_precision[BACKBONE], "mean": np.mean(found, axis=0)}
        values |= {str(seed): of_seed for seed, of_seed in zip(runs, found, strict=True)}
        task = TaskQueries(same[0].task, same[0].classes, values)
        combined.append(task.some(~validation_half(task.classes)) if first.validation else task)
    each = [mean_over_tasks([task.less(str(seed), BACKBONE) for task in combined]) for seed in runs]
    mean, of_tasks = gains(combined, "mean")
    notes = caveats_on(of_tasks) + tuple(line for line in first.caveats if line == TRAINED_ON)
    return SeedsVerdict(tuple(runs), tuple(models), tuple(each), first.asked, mean, of_tasks, notes)


def gains(tasks: Sequence[TaskQueries], model: str, baseline: str = BACKBONE) -> tuple[Gain, tuple[Gain, ...]]:
    """How much better one model is than another: in the mean over tasks, and on each."""
    each = tuple(_gain([task], model, baseline, task.task) for task in tasks)
    return (replace(each[0], task=None) if len(tasks) == 1 else _gain(tasks, model, baseline, None)), each


def _gain(tasks: Sequence[TaskQueries], model: str, baseline: str, name: str | None) -> Gain:
    differences = [task.less(model, baseline) for task in tasks]
    low, high = bootstrap_interval(differences)
    return Gain(
        task=name,
        queries=sum(len(task.classes) for task in tasks),
        classes=sum(len(np.unique(task.classes)) for task in tasks),
        value=mean_over_tasks([task.r_precision[model] for task in tasks]),
        baseline=mean_over_tasks([task.r_precision[baseline] for task in tasks]),
        low=low,
        high=high,
        p_value=paired_test(differences),
    )


class Counted(Protocol):
    """Figures of a task."""

    @property
    def task(self) -> str | None: ...
    @property
    def queries(self) -> int: ...
    @property
    def classes(self) -> int: ...


def caveats_on(each: Sequence[Counted]) -> tuple[str, ...]:
    """What makes the figures of some tasks say less than they seem to."""
    found = []
    if few := [f"{g.task} ({g.queries})" for g in each if g.queries < FEW]:
        found.append(f"few queries, so the interval is wide and itself rough: {_some(few)}")
    if single := [str(g.task) for g in each if g.classes == 1]:
        found.append(f"all queries are of one class, which tells no models apart: {_some(single)}")
    if len(each) == 1:
        found.append("the test images are of one task: nothing is known of others")
    return tuple(found)


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
