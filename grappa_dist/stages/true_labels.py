"""true_labels: JSON members of the training images -> a class of every row, for the rows to compare a method with.

Nothing else that trains reads a label, and this runs only where a setting asks for it. A class is a (task, label); a
row without a label has none and trains nothing. Shapes: P rows of one shard, K classes, D channels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, RowArrays, Store, numbered, wait_until_seen
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import write_json
from grappa_dist.stages.ground_truth import load_truth, note_truth
from grappa_dist.stages.label_files import CENTROIDS_FILE, label_rows, rows_file
from grappa_dist.stages.label_stats import STATS_FILE
from grappa_dist.stages.run import Run

ASKED_BY = "adapt.supervised or the variant supervised of fuse.variants"
NAMED = 3  # shards, in a message


@dataclass(frozen=True)
class TrueLabelsTask:
    """What naming the classes of all rows needs."""

    truth: Artifact
    features: RowArrays
    bad: NDArray[np.int64]
    artifact: Artifact


def true_labels_of(store: Store, truth: Artifact, features: Sequence[Artifact]) -> Artifact:
    """The artefact of the classes; it looks like that of a partition."""
    return store.artifact("labels/true", {}, {"truth": truth, **numbered("shard", features)})


def read_true_labels(run: Run, images: ImageShards, truth: Artifact, classes: Artifact) -> None:
    """Reads the labels before anything else is done, so that a run that lacks them ends at once.

    Args:
        classes: what will be made of them; where it is there, they are not looked at again.

    Raises:
        ValueError: fewer than two classes are there, saying which shards have how many labels.
    """
    if classes.complete:
        return
    with run.console.stage("true_labels", f"{ASKED_BY} asks for the labels of {len(images)} training images"):
        note_truth(run, images, truth, "true_labels")
        labels = load_truth(truth).labels
        found = len(np.unique(labels[labels >= 0]))
        if found < 2:
            raise ValueError(_too_few(images, labels, found))
        missing = int((labels < 0).sum())
        without = f"; {missing} have none and take no part: {_by_shard(images, labels)}" if missing else ""
        run.console.say(f"true_labels: {found} classes of {len(labels) - missing} images{without}")


def _too_few(images: ImageShards, labels: NDArray[np.int64], classes: int) -> str:
    return (
        f'{ASKED_BY} needs the labels of at least two classes, from members <key>.json with "label" beside the '
        f"training images; found {classes} classes on {int((labels >= 0).sum())} of {len(labels)} images: "
        f"{_by_shard(images, labels)}"
    )


def _by_shard(images: ImageShards, labels: NDArray[np.int64]) -> str:
    """How many labels the shards lack, and the first image of each that has none."""
    said = []
    for shard, about in enumerate(images.shards):
        rows = images.shard_rows(shard)
        missing = np.flatnonzero(labels[rows.start : rows.stop] < 0)
        if len(missing):
            first = images.where(rows.start + int(missing[0]))
            said.append(f"{len(missing)} of {about.rows} lack one, the first is {first}")
    more = f"; and {len(said) - NAMED} more shards" if len(said) > NAMED else ""
    return "; ".join(said[:NAMED]) + more


def name_classes(run: Run, truth: Artifact, features: RowArrays, bad: NDArray[np.int64], artifact: Artifact) -> None:
    """Numbers the classes of the rows that can be read, once."""
    if not artifact.complete:
        with run.console.stage("true_labels", f"classes of {features.starts[-1]} training images"):
            run.runner.map(write_true_labels, [TrueLabelsTask(truth, features, bad, artifact)])
            wait_until_seen([artifact])


def write_true_labels(device: torch.device, task: TrueLabelsTask) -> None:
    """Classes of all rows, -1 for none, and the mean feature of each class, where a classifier starts."""
    labels = np.array(load_truth(task.truth).labels)
    labels[task.bad] = -1
    classes = np.unique(labels[labels >= 0])
    if len(classes) < 2:
        raise ValueError(f"{ASKED_BY} needs two classes at least, found {len(classes)} on images that can be read")
    numbers = np.where(labels >= 0, np.searchsorted(classes, labels), -1).astype(np.int32)
    folder, starts = task.artifact.begin(), task.features.starts
    sums = torch.zeros(len(classes), task.features.shard(0).shape[1], dtype=torch.float64)
    for shard in range(len(starts) - 1):
        own = numbers[starts[shard] : starts[shard + 1]]
        np.save(folder / rows_file(shard), own)
        known = np.flatnonzero(own >= 0)
        sums.index_add_(0, torch.from_numpy(own[known]), torch.from_numpy(task.features.shard(shard)[known]).double())
    counts = np.bincount(numbers[numbers >= 0], minlength=len(classes))
    np.save(folder / CENTROIDS_FILE, (sums / torch.from_numpy(counts)[:, None]).float().numpy())
    labelled, images = int(counts.sum()), len(labels)
    write_json(folder / STATS_FILE, {"classes": len(classes), "labelled": labelled, "images": images})
    task.artifact.commit()


def class_counts(artifact: Artifact) -> dict[str, int]:
    """How many `classes` there are, on how many `labelled` of all `images`."""
    found: dict[str, int] = json.loads((artifact.path / STATS_FILE).read_text())
    return found


def without_class(artifact: Artifact, images: ImageShards) -> NDArray[np.int64]:
    """Row ids, ascending, of images that cannot be read or have no label."""
    labels = label_rows(artifact, images)
    found = [np.flatnonzero(labels.shard(i) < 0) + labels.starts[i] for i in range(len(images.shards))]
    return np.concatenate(found).astype(np.int64)
