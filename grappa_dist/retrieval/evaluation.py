"""Retrieval scores of any model on any labelled images, leave-one-out as in the paper, beside another model.

Every labelled image is a query among the others of its task. The figures are those that a run computes of the same
images (stages/evaluate.py). Shapes: n images, q queries of a task, D channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.console import Console, pluralize
from grappa_dist.data.loader import Images
from grappa_dist.data.shards import ImageShards
from grappa_dist.metrics import METRICS, QueryScores, query_scores
from grappa_dist.retrieval import BATCH_SIZE, DECODE_THREADS
from grappa_dist.retrieval.embedding import Embedder
from grappa_dist.retrieval.images import open_images
from grappa_dist.retrieval.opening import OWN_BACKBONE, Named, OpenModel, is_backbone, open_model
from grappa_dist.significance import bootstrap_interval, mean_over_tasks
from grappa_dist.stages.ground_truth import GroundTruth, describe_unreadable, members_of, numbered_members
from grappa_dist.verdict import Gain, TaskQueries, gains


@dataclass(frozen=True)
class Scores:
    """One model on one task, or in the mean over tasks; figures in [0, 1]."""

    task: str | None  # None: the mean over tasks
    queries: int
    classes: int  # of the queries
    alone: int  # images that are the only one of their class, so that they are searched among and are no queries
    r_precision: float
    map_at_r: float
    recall_at_1: float
    low: float  # 95 % bootstrap interval of R-Precision over queries
    high: float


@dataclass(frozen=True)
class Evaluated:
    """What `evaluate` found.

    Attributes:
        models: what the model, and the one that it is compared with, are called in `scores`, and which they are.
        images: how many there are; those of `bad` among them.
        scores: by model, the model first: the tasks in their order.
        means: by model, the mean over tasks.
        gains: of the model over the other one: the mean, then each task; empty where nothing is compared.
        bad: names of images that could not be read, and why.
        remarks: sentences about labels.
    """

    models: Mapping[str, str]
    images: int
    scores: Mapping[str, Sequence[Scores]]
    means: Mapping[str, Scores]
    gains: Sequence[Gain]
    bad: Sequence[tuple[str, str]]
    remarks: Sequence[str]


def evaluate(
    model: Named,
    images: str | Path | Sequence[str | Path],
    *,
    against: Named | None = OWN_BACKBONE,
    label_column: str | None = None,
    gallery: str | None = None,
    settings: Iterable[str] = (),
    trust_modules: bool | None = None,
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
    decode_threads: int = DECODE_THREADS,
) -> Evaluated:
    """R-Precision, MAP@R and recall@1 of a model on labelled images, and how sure it is better than another.

    Args:
        model: a run directory, an exported model's, `timm:<model>`, `<module>:<function>`, or what `load_model` gives.
        images: class folders, a CSV with labels, or shards with labels; one or several.
        against: the model to compare with; "backbone": the model's own, if it has adaptors; None: nothing.
        label_column: the column of a CSV, or the key of the shards' JSON members, that has the labels.
        gallery: of a model of the variant `gallery`: the task whose weights are used, in place of each task's own.
        settings: `backbone.key=value`, as of a run, of a backbone that `model` or `against` names.
        trust_modules: as for `load_model`.
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:<number>".

    Raises:
        ValueError: there is no such model or image, or no image has a label that another one shares.
    """
    places = [str(place) for place in ([images] if isinstance(images, str | Path) else images)]
    console = Console()
    found = open_images(places, labelled=True, label_column=label_column, log=console.log)
    labels = _labels_of(found, label_column)
    mine, theirs = _divided(tuple(settings), model, against)
    opened = open_model(model, device, gallery=gallery, settings=mine, trust_modules=trust_modules)
    other = _other(opened, against, device, settings=theirs, trust_modules=trust_modules)
    models = {opened.variant: opened}
    if other is not None:
        models = dict(zip(_called(opened, other, own=against == OWN_BACKBONE), (opened, other), strict=True))
    embedders = {name: Embedder(one, console, batch_size, decode_threads) for name, one in models.items()}
    return _evaluated(embedders, found, labels)


def _evaluated(embedders: Mapping[str, Embedder], images: Images, labels: _Labels) -> Evaluated:
    queries, bad = dict[str, list[_Task]](), dict[int, str]()
    for name, embedder in embedders.items():
        queries[name], reasons = _queries_of(embedder, images, labels)
        bad |= reasons
    return Evaluated(
        {name: embedder.model.describe() for name, embedder in embedders.items()},
        len(images),
        {name: [task.scores() for task in tasks] for name, tasks in queries.items()},
        {name: _mean(tasks) for name, tasks in queries.items()},
        _gains(queries),
        [(images.name(row) or images.where(row), why) for row, why in sorted(bad.items())],
        labels.remarks,
    )


def _divided(settings: tuple[str, ...], model: Named, against: Named | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The settings for each model: for those that are named backbones; else for the first, which refuses them."""
    if against is None or not is_backbone(against):
        return settings, ()
    return settings if is_backbone(model) else (), settings


