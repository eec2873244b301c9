"""make_shards: images with or without labels become OUT/train and OUT/test; which classes train and which test."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, get_args

import numpy as np

from grappa_dist.console import pluralize
from grappa_dist.data.decoding import TAKEN
from grappa_dist.data.rng import Purpose, permutation
from grappa_dist.make_shards.building import Building, bad_files, bad_reasons, build
from grappa_dist.make_shards.class_folders import Part, folder_items, part_of, sides_of, task_name
from grappa_dist.make_shards.exclusions import read_exclusions
from grappa_dist.make_shards.left_out import FILE as LIST_FILE
from grappa_dist.make_shards.left_out import LeftOut, described, joined, write_list, write_table
from grappa_dist.make_shards.lists import Columns, csv_items
from grappa_dist.make_shards.planning import Limits, plan_folder, prefixes_of
from grappa_dist.make_shards.progress import Log, Progress, align
from grappa_dist.make_shards.sources import Item, Source, as_utf8, open_source
from grappa_dist.progress import duration

Split = Literal["classes", "folders", "column", "none", "test"]
SPLITS = ("train", "test")
CLASSES_FILE = "classes.csv"
_SHOWN_CLASSES = 5
Row = TypeVar("Row")


@dataclass(frozen=True, kw_only=True)
class CollectionConfig:
    """How images become shards."""

    label_column: str | None = None  # None: "fine", which may be absent if split is none or test; "": no labels
    task_column: str | None = None  # None: "dataset"
    task: str | None = None  # one name for all images of every pair
    split: Split | None = None  # None: folders where there are such, else classes
    image_size: int | None = None  # shorter side of what is larger; None copies the files as they are
    images_per_shard: int | None = None  # None: 1000, or any number where shard_bytes is given
    shard_bytes: int | None = None  # a tar is at most so large
    seed: int = 0
    drop: tuple[str, ...] = ()  # lists of images that are left out (exclusions.py)

    def __post_init__(self) -> None:
        if self.split not in (*get_args(Split), None):
            raise ValueError(f"split must be classes, folders, column, none or test, got {self.split!r}")
        for name in ("image_size", "images_per_shard", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.label_column == "" and self.split in ("classes", None):
            raise ValueError("label_column is empty, but classes are divided by labels; expected another split")
        if self.task_column is not None and self.task is not None:
            raise ValueError(f"task_column={self.task_column} and task={self.task}; expected one of them")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    @property
    def limits(self) -> Limits:
        rows = self.images_per_shard
        return Limits(1000 if rows is None and self.shard_bytes is None else rows, self.shard_bytes)


@dataclass(frozen=True)
class Work:
    """How many processes write, and what is logged; nothing of this changes what is written."""

    workers: int = 1
    log: Log = lambda line: None  # lines that stay
    renew: Log | None = None  # on a terminal: a line that replaces the one before

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")

    def progress(self, images: int, shards: int) -> Progress:
        if self.renew is None:
            return Progress(images, shards, self.log)
        return Progress(images, shards, self.renew, interval_s=0.5)


def make_shards(pairs: Sequence[tuple[str | None, str]], out: Path, cfg: CollectionConfig, work: Work) -> str:
    """Table of what is in OUT/train and OUT/test, which it writes from pairs of (CSV or None, images)."""
    sources = [(csv, open_source(images)) for csv, images in pairs]
    if len(set(pairs)) < len(pairs):
        twice = next(images for csv, images in pairs if pairs.count((csv, images)) > 1)
        raise ValueError(f"{twice}: named twice")
    _check_tasks([source.path for csv, source in sources if csv is None], cfg)
    items = _items(sources, cfg, work.log)
    _check_names(items)
    return write_items(items, out, cfg, work=work, sources=[source for _, source in sources])


def write_items(
    items: Sequence[Item],
    out: Path,
    cfg: CollectionConfig,
    *,
    work: Work,
    sources: Sequence[Source] = (),
    left_out: LeftOut = LeftOut(),  # noqa: B008 - not changed
    base: Path | None = None,
) -> str:
    """Table of what is in OUT/train and OUT/test, which it writes from the items.

    Args:
        sources: of the items, with what they leave out.
        left_out: further files that are.
        base: the folder from which the names of their files count; by default the deepest that holds all sources.
    """
    began = time.monotonic()
    prefixes = prefixes_of({item.source.path for item in items}, base)
    splits, dropped = _without_dropped(split_items(items, cfg.split), cfg.drop, prefixes, work.log)
    left_out = joined(
        [left_out, dropped, *(source.left_out.below(prefixes.get(source.path, "")) for source in sources)]
    )
    for split in SPLITS:
        if not splits[split] and (out / split).exists():
            raise ValueError(f"{out / split}: exists, but these images have no {split} part; choose another folder")
    ordered = {split: in_order(splits[split], split, cfg.seed) for split in SPLITS if splits[split]}
    plans = [
        plan_folder((out / split).absolute(), rows, cfg.limits, cfg.image_size, prefixes=prefixes)
        for split, rows in ordered.items()
    ]
    buildings = build(plans, work.workers, log=work.log, progress=work.progress)
    lines = [*summary(buildings, left_out), *_listed(out, buildings, left_out)]
    for line in [*lines, *describe_classes(splits), *list_classes(splits, out / CLASSES_FILE)]:
        work.log(line)
    work.log(f"took {duration(time.monotonic() - began)}")
    return table(splits)


def _without_dropped(
    splits: Mapping[str, list[Item]], lists: Sequence[str], prefixes: Mapping[Path, str], log: Log
) -> tuple[dict[str, list[Item]], LeftOut]:
    """The images without those that the lists drop, and these.

    Args:
        prefixes: by source, what comes before the names of its files in shards; absolute names do as well.

    Raises:
        ValueError: a list cannot be read, or names none of the images.
    """
    exclusions, left, dropped = read_exclusions(lists), dict(splits), LeftOut()
    matched = np.zeros(len(exclusions.lines), bool)
    for side, items in splits.items() if lists else ():
        names = [f"{prefixes[item.source.path]}{item.name}" for item in items]
        both = ((n, as_utf8(os.path.join(item.source.path, item.name))) for n, item in zip(names, items, strict=True))
        found = exclusions.among(both, side)
        matched |= found.matched
        for row, reason in zip(found.rows.tolist(), found.reasons, strict=True):
            dropped.add(names[row], reason)
        out = frozenset(found.rows.tolist())
        left[side] = [item for row, item in enumerate(items) if row not in out]
    example = next((f"{prefixes[item.source.path]}{item.name}" for items in splits.values() for item in items), "")
    if unknown := exclusions.check_matched(matched, example):
        log(f"warning: {unknown}")
    return left, dropped


def _listed(out: Path, buildings: Sequence[Building], left_out: LeftOut) -> list[str]:
    """Lists the files that are left out, and those that do not decode, beside the folders; a line that says where."""
    path = out / LIST_FILE
    if path.is_file() and any(building.reused for building in buildings):
        return [
            f"left_out.csv of an earlier call is kept: {path}"
        ]  # what does not decode is known from that call alone
    files = [*left_out.files, *((name, f"kept, but it does not decode: {why}") for name, why in bad_files(buildings))]
    return [f"all of them by name: {path}"] if write_list(path, files) else []


def _check_tasks(paths: Sequence[Path], cfg: CollectionConfig) -> None:
    """Images without a CSV are each of one task, by the name of their folder or tar."""
    real, first = Counter(path.resolve() for path in paths), dict[str, Path]()
    for path in paths:
        if real[path.resolve()] > 1:
            raise ValueError(f"{path}: named twice")
        for other in real.keys() & set(path.resolve().parents):
            raise ValueError(f"{path}: lies in {other}, whose images would be there twice; name one of the two")
        alike = first.setdefault(task_name(path), path)
        if cfg.task is None and alike is not path:
            raise ValueError(
                f"{alike} and {path}: both would be the task {task_name(path)!r}; rename one, or give --task to both"
            )
    parts = {part_of(task_name(path)): path for path in paths if cfg.split != "classes" and cfg.task is None}
    if "train" in parts and len(parts.keys() - {None}) > 1:
        train, test = parts["train"], next(path for part, path in parts.items() if part not in (None, "train"))
        raise ValueError(
            f"{train} and {test}: would be two tasks, but look like parts of one data set; put both below one "
            "folder and name that folder, or give --task for one task, or --split classes"
        )


def _check_names(items: Sequence[Item]) -> None:
    """Labels and tasks are written as UTF-8; names of files may be anything."""
    for label, task in {(item.label, item.task) for item in items}:
        for name in (label or "", task):
            try:
                name.encode()
            except UnicodeEncodeError:
                first = next(item for item in items if name in (item.label, item.task))
                where, found = (text.encode("utf-8", "surrogateescape") for text in (first.where, name))
                raise ValueError(f"{where!r}: the class or task {found!r} is not UTF-8; rename it") from None


def in_order(items: Sequence[Row], split: str, seed: int) -> Sequence[Row]:
    """The train rows shuffled, or the test rows as they are."""
    if split != "train":
        return items
    return [items[i] for i in permutation(len(items), Purpose.DATA_SET_ORDER, seed).tolist()]


def summary(buildings: Sequence[Building], left_out: LeftOut) -> list[str]:
    """What was written, and what was not, as lines."""
    lines = []
    for building in buildings:
        items, folder = building.plan.items, building.plan.folder
        size = sum(tar.stat().st_size for tar in folder.glob("*.tar"))
        classes = len({(item.task, item.label) for item in items if item.label is not None})
        done = "was finished before, with these images" if building.reused else "written"
        lines.append(
            f"{folder}: {pluralize(len(items), 'image')}, {pluralize(classes, 'class', 'classes')}, "
            f"{pluralize(len({item.task for item in items}), 'task')}, {pluralize(building.plan.shards, 'shard')}, "
            f"{size:,} bytes; {done}"
        )
    lines += described(left_out)
    if left_out.files:
        lines.append(f"taken are files ending in {', '.join(TAKEN)}")
    bad = bad_reasons(buildings)
    lines += [
        f"kept as they are, for they do not decode: {pluralize(number, 'file')}, {why}"
        for why, number in bad.most_common(8)
    ]
    if len(bad) > 8:
        files = pluralize(sum(bad.values()), "file")
        lines.append(f"kept as they are: {files} in all, for {len(bad):,} reasons")
    return lines


def _items(sources: Sequence[tuple[str | None, Source]], cfg: CollectionConfig, log: Log) -> list[Item]:
    if all(csv is None for csv, _ in sources) and (option := cfg.label_column or cfg.task_column):
        raise ValueError(f"{option}: a column, and there is no CSV to have it; expected --csv, or neither column")
    columns = Columns(
        label=None if cfg.label_column == "" else cfg.label_column or "fine",
        label_required=cfg.split in ("classes", None),
        label_named=cfg.label_column is not None or cfg.split == "column",
        task=cfg.task_column or "dataset",
        split="split" if cfg.split == "column" else None,
        hint=" (--label-column names another; --label-column '' says that there are no labels)",
        task_name=cfg.task,
    )
    items: list[Item] = []
    for csv, source in sources:
        if csv is not None and cfg.split == "folders":
            raise ValueError(f"{csv}: --split folders is for images without a CSV; expected --split column")
        if csv is not None:
            items += csv_items(csv, source, columns, log)
        elif cfg.split == "column":
            raise ValueError(f"{source.path}: --split column needs a CSV with a column 'split'")
        else:
            items += folder_items(source, cfg.task, cfg.split, log)
    return items


def split_items(items: Sequence[Item], split: str | None) -> dict[str, list[Item]]:
    """The images that train and those that test, each in the order given."""
    if split in ("classes", None):
        train = train_classes([item for item in items if item.split is None])
        sides = [item.split or ("train" if (item.task, item.label) in train else "test") for item in items]
    elif split in ("column", "folders"):
        found = sides_of([_part_of(item) for item in items])
        for item, side in zip(items, found, strict=True):
            if side is None:
                item.source.left_out.add(item.name, f"in {item.split}, which neither trains nor tests")
        sides = [side or "" for side in found]
    else:
        sides = ["test" if split == "test" else "train"] * len(items)
    return {name: [item for item, side in zip(items, sides, strict=True) if side == name] for name in SPLITS}


def train_classes(items: Sequence[Item]) -> set[tuple[str, str | None]]:
    """(task, label) of every class that trains: in each task the first half, rounded up, by name."""
    labels: dict[str, set[str]] = defaultdict(set)
    for item in items:
        if item.label is None:
            raise ValueError(f"{item.where}: has no label, by which classes are divided; expected one for every image")
        labels[item.task].add(item.label)
    return {(task, label) for task, names in labels.items() for label in sorted(names)[: (len(names) + 1) // 2]}


def _part_of(item: Item) -> Part:
    part = part_of((item.split or "").strip())
    if part is None:
        raise ValueError(f"{item.where}: split is {item.split!r}; expected train, val, valid, validation or test")
    return part


def describe_classes(splits: Mapping[str, Sequence[Item]], *, train: str = "train") -> list[str]:
    """Which classes train and which test, as lines with the first names.

    Args:
        train: how the side train is named.
    """
    found = {side: _classes(items) for side, items in splits.items()}
    several = len({task for classes in found.values() for task, _ in classes}) > 1
    lines = list[str]()
    for side, classes in found.items():
        shown = ", ".join(f"{task}: {label}" if several else label for task, label in list(classes)[:_SHOWN_CLASSES])
        more = ", ..." if len(classes) > _SHOWN_CLASSES else ""
        does = train if side == "train" else side
        lines += [f"classes that {does}: {len(classes):,} ({shown}{more})"] if classes else []
    return lines


def list_classes(splits: Mapping[str, Sequence[Item]], path: Path) -> list[str]:
    """Lists the classes in a CSV where `describe_classes` does not show all; a line that says where."""
    found = {side: _classes(items) for side, items in splits.items()}
    if all(len(classes) <= _SHOWN_CLASSES for classes in found.values()):
        return []
    rows = [(side, *name, str(images)) for side, classes in found.items() for name, images in classes.items()]
    write_table(path, ("side", "task", "class", "images"), rows)
    return [f"all classes: {path}"]


def _classes(items: Sequence[Item]) -> dict[tuple[str, str], int]:
    """How many images each class has, by (task, label), sorted."""
    return dict(sorted(Counter((item.task, item.label) for item in items if item.label).items()))


def table(splits: dict[str, list[Item]]) -> str:
    """Classes and images of every task on both sides, as lines of text."""
    tasks = sorted({item.task for items in splits.values() for item in items})
    lines = [("task", *(f"{split} {what}" for split in SPLITS for what in ("classes", "images")))]
    for task in [*tasks, "all"]:
        cells = []
        for split in SPLITS:
            items = [item for item in splits[split] if task in (item.task, "all")]
            cells += [len({(item.task, item.label) for item in items if item.label is not None}), len(items)]
        lines.append((task, *(f"{cell:,}" for cell in cells)))
    return "\n".join(align(lines))
