"""The entries of `data.train` and `data.test`: shards as they are, and all else as the shards that are made of it once.

`look` writes nothing and knows how many images there are; `Inputs.make` makes what is missing. A folder is taken with
the rules of make_shards, except that no label is needed: class folders give labels, and all images of an entry of
`data.train` train unless the folder has parts (train/ with val/ or test/), or `data.split` divides its classes.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from grappa_dist.config import Config
from grappa_dist.console import Console, pluralize
from grappa_dist.inputs.growing import Growing, count_rows
from grappa_dist.inputs.images import Images, images_of
from grappa_dist.inputs.kinds import kind_of
from grappa_dist.make_shards.collection import CLASSES_FILE, SPLITS, describe_classes, list_classes
from grappa_dist.make_shards.left_out import FILE as LIST_FILE
from grappa_dist.make_shards.left_out import LeftOut, described, joined, write_list
from grappa_dist.make_shards.progress import Log
from grappa_dist.make_shards.sources import Item
from grappa_dist.variants import SUPERVISED

SHARDS_DIR = "shards"  # below a run directory
USED_FROM = 0.5  # of a shard's images are there: then it is used by who passes over rows
_FOLDER = re.compile(r".+-(train|test)-[0-9a-f]{10}(\.removed)?")  # of the shards of an entry


@dataclass(frozen=True)
class Entry:
    """Shards that are named, or the images of something else."""

    name: str
    growing: Growing | None = None  # None: shards
    left_out: LeftOut = field(default_factory=LeftOut)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of its shards, as far as they are made."""
        return (self.name,) if self.growing is None else self.growing.made().paths

    @property
    def missing(self) -> int:
        """Images that are in no shard yet."""
        return 0 if self.growing is None else int((~self.growing.made().holds).sum())

    def make(self, log: Log, count: Callable[[int], None] | None = None) -> tuple[str, ...]:
        return (self.name,) if self.growing is None else self.growing.make(log, count).paths


