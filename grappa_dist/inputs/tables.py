"""Images in the rows of tables: parquet files, and folders that `datasets.save_to_disk` has written (Arrow streams).

Read by pyarrow alone. Of a row the bytes of its image are read when they are needed, one by one. A path in a
row is a name and nothing is opened by it.
"""

from __future__ import annotations

import glob
import json
import os
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from sys import intern
from typing import Any

from grappa_dist.data.labels import named
from grappa_dist.extras import require
from grappa_dist.files import read_json
from grappa_dist.make_shards.class_folders import Part, part_of
from grappa_dist.make_shards.left_out import LeftOut
from grappa_dist.make_shards.sources import Item, stamp_of

DATA_SET, STATE, DATA_SETS = "dataset_info.json", "state.json", "dataset_dict.json"  # of save_to_disk
PARQUET, ARROW = ".parquet", ".arrow"
_LABELS, _TASKS = ("label", "labels"), ("task",)
_KEPT, _KEPT_BYTES = 64, 2**26  # rows that are kept at most: threads ask for rows a little out of order
_DIGITS = 9


def is_saved(folder: str) -> bool:
    """Whether a folder is one of `datasets.save_to_disk`."""
    has = set(os.listdir(folder))
    return DATA_SETS in has or {DATA_SET, STATE} <= has


def files_of(entry: str) -> dict[str, Part | None]:
    """The table files that an entry names, in order, and the part of a data set that each holds as its name says."""
    if os.path.isdir(entry):
        if is_saved(entry):
            return dict(_saved(Path(entry)))
        found = (os.path.join(at, name) for at, _, names in os.walk(entry) for name in names if name.endswith(PARQUET))
    elif os.path.isfile(entry):
        return {entry: None}
    else:
        found = (path for path in glob.glob(entry, recursive=True) if path.endswith(PARQUET))
    base = entry if os.path.isdir(entry) else os.path.dirname(entry)
    files = sorted(path for path in found if not os.path.basename(path).startswith("."))
    if not files:
        raise ValueError(f"{entry}: no {PARQUET} files; expected a folder, a file or a pattern such as DIR/*{PARQUET}")
    return {path: _part_by_name(os.path.relpath(path, base)) for path in files}


def _saved(folder: Path) -> Iterator[tuple[str, Part | None]]:
    """The files of a saved data set, or of each of several."""
    if (folder / DATA_SETS).is_file():
        for split in read_json(folder / DATA_SETS).get("splits", []):
            for path, _ in _saved(_inside(folder, split)):
                yield path, part_of(str(split))
        return
    state = read_json(folder / STATE)
    if state.get("_indices_data_files"):
        raise ValueError(f"{folder}: a selection of rows, by an old version of datasets; save it again with a new one")
    for file in state["_data_files"]:
        yield str(_inside(folder, file["filename"])), None


