"""The images that become shards: found in a tar or a folder, with a CSV or in class folders, and perhaps re-encoded."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from sys import intern
from typing import NamedTuple, Protocol

from PIL import Image, features

from grappa_dist.data.decoding import COPIED, FORMATS, REWRITTEN, TAKEN, BadImage, decode
from grappa_dist.data.index import OpenFile
from grappa_dist.data.tars import members_of

FILE_COLUMN = "file"  # of a CSV
FOREIGN = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}  # folders
QUALITY = 95  # of JPEG


class Place(NamedTuple):
    """Where the bytes of an image lie; a size below 0 means the whole file."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        if self.size < 0:
            return Path(self.path).read_bytes()
        return _open(self.path).read(self.offset, self.size)


@lru_cache(maxsize=64)
def _open(path: str) -> OpenFile:
    return OpenFile(path)


def as_utf8(name: str) -> str:
    """A name from the file system, read as UTF-8 whatever the locale; bytes that are none become lone surrogates."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def on_disk(name: str) -> str:
    """The inverse of `as_utf8`."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


class Source(Protocol):
    """Files by name, as UTF-8 has it."""

    path: Path
    skipped: Counter[str]  # by reason: what is there but cannot be taken

    def names(self) -> list[str]: ...
    def has(self, name: str) -> bool: ...
    def place(self, name: str) -> Place: ...
    def size(self, name: str) -> int: ...


class TarSource:
    """The files of a plain tar, read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        self._places: dict[str, tuple[int, int]] = {}
        with path.open("rb") as file:
            for member in members_of(file, path):
                if member.isreg() and not member.issparse():
                    self._places[member.name.removeprefix("./")] = (member.offset_data, member.size)
                else:
                    self.skipped["a link or special file in a tar"] += not member.isdir()

    def names(self) -> list[str]:
        return sorted(self._places)

    def has(self, name: str) -> bool:
        return name in self._places

    def place(self, name: str) -> Place:
        return Place(str(self.path), *self._places[name])

    def size(self, name: str) -> int:
        return self._places[name][1]


class FolderSource:
    """The files below a folder, also behind links."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()

    def names(self) -> list[str]:
        start = len(os.path.join(self.path, ""))
        return sorted(as_utf8(name[start:]) for name in self._below(str(self.path), ()))

    def _below(self, folder: str, above: tuple[str, ...]) -> Iterator[str]:
        """Paths of files; `above` are the real paths of the folders that hold this one, to which a link may lead."""
        above = (*above, os.path.realpath(folder))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_file():
                    yield entry.path
                elif not entry.is_dir():
                    self.skipped["a link to nothing, a pipe or another special file"] += 1
                elif entry.is_symlink() and os.path.realpath(entry.path) in above:
                    self.skipped["a link to a folder that holds it"] += 1
                else:
                    yield from self._below(entry.path, above)

    def has(self, name: str) -> bool:
        return os.path.isfile(self._at(name))

    def place(self, name: str) -> Place:
        return Place(self._at(name))

    def size(self, name: str) -> int:
        return os.stat(self._at(name)).st_size

    def _at(self, name: str) -> str:
        return os.path.join(self.path, on_disk(name))


def open_source(path: str) -> Source:
    """The files at a path, a tar or a folder."""
    if "://" in path:
        raise ValueError(f"{path}: expected a local tar or folder; fetch it first")
    found = Path(path).absolute()
    if found.is_dir():
        return FolderSource(found)
    if found.is_file():
        return TarSource(found)
    raise ValueError(f"{path}: does not exist; expected a tar or a folder of images")


@dataclass(frozen=True, slots=True)
class Item:
    """One image to be written: there may be 10^7 of them, so they share what they can."""

    source: Source = field(repr=False)
    name: str
    label: str | None
    task: str
    split: str | None = None  # train or test, where that is known: from a CSV, or from a benchmark's lists
    listed: str | None = None  # the file that names the image
    line: int = 0

    @property
    def where(self) -> str:
        """Where the image was listed, for messages."""
        return f"{self.source.path}: {self.name}" if self.listed is None else f"{self.listed} line {self.line}"

    @property
    def suffix(self) -> str:
        suffix = image_suffix(self.name)
        assert suffix is not None, f"{self.name} was taken without an image's suffix"
        return suffix

    @property
    def place(self) -> Place:
        return self.source.place(self.name)


