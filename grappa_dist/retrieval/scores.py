"""What an evaluation has found: figures with intervals, by task, by class and by query, of one model or of two.

Shapes: q queries, m metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from grappa_dist.data.decoding import BadImage
from grappa_dist.metrics import DEPTHS, METRICS, as_fractions, mean_of, metrics_of
from grappa_dist.retrieval.ranking import Ranking
from grappa_dist.significance import bootstrap_intervals, mean_over_tasks
from grappa_dist.verdict import Gain, TaskQueries, gains

ORDERED_BY = ("r_precision", "map_at_r")  # queries, from the worst on


class Figure(NamedTuple):
    """A metric in [0, 1], with its 95 % bootstrap interval over queries."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Scores:
    """One model on one task, or in the mean over tasks; figures in [0, 1]."""

    task: str | None  # None: the mean over tasks
    queries: int
    classes: int  # of the queries
    alone: int  # images that would be queries, but no other image of their class is searched
    r_precision: float
    map_at_r: float
    recall_at_1: float
    low: float  # 95 % bootstrap interval of R-Precision over queries
    high: float
    figures: Mapping[str, Figure] = field(default_factory=dict)  # of every metric, these three included


@dataclass(frozen=True)
class ClassScores:
    """The queries of one class: the mean of each metric, by model."""

    task: str
    label: str
    queries: int
    figures: Mapping[str, Mapping[str, float]]

    def gain(self, metric: str = "r_precision") -> float:
        """Of the first model over the second; 0 where there is one."""
        first, *others = (figures[metric] for figures in self.figures.values())
        return first - others[0] if others else 0.0


@dataclass(frozen=True)
class Searched:
    """How the images were divided, and how many there were of each kind."""

    leave_one_out: bool = True
    queries: int = 0  # with a label and readable, scored or not
    gallery: int = 0
    distractors: int = 0  # that were searched
    copies: int = 0  # distractors with the bytes of a labelled image, which were not


@dataclass(frozen=True)
class Mixed:
    """The same queries among the images of all tasks; an image of another task is never relevant."""

    scores: Mapping[str, Sequence[Scores]]
    means: Mapping[str, Scores]
    gains: Sequence[Gain]


