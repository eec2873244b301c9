"""The images that become shards: in a tar or a folder, and perhaps re-encoded."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image, features

from grappa_dist.data.decoding import (
    COPIED,
    FORMATS,
    MORE_FORMATS,
    REENCODED,
    TAKEN,
    BadImage,
    decode,
    describe_missing_decoder,
    suffix_of,
)
from grappa_dist.data.index import OpenFile
from grappa_dist.data.tars import members_of
from grappa_dist.files import read_bytes
from grappa_dist.make_shards.left_out import LeftOut

FOREIGN = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}  # folders
QUALITY = 95  # of JPEG


class Readable(Protocol):
    """Where the bytes of an image lie."""

    def read(self) -> bytes: ...


class Place(NamedTuple):
    """Where the bytes of an image lie; a size below 0 means the whole file."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        if self.size < 0:
            return read_bytes(Path(self.path))
        return _open(self.path, stamp_of(self.path)).read(self.offset, self.size)


@lru_cache(maxsize=64)
def _open(path: str, stamp: str) -> OpenFile:
    """A file stays open as long as its stamp says that it is the same."""
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
    left_out: LeftOut  # what is there but cannot be taken

    def names(self) -> list[str]: ...
    def has(self, name: str) -> bool: ...
    def place(self, name: str) -> Readable: ...
    def size(self, name: str) -> int: ...
    def stamp(self, name: str) -> str: ...  # of the file's state: another one where it has changed


class TarSource:
    """The files of a plain tar, read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = LeftOut()
        self._places: dict[str, tuple[int, int]] = {}
        with path.open("rb") as file:
            for member in members_of(file, path):
                if member.isreg() and not member.issparse():
                    name = member.name.removeprefix("./")
                    if name in self._places:
                        self.left_out.add(name, "an earlier file of the same name in a tar")
                    self._places[name] = (member.offset_data, member.size)
                elif not member.isdir():
                    self.left_out.add(member.name, "a link or special file in a tar")

    def names(self) -> list[str]:
        return sorted(self._places)

    def has(self, name: str) -> bool:
        return name in self._places

    def place(self, name: str) -> Place:
        return Place(str(self.path), *self._places[name])

    def size(self, name: str) -> int:
        return self._places[name][1]

    def stamp(self, name: str) -> str:
        return f"{self._places[name]} {stamp_of(self.path)}"


class _Above(NamedTuple):
    """The real path of a folder, and the folders through which it was reached."""

    real: str
    above: _Above | None = None

    def has(self, path: str) -> bool:
        one: _Above | None = self
        while one is not None and one.real != path:
            one = one.above
        return one is not None


class FolderSource:
    """The files below a folder, also behind links."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left_out = LeftOut()

    def names(self) -> list[str]:
        start = len(os.path.join(self.path, ""))
        return sorted(as_utf8(name[start:]) for name in self._below())

    def _below(self) -> Iterator[str]:
        """Paths of files. A link to a folder that holds it is left out; other links are followed."""
        left = [(str(self.path), _Above(os.path.realpath(self.path)))]
        while left:
            folder, here = left.pop()
            with _scanned(folder) as entries:
                for entry in entries:
                    kind = _kind_of(entry)
                    if kind == "file":
                        yield entry.path
                    elif not kind:
                        self._leave_out(entry.path, "a link to nothing, a pipe or another special file")
                    elif not entry.is_symlink():
                        left.append((entry.path, _Above(os.path.join(here.real, entry.name), here)))
                    elif here.has(real := os.path.realpath(entry.path)):
                        self._leave_out(entry.path, "a link to a folder that holds it")
                    else:
                        left.append((entry.path, _Above(real, here)))

    def _leave_out(self, path: str, reason: str) -> None:
        self.left_out.add(as_utf8(os.path.relpath(path, self.path)), reason)

    def has(self, name: str) -> bool:
        return os.path.isfile(self._at(name))

    def place(self, name: str) -> Place:
        return Place(self._at(name))

    def size(self, name: str) -> int:
        path = self._at(name)
        if not os.access(path, os.R_OK):  # before anything is written, and not in the middle of it
            raise ValueError(f"{path}: cannot be read by this user; expected images that can, or another folder")
        return os.stat(path).st_size

    def stamp(self, name: str) -> str:
        return stamp_of(self._at(name))

    def _at(self, name: str) -> str:
        return os.path.join(self.path, on_disk(name))


def stamp_of(path: str | os.PathLike[str]) -> str:
    """Size and time of change of a file."""
    stat = os.stat(path)
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _kind_of(entry: os.DirEntry[str]) -> str:
    """file, folder, or "" for what is neither."""
    try:
        return "file" if entry.is_file() else "folder" if entry.is_dir() else ""
    except OSError:  # a link that leads to itself
        return ""


def _scanned(folder: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise ValueError(f"{folder}: this folder cannot be read: {error.strerror}") from None


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
        """That of its name; "" where only its content tells what it is, as of rows of tables."""
        return image_suffix(self.name) or ""

    @property
    def place(self) -> Readable:
        return self.source.place(self.name)


def image_suffix(name: str) -> str | None:
    """The lower-case image suffix of a file, or None; dots elsewhere in the name do not matter here."""
    base, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() if base and dot and suffix.lower() in TAKEN else None


def is_taken(name: str, left_out: LeftOut) -> bool:
    """Whether a file is a visible image; notes why not."""
    folders = name.split("/")
    if any(part.startswith(".") for part in folders):
        left_out.add(name, "hidden")
    elif FOREIGN.intersection(folders):
        left_out.add(name, "in a folder of the system or of another program")
    elif image_suffix(name) is None:
        suffix = os.path.splitext(name)[1].lower()
        left_out.add(name, f"of the suffix {suffix!r}" if suffix else "without a suffix")
    elif missing := describe_missing_decoder(image_suffix(name) or ""):
        left_out.add(name, missing)
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

    What is rewritten becomes a PNG in any case, HEIC and AVIF a JPEG: of an animation or of several pages the first.

    Args:
        suffix: of the file, one of TAKEN, or "" to tell it by its content.
    """
    suffix = suffix or suffix_of(data)
    rewritten, kept = suffix not in COPIED, COPIED.get(suffix, "jpg" if suffix in REENCODED else "png")
    if not data:
        return Encoded(data, kept, "empty file")
    if image_size is None and not rewritten:
        return Encoded(data, kept)
    if missing := describe_missing_decoder(suffix):
        return Encoded(data, kept, missing)
    try:
        image = decode(data, (*FORMATS, *MORE_FORMATS.get(suffix, ())))
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


def encoder(suffixes: Collection[str] = ()) -> str:
    """What makes the bytes of a re-encoded image: other versions may make others.

    Args:
        suffixes: of the images; further libraries decode some.
    """
    versions = [f"{name} {features.version(name)}" for name in ("pil", "jpg", "zlib", "webp")]
    if "avif" in suffixes:
        versions.append(f"avif {features.version('avif')}")
    if {"heic", "heif"} & set(suffixes):
        versions.append(f"pillow-heif {version('pillow-heif')}")
    return f"bicubic, JPEG {QUALITY} or PNG, {', '.join(versions)}"