def _inside(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or os.path.basename(name) != name or name in ("", ".", ".."):
        raise ValueError(f"{folder}: names {name!r:.100}; expected a file or folder in it")
    return folder / name


def _part_by_name(path: str) -> Part | None:
    """The part that a name such as data/train-00000-of-00002.parquet or train/0000.parquet says."""
    *folders, name = path.split(os.sep)
    stem = name.removesuffix(PARQUET)
    return next((part for text in (stem, stem.partition("-")[0], *reversed(folders)) if (part := part_of(text))), None)


@dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what."""

    image: str
    is_struct: bool  # of bytes and path, else the bytes alone
    label: str | None
    label_names: Sequence[str]  # of numbers; empty: none
    task: str | None
    has_path: bool = False


class Table:
    """A file of rows: the interface of a `Source` of make_shards, whose names are numbers of rows."""

    def __init__(self, path: Path, label_field: str | None = None) -> None:
        require("pyarrow", what=str(path))
        self.path = path
        self.left_out = LeftOut()
        self.is_parquet = path.name.endswith(PARQUET)
        self._stamp = stamp_of(path)
        with reading(path):
            schema, self.rows = _schema_of(path)
            self.columns = columns_of(path, schema, label_field)
            if self.rows and self.columns.is_struct and _empty_cells(path, self.columns.image) == self.rows:
                raise ValueError(
                    f"{path}: column {self.columns.image!r} has no bytes in any row, at most paths of files elsewhere; "
                    "save it with the images embedded, or give a list of the files"
                )

    def size(self, name: str) -> int:
        return int(self._stamp.partition(" ")[0])

    def stamp(self, name: str) -> str:
        return self._stamp

    def place(self, name: str) -> RowPlace:
        return RowPlace(str(self.path), int(name[:_DIGITS]), self.columns.image, self.columns.is_struct)

    def has(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> list[str]:
        return [name for name, _, _ in self._records()]

    def items(self, task: str, split: str | None) -> list[Item]:
        """All rows, with their labels."""
        with reading(self.path):
            return [
                Item(self, name, label and intern(label), intern(of or task), split)
                for name, label, of in self._records()
            ]

    def _records(self) -> Iterator[tuple[str, str | None, str | None]]:
        """Name, label and task of every row."""
        columns, row = self.columns, 0
        wanted = [columns.label, columns.task, f"{columns.image}.path" if columns.has_path else None]
        for batch in _batches(self.path, [column for column in wanted if column is not None]):
            records = batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
            for record in records:
                path = (record.get(columns.image) or {}).get("path") if columns.has_path else None
                base = os.path.basename(path) if isinstance(path, str) else ""
                name = f"{row:0{_DIGITS}d}" + (f"/{base}" if base else "")
                yield name, self._label(record), named(record.get(columns.task or "")).name
                row += 1

    def _label(self, record: dict[str, Any]) -> str | None:
        value = record.get(self.columns.label or "")
        if self.columns.label_names and isinstance(value, int):
            return self.columns.label_names[value] if 0 <= value < len(self.columns.label_names) else None
        return named(value).name


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where the bytes of a row's image lie: the interface of a `Place` of make_shards."""

    path: str
    row: int
    column: str
    is_struct: bool

    def read(self) -> bytes:
        with reading(Path(self.path)):
            return _cursor(self.path, stamp_of(self.path), self.column, self.is_struct).read(self.row)


class _Cursor:
    """Reads the images of a parquet file forwards, row by row; going back begins at the row group."""

    def __init__(self, path: str, column: str, is_struct: bool) -> None:
        from pyarrow import parquet

        self._file = parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        self._column, self._is_struct = column, is_struct
        counts = [self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups)]
        self._starts = list(accumulate(counts, initial=0))
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._batches: Iterator[Any] = iter(())
        self._group, self._next = -1, 0
        self._lock = threading.Lock()

    def read(self, row: int) -> bytes:
        with self._lock:
            while row not in self._kept:
                self._advance(row)
            return self._kept[row]

    def _advance(self, row: int) -> None:
        """Keeps the next row of the row's group, and the last ones before it."""
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._next:
            self._batches, self._group, self._next = self._open(group), group, self._starts[group]
        self._kept[self._next] = _bytes_in(next(self._batches).column(0)[0], self._is_struct)
        self._next += 1
        while len(self._kept) > 1 and (len(self._kept) > _KEPT or sum(map(len, self._kept.values())) > _KEPT_BYTES):
            self._kept.popitem(last=False)

    def _open(self, group: int) -> Iterator[Any]:
        column = f"{self._column}.bytes" if self._is_struct else self._column
        # one by one, so that no more than one image that claims to be huge is in memory
        opened: Iterator[Any] = self._file.iter_batches(1, row_groups=[group], columns=[column], use_threads=False)
        return opened


class _Mapped:
    """Reads the images of an Arrow stream, which is mapped into memory, at any row."""

    def __init__(self, path: str, column: str, is_struct: bool) -> None:
        self._values, self._is_struct = _mapped(path).column(column), is_struct

    def read(self, row: int) -> bytes:
        return _bytes_in(self._values[row], self._is_struct)


def _bytes_in(value: Any, is_struct: bool) -> bytes:
    """The bytes of a cell; none where it is empty."""
    found = value.as_py()
    found = (found or {}).get("bytes") if is_struct else found
    return found if isinstance(found, bytes) else b""


@lru_cache(maxsize=16)
def _cursor(path: str, stamp: str, column: str, is_struct: bool) -> _Cursor | _Mapped:
    return (_Cursor if path.endswith(PARQUET) else _Mapped)(path, column, is_struct)


def _mapped(path: Path | str) -> Any:
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()