def image_suffix(name: str) -> str | None:
    """The lower-case image suffix of a file, or None; dots elsewhere in the name do not matter here."""
    base, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() if base and dot and suffix.lower() in TAKEN else None


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a CSV hold what; None: not read."""

    label: str | None = "fine"
    label_required: bool = True
    task: str = "dataset"
    split: str | None = None
    task_name: str | None = None  # one task for all rows, instead of the column


def csv_items(path: str, source: Source, columns: Columns) -> list[Item]:
    """The images that a CSV lists, in its order; ValueError where one is not there."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: does not exist; expected a CSV with a column {FILE_COLUMN!r}")
    items: list[Item] = []
    names: set[str] = set()
    for line, row in _csv_rows(path, columns):
        where = f"{path} line {line}"
        name = row[FILE_COLUMN].removeprefix("./")
        if image_suffix(name) is None:
            raise ValueError(f"{where}: {name!r} has no image suffix; expected {', '.join(TAKEN)}")
        if name in names:
            raise ValueError(f"{where}: {name!r} is listed twice")
        if not source.has(name):
            raise ValueError(f"{where}: {name!r} is not in {source.path}")
        names.add(name)
        label = None if columns.label is None else row.get(columns.label)
        task = columns.task_name or row[columns.task]
        split = intern(row[columns.split]) if columns.split else None
        items.append(Item(source, name, label and intern(label), intern(task), split, path, line))
    if not items:
        raise ValueError(f"{path}: no rows")
    return items


def _csv_rows(path: str, columns: Columns) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows with their lines; the columns that must be there are there and filled."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        try:
            has = list(reader.fieldnames or [])
            needed = _needed(path, has, columns)
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where}: {_width(row)} fields; expected {len(has)} ({', '.join(has)})")
                for column in needed:
                    if not row[column].strip():
                        raise ValueError(f"{where}: column {column!r} is empty")
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV in UTF-8: {error}") from None


def _width(row: dict[str, str]) -> int:
    extra: Sequence[str] = row.get(None, ())  # type: ignore[call-overload]
    return sum(value is not None for key, value in row.items() if key is not None) + len(extra)


def _needed(path: str, has: Sequence[str], columns: Columns) -> list[str]:
    """The columns that every row must fill."""
    needed = [FILE_COLUMN]
    if columns.label is not None and (columns.label_required or columns.label in has):
        needed.append(columns.label)
    if columns.task_name is None:
        needed.append(columns.task)
    if columns.split is not None:
        needed.append(columns.split)
    for column in needed:
        if column not in has:
            raise ValueError(f"{path}: no column {column!r}; it has {', '.join(has) or 'none'}")
    return needed


def is_taken(name: str, skipped: Counter[str]) -> bool:
    """Whether a file is a visible image; counts why not."""
    folders = name.split("/")
    if any(part.startswith(".") for part in folders):
        skipped["hidden"] += 1
    elif FOREIGN.intersection(folders):
        skipped["in a folder of the system or of another program"] += 1
    elif image_suffix(name) is None:
        suffix = os.path.splitext(name)[1].lower()
        skipped[f"of the suffix {suffix!r}" if suffix else "without a suffix"] += 1
    else:
        return True
    return False


@dataclass(frozen=True)
class Encoded:
    """What is written for one image."""

    data: bytes
    suffix: str
    bad: str | None = None  # why it does not decode, where that was tried; such a file is kept as it is


def encoded(data: bytes, suffix: str, image_size: int | None) -> Encoded:
    """The image re-encoded to a shorter side of `image_size`; as it is where that is None or not smaller.

    What is rewritten becomes a PNG in any case: of an animation or of several pages the first.

    Args:
        suffix: of the file, one of TAKEN.
    """
    rewritten, kept = suffix in REWRITTEN, COPIED.get(suffix, "png")
    if not data:
        return Encoded(data, kept, "empty file")
    if image_size is None and not rewritten:
        return Encoded(data, kept)
    try:
        image = decode(data, (*FORMATS, "TIFF") if rewritten else FORMATS)
    except BadImage as error:
        return Encoded(data, kept, str(error))
    smaller = image if image_size is None else shrunk(image, image_size)
    if smaller is image and not rewritten:
        return Encoded(data, kept)
    buffer = BytesIO()
    if kept == "png":
        smaller.save(buffer, "PNG")
        return Encoded(buffer.getvalue(), "png")
    smaller.save(buffer, "JPEG", quality=QUALITY)
    return Encoded(buffer.getvalue(), "jpg")


def shrunk(image: Image.Image, shorter_side: int) -> Image.Image:
    """The image at that shorter side; itself where it is no larger."""
    scale = shorter_side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(shorter_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def encoder() -> str:
    """What makes the bytes of a re-encoded image: other versions may make others."""
    versions = [f"{name} {features.version(name)}" for name in ("pil", "jpg", "zlib", "webp")]
    return f"bicubic, JPEG {QUALITY} or PNG, {', '.join(versions)}"
