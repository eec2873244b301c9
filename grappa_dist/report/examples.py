"""The images that the report shows: of sample queries, of queries that changed most, of sample clusters.

Shapes: g rows of a task that are searched, q queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.artifacts import RowArrays
from grappa_dist.data.decoding import decode
from grappa_dist.data.shards import ImageShards
from grappa_dist.report.content import ChangedQuery, ClusterSample, Gallery, Hit
from grappa_dist.report.gallery import small_jpeg
from grappa_dist.report.queries import changed_most
from grappa_dist.stages.bad_rows import bad_rows
from grappa_dist.stages.embed import feature_rows
from grappa_dist.stages.flow import Flow
from grappa_dist.stages.ground_truth import GroundTruth, load_ground_truth
from grappa_dist.variants import BACKBONE
from grappa_dist.verdict import TaskQueries

THUMBNAIL_PX = 112
HITS = 5  # of a query that changed
BLOCK_ROWS = 2**14  # searched at once


class Pictures:
    """Small images of rows and the names of their files, each read once."""

    def __init__(self, images: ImageShards) -> None:
        self._images = images
        self.thumbnail = cache(self._thumbnail)
        self.name = cache(self._name)

    def _thumbnail(self, row: int) -> bytes:
        return small_jpeg(decode(self._images.image_bytes(row)), THUMBNAIL_PX)

    def _name(self, row: int) -> str:
        """Of the file before it came into a shard; else its key there."""
        return self._images.name(row) or self._images.key(row)


def sample_galleries(
    flow: Flow, pictures: Pictures, insights: Mapping[str, Any], chosen: str | None
) -> Iterator[Gallery]:
    """What the backbone, the fusions as trained and, of single sets and other strengths of adaptation, the chosen model
    retrieve for the sample queries."""
    ground_truth = load_ground_truth(flow.ground_truth)
    more = [m for m, spec in flow.models.items() if not m.startswith("k=") and spec.strength == 1]
    shown = [m for m in (BACKBONE, *flow.models) if m in (BACKBONE, chosen, *more)]
    for number, first in enumerate(insights[BACKBONE]["galleries"]):
        hits = {m: insights[m]["galleries"][number]["hits"] for m in dict.fromkeys(shown)}
        found = {m: [(hit["row"], hit["score"]) for hit in of_model] for m, of_model in hits.items()}
        yield _gallery(pictures, ground_truth, first["query"], found)


def changed_queries(flow: Flow, pictures: Pictures, tasks: Sequence[TaskQueries], model: str) -> Iterator[ChangedQuery]:
    """The queries that a model is worst on, and those on which it differs most from the backbone, with neighbours."""
    ground_truth = load_ground_truth(flow.ground_truth)
    labels = ground_truth.labels.copy()
    labels[bad_rows(flow.test, flow.test_features[BACKBONE])] = -1
    features = {m: feature_rows(flow.test, flow.test_features[m]) for m in (BACKBONE, model)}
    for task in tasks:
        picked = changed_most(task, model, BACKBONE, len(tasks))
        if not picked or task.rows is None:
            continue
        queries = task.rows[[pick.place for pick in picked]]
        number = ground_truth.task_names.index(task.task)
        searched = np.flatnonzero((ground_truth.tasks == number) & (labels >= 0))
        found = {m: nearest_rows(of_model, searched, queries, HITS) for m, of_model in features.items()}
        for place, pick in enumerate(picked):
            hits = {m: of_model[place] for m, of_model in found.items()}
            gallery = _gallery(pictures, ground_truth, int(queries[place]), hits)
            yield ChangedQuery(why=pick.why, gallery=gallery, value=pick.value, baseline=pick.baseline)


def nearest_rows(
    features: RowArrays, rows: NDArray[np.int64], queries: NDArray[np.int64], count: int
) -> list[list[tuple[int, float]]]:
    """The `count` of `rows` (g,) nearest to each of the query rows (q,), itself excepted, with their cosines."""
    z = features.take_unit(queries)  # (q, D)
    near, cosines = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        part = rows[start : start + BLOCK_ROWS]
        scores = z @ features.take_unit(part).T
        scores[queries[:, None] == part] = -np.inf
        cosines = np.concatenate([cosines, scores], axis=1)
        near = np.concatenate([near, np.broadcast_to(part, scores.shape)], axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        cosines, near = np.take_along_axis(cosines, order, 1), np.take_along_axis(near, order, 1)
    return [
        [(int(row), float(cosine)) for row, cosine in zip(*of_query, strict=True) if np.isfinite(cosine)]
        for of_query in zip(near, cosines, strict=True)
    ]


def _gallery(
    pictures: Pictures, known: GroundTruth, query: int, found: Mapping[str, Sequence[tuple[int, float]]]
) -> Gallery:
    label = int(known.labels[query])

    def hit(row: int, score: float) -> Hit:
        correct = None if label < 0 else bool(known.labels[row] == label)
        return Hit(image=pictures.thumbnail(row), score=score, correct=correct, name=pictures.name(row))

    return Gallery(
        task=known.task_names[int(known.tasks[query])],
        query=pictures.thumbnail(query),
        name=pictures.name(query),
        label=known.label_names[label] if label >= 0 else None,
        results={m: [hit(*pair) for pair in of_model] for m, of_model in found.items()},
    )


def cluster_samples(pictures: Pictures, clusters: Sequence[Mapping[str, Any]]) -> list[ClusterSample]:
    """Clusters of the training images with some of their images."""
    return [
        ClusterSample(
            pick=c["pick"], label=c["label"], size=c["size"], images=[pictures.thumbnail(row) for row in c["rows"]]
        )
        for c in clusters
    ]
