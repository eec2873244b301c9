"""Ground truth: the JSON members of the images -> task and label of every row. Shapes: n rows.

Those of test images serve evaluation; those of training images are read for supervised baselines alone. Which values
are none, and which are the same, is decided in data/labels.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, Store, wait_until_seen
from grappa_dist.checksums import load_array, load_json
from grappa_dist.config import DataConfig
from grappa_dist.console import pluralize
from grappa_dist.data.labels import Names, named
from grappa_dist.data.loader import Images
from grappa_dist.data.shards import BadLabels, ImageShards
from grappa_dist.files import save_array, write_json
from grappa_dist.stages.run import Run

MOST_UNREADABLE = 100  # JSON members that do not parse, kept by name
TASKS_FILE, LABELS_FILE, NAMES_FILE = "tasks.npy", "labels.npy", "names.json"
RULE = 2  # of data/labels.py
_NO_TASK = "all"
_KEYS_NAMED = 8  # of JSON members without a label


@dataclass(frozen=True)
class GroundTruth:
    """Task and label (n,) of every row, as numbers of names; label -1: none."""

    tasks: NDArray[np.int64]
    labels: NDArray[np.int64]
    task_names: list[str]
    label_names: list[str]
    other_keys: list[str]  # of JSON members, where none of them has a label

    def rows(self, task: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.tasks == task)


def ground_truth_of(store: Store, images: ImageShards, *, labelled: bool, data: DataConfig | None = None) -> Artifact:
    """The artefact; a name of its own where one made by an earlier rule says something else than the rule of now.

    Args:
        data: says where labels are; by default under the key `label`.
    """
    settings: dict[str, Any] = {"labelled": labelled}
    if data is not None and labelled:
        settings |= {} if data.label_field is None else {"label_field": data.label_field}
        settings |= {} if data.label_member == "json" else {"label_member": data.label_member}
    artifact = store.artifact("truth", settings, {"images": images.fingerprint})
    if artifact.complete and _is_outdated(artifact):
        return store.artifact("truth", {**settings, "rule": RULE}, {"images": images.fingerprint})
    return artifact


def _is_outdated(artifact: Artifact) -> bool:
    """Whether what an earlier rule found holds a class that is none, or two that are one, or may lack the task 0."""
    try:
        names = load_json(artifact.path / NAMES_FILE)
        tasks, labels = names["tasks"], names["labels"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged, which its checksum will show
        return False
    if "rule" in names:
        return False
    found = [[named(text).name for text in of] for of in (tasks, labels)]
    equal = len(set(found[0])) < len(tasks) or (len(tasks) == 1 and len(set(found[1])) < len(labels))
    lists = any(text.startswith(("[", "{")) for text in (*tasks, *labels))
    zero = _NO_TASK in tasks and any(text.replace(".", "").isdigit() for text in tasks)
    return equal or lists or zero or None in found[0] or None in found[1]


def write_ground_truth(run: Run, images: ImageShards, ground_truth: Artifact, stage: str) -> None:
    """Reads tasks and labels, once; warns in the name of the stage of what is unreadable or counts as none.

    Raises:
        ValueError: no image has a label where a setting says that they are.
    """
    if ground_truth.complete:
        _refuse_none(ground_truth)
        return
    run.runner.map(read_ground_truth, [(images, ground_truth)])
    wait_until_seen([ground_truth])
    names = load_json(ground_truth.path / NAMES_FILE)
    unreadable = names["unreadable"]
    if unreadable["images"]:
        run.console.log(f"{stage}: warning: {describe_unreadable(unreadable['images'], unreadable['first'][0])}")
    for line in names.get("remarks", []):
        run.console.log(f"{stage}: warning: {line}")
    _refuse_none(ground_truth)


def _refuse_none(ground_truth: Artifact) -> None:
    """Raises ValueError where a setting says where labels are, and no image has one there."""
    asked = {key: value for key, value in ground_truth.settings.items() if key.startswith("label_")}
    if asked and (load_array(ground_truth.path / LABELS_FILE) < 0).all():
        keys = ", ".join(f"{key!r:.40}" for key in load_json(ground_truth.path / NAMES_FILE).get("other_keys", []))
        raise ValueError(
            f"{' and '.join(f'data.{key}={value}' for key, value in asked.items())}: no image has a label there; its "
            f"JSON members have {keys or 'no keys'}"
        )


def read_ground_truth(device: torch.device, task: tuple[ImageShards, Artifact]) -> None:
    """Reads the JSON members and commits the artefact: the only place that reads them."""
    images, artifact = task
    settings = artifact.settings
    folder, labelled = artifact.begin(), bool(settings["labelled"])
    unreadable = list[str]()
    found, remarks = numbered_members(
        members_of(images, settings.get("label_field"), settings.get("label_member"), unreadable)
        if labelled
        else [{}] * len(images),
        len(images),
    )
    save_array(folder / TASKS_FILE, found.tasks)
    save_array(folder / LABELS_FILE, found.labels)
    names = {"tasks": found.task_names, "labels": found.label_names, "rule": RULE}
    bad = {"images": len(unreadable), "first": unreadable[:MOST_UNREADABLE]}
    lines = {"remarks": remarks} if remarks else {}
    others = {"other_keys": found.other_keys} if (found.labels < 0).all() else {}
    write_json(folder / NAMES_FILE, {**names, "unreadable": bad, **lines, **others})
    artifact.commit()


def numbered_members(members: Iterable[Mapping[str, Any]], count: int) -> tuple[GroundTruth, list[str]]:
    """Tasks and labels of `count` rows from what is noted of each; lines about what names nothing, or is the same."""
    tasks, labels = np.zeros(count, np.int64), np.full(count, -1, np.int64)
    task_names, label_names, keys = Names(), Names(), Counter[str]()
    for row, member in enumerate(members):
        number = task_names.number(member.get("task"))
        tasks[row] = task_names.number(_NO_TASK) if number < 0 else number
        labels[row] = label_names.number(member.get("label"), within=int(tasks[row]))
        keys.update(key for key in member if len(keys) < 100)
    other_keys = [key for key, _ in keys.most_common(_KEYS_NAMED)] if (labels < 0).all() else []
    found = GroundTruth(tasks, labels, task_names.shown, label_names.shown, other_keys)
    return found, [*label_names.described("label"), *task_names.described("task")]


def members_of(images: Images, key: str | None, suffix: str | None, unreadable: list[str]) -> Iterator[dict[str, Any]]:
    """What is noted of every row, its label under `label`; nothing where it cannot be used.

    Args:
        key: the one that has the label; None: `label`.
        suffix: of shards: of the file beside the image whose text is the label, in place of a key.
        unreadable: gets a line for each row that cannot be used.
    """
    for row in range(len(images)):
        try:
            member = images.labels(row) or {}
            if suffix is not None and isinstance(images, ImageShards):
                member = {**member, "label": images.text(row, suffix)}
            elif key is not None:
                member = {**member, "label": member.get(key)}
            yield member
        except BadLabels as why:
            unreadable.append(str(why))
            yield {}


def describe_unreadable(count: int, first: str) -> str:
    return f"{pluralize(count, 'image counts', 'images count')} as without a label: {first}"


def load_ground_truth(artifact: Artifact) -> GroundTruth:
    names = load_json(artifact.path / NAMES_FILE)
    tasks, labels = (load_array(artifact.path / f) for f in (TASKS_FILE, LABELS_FILE))
    return GroundTruth(tasks, labels, names["tasks"], names["labels"], names.get("other_keys", []))