@dataclass(frozen=True)
class Queries:
    """Every query that was scored, with what each model found for it among the images of its task."""

    rows: NDArray[np.int64]  # (q,)
    tasks: NDArray[np.int64]  # (q,) numbers of `task_names`
    classes: NDArray[np.int64]  # (q,) numbers of `class_names`
    rankings: Mapping[str, Ranking]  # by model
    task_names: Sequence[str]
    class_names: Sequence[str]
    depths: tuple[int, ...] = DEPTHS

    @property
    def metrics(self) -> tuple[str, ...]:
        return metrics_of(self.depths)

    def units(self, model: str, metric: str) -> NDArray[np.int64]:
        units: NDArray[np.int64] = self.rankings[model].units[:, self.metrics.index(metric)]
        return units

    def of_tasks(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The tasks that have queries, and the places of these."""
        for task in np.unique(self.tasks).tolist():
            yield task, np.flatnonzero(self.tasks == task)


@dataclass(frozen=True)
class Lookup:
    """What a row id of a ranking stands for: a labelled image or a distractor."""

    name: Callable[[int], str]
    label: Callable[[int], str | None]  # None: a distractor
    image: Callable[[int], bytes | BadImage]
    same_class: Callable[[int, int], bool]


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found.

    Attributes:
        models: what the model, and the one that it is compared with, are called in `scores`, and which they are.
        images: how many there are; those of `bad` among them.
        scores: by model, the model first: the tasks in their order, each searched among its own images.
        means: by model, the mean over tasks.
        gains: of the model over the other one: the mean, then each task; empty where nothing is compared.
        bad: names of images that could not be read, and why.
        remarks: sentences about labels.
        searched: how the images were divided.
        mixed: the same among the images of all tasks; None where there is one task, or the weights of the sets differ
            by task.
        metric_gains: as `gains`, of each metric, in the mean over tasks.
        classes: of every class, in the order of tasks.
        unmatched: names, tasks and labels of queries whose class has no image in the gallery; not of leave-one-out.
        queries: every query.
        lookup: the images by row id.
    """

    models: Mapping[str, str]
    images: int
    scores: Mapping[str, Sequence[Scores]]
    means: Mapping[str, Scores]
    gains: Sequence[Gain]
    bad: Sequence[tuple[str, str]]
    remarks: Sequence[str]
    searched: Searched = Searched()
    mixed: Mixed | None = None
    metric_gains: Mapping[str, Gain] = field(default_factory=dict)
    classes: Sequence[ClassScores] = ()
    unmatched: Sequence[tuple[str, str, str]] = ()
    queries: Queries | None = field(default=None, repr=False)
    lookup: Lookup | None = field(default=None, repr=False)


def task_scores(queries: Queries, model: str, alone: Mapping[int, int]) -> list[Scores]:
    """A model on every task.

    Args:
        alone: by task, images that would be queries.
    """
    found = []
    for task, places in queries.of_tasks():
        units = queries.rankings[model].units[places]
        intervals = bootstrap_intervals([as_fractions(units)])
        values = [mean_of(units[:, column]) for column in range(units.shape[1])]
        name = queries.task_names[task]
        found.append(_scores(name, queries, places, alone.get(task, 0), list(zip(values, intervals, strict=True))))
    return found


def mean_scores(queries: Queries, model: str, alone: Mapping[int, int]) -> Scores:
    """The mean over tasks; a single task is its own."""
    of_tasks = [as_fractions(queries.rankings[model].units[places]) for _, places in queries.of_tasks()]
    intervals = bootstrap_intervals(of_tasks)
    values = [mean_over_tasks([task[:, column] for task in of_tasks]) for column in range(len(queries.metrics))]
    places = np.arange(len(queries.rows))
    tasks = [task for task, _ in queries.of_tasks()]
    return _scores(
        None, queries, places, sum(alone.get(task, 0) for task in tasks), list(zip(values, intervals, strict=True))
    )


def _scores(
    name: str | None,
    queries: Queries,
    places: NDArray[np.int64],
    alone: int,
    found: Sequence[tuple[float, tuple[float, float]]],
) -> Scores:
    figures = {m: Figure(value, *bounds) for m, (value, bounds) in zip(queries.metrics, found, strict=True)}
    plain = {metric: figures[metric].value for metric in METRICS}
    low, high = figures["r_precision"][1:]
    classes = len(np.unique(queries.classes[places]))
    return Scores(name, len(places), classes, alone, **plain, low=low, high=high, figures=figures)


def compared(queries: Queries, metric: str = "r_precision") -> list[Gain]:
    """Of the first model over the second: the mean over tasks, then each task; [] where there is one model."""
    if len(queries.rankings) < 2:
        return []
    model, other = queries.rankings
    values = {name: as_fractions(queries.units(name, metric)) for name in (model, other)}
    both = [
        TaskQueries(queries.task_names[task], queries.classes[places], {n: v[places] for n, v in values.items()})
        for task, places in queries.of_tasks()
    ]
    mean, each = gains(both, model, other)
    return [mean, *each]


def class_scores(queries: Queries) -> list[ClassScores]:
    """The mean of every metric over the queries of each class."""
    found = []
    order = np.lexsort((queries.classes, queries.tasks))
    starts = np.flatnonzero(np.diff(queries.classes[order], prepend=-1))  # numbers of classes are of one task each
    for places in np.split(order, starts[1:]) if len(order) else []:
        first = places[0]
        figures = {
            model: {metric: mean_of(ranking.units[places, column]) for column, metric in enumerate(queries.metrics)}
            for model, ranking in queries.rankings.items()
        }
        task, label = queries.task_names[queries.tasks[first]], queries.class_names[queries.classes[first]]
        found.append(ClassScores(task, label, len(places), figures))
    return found


def worst_queries(queries: Queries, model: str, count: int, each: int = 2) -> list[int]:
    """Places of the queries that a model finds least for: by R-Precision, then MAP@R; of equal ones, where what is
    found first is nearest. At most `each` of a class, as long as there are others.
    """
    keys = [queries.units(model, metric) for metric in reversed(ORDERED_BY)]
    sure = -queries.rankings[model].cosines[:, 0]
    return _spread(np.lexsort((sure, *keys)), queries.classes, count, each)


def most_changed(queries: Queries, count: int, each: int = 2) -> tuple[list[int], list[int]]:
    """Places of the queries where the first model gains most over the second, and where it loses most."""
    model, other = queries.rankings
    differences = [queries.units(model, metric) - queries.units(other, metric) for metric in reversed(ORDERED_BY)]
    order = np.lexsort(differences)
    changed = order[differences[-1][order] != 0]
    gained = [place for place in changed[::-1].tolist() if differences[-1][place] > 0]
    lost = [place for place in changed.tolist() if differences[-1][place] < 0]
    return tuple(_spread(np.array(side, np.int64), queries.classes, count, each) for side in (gained, lost))  # type: ignore[return-value]


def _spread(order: NDArray[np.int64], classes: NDArray[np.int64], count: int, each: int) -> list[int]:
    """The first of an order of queries, at most `each` of a class; then the others, where these are too few."""
    seen, taken, left = dict[int, int](), list[int](), list[int]()
    for place in order.tolist():
        if len(taken) == count:
            break
        number = int(classes[place])
        seen[number] = seen.get(number, 0) + 1
        (taken if seen[number] <= each else left).append(place)
    return [*taken, *left[: count - len(taken)]]