def _batches(path: Path, columns: Sequence[str]) -> Iterator[Any]:
    if path.name.endswith(PARQUET):
        from pyarrow import parquet

        file = parquet.ParquetFile(path)
        yield from file.iter_batches(4096, columns=list(columns), use_threads=False)
        return
    table = _mapped(path)
    yield from table.select(sorted({column.partition(".")[0] for column in columns})).to_batches()


def _schema_of(path: Path) -> tuple[Any, int]:
    """Schema and number of rows."""
    if path.name.endswith(PARQUET):
        from pyarrow import parquet

        file = parquet.ParquetFile(path)
        return file.schema_arrow, file.metadata.num_rows
    table = _mapped(path)
    return table.schema, table.num_rows


def _empty_cells(path: Path, image: str) -> int:
    """How many rows have no bytes of an image, as far as that is known without reading any."""
    if path.name.endswith(PARQUET):
        from pyarrow import parquet

        groups = parquet.ParquetFile(path).metadata
        chunks = [
            groups.row_group(g).column(c) for g in range(groups.num_row_groups) for c in range(groups.num_columns)
        ]
        known = [chunk.statistics for chunk in chunks if chunk.path_in_schema == f"{image}.bytes"]
        return sum(found.null_count or 0 for found in known if found is not None)
    return sum(chunk.field("bytes").null_count for chunk in _mapped(path).column(image).chunks)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises into an error that names the file."""
    try:
        yield
    except ValueError as error:  # ArrowInvalid is one; ours name the file
        text = " ".join(str(error).split())
        if text.startswith(str(path)):
            raise
        kind = "parquet file" if path.name.endswith(PARQUET) else "Arrow stream"
        raise ValueError(f"{path}: no {kind} that can be read: {text:.300}") from None
    except (NotImplementedError, MemoryError) as error:  # pyarrow's
        raise ValueError(f"{path}: cannot be read by pyarrow: {error}") from None


def columns_of(path: Path, schema: Any, label_field: str | None) -> Columns:
    """The columns of a table that are used: of its image, label and task.

    Args:
        schema: of pyarrow; that of a Hugging Face data set says which columns are images, and names its classes.
        label_field: the column of the labels; by default `label`, or the only one whose classes have names.
    """
    import pyarrow

    features = _features_of(schema)
    images = [name for name in schema.names if _is_image(schema.field(name).type, features.get(name), name)]
    if not images:
        has = ", ".join(f"{name} ({schema.field(name).type})" for name in schema.names[:20])
        raise ValueError(f"{path}: no column of images (bytes, or bytes and path); it has {has or 'no columns'}")
    if len(images) > 1 and "image" not in images:
        raise ValueError(f"{path}: several columns of images, {', '.join(images)}; expected one, or one called image")
    image = "image" if "image" in images else images[0]
    kind = schema.field(image).type
    label = _label_of(path, schema.names, features, label_field)
    task = next((name for name in _TASKS if name in schema.names and _is_text(schema.field(name).type)), None)
    is_struct = pyarrow.types.is_struct(kind)
    has_path = is_struct and any(kind.field(i).name == "path" for i in range(kind.num_fields))
    return Columns(image, is_struct, label, _names_of(features.get(label or "")), task, has_path)


def _features_of(schema: Any) -> Mapping[str, Any]:
    """What a Hugging Face data set says of its columns; empty where it says nothing."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_image(kind: Any, feature: Any, name: str) -> bool:
    import pyarrow

    types = pyarrow.types
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" and _is_bytes(kind.field(i).type) for i in range(kind.num_fields))
    said = isinstance(feature, dict) and feature.get("_type") == "Image"
    return _is_bytes(kind) and (said or re.search("image|img|jpe?g|png|bytes|content", name, re.IGNORECASE) is not None)


def _is_bytes(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow

    return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))


def _label_of(path: Path, names: Sequence[str], features: Mapping[str, Any], asked: str | None) -> str | None:
    if asked is not None:
        if asked not in names:
            raise ValueError(f"{path}: no column {asked!r}, which data.label_field names; it has {', '.join(names)}")
        return asked
    named_ones = [name for name in names if _names_of(features.get(name))]
    usual = next((name for name in _LABELS if name in names), None)
    return usual or (named_ones[0] if len(named_ones) == 1 else None)


def _names_of(feature: Any) -> Sequence[str]:
    """The names of the classes of a column of numbers."""
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    return [str(name) for name in names] if isinstance(names, list) else []
