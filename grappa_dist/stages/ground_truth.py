"""Ground truth: the JSON members of the images -> task and label of every row. Shapes: n rows.

Those of test images serve evaluation; those of training images are read for supervised baselines alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, Store, wait_until_seen
from grappa_dist.data.shards import BadLabels, ImageShards
from grappa_dist.files import read_json, write_json
from grappa_dist.stages.run import Run

MOST_UNREADABLE = 100  # JSON members that do not parse, kept by name
TASKS_FILE, LABELS_FILE, NAMES_FILE = "tasks.npy", "labels.npy", "names.json"


@dataclass(frozen=True)
class GroundTruth:
    """Task and label (n,) of every row, as numbers of names; label -1: none."""

    tasks: NDArray[np.int64]
    labels: NDArray[np.int64]
    task_names: list[str]
    label_names: list[str]

    def rows(self, task: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.tasks == task)


def ground_truth_of(store: Store, images: ImageShards, *, labelled: bool) -> Artifact:
    return store.artifact("truth", {"labelled": labelled}, {"images": images.fingerprint})


def write_ground_truth(run: Run, images: ImageShards, ground_truth: Artifact, stage: str) -> None:
    """Reads tasks and labels, once; warns of unreadable ones in the name of the stage."""
    if ground_truth.complete:
        return
    run.runner.map(read_ground_truth, [(images, ground_truth)])
    wait_until_seen([ground_truth])
    unreadable = read_json(ground_truth.path / NAMES_FILE)["unreadable"]
    if unreadable["images"]:
        run.console.log(
            f"{stage}: warning: {unreadable['images']} images count as without a label: {unreadable['first'][0]}"
        )


def read_ground_truth(device: torch.device, task: tuple[ImageShards, Artifact]) -> None:
    """Reads the JSON members and commits the artefact: the only place that reads them."""
    images, artifact = task
    folder, labelled = artifact.begin(), bool(artifact.settings["labelled"])
    tasks, labels = np.zeros(len(images), np.int64), np.full(len(images), -1, np.int64)
    task_ids: dict[str, int] = {}
    label_ids: dict[tuple[str, str], int] = {}
    unreadable = list[str]()
    for row in range(len(images)):
        try:
            member = (images.labels(row) if labelled else None) or {}
        except BadLabels as why:
            unreadable.append(str(why))
            member = {}
        name = str(member.get("task") or "all")
        tasks[row] = task_ids.setdefault(name, len(task_ids))
        if member.get("label") is not None:
            labels[row] = label_ids.setdefault((name, str(member["label"])), len(label_ids))
    np.save(folder / TASKS_FILE, tasks)
    np.save(folder / LABELS_FILE, labels)
    names = {"tasks": list(task_ids), "labels": [label for _, label in label_ids]}
    bad = {"images": len(unreadable), "first": unreadable[:MOST_UNREADABLE]}
    write_json(folder / NAMES_FILE, {**names, "unreadable": bad})
    artifact.commit()


def load_ground_truth(artifact: Artifact) -> GroundTruth:
    names = read_json(artifact.path / NAMES_FILE)
    tasks, labels = (np.load(artifact.path / f, mmap_mode="r", allow_pickle=False) for f in (TASKS_FILE, LABELS_FILE))
    return GroundTruth(tasks, labels, names["tasks"], names["labels"])
