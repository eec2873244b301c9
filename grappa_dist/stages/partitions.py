"""partitions: all pseudo-labels -> statistics of the partitions: how nested they are, and sample clusters of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, RowArrays, Store, wait_until_seen
from grappa_dist.data.rng import Purpose, generator
from grappa_dist.files import write_json
from grappa_dist.metrics import chance_nestedness, nestedness
from grappa_dist.stages.run import Run

PARTITIONS_FILE = "partitions.json"
MOST_ROWS = 1_000_000  # that nestedness is computed on; of more rows, a sample
SHUFFLES = 8  # permutations behind the value by chance
DRAWN_CLUSTERS = 2  # of each K, in addition to the largest and the one of median size
CLUSTER_IMAGES = 6  # shown of each cluster


@dataclass(frozen=True)
class PartitionsTask:
    """The partitions, and the artefact of their statistics."""

    labels: Mapping[int, RowArrays]  # by K; -1 for rows that do not decode
    artifact: Artifact


def partitions_of(store: Store, seed: int, labels: Mapping[int, Artifact]) -> Artifact:
    settings = {
        "seed": seed,
        "most_rows": MOST_ROWS,
        "shuffles": SHUFFLES,
        "drawn_clusters": DRAWN_CLUSTERS,
        "cluster_images": CLUSTER_IMAGES,
    }
    return store.artifact("partitions", settings, {f"k={k}": a for k, a in labels.items()})


def partition_statistics(run: Run, artifact: Artifact, labels: Mapping[int, RowArrays]) -> None:
    """Writes the statistics of the partitions, if they are missing."""
    if not artifact.complete:
        with run.console.stage("partitions", f"how K = {', '.join(map(str, labels))} agree, and samples of each"):
            run.runner.map(compute_statistics, [PartitionsTask(labels, artifact)])
            wait_until_seen([artifact])


def compute_statistics(device: torch.device, task: PartitionsTask) -> None:
    """Nestedness of consecutive K and sample clusters of every K, as row ids."""
    folder, labels = task.artifact.begin(), dict(sorted(task.labels.items()))
    sheets = [{"k": k, "clusters": list(_sample_clusters(task, k))} for k in labels]
    write_json(folder / PARTITIONS_FILE, {"nestings": list(_nestings(task, labels)), "sheets": sheets})
    task.artifact.commit()


def _nestings(task: PartitionsTask, labels: Mapping[int, RowArrays]) -> Iterator[dict[str, Any]]:
    """Every K against the next finer one, on the same rows for all of them."""
    settings = task.artifact.settings
    total = next(iter(labels.values())).starts[-1]
    draw = generator(Purpose.NESTED_ROWS, settings["seed"])
    sample = total > settings["most_rows"]
    rows = np.sort(draw.choice(total, settings["most_rows"], replace=False)) if sample else np.arange(total)
    for k, finer in pairwise(labels):
        coarse, fine = labels[k].take(rows), labels[finer].take(rows)
        rng = generator(Purpose.NESTED_BY_CHANCE, settings["seed"], k, finer)
        yield {
            "coarse": k,
            "fine": finer,
            "nestedness": nestedness(coarse, fine),
            "chance": chance_nestedness(coarse, fine, rng, settings["shuffles"]),
            "rows": len(rows),
            "of": total,
        }


def _sample_clusters(task: PartitionsTask, k: int) -> Iterator[dict[str, Any]]:
    """The largest cluster, the one of median size and some drawn ones, each with some of its rows."""
    sizes = _sizes(task.labels[k], k)
    picked = _picked(sizes, k, task.artifact.settings)
    shown = {label: _places(label, int(sizes[label]), k, task.artifact.settings) for _, label in picked}
    found = _rows_at(task.labels[k], shown)
    for pick, label in picked:
        yield {"pick": pick, "label": label, "size": int(sizes[label]), "rows": found[label]}


def _sizes(labels: RowArrays, k: int) -> NDArray[np.int64]:
    """Rows of every cluster, (K,), a shard at a time."""
    sizes = np.zeros(k, np.int64)
    for shard in range(len(labels.paths)):
        own = labels.shard(shard)
        sizes += np.bincount(own[own >= 0], minlength=k)
    return sizes


def _picked(sizes: NDArray[np.int64], k: int, settings: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Unlike, non-empty clusters: the largest, the middle one in the order of size, and drawn ones."""
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    middle = len(order) // 2
    picked = [("largest", int(order[0]))] if len(order) else []
    picked += [("median", int(order[middle]))] if middle else []
    rest = np.delete(order, [0, middle]) if middle else order[1:]
    draw = generator(Purpose.SHOWN_CLUSTERS, settings["seed"], k)
    drawn = draw.choice(rest, min(settings["drawn_clusters"], len(rest)), replace=False) if len(rest) else rest
    return [*picked, *(("drawn", int(label)) for label in drawn)]


def _places(label: int, size: int, k: int, settings: Mapping[str, Any]) -> NDArray[np.int64]:
    """Which of a cluster's rows are shown, counted in row order: drawn, since the nearest rows would not be typical."""
    draw = generator(Purpose.CLUSTER_IMAGES, settings["seed"], k, label)
    return np.sort(draw.choice(size, min(settings["cluster_images"], size), replace=False))


def _rows_at(labels: RowArrays, places: Mapping[int, NDArray[np.int64]]) -> dict[int, Sequence[int]]:
    """Row ids of some places of some clusters, a shard at a time."""
    found: dict[int, list[int]] = {label: [] for label in places}
    seen = dict.fromkeys(places, 0)
    for shard in range(len(labels.paths)):
        own = labels.shard(shard)
        for label, wanted in places.items():
            here = np.flatnonzero(own == label)
            inside = wanted[(wanted >= seen[label]) & (wanted < seen[label] + len(here))] - seen[label]
            found[label] += (labels.starts[shard] + here[inside]).tolist()
            seen[label] += len(here)
    return dict(found)
