"""evaluate: features of every model -> retrieval scores per task, and label-free figures (insight).

Shapes: n rows, D channels, L layers, N adaptor sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.artifacts import Artifact, RowArrays, Store, numbered, wait_until_seen
from grappa_dist.checksums import load_array
from grappa_dist.config import Config, EvaluateConfig
from grappa_dist.console import pluralize
from grappa_dist.data.decoding import Picture
from grappa_dist.data.device_batches import Memory, device_batches
from grappa_dist.data.loader import Make, load_images
from grappa_dist.data.rng import Purpose, generator, view_generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.device_rows import memory_for_rows
from grappa_dist.files import save_array, write_json
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.metrics import QueryScores, query_scores
from grappa_dist.models import Grappa
from grappa_dist.models.spec import ModelSpec, cached_model, preprocess_of
from grappa_dist.stages.embed import to_images
from grappa_dist.stages.exclude import excluding
from grappa_dist.stages.gallery_weights import rows_by_gallery
from grappa_dist.stages.ground_truth import GroundTruth, load_ground_truth, write_ground_truth
from grappa_dist.stages.run import Run
from grappa_dist.verdict import TaskQueries

SCORES_FILE, QUERIES_FILE, INSIGHT_FILE = "scores.json", "queries.npy", "insight.json"
BATCH = 64  # images at a time through a model, for insight
GALLERY_ROWS = 20_000  # images that views and gallery queries are searched among, at most
ATTENTION_IMAGES = 128  # per task
SPREAD = "spread over classes"  # how queries of galleries are chosen where there are labels
NEIGHBOURS = 5  # of each image, counted by shared task and shared label
VIEW, VIEW_CROP_AREA = 2, 0.25  # training uses views 0 and 1


@dataclass(frozen=True)
class Evaluation:
    """The artefacts of one evaluation."""

    ground_truth: Artifact
    features: Mapping[str, RowArrays]  # by model name
    scores: Mapping[str, Artifact]
    insights: Mapping[str, Artifact]


@dataclass(frozen=True)
class ModelTask:
    """What evaluating one model needs."""

    images: ImageShards
    bad: NDArray[np.int64]
    spec: ModelSpec
    features: RowArrays
    ground_truth: Artifact
    scores: Artifact
    insight: Artifact
    config: Config


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
    figures = {**settings.model_dump(exclude={"export", "train_images"}), "seed": seed, "neighbours": NEIGHBOURS}
    if ground_truth.settings["labelled"]:
        figures["queries"] = SPREAD
    return store.artifact(f"insight/{model}", figures, inputs)


def evaluate(
    run: Run, images: ImageShards, bad: NDArray[np.int64], specs: Mapping[str, ModelSpec], evaluation: Evaluation
) -> None:
    """Reads the labels, then computes scores and insight of every model that has none."""
    ground_truth, scores, insights = evaluation.ground_truth, evaluation.scores, evaluation.insights
    tasks = [
        ModelTask(images, bad, specs[m], evaluation.features[m], ground_truth, scores[m], insights[m], run.config)
        for m in specs
        if not (scores[m].complete and insights[m].complete)
    ]
    if tasks or not ground_truth.complete:
        with run.console.stage("evaluate", f"{pluralize(len(tasks), 'model')} on {pluralize(len(images), 'image')}"):
            write_ground_truth(run, images, ground_truth, "evaluate")
            run.runner.map(evaluate_model, tasks, run.console.counter("evaluate", [1] * len(tasks), "models"))
            wait_until_seen(artifact for task in tasks for artifact in (task.scores, task.insight))


def evaluate_model(device: torch.device, task: ModelTask) -> None:
    """Computes and commits what is missing of one model: scores with labels, and insight without."""
    ground_truth = load_ground_truth(task.ground_truth)
    if not task.scores.complete:
        scores, queries = _scores(task, ground_truth, device)
        write_json(task.scores.begin() / SCORES_FILE, scores)
        save_array(task.scores.begin() / QUERIES_FILE, queries)
        task.scores.commit()
    if not task.insight.complete:
        write_json(task.insight.begin() / INSIGHT_FILE, _insight(task, ground_truth, device))
        task.insight.commit()


def _scores(
    task: ModelTask, ground_truth: GroundTruth, device: torch.device
) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """Leave-one-out retrieval on every labelled task; rows that do not decode are neither query nor gallery.

    Returns:
        The means of each task, and (q, 4) of all queries: the row, then the metrics in units of `QueryScores`.
    """
    labels = ground_truth.labels.copy()
    labels[task.bad] = -1
    scores, queries = [], [np.empty((0, 4), np.int64)]
    for number, name in enumerate(ground_truth.task_names):
        rows = ground_truth.rows(number)
        rows = rows[labels[rows] >= 0]
        if len(rows):
            z = torch.from_numpy(task.features.take_unit(rows))
            fits = z.nbytes <= memory_for_rows(device)  # else they stay in host memory, as on a CPU
            found = query_scores(z, torch.from_numpy(labels[rows]), device=device if fits else None)
            scores.append({"task": name, **found.sums().finish()})
            queries.append(np.column_stack([rows[found.rows], found.units]))
    return [s for s in scores if s["queries"]], np.concatenate(queries)


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


def spread_over_classes(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """The first images of every class, then the second ones, and so on: `count` places in the labels (n,).

    Images that are alone in their class or have no label (-1), for which nothing right can be found, come last.
    """
    sizes, seen, turns = Counter(labels.tolist()), Counter[int](), list[tuple[bool, int]]()
    for label in labels.tolist():
        turns.append((label < 0 or sizes[label] == 1, seen[label]))
        seen[label] += 1
    return np.array(sorted(range(len(turns)), key=lambda place: turns[place])[:count], dtype=np.int64)


@torch.inference_mode()
def _insight(task: ModelTask, ground_truth: GroundTruth, device: torch.device) -> dict[str, Any]:
    """How often an augmented view finds its source, which images are near, and the weights of the sets."""
    found = _Insight(task, ground_truth, cached_model(task.spec, device), device)
    attention = found.attention() if task.spec.weights_vary else {}
    return {**found.views_find_sources(), **found.neighbours_agree(), "galleries": found.galleries(), **attention}


class _Insight:
    """Label-free figures of one model, on samples of images that are the same for every model."""

    def __init__(
        self, task: ModelTask, ground_truth: GroundTruth, model: torch.nn.Module, device: torch.device
    ) -> None:
        self._task, self._ground_truth, self._model, self._device = task, ground_truth, model, device
        self._settings, self._seed = task.config.evaluate, task.config.seed
        self._good = np.setdiff1d(np.arange(len(task.images)), task.bad)
        self._preprocess = preprocess_of(model)

    def views_find_sources(self) -> dict[str, Any]:
        """The share of augmented views whose nearest image is their source, among at most GALLERY_ROWS images."""
        rows = self._sample(self._good, self._settings.view_queries)
        gallery = np.union1d(self._sample(self._good, GALLERY_ROWS), rows)
        base = torch.from_numpy(self._task.features.take_unit(gallery)).to(self._device)
        found = 0
        for part, z in self._features(rows, self._augmented):
            found += int((gallery[(z @ base.T).argmax(1).cpu().numpy()] == part).sum())
        return {"view_finds_source": found / max(1, len(rows)), "view_queries": len(rows)}

    def neighbours_agree(self) -> dict[str, Any]:
        """How often the nearest of at most GALLERY_ROWS rows share task and label; nothing without labels."""
        rows = self._sample(self._good, GALLERY_ROWS)
        labels, tasks = self._ground_truth.labels[rows], self._ground_truth.tasks[rows]
        if not (labels >= 0).any():
            return {}
        z = self._task.features.take_unit(rows)
        near, _ = sharded_knn(Comm(), z, np.arange(len(rows)), NEIGHBOURS, device=self._device)
        valid = near >= 0
        labelled = valid & (labels >= 0)[:, None]
        same_task = valid & (tasks[near] == tasks[:, None])
        same_label = labelled & (labels[near] == labels[:, None])
        return {
            "neighbours_share_task": int(same_task.sum()) / max(1, int(valid.sum())),
            "neighbours_share_label": int(same_label.sum()) / max(1, int(labelled.sum())),
            "neighbour_queries": len(rows),
        }

    def galleries(self) -> list[dict[str, Any]]:
        """Some queries of every task and their nearest of at most GALLERY_ROWS rows of the task, as row ids."""
        galleries = []
        for task in range(len(self._ground_truth.task_names)):
            rows = self._sample(np.intersect1d(self._ground_truth.rows(task), self._good), GALLERY_ROWS, task, 2)
            queries = self._gallery_queries(rows, task)
            for query in queries.tolist():
                scores = self._scores_of(query, rows)
                order = np.argsort(-scores, kind="stable")[: min(self._settings.gallery_hits, len(rows) - 1)]
                hits = [{"row": int(rows[i]), "score": float(scores[i])} for i in order]
                galleries.append({"task": task, "query": query, "hits": hits})
        return galleries

    def _gallery_queries(self, rows: NDArray[np.int64], task: int) -> NDArray[np.int64]:
        """Some of a task's rows, sorted; of as many classes as possible where they have labels."""
        labels, count = self._ground_truth.labels[rows], self._settings.gallery_queries
        if not (labels >= 0).any():
            return self._sample(rows, count, task)
        order = generator(Purpose.EVALUATION_SAMPLE, self._seed, task).permutation(len(rows))
        return np.sort(rows[order[spread_over_classes(labels[order], count)]])

    def attention(self) -> dict[str, Any]:
        """Mean attention per task, (L, N) each, over a sample; mean entropy as a share of log N, (L,)."""
        assert isinstance(self._model, Grappa)
        means: dict[str, list[list[float]]] = {}
        entropies = []
        for task, name in enumerate(self._ground_truth.task_names):
            rows = self._sample(np.intersect1d(self._ground_truth.rows(task), self._good), ATTENTION_IMAGES, task, 1)
            parts = [self._model.last_attention().double().cpu() for _ in self._features(rows, self._plain)]
            if parts:
                alpha = torch.cat(parts)  # (n, L, N)
                means[name] = alpha.mean(0).tolist()
                entropies.append(-(alpha * alpha.clamp_min(1e-30).log()).sum(-1))
        layers, sets = self._model.layers, self._model.layers[0].adaptors.num_sets
        entropy = torch.cat(entropies).mean(0) / np.log(sets) if sets > 1 and entropies else torch.ones(len(layers))
        return {"attention": means, "entropy": entropy.tolist()}

    def _sample(self, rows: NDArray[np.int64], count: int, *purpose: int) -> NDArray[np.int64]:
        """Some of the rows, sorted: the same for every model."""
        draw = generator(Purpose.EVALUATION_SAMPLE, self._seed, *purpose)
        return np.sort(draw.choice(rows, min(count, len(rows)), replace=False)) if len(rows) else rows

    def _features(self, rows: NDArray[np.int64], make: Make) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Rows and their features z (b, D), by batches."""
        side, model, threads = self._preprocess.image_size, self._model, self._task.config.resources.decode_threads
        galleries = rows_by_gallery(self._task.spec, rows)
        jobs = [
            (some[start : start + BATCH], weights)
            for some, weights in galleries
            for start in range(0, len(some), BATCH)
        ]

        def read(job: tuple[NDArray[np.int64], Tensor | None], memory: Memory) -> None:
            into = memory((len(job[0]), side, side, 3))
            load_images(self._task.images, job[0], make, into.shape[1:], into=into)

        with closing(device_batches(jobs, read, self._device, threads=threads)) as batches:
            for (some, weights), (pixels, _) in zip(jobs, batches, strict=True):
                if weights is not None:
                    assert isinstance(model, Grappa)
                    model.weigh(weights)
                yield some, model(to_images(pixels, self._device)).float()

    def _plain(self, image: Picture, row: int) -> NDArray[np.uint8]:
        return self._preprocess.test(image)

    def _augmented(self, image: Picture, row: int) -> NDArray[np.uint8]:
        return self._preprocess.augment(image, view_generator(self._seed, 0, row, VIEW), VIEW_CROP_AREA)

    def _scores_of(self, query: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Cosines of a query with rows, itself last."""
        scores: NDArray[np.float32] = self._task.features.take(rows) @ self._task.features.take(np.array([query]))[0]
        scores[rows == query] = -np.inf
        return scores
