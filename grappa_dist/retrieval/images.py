"""The images that a verb looks at, read where they lie: folders, lists, single files, or shards.

A run makes shards of its images first, since it reads them many times; here each is read once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grappa_dist.console import pluralize
from grappa_dist.data.decoding import COPIED, TAKEN, BadImage
from grappa_dist.data.entries import is_shard_name
from grappa_dist.data.index import COMMITTED
from grappa_dist.data.loader import Images
from grappa_dist.data.shards import ImageShards
from grappa_dist.inputs.images import images_of
from grappa_dist.inputs.kinds import kind_of
from grappa_dist.make_shards.class_folders import task_name
from grappa_dist.make_shards.left_out import described
from grappa_dist.make_shards.progress import Log
from grappa_dist.make_shards.sources import FolderSource, Item, encoded, image_suffix
from grappa_dist.object_store import is_remote
from grappa_dist.storage import described as error_text


@dataclass(frozen=True)
class ImageFiles:
    """Files of images as they lie in folders; a row id is the position in `items`."""

    items: Sequence[Item]
    several: bool = False  # whether names need the folder before them

    def __len__(self) -> int:
        return len(self.items)

    def images(self, rows: Iterable[int]) -> Iterator[bytes | BadImage]:
        """The files of some rows, or why one is bad, in their order."""
        return map(self._image_or_why, rows)

    def _image_or_why(self, row: int) -> bytes | BadImage:
        item = self.items[row]
        try:
            data = item.place.read()
        except OSError as error:  # it went away meanwhile, or is not ours to read
            return BadImage(f"cannot be read: {error.strerror or error_text(error)}")
        if item.suffix in COPIED:
            return data
        made = encoded(data, item.suffix, None)  # as make_shards writes it
        return made.data if made.bad is None else BadImage(made.bad)

    def where(self, row: int) -> str:
        return self.items[row].where

    def name(self, row: int) -> str:
        """The name of the file below its folder; with the folder where there are several."""
        item = self.items[row]
        return os.path.join(item.source.path, item.name) if self.several else item.name

    def key(self, row: int) -> str:
        return self.name(row)

    def labels(self, row: int) -> dict[str, Any] | None:
        item = self.items[row]
        side = {} if item.split is None else {"split": item.split}
        return {"label": item.label, "task": item.task, **side}

    def stamp(self, row: int) -> str:
        """What tells whether the file has changed: its size and time of change."""
        item = self.items[row]
        return item.source.stamp(item.name)


def open_images(
    paths: Sequence[str],
    *,
    labelled: bool = False,
    label_column: str | None = None,
    split_column: str | None = None,
    log: Log = lambda line: None,
) -> Images:
    """The images of folders, lists and tables, of single files, or of shards; not of both shards and others.

    Args:
        labelled: whether folders are classes; of a folder that is split, those that test are taken. Else the names of
            folders mean nothing.
        label_column: of a list or table, by default `label`, `fine` or `class`.
        split_column: of a list, what its images have as `split`; of other inputs but shards it is refused.
        log: gets a line for what is passed over.

    Raises:
        ValueError: there are none, or they cannot be read, or not as classes.
    """
    given = [os.path.expanduser(path) for path in paths]
    if not given:
        raise ValueError("no images are given; expected a folder, a CSV that lists them, or shards")
    of_shards = [path for path in given if _are_shards(path)]
    if len(of_shards) == len(given):
        shards = ImageShards.open(given, None, log=log)
        if not len(shards):
            raise ValueError(f"{' '.join(given)}: the shards hold no images")
        return shards
    if of_shards:
        raise ValueError(f"{of_shards[0]} is a shard, or has some, and other images are none; expected one kind")
    items = [item for path in given for item in _items(path, labelled, (label_column, split_column), log)]
    return ImageFiles(items, several=len({item.source.path for item in items}) > 1)


def _are_shards(path: str) -> bool:
    if is_remote(path) or path.endswith(".tar"):
        return True
    if not os.path.exists(path) and any(c in path for c in "*?[{"):
        return kind_of(path) == "shards"
    return os.path.isdir(path) and any(is_shard_name(name) or name == COMMITTED for name in os.listdir(path))


def _items(path: str, labelled: bool, columns: tuple[str | None, str | None], log: Log) -> list[Item]:
    """The images of a folder, a list or a table, or a single one; columns of labels and of sides."""
    if os.path.isfile(path) and image_suffix(path) is not None:
        place = Path(path).absolute()
        return [Item(FolderSource(place.parent), place.name, None, task_name(place.parent))]
    found = images_of(
        path, "auto" if labelled and columns[1] is None else "none", columns[0], log, split_column=columns[1]
    )
    if found is None:
        what = "does not exist; expected"
        if os.path.exists(path):
            what = "is no folder, image, list or table; expected"
        if os.path.isdir(path):
            what = f"no images; expected files ending in {', '.join(TAKEN)}, or"
        raise ValueError(f"{path}: {what} a folder of images, a CSV or JSONL list, parquet, or shards")
    items = [*(found.test or found.train)]
    if labelled and os.path.isdir(path) and all(item.label is None for item in items):
        flat = next((item.name for item in items if "/" not in item.name), items[0].name)
        raise ValueError(f"{path}: {flat!r} lies in no class folder; expected CLASS/FILE, or a list with labels")
    if found.test and found.train:
        train, test = len(found.train), len(found.test)
        log(
            f"{path}: {pluralize(test, 'image that tests is', 'images that test are')} scored, "
            f"{pluralize(train, 'that trains is', 'that train are')} not"
        )
    for line in described(found.left_out):
        log(f"{path}: {line}")
    return items
