"""The images that one entry holds: a folder, a table or a list; what trains, what tests, and what is left out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from grappa_dist.inputs.kinds import kind_of
from grappa_dist.inputs.tables import Table, files_of
from grappa_dist.make_shards.class_folders import folder_items, part_of, parts_of_split, task_name
from grappa_dist.make_shards.collection import split_items
from grappa_dist.make_shards.left_out import LeftOut, joined
from grappa_dist.make_shards.lists import FILE_COLUMN, LINES, Columns, csv_items, header_of
from grappa_dist.make_shards.planning import prefixes_of
from grappa_dist.make_shards.progress import Log
from grappa_dist.make_shards.sources import FolderSource, Item, Source, as_utf8, open_source

_FILES = (FILE_COLUMN, "file_name", "path", "image")  # columns that may name the files
_LABELS, _TASKS, _SPLIT = ("label", "fine", "class"), ("task", "dataset"), "split"


@dataclass(frozen=True)
class Images:
    """The images of an entry.

    Attributes:
        train: all of them, unless the entry has parts or its classes are divided.
        base: the folder from which the names of files count.
        is_ordered: whether they are read in their order, as rows of a table are.
    """

    train: Sequence[Item] = field(repr=False)
    test: Sequence[Item] = field(repr=False)
    base: Path
    is_ordered: bool
    sources: Sequence[Source] = field(repr=False)

    @property
    def left_out(self) -> LeftOut:
        """What is left out, by absolute names."""
        prefixes = prefixes_of({source.path for source in self.sources}, self.base)
        found = joined(source.left_out.below(prefixes[source.path]) for source in self.sources)
        return LeftOut([(os.path.join(as_utf8(str(self.base)), name), reason) for name, reason in found.files])

    def all_test(self) -> Images:
        """The same images, all of them on the test side."""
        return replace(self, train=(), test=[*self.train, *self.test])


def images_of(
    entry: str, split: str, label_field: str | None, log: Log, *, split_column: str | None = None
) -> Images | None:
    """The images of an entry; None of one that is shards.

    Args:
        split: auto: by the parts that folders, files or a column name; none: all train; classes: half of them train.
        label_field: the column of the labels, of a table or a list.
        split_column: of a list: the column whose value its items have as `split`, by default `split`.

    Raises:
        ValueError: nothing in it can be used, or a column that was asked for is not there.
    """
    kind = kind_of(entry)
    if kind == "shards":
        return None
    if split_column is not None and kind in ("folder", "table"):
        raise ValueError(f"{entry}: is a {kind}; expected a CSV or {LINES} list with a column {split_column!r}")
    if kind == "folder":
        return _of_folder(entry, split, log)
    found = _of_table(entry, label_field, log) if kind == "table" else _of_list(entry, label_field, log, split_column)
    sides = split_items(found.train, _split_of(found.train, split))
    if not found.train:
        raise ValueError(f"{entry}: no rows; expected images")
    return replace(found, train=sides["train"], test=sides["test"])


def _split_of(items: Sequence[Item], split: str) -> str:
    """How items are divided: by their column or file only where each has a part, and there are two sides."""
    if split != "auto":
        return split
    parts = {part_of((name or "").strip()) for name in {item.split for item in items}}
    return "column" if "train" in parts and len(parts) > 1 and None not in parts else "none"


def _of_folder(entry: str, split: str, log: Log) -> Images:
    source = open_source(entry)
    if split == "classes":
        items = folder_items(source, None, "classes", log)
    elif split == "auto" and parts_of_split(open_source(entry)):
        split = "folders"
        items = folder_items(source, None, "folders", log, labelled=False)
    else:
        split = "none"
        items = folder_items(source, None, "none", log)
    sides = split_items(items, split)
    return Images(sides["train"], sides["test"], source.path, is_ordered=False, sources=[source])


def _of_table(entry: str, label_field: str | None, log: Log) -> Images:
    files = files_of(entry)
    tables = [Table(Path(path).absolute(), label_field) for path in files]
    named = Path(entry).absolute() if os.path.exists(entry) else Path(entry).absolute().parent
    task = task_name(named if named.is_dir() else named.with_suffix(""))
    items = [item for table, part in zip(tables, files.values(), strict=True) for item in table.items(task, part)]
    if items and label_field is not None and all(item.label is None for item in items):
        raise ValueError(f"{entry}: column {label_field!r}, which data.label_field names, has no label in any row")
    folders = [os.path.dirname(os.path.abspath(path)) for path in files]
    base = Path(entry if os.path.isdir(entry) else os.path.commonpath(folders))
    return Images(items, (), base.absolute(), is_ordered=True, sources=tables)


def _of_list(entry: str, label_field: str | None, log: Log, split_column: str | None) -> Images:
    """The images that a list names: relative to its folder, or anywhere by absolute paths."""
    path = Path(entry).absolute()
    if not path.is_file():
        raise ValueError(f"{entry}: does not exist; expected a CSV or {LINES} list, or a folder of images")
    source, elsewhere = FolderSource(path.parent), FolderSource(Path(path.anchor))
    items = csv_items(str(path), source, _columns_of(path, label_field, split_column), log, elsewhere=elsewhere)
    return Images(items, (), path.parent, is_ordered=False, sources=[source, elsewhere])


def _columns_of(path: Path, label_field: str | None, split_column: str | None) -> Columns:
    has = header_of(str(path))
    file = _first(_FILES, has)
    if file is None:
        raise ValueError(f"{path}: no column {FILE_COLUMN!r}; it has {', '.join(has) or 'none'}")
    task = _first(_TASKS, has)
    return Columns(
        file=file,
        label=label_field or _first(_LABELS, has),
        label_required=False,
        label_named=label_field is not None,
        task=task or "",
        task_name=None if task else path.stem,
        split=split_column or _first((_SPLIT,), has),
    )


def _first(names: Sequence[str], has: Sequence[str]) -> str | None:
    return next((name for name in names if name in has), None)