def _other(model: OpenModel, against: Named | None, device: str, **how: Any) -> OpenModel | None:
    if against is None:
        return None
    if isinstance(against, str) and against == OWN_BACKBONE:
        return model.backbone() if model.has_adaptors else None
    return open_model(against, device, **how)


def _called(model: OpenModel, other: OpenModel, *, own: bool) -> tuple[str, str]:
    """Two different names: of the variants, else as the caller named them, else with numbers.

    Args:
        own: whether the other is the model's own backbone, which alone is called so.
    """
    variant = other.variant if own or other.has_adaptors or not model.has_adaptors else other.name
    for names in ((model.variant, variant), (model.name, other.name)):
        if names[0] != names[1]:
            return names
    return f"{model.name} (1)", f"{other.name} (2)"


@dataclass(frozen=True)
class _Labels:
    ground_truth: GroundTruth
    remarks: list[str]


def _labels_of(images: Images, column: str | None) -> _Labels:
    """Task and label of every image, by the rule of data/labels.py.

    Raises:
        ValueError: none has a label.
    """
    unreadable = list[str]()
    key = column if isinstance(images, ImageShards) else None  # a list's items have theirs from its column
    ground_truth, remarks = numbered_members(members_of(images, key, None, unreadable), len(images))
    if unreadable:
        remarks.append(describe_unreadable(len(unreadable), unreadable[0]))
    if (ground_truth.labels < 0).all():
        noted = [key for key in ground_truth.other_keys if column is not None or key not in ("label", "task")]
        keys = f"; their JSON members have {', '.join(noted)}" if noted and isinstance(images, ImageShards) else ""
        asked = "" if column is None else f" under {column!r}"
        raise ValueError(
            f"none of {pluralize(len(images), 'image')} has a label{asked}{keys}; expected class folders, or a CSV or "
            "shards with labels (--label-column names them)"
        )
    if without := int((ground_truth.labels < 0).sum()):
        remarks.append(f"{pluralize(without, 'image')} without a label: neither query nor searched")
    return _Labels(ground_truth, remarks)


@dataclass(frozen=True)
class _Task:
    """The queries of one task, for one model."""

    task: str
    queries: QueryScores
    classes: NDArray[np.int64]  # (q,) the label of each query
    alone: int

    def scores(self) -> Scores:
        values = self.queries.values()
        low, high = bootstrap_interval([values])
        figures = self.queries.sums().finish()
        means = {metric: figures[metric] for metric in METRICS}
        return Scores(self.task, len(values), len(np.unique(self.classes)), self.alone, **means, low=low, high=high)


def _queries_of(embedder: Embedder, images: Images, labels: _Labels) -> tuple[list[_Task], dict[int, str]]:
    """How a model does on every query, by task; and why images could not be read, by row.

    Raises:
        ValueError: there is no query.
    """
    ground_truth, tasks, bad = labels.ground_truth, list[_Task](), dict[int, str]()
    weighed = bool(embedder.model.galleries) and embedder.model.gallery is None
    whole = np.flatnonzero(ground_truth.labels >= 0)
    parts = [whole[ground_truth.tasks[whole] == number] for number in range(len(ground_truth.task_names))]
    together = None if weighed else embedder.embed(images, whole)
    for number, rows in enumerate(parts):
        if weighed:  # each task with the weights that the run found for it
            embedder.model.weigh(ground_truth.task_names[number])
        found = embedder.embed(images, rows) if together is None else together
        places = np.arange(len(rows)) if together is None else np.searchsorted(whole, rows)
        bad |= found.bad
        good = np.array([row not in found.bad for row in rows.tolist()], dtype=bool)
        task = _task(ground_truth.task_names[number], found.rows[places][good], ground_truth.labels[rows][good])
        tasks += [task] * bool(len(task.classes))
    if not tasks:
        raise ValueError(
            f"no image has a label that another one shares, among {pluralize(len(whole) - len(bad), 'labelled image')} "
            "that can be read: there is nothing to find"
        )
    return tasks, bad


def _task(name: str, z: NDArray[np.float32], labels: NDArray[np.int64]) -> _Task:
    found = query_scores(torch.from_numpy(z), torch.from_numpy(labels))
    return _Task(name, found, labels[found.rows], len(labels) - len(found.rows))


def _mean(tasks: Sequence[_Task]) -> Scores:
    """The mean over tasks; a single task is its own."""
    values = [task.queries.values() for task in tasks]
    low, high = bootstrap_interval(values)
    figures = {metric: mean_over_tasks([task.queries.values(metric) for task in tasks]) for metric in METRICS}
    return Scores(
        None,
        queries=sum(map(len, values)),
        classes=sum(len(np.unique(task.classes)) for task in tasks),
        alone=sum(task.alone for task in tasks),
        low=low,
        high=high,
        **figures,
    )


def _gains(queries: Mapping[str, Sequence[_Task]]) -> list[Gain]:
    if len(queries) < 2:
        return []
    model, other = queries
    both = [
        TaskQueries(a.task, a.classes, {model: a.queries.values(), other: b.queries.values()})
        for a, b in zip(queries[model], queries[other], strict=True)
    ]
    mean, each = gains(both, model, other)
    return [mean, *each]
