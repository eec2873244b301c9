"""exclude: lists of images -> the rows that take no part, and the near-duplicates that rows stand for.

Excluded images keep their row ids and their features, so another list embeds nothing anew. From there on they are what
images that do not decode are: in no partition, batch, pair, graph or score. With `data.duplicates=weigh`, those that a
row stands for take turns with it: training sees one of them in an epoch. Shapes: m rows that are excluded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import Artifact, Store, wait_until_seen
from grappa_dist.checksums import load_array, load_json
from grappa_dist.config import DataConfig
from grappa_dist.console import pluralize
from grappa_dist.data.loader import read_batches
from grappa_dist.data.shards import ImageShards
from grappa_dist.files import save_array, write_json
from grappa_dist.make_shards.exclusions import Exclusions, read_exclusions
from grappa_dist.stages.flow import Exclusion
from grappa_dist.stages.run import Run
from grappa_dist.training.batches import Turns

ROWS_FILE, FIRSTS_FILE, MATCHED_FILE = "rows.npy", "firsts.npy", "matched.npy"
REASONS_FILE = "reasons.json"  # how many for each reason, and the name of the first image
_THREADS = 8  # that read names


@dataclass(frozen=True)
class ExcludeTask:
    """The images of one side, and what the lists say."""

    images: ImageShards
    exclusions: Exclusions
    artifact: Artifact


def exclusion_of(store: Store, data: DataConfig, train: ImageShards, test: ImageShards, *, has_test: bool) -> Exclusion:
    """The artefacts of the images that the lists say something of.

    Args:
        test: the images that are evaluated, some of the training images where there are no test images.

    Raises:
        ValueError: a list cannot be read.
    """
    if not data.exclude:
        return Exclusion()
    lists = read_exclusions(data.exclude)

    def of(images: ImageShards, role: str, side: str) -> Artifact | None:
        settings = {"lists": lists.digest(side), "side": side}
        return (
            store.artifact(f"excluded/{role}", settings, {"images": images.fingerprint}) if settings["lists"] else None
        )

    return Exclusion(of(train, "train", "train"), of(test, "test", "test" if has_test else "train"))


def excluding(artifact: Artifact | None) -> dict[str, Artifact]:
    """What an artefact is made of besides its other inputs, where images are excluded."""
    return {} if artifact is None else {"excluded": artifact}


def exclude(run: Run, excluded: Exclusion, train: ImageShards, test: ImageShards) -> None:
    """Finds the excluded rows by the names of the images, once, and tells of them.

    Raises:
        ValueError: no image has a name that is listed.
    """
    if not run.config.data.exclude:
        return
    lists = read_exclusions(run.config.data.exclude)
    pairs = [(images, a) for images, a in ((train, excluded.train), (test, excluded.test)) if a is not None]
    if any(lists.digest(artifact.settings["side"]) != artifact.settings["lists"] for _, artifact in pairs):
        raise ValueError(f"data.exclude: {', '.join(lists.paths)} changed while the run began; start it again")
    tasks = [ExcludeTask(images, lists, artifact) for images, artifact in pairs if not artifact.complete]
    if tasks:
        with run.console.stage("exclude", f"by the names of {pluralize(sum(len(t.images) for t in tasks), 'image')}"):
            run.runner.map(find_excluded, tasks)
            wait_until_seen(task.artifact for task in tasks)
    if not pairs:  # a list may be empty, as that of a collection without near-duplicates
        run.console.log(f"warning: data.exclude: {', '.join(lists.paths)}: says nothing of these images")
        return
    found = [load_json(artifact.path / REASONS_FILE) for _, artifact in pairs]
    matched = np.zeros(len(lists.lines), bool)
    for _, artifact in pairs:
        matched[lists.lines_of(artifact.settings["side"])] |= load_array(artifact.path / MATCHED_FILE)
    if unknown := lists.check_matched(matched, found[0]["example"]):
        run.console.log(f"warning: data.exclude: {unknown}")
    for line in describe_excluded(excluded) if tasks else ():
        run.console.log(f"exclude: {line}")
    for task in tasks:
        counts = load_json(task.artifact.path / REASONS_FILE)["reasons"]
        run.console.event("excluded", artifact=task.artifact.name, images=sum(counts.values()), reasons=counts)


def find_excluded(device: torch.device, task: ExcludeTask) -> None:
    """Reads the names of all images and commits the artefact."""
    folder, names = task.artifact.begin(), _names(task.images)
    first = next(names)
    found = task.exclusions.among(chain([first], names), task.artifact.settings["side"])
    save_array(folder / ROWS_FILE, found.rows)
    save_array(folder / FIRSTS_FILE, found.firsts)
    of_side = task.exclusions.lines_of(task.artifact.settings["side"])  # other lines may change, and this stays
    save_array(folder / MATCHED_FILE, found.matched[of_side])
    counts = dict(Counter(found.reasons).most_common())
    write_json(folder / REASONS_FILE, {"reasons": counts, "images": len(task.images), "example": first[0]})
    task.artifact.commit()


def _names(images: ImageShards) -> Iterator[tuple[str]]:
    """What every image is called: by its file, else by shard and key."""

    def of_shard(shard: int) -> list[str]:
        return [images.called(row) for row in images.shard_rows(shard)]

    for names in read_batches(range(len(images.shards)), of_shard, threads=_THREADS):
        yield from ((name,) for name in names)


def excluded_rows(artifact: Artifact | None) -> NDArray[np.int64]:
    """(m,) row ids, ascending; none without an artefact."""
    return np.zeros(0, np.int64) if artifact is None else load_array(artifact.path / ROWS_FILE)


def turns_of(data: DataConfig, artifact: Artifact | None, bad: NDArray[np.int64]) -> Turns | None:
    """The near-duplicates that take turns with the row which stands for them; None where none do.

    Args:
        bad: rows that do not decode.
    """
    if artifact is None or data.duplicates != "weigh":
        return None
    members: dict[int, list[int]] = defaultdict(list)
    out = frozenset(bad.tolist())
    firsts = load_array(artifact.path / FIRSTS_FILE)
    for row, first in zip(excluded_rows(artifact).tolist(), firsts.tolist(), strict=True):
        if first >= 0 and row not in out:
            members[first].append(row)
    return Turns({first: tuple(rows) for first, rows in members.items()}) if members else None


def describe_excluded(excluded: Exclusion) -> list[str]:
    """A line for each side: how many images are excluded, and why."""
    lines = []
    for side, artifact in (("training", excluded.train), ("test", excluded.test)):
        if artifact is None or (side == "test" and artifact.settings["side"] == "train"):
            continue  # there are no test images, and some training images are evaluated
        found = load_json(artifact.path / REASONS_FILE)
        counts: Mapping[str, int] = found["reasons"]
        why = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        count = f"{sum(counts.values()):,} of {pluralize(found['images'], f'{side} image')}"
        lines.append(f"{count} excluded{f' ({why})' if why else ''}")
    return lines


def weigh_note(data: DataConfig, artifact: Artifact | None) -> str:
    """How near-duplicates are trained with; "" where none is listed with the image that stays."""
    count = 0 if artifact is None else int((load_array(artifact.path / FIRSTS_FILE) >= 0).sum())
    if not count:
        return ""
    if data.duplicates == "weigh":
        return f"{pluralize(count, 'near-duplicate')} took turns with the first image of its group, one in an epoch"
    return f"{pluralize(count, 'near-duplicate')} took no part; the first image of each group did"
