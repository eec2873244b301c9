"""Ground truth: the JSON members of the images -> task and label of every row. Shapes: n rows.

Those of test images serve evaluation; those of training images are read for supervised baselines alone. Which values
are none, and which are the same, is decided in data/labels.py.

Of many images, all workers read: each task notes which different members some shards have, and which row has which.
One task then numbers these in the order of the rows, so the artefact does not depend on how the shards are divided.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, Store, wait_for_files, wait_until_seen
from grappa_dist.bucket import send
from grappa_dist.checksums import load_array, load_json
from grappa_dist.config import DataConfig
from grappa_dist.console import pluralize
from grappa_dist.data.labels import Names, named
from grappa_dist.data.loader import Images
from grappa_dist.data.shards import BadLabels, ImageShards
from grappa_dist.files import read_json, save_array, write_json
from grappa_dist.stages.run import Run

MOST_UNREADABLE = 100  # JSON members that do not parse, kept by name
TASKS_FILE, LABELS_FILE, NAMES_FILE = "tasks.npy", "labels.npy", "names.json"
RULE = 2  # of data/labels.py
_NO_TASK = "all"
_KEYS_NAMED, _MOST_KEYS = 8, 100  # of JSON members without a label: named, and noted
ROWS_PER_TASK = 2**15  # whose members one task reads, in whole shards


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
    tasks = _tasks_of(images, ground_truth)
    if len(tasks) > 1:
        counter = run.console.counter(f"{stage}: labels", [sum(map(len, task.shards)) for task in tasks])
        run.runner.map(read_members, tasks, counter)
        run.runner.map(join_members, [(ground_truth, [task.name for task in tasks])])
    else:
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


@dataclass(frozen=True)
class Members:
    """What is noted of some rows: its different members in the order in which they come, and which one a row has."""

    which: NDArray[np.int32]  # (n,)
    different: list[list[Any]]  # task, why it is none, label, why it is none
    keys: Counter[str]
    unreadable: int = 0
    first_unreadable: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MembersTask:
    """Some shards whose members are read by themselves."""

    shards: tuple[ImageShards, ...]  # one each
    first: int  # the number of the first
    artifact: Artifact

    @property
    def name(self) -> str:
        return f"members-{self.first}-{self.first + len(self.shards)}"


def _tasks_of(images: ImageShards, artifact: Artifact) -> list[MembersTask]:
    """About ROWS_PER_TASK rows each; one task where there is little to read, or nothing."""
    if not artifact.settings["labelled"] or len(images) <= ROWS_PER_TASK:
        return [MembersTask((), 0, artifact)]
    owners = images.starts[:-1] // ROWS_PER_TASK
    firsts = np.flatnonzero(np.diff(owners, prepend=-1)).tolist()
    return [
        MembersTask(tuple(images.part(i) for i in range(first, after)), first, artifact)
        for first, after in zip(firsts, [*firsts[1:], len(owners)], strict=True)
    ]


def read_members(device: torch.device, task: MembersTask) -> None:
    """Writes what is noted of some shards into the unfinished artefact, unless that is done."""
    folder = task.artifact.begin()
    files = [folder / f"{task.name}.npy", folder / f"{task.name}.json"]
    if not files[1].exists():
        found = _read(task.shards, task.artifact, sum(map(len, task.shards)))
        save_array(files[0], found.which)
        rest = {"different": found.different, "keys": found.keys.most_common(), "unreadable": found.unreadable}
        write_json(files[1], {**rest, "first_unreadable": found.first_unreadable})
    send(*files)


def join_members(device: torch.device, task: tuple[Artifact, Sequence[str]]) -> None:
    """Numbers what the tasks of these names have noted, in their order, and commits the artefact."""
    artifact, names = task
    folder = artifact.begin()
    wait_for_files(folder / f"{name}{suffix}" for name in names for suffix in (".json", ".npy"))
    _commit(artifact, [_noted(folder, name) for name in names])


def _noted(folder: Path, name: str) -> Members:
    noted = read_json(folder / f"{name}.json")
    keys = Counter[str](dict(noted["keys"]))
    which = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    return Members(which, noted["different"], keys, noted["unreadable"], noted["first_unreadable"])


def read_ground_truth(device: torch.device, task: tuple[ImageShards, Artifact]) -> None:
    """Reads the members of all shards and commits the artefact."""
    images, artifact = task
    _commit(artifact, [_read([images], artifact, len(images))])


def _read(parts: Sequence[ImageShards], artifact: Artifact, count: int) -> Members:
    """What is noted of the rows of some shards: the only place of a run that reads labels."""
    settings, unreadable = artifact.settings, list[str]()
    if not settings["labelled"]:
        return _members([{}] * count, count)
    rows = (
        member
        for images in parts
        for member in members_of(images, settings.get("label_field"), settings.get("label_member"), unreadable)
    )
    found = _members(rows, count)
    return Members(found.which, found.different, found.keys, len(unreadable), unreadable[:MOST_UNREADABLE])


def _commit(artifact: Artifact, parts: Sequence[Members]) -> None:
    folder = artifact.begin()
    found, remarks = _numbered(parts)
    save_array(folder / TASKS_FILE, found.tasks)
    save_array(folder / LABELS_FILE, found.labels)
    names = {"tasks": found.task_names, "labels": found.label_names, "rule": RULE}
    first = [line for part in parts for line in part.first_unreadable][:MOST_UNREADABLE]
    bad = {"images": sum(part.unreadable for part in parts), "first": first}
    lines = {"remarks": remarks} if remarks else {}
    others = {"other_keys": found.other_keys} if (found.labels < 0).all() else {}
    write_json(folder / NAMES_FILE, {**names, "unreadable": bad, **lines, **others})
    artifact.commit(discard=["members-*"])


def numbered_members(members: Iterable[Mapping[str, Any]], count: int) -> tuple[GroundTruth, list[str]]:
    """Tasks and labels of `count` rows from what is noted of each; lines about what names nothing, or is the same."""
    return _numbered([_members(members, count)])


def _members(members: Iterable[Mapping[str, Any]], count: int) -> Members:
    which, keys, places, different = np.zeros(count, np.int32), Counter[str](), dict[str, int](), list[list[Any]]()
    for row, member in enumerate(members):
        values = [part for key in ("task", "label") for part in _written(member.get(key))]
        place = places.setdefault(json.dumps(values), len(different))  # 1, 1.0, "1" and true differ
        if place == len(different):
            different.append(values)
        which[row] = place
        keys.update(key for key in member if len(keys) < _MOST_KEYS)
    return Members(which, different, keys)


def _written(value: object) -> tuple[object, str]:
    """A value that names something, else None; why it names nothing."""
    found = named(value)
    return (None if found.name is None else value), found.remark


def _numbered(parts: Sequence[Members]) -> tuple[GroundTruth, list[str]]:
    """Tasks and labels of all rows, numbered in the order in which they come."""
    task_names, label_names, keys = Names(), Names(), Counter[str]()
    tasks, labels = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
    for part in parts:
        counts = np.bincount(part.which, minlength=len(part.different)).tolist()
        numbers = np.zeros((len(part.different), 2), np.int64)
        for place, (task, no_task, label, no_label) in enumerate(part.different):
            number = _number(task_names, (task, no_task), counts[place])
            numbers[place, 0] = task_names.number(_NO_TASK) if number < 0 else number
            numbers[place, 1] = _number(label_names, (label, no_label), counts[place], within=int(numbers[place, 0]))
        tasks.append(numbers[part.which, 0])
        labels.append(numbers[part.which, 1])
        keys.update(part.keys)
    of_rows = np.concatenate([np.zeros(0, np.int64), *labels])
    other_keys = [key for key, _ in keys.most_common(_KEYS_NAMED)] if (of_rows < 0).all() else []
    of_tasks = np.concatenate([np.zeros(0, np.int64), *tasks])
    found = GroundTruth(of_tasks, of_rows, task_names.shown, label_names.shown, other_keys)
    return found, [*label_names.described("label"), *task_names.described("task")]


def _number(names: Names, written: tuple[object, str], count: int, within: object = None) -> int:
    """The number of what a value names, which `count` rows have; -1 where it names nothing."""
    value, remark = written
    if value is not None:
        return names.number(value, within=within)
    if remark:
        names.remarks[remark] += count
    return -1


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
