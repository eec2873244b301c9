"""evaluate: features of every model -> retrieval scores per task, and label-free figures (stages/insight.py).

One job on all workers, model by model. Every rank has part of the queries and reads the rows that they are compared
with from the features on storage, tile by tile; rank 0 gathers the figures of each query and commits. A rank holds,
whatever the number of images n: HELD_BYTES of rows at most (on a GPU, what fits its memory), about as much for queries
and tables, and beside these labels and the figures of queries, some 150 bytes of every image.

Shapes: n rows, q queries of a rank, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.artifacts import Artifact, RowArrays, Store, numbered, wait_until_seen
from grappa_dist.checksums import load_array
from grappa_dist.class_ranks import Gallery, score_queries, unit_on_grid
from grappa_dist.config import Config, EvaluateConfig
from grappa_dist.console import pluralize
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import wire_device
from grappa_dist.distributed.device_rows import memory_for_rows
from grappa_dist.distributed.runner import Job
from grappa_dist.distributed.worker import RankContext, wait_for_slower_ranks
from grappa_dist.files import save_array, write_json
from grappa_dist.metrics import QueryScores
from grappa_dist.models.spec import ModelSpec
from grappa_dist.stages.exclude import excluding
from grappa_dist.stages.ground_truth import GroundTruth, load_ground_truth, write_ground_truth
from grappa_dist.stages.insight import NEIGHBOURS, Insight, InsightImages
from grappa_dist.stages.run import Run
from grappa_dist.verdict import TaskQueries

SCORES_FILE, QUERIES_FILE, INSIGHT_FILE = "scores.json", "queries.npy", "insight.json"
SPREAD = "spread over classes"  # how queries of galleries are chosen where there are labels
HELD_BYTES = 2**28  # of the rows of a task in the memory of a rank without a GPU; more are read tile by tile


@dataclass(frozen=True)
class Evaluation:
    """The artefacts of one evaluation."""

    ground_truth: Artifact
    features: Mapping[str, RowArrays]  # by model name
    scores: Mapping[str, Artifact]
    insights: Mapping[str, Artifact]


@dataclass(frozen=True)
class ModelTask:
    """A model that lacks scores or insight."""

    spec: ModelSpec
    features: RowArrays
    scores: Artifact
    insight: Artifact


@dataclass(frozen=True)
class EvaluateJob:
    """What every rank of an evaluation needs."""

    images: ImageShards
    bad: NDArray[np.int64]
    ground_truth: Artifact
    models: tuple[ModelTask, ...]
    config: Config
    held_bytes: int = HELD_BYTES


def scores_of(
    store: Store,
    ground_truth: Artifact,
    model: str,
    features: Sequence[Artifact],
    *,
    excluded: Artifact | None = None,
) -> Artifact:
    inputs = {"truth": ground_truth, **numbered("shard", features), **excluding(excluded)}
    return store.artifact(f"scores/{model}", {"queries": True}, inputs)


def insight_of(
    store: Store,
    ground_truth: Artifact,
    model: str,
    settings: EvaluateConfig,
    seed: int,
    features: Sequence[Artifact],
    *,
    excluded: Artifact | None = None,
) -> Artifact:
    inputs = {"truth": ground_truth, **numbered("shard", features), **excluding(excluded)}
    of_figures = settings.model_dump(exclude={"export", "train_images", "strengths"})
    figures = {**of_figures, "seed": seed, "neighbours": NEIGHBOURS}
    if ground_truth.settings["labelled"]:
        figures["queries"] = SPREAD
    return store.artifact(f"insight/{model}", figures, inputs)


def evaluate(
    run: Run, images: ImageShards, bad: NDArray[np.int64], specs: Mapping[str, ModelSpec], evaluation: Evaluation
) -> None:
    """Reads the labels, then computes scores and insight of every model that has none."""
    ground_truth, scores, insights = evaluation.ground_truth, evaluation.scores, evaluation.insights
    models = tuple(
        ModelTask(specs[m], evaluation.features[m], scores[m], insights[m])
        for m in specs
        if not (scores[m].complete and insights[m].complete)
    )
    if models or not ground_truth.complete:
        with run.console.stage("evaluate", f"{pluralize(len(models), 'model')} on {pluralize(len(images), 'image')}"):
            write_ground_truth(run, images, ground_truth, "evaluate")
            if models:
                job = EvaluateJob(images, bad, ground_truth, models, run.config)
                run.runner.run_jobs([Job("evaluate", evaluate_models, job, run.runner.num_workers)])
                wait_until_seen(artifact for model in models for artifact in (model.scores, model.insight))


def evaluate_models(context: RankContext, job: EvaluateJob) -> None:
    """One rank: computes and commits what is missing of each model, scores with labels, and insight without.

    Raises:
        Stopped: on all ranks, when any was asked to stop; what is committed stays.
    """
    known = load_ground_truth(job.ground_truth)
    insight = Insight(context, InsightImages(job.images, known, job.bad, job.config))
    progress = _Progress(context, len(job.models))
    for model in job.models:
        if not context.of_rank_0(model.scores.complete):
            scores, queries = _scores(context, job, model, (known, progress))
            if context.comm.rank == 0:
                write_json(model.scores.begin() / SCORES_FILE, scores)
                save_array(model.scores.begin() / QUERIES_FILE, queries)
                model.scores.commit()
        if not context.of_rank_0(model.insight.complete):
            progress.phase(f"{model.spec.name}, images without labels")
            figures = insight.figures(model.spec, model.features)
            if context.comm.rank == 0:
                write_json(model.insight.begin() / INSIGHT_FILE, figures)
                model.insight.commit()
        progress.model_done()


@dataclass
class _Progress:
    """What is reported: models that are done, and what is done of the scores of the next."""

    context: RankContext
    models: int
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    def phase(self, text: str) -> None:
        """Of the model that is under way."""
        status: dict[str, Any] = {"phase": text, "done": self.done, "of": self.models, "unit": "models"}
        if self.done:
            status["left_s"] = (time.monotonic() - self.began) / self.done * (self.models - self.done)
        self.context.report(status)

    def scored(self, pieces: Generator[int, None, None], pairs: int, what: str) -> Generator[None, None, None]:
        """Reports after each piece what share of the pairs of a query and a row is behind it."""
        done = 0
        for number in pieces:
            done += number
            self.phase(f"{what}: {100 * done // pairs} % of the scores")
            yield

    def model_done(self) -> None:
        self.done += 1
        self.context.report({"done": self.done, "of": self.models, "unit": "models"})


def _scores(
    context: RankContext, job: EvaluateJob, model: ModelTask, known: tuple[GroundTruth, _Progress]
) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """Leave-one-out retrieval on every labelled task; rows that do not decode are neither query nor gallery.

    Returns:
        On rank 0 the means of each task, and (q, 4) of all queries: the row, then the metrics in units of
        `QueryScores`; nothing on the others.
    """
    ground_truth, progress = known
    labels = ground_truth.labels.copy()
    labels[job.bad] = -1
    scores, queries = list[dict[str, Any]](), [np.empty((0, 4), np.int64)]
    for number, name in enumerate(ground_truth.task_names):
        rows = ground_truth.rows(number)
        rows = rows[labels[rows] >= 0]
        gallery = _gallery(context, job, model.features, (rows, labels[rows]))
        places = gallery.queries_of(context.comm.rank, context.comm.size)
        units = torch.zeros(len(places), 3, dtype=torch.int64)
        queried = progress.scored(
            score_queries(gallery, places, units), len(places) * len(rows), f"{model.spec.name} {name}"
        )
        wait_for_slower_ranks(context, queried)
        found = _gathered(context, torch.cat([places[:, None], units], 1))
        if context.comm.rank == 0 and len(found):
            of_task = QueryScores(rows[found[:, 0]], found[:, 1:])
            scores.append({"task": name, **of_task.sums().finish()})
            queries.append(np.column_stack([of_task.rows, of_task.units]))
    return scores, np.concatenate(queries)


def _gallery(
    context: RankContext, job: EvaluateJob, features: RowArrays, labelled: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> Gallery:
    """The labelled rows of a task, with their labels."""
    rows, device = labelled[0], context.device
    classes = torch.from_numpy(np.unique(labelled[1], return_inverse=True)[1])

    def read(places: Tensor) -> Tensor:
        return unit_on_grid(torch.from_numpy(features.take_unit(rows[places.numpy()])))

    held = memory_for_rows(device) if device.type == "cuda" else job.held_bytes
    return Gallery.of(classes, read, device, dim=features.shard(0).shape[1], held_bytes=held)


def _gathered(context: RankContext, own: Tensor) -> NDArray[np.int64]:
    """All ranks' rows (q, 4), by ascending places."""
    parts = context.comm.gather(own.to(wire_device(context.comm)))
    found: NDArray[np.int64] = torch.cat(parts).cpu().numpy()
    return found[np.argsort(found[:, 0])]


def task_queries(ground_truth: Artifact, scores: Mapping[str, Artifact]) -> list[TaskQueries]:
    """The queries of each labelled task and what every model reached on them; [] without labels."""
    known = load_ground_truth(ground_truth)
    found = {m: load_array(artifact.path / QUERIES_FILE) for m, artifact in scores.items()}  # (q, 4) each
    rows = next(iter(found.values()))[:, 0] if found else np.empty(0, np.int64)
    r_precision = {m: QueryScores(rows, of_model[:, 1:]).values() for m, of_model in found.items()}
    tasks = []
    for number, name in enumerate(known.task_names):
        kept = known.tasks[rows] == number
        if kept.any():
            tasks.append(TaskQueries(name, known.labels[rows], r_precision, rows).some(kept))
    return tasks