@dataclass(frozen=True)
class Inputs:
    """What the training and the test images of a run are."""

    given: Config
    root: Path
    train: tuple[Entry, ...] = ()
    test: tuple[Entry, ...] = ()

    @property
    def missing(self) -> int:
        """Images of which shards are still to be made."""
        return sum(entry.missing for entry in (*self.train, *self.test))

    @property
    def sizes(self) -> dict[str, int]:
        """How many images there are, by train and test; reads the indexes of what are shards already."""
        return {side: self._size(getattr(self, side)) for side in SPLITS}

    @property
    def items(self) -> dict[str, list[Item]]:
        """The images that are in no shards of others, by train and test."""
        return {side: [item for e in getattr(self, side) if e.growing for item in e.growing.items] for side in SPLITS}

    def _size(self, entries: Sequence[Entry]) -> int:
        images = sum(len(entry.growing.items) for entry in entries if entry.growing is not None)
        return images + count_rows([entry.name for entry in entries if entry.growing is None], self.root / "index")

    def some_files(self, count: int) -> list[bytes]:
        """Files of some training images that are in no shards yet, evenly spread."""
        items = self.items["train"]
        step = max(1, len(items) // count)
        return [item.source.place(item.name).read() for item in items[::step][:count]]

    @property
    def folders(self) -> tuple[Path, ...]:
        """Those that hold the shards that are made of entries."""
        return tuple(entry.growing.folder for entry in (*self.train, *self.test) if entry.growing is not None)

    @property
    def config(self) -> Config:
        """The settings with shards as their data, as far as these are made."""
        return self._with([entry.paths for entry in self.train], [entry.paths for entry in self.test])

    def unneeded(self) -> list[Path]:
        """Shards in the run directory that were made of images which no entry names now."""
        folders = {folder.name for folder in self.folders}
        mine = self.root / SHARDS_DIR
        others = [path for path in mine.iterdir() if path.name not in folders] if mine.is_dir() else []
        grown = [entry.growing for entry in (*self.train, *self.test) if entry.growing is not None]
        below = [path for growing in grown if growing.folder.parent == mine.absolute() for path in growing.unneeded()]
        return sorted([path for path in others if _FOLDER.fullmatch(path.name) and path.is_dir()] + below)

    def make(self, log: Log, console: Console | None = None) -> Config:
        """The settings with shards as their data; makes those that are missing, as a stage of the console."""
        paths = _make([*self.train, *self.test], log, console)
        made = self._with(paths[: len(self.train)], paths[len(self.train) :])
        note_left_out(self.root, (*self.train, *self.test), log)
        for line in list_classes(self.items, self.root / CLASSES_FILE):
            log(line)
        return made

    def _with(self, train: Sequence[tuple[str, ...]], test: Sequence[tuple[str, ...]]) -> Config:
        if not self.folders:
            return self.given
        of_made = {"label_field": None, "label_member": "json"}  # what is made has its labels under the usual key
        data = self.given.data.model_copy(update={"train": sum(train, ()), "test": sum(test, ()), **of_made})
        return self.given.model_copy(update={"data": data})


def look(config: Config, root: Path, *, log: Log = lambda line: None) -> Inputs:
    """What data.train and data.test are. Lists files and writes nothing.

    Args:
        root: the run directory.
        log: gets a line for each entry that is no shards, and which of their classes train and test.

    Raises:
        ValueError: an entry holds nothing that can be used, or a file in it cannot be read.
    """
    data = config.data
    if data.collection or all(kind_of(entry) == "shards" for entry in (*data.train, *data.test)):
        shards = {side: tuple(map(Entry, getattr(data, side))) for side in SPLITS}
        return Inputs(config, root, **shards)
    where = (root / SHARDS_DIR).absolute() if data.shards_dir is None else Path(data.shards_dir).absolute()
    train, of_train = list[Entry](), list[Entry]()
    for name in data.train:
        images = images_of(name, data.split, data.label_field, log)
        train.append(_entry(name, where, "train", images))
        if images is not None and images.test:
            of_train.append(_entry(name, where, "test", images))
    test = []
    for name in data.test:
        divided = data.split == "auto" or name in data.train
        images = images_of(name, data.split if divided else "none", data.label_field, log)
        images = images if images is None or images.test else images.all_test()
        test.append(_entry(name, where, "test", images))
    found = Inputs(config, root, tuple(train), tuple(test or of_train))
    _check_labels(found)
    _describe(found.train, "to adapt to", log)
    _describe(found.test, "to test on", log)
    labels_used = config.adapt.supervised or SUPERVISED in config.fuse.variants
    for line in describe_classes(found.items, train="train" if labels_used else "train, without their labels"):
        log(line)
    if test and {entry.name for entry in of_train} - set(data.test):
        log("the test parts of data.train are not used, for data.test names other images")
    return found


def _check_labels(found: Inputs) -> None:
    """Raises ValueError where a setting would be about shards, and about what has its labels elsewhere."""
    data, entries = found.given.data, (*found.train, *found.test)
    shards = [entry.name for entry in entries if entry.growing is None]
    others = [entry.name for entry in entries if entry.growing is not None]
    if data.label_member != "json" and others:
        raise ValueError(f"data.label_member={data.label_member}: is for shards; {others[0]} is none")
    if data.label_field is not None and all(kind_of(entry.name) == "folder" for entry in entries):
        raise ValueError(
            f"data.label_field={data.label_field}: there is no column or key of that name in folders of images, whose "
            "classes are the folders below; expected a list, a table or shards"
        )
    if data.label_field is not None and shards and others:
        raise ValueError(
            f"data.label_field={data.label_field}: would be a key of the shards {shards[0]} and a column of "
            f"{others[0]}; expected one kind where it is set"
        )


def prepared(config: Config, root: Path, *, log: Log = lambda line: None, console: Console | None = None) -> Config:
    """The config with shards as its data; what is no shards is made into some once, below `root` or data.shards_dir.

    Args:
        console: shows the making of shards as a stage.
    """
    return look(config, root, log=log).make(log, console)


def shards_of(
    paths: Sequence[str],
    root: Path,
    *,
    label_field: str | None = None,
    log: Log = lambda line: None,
    console: Console | None = None,
) -> tuple[str, ...]:
    """Shards of all images that the paths name, in the order of the paths; what is none is made into some, once.

    For commands that are given images without settings of a run; made shards lie in `root`/shards. Class folders give
    labels.

    Args:
        console: shows the making of shards as a stage.

    Raises:
        ValueError: a path holds nothing that can be used.
    """
    entries = _looked_at(paths, root, label_field, log)
    shards = tuple(shard for made in _make(entries, log, console) for shard in made)
    note_left_out(root, entries, log)
    return shards


def living_shards_of(
    paths: Sequence[str], root: Path, *, log: Log = lambda line: None, console: Console | None = None
) -> tuple[tuple[str, ...], dict[str, list[int]]]:
    """As `shards_of`, with fewer shards made anew: the rows, by tar, whose images are gone are to be passed over."""
    entries = [
        replace(entry, growing=entry.growing and replace(entry.growing, used_from=USED_FROM))
        for entry in _looked_at(paths, root, None, log)
    ]
    shards = tuple(shard for made in _make(entries, log, console) for shard in made)
    note_left_out(root, entries, log)
    gone = [entry.growing.made().gone for entry in entries if entry.growing is not None]
    return shards, {tar: rows for of_entry in gone for tar, rows in of_entry.items()}


def _looked_at(paths: Sequence[str], root: Path, label_field: str | None, log: Log) -> list[Entry]:
    where = (root / SHARDS_DIR).absolute()
    found = [(path, images_of(path, "none", label_field, log)) for path in paths]
    entries = [_entry(path, where, "test", images and images.all_test()) for path, images in found]
    _describe(entries, "to look at", log)
    return entries


def _make(entries: Sequence[Entry], log: Log, console: Console | None) -> list[tuple[str, ...]]:
    """The shards of each entry; where some are to be made and there is a console, that is a stage of it."""
    sizes = [entry.missing for entry in entries]
    if console is None or not any(sizes):
        return [entry.make(log) for entry in entries]
    with console.stage("shards", f"of {pluralize(sum(sizes), 'image')}"):
        counter, began, made = console.counter("shards", sizes), time.monotonic(), list[tuple[str, ...]]()
        for number, entry in enumerate(entries):
            made.append(
                entry.make(log, lambda done: counter.running([{"done": done, "seconds": time.monotonic() - began}]))
            )
            counter(number)
    return made


def _entry(name: str, where: Path, side: str, images: Images | None) -> Entry:
    if images is None:
        return Entry(name)
    path = os.path.abspath(name)
    digest = hashlib.sha256(f"{path}\0{side}".encode("utf-8", "surrogateescape")).hexdigest()[:10]
    stem = re.sub(r"[^\w.-]+", "-", os.path.basename(path)).strip(".-") or "images"
    items = images.train if side == "train" else images.test
    growing = Growing(name, where / f"{stem}-{side}-{digest}", side, items, images.base, images.is_ordered)
    return Entry(name, growing, images.left_out)


def note_left_out(root: Path, entries: Sequence[Entry], log: Log) -> None:
    """Lists the files that entries leave out in `left_out.csv` of a directory, and logs how many, why, and where."""
    files = LeftOut(list(dict.fromkeys(joined(entry.left_out for entry in entries).files)))
    if write_list(root / LIST_FILE, files.files):
        for line in described(files):
            log(line)
        log(f"all of them by name: {root / LIST_FILE}")


def _describe(entries: Sequence[Entry], purpose: str, log: Log) -> None:
    for entry in entries:
        if entry.growing is not None:
            items = entry.growing.items
            classes = {(item.task, item.label) for item in items if item.label is not None}
            labels = f"in {pluralize(len(classes), 'class', 'classes')}" if classes else "without labels"
            log(f"{entry.name}: {pluralize(len(items), 'image')} {purpose}, {labels}")
