"""Indexes of shards: where the images of one tar lie, made in one pass over it, written, and read without trust.

A finished folder of shards has `index.json`, a line for each shard, and beside each tar a .npy with its rows. Images
that have no row are counted as missing: those behind the damage of a tar, and those whose names give no key of their
own. Shapes: P images of one shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.console import pluralize
from grappa_dist.data.tars import DamagedTar, Zeros, members_of, split_name
from grappa_dist.files import map_file, parse_json
from grappa_dist.storage import open_to_read, tried_again

COMMITTED = "index.json"  # written last beside finished shards
INDEX_VERSION = 1
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# 24 bytes an image. Without JSON `json_size` is 0. A row whose image cannot be had has no `size`, no `json_size`, and
# in `json_offset` why, by REFUSED; its `offset` is that of the member's data, or of the damage.
ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("json_offset", "<u8"), ("json_size", "<u4")])
_LARGEST = 2**32 - 1
REFUSED = {  # numbers at which no JSON member can begin: the first block of a tar is a header
    1: "a second image of its key, which names one image",
    2: "a link or a sparse file, no plain file",
    3: f"more than {_LARGEST} bytes",
    4: "the shard is damaged or cut off from here on, and what follows is missing",
    5: "its last bytes are zeros, as are those behind it where the next member should be",
}
_SECOND, _LINK, _LARGE, DAMAGED, _TORN = REFUSED
REMADE = "; remove it, and it is made or fetched again"
_NO_MEMBER = (0, 0)
_FIRST_NAMES, _NAME_LENGTH = 20, 300  # of misnamed images of a shard, kept for messages
_LONGEST_SUFFIX, _SUFFIXES, _SHOWN_SUFFIXES = 30, 1000, 8  # of ignored members
_SHOWN = 3  # shards that a message names
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
# What numpy's reader of headers may raise
_UNREADABLE = (ValueError, EOFError, TypeError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError)


@dataclass(frozen=True, slots=True)
class Missing:
    """How many images of a tar have no row."""

    behind: int = 0  # behind a damage, or where zeros are: an estimate
    misnamed: int = 0  # whose name has another dot before its suffix, and whose key has no image
    names: tuple[str, ...] = ()  # the first of these

    @property
    def images(self) -> int:
        return self.behind + self.misnamed


NONE_MISSING = Missing()


@dataclass(frozen=True, slots=True)  # slots: every process of a run holds all shards
class Shard:
    """One tar of images, as its index saw it."""

    name: str
    path: str
    rows: int
    bytes: int
    fingerprint: str  # sha256 of the tar; another one where there are zeros in it, see `Scan.shard`
    ignored: int = 0  # members that are neither an image nor the JSON of one
    version: str = ""  # when it was found: of a remote tar its ETag, of a local one its time of change
    missing: Missing = NONE_MISSING
    others: tuple[tuple[str, int], ...] = ()  # suffixes of ignored members with their numbers, the most frequent ones


@dataclass(frozen=True)
class Scan:
    """What a tar has: places of its images in file order, (P,) of ROW, how many other members, and what is missing."""

    rows: NDArray[Any]
    ignored: int
    missing: Missing
    others: tuple[tuple[str, int], ...]
    inner_zeros: bool = False  # members, or damage, behind zeros that could pass for the end

    def shard(self, name: str, path: str, size: int, sha256: str, version: str) -> Shard:
        """The shard that a tar of these bytes is.

        Programs up to November 2026 took the first block of zeros for the end: what they kept of a tar with inner zeros
        has fewer rows, so such a one has another fingerprint.
        """
        if self.inner_zeros:
            sha256 = hashlib.sha256(f"{sha256} and behind zeros".encode()).hexdigest()
        return Shard(name, path, len(self.rows), size, sha256, self.ignored, version, self.missing, self.others)


def index_shard(path: str | os.PathLike[str]) -> tuple[NDArray[Any], Shard]:
    """Places of a tar's images in file order, (P,) of ROW, and its shard."""
    path = Path(path)
    with open_to_read(path) as file:
        stat = os.fstat(file.fileno())
        found = scan(file, path, stat.st_size)
        sha256 = sha256_of(file)
    return found.rows, found.shard(path.name, str(path.absolute()), stat.st_size, sha256, version_of(stat))


def version_of(stat: os.stat_result) -> str:
    """What tells a local file from a later one of its name: whole seconds, which every file system keeps."""
    return str(stat.st_mtime_ns // 10**9)


def sha256_of(file: BufferedReader) -> str:
    """Of all bytes of a file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def scan(file: IO[bytes], path: Path | str, size: int) -> Scan:
    """What a tar of `size` bytes has; DamagedTar where it has no image before a damage.

    An image that cannot be used keeps a row, which says why. A tar that is damaged further on ends with such a row.
    """
    found = _Members()
    try:
        for member in members_of(file, path, size, on_zeros=found.pass_zeros):
            found.add(member)
    except DamagedTar as error:
        if not found.images and not found.refused:
            raise
        return found.scan(size, error)
    return found.scan(size, None)


class _Members:
    """What a walk through a tar has met so far."""

    def __init__(self) -> None:
        self.images: dict[str, tuple[int, int]] = {}
        self.refused: list[tuple[int, int, int, int]] = []
        self._texts: dict[str, tuple[int, int]] = {}
        self._further: dict[str, list[str]] = {}  # names of further images of a key, as far as suffixes say
        self._ignored = self._bytes_of_zeros = 0
        self._inner_zeros = False
        self._suffixes = Counter[str]()  # of ignored members
        self._last = ""  # key of the last member, if it is an image
        self._numbered, self._step = ("", -1), 1  # the last key that ends in a number; the largest step so far
        self._padding = self._doubtful = 0  # bytes of zeros that pass for an end mark: since the last image, in all

    def add(self, member: tarfile.TarInfo) -> None:
        key, suffix = (None if member.isdir() else split_name(member.name)) or ("", "")
        is_image = suffix in IMAGE_SUFFIXES
        self._last = key if is_image else ""
        if is_image and (why := _why_refused(self.images, key, member)):
            self.refused.append((member.offset_data, 0, why, 0))
        elif is_image:
            self.images[key] = (member.offset_data, member.size)
            self._follow(key)
        elif suffix == "json" and not _why_refused(self._texts, key, member):
            self._texts[key] = (member.offset_data, member.size)
        elif suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
            self._further.setdefault(key, []).append(member.name)
        elif not member.isdir():
            self._ignored += 1
            if suffix in self._suffixes or (0 < len(suffix) <= _LONGEST_SUFFIX and len(self._suffixes) < _SUFFIXES):
                self._suffixes[suffix] += 1

    def pass_zeros(self, zeros: Zeros) -> None:
        """Notes zeros; an image that they seem to begin in is refused."""
        self._inner_zeros = True
        text_missing = self._last not in self._texts and len(self._texts) == len(self.images) - 1 > 0
        if not zeros.padding or zeros.start == 0 or (self._last and text_missing):
            self._bytes_of_zeros += zeros.end - zeros.start
        else:
            self._padding = zeros.end - zeros.start
        offset, length = self.images.get(self._last, _NO_MEMBER)
        if not zeros.padding and zeros.torn and 0 <= zeros.start - offset - length < 512:
            self.refused.append((self.images.pop(self._last)[0], 0, _TORN, 0))

    def _follow(self, key: str) -> None:
        """Notes the number at the end of a key: one that jumps behind zeros says that these may have been images."""
        prefix, digits = key.rstrip("0123456789"), len(key) - len(key.rstrip("0123456789"))
        number = int(key[-digits:]) if 0 < digits <= 18 else -1
        before, self._numbered = self._numbered, (prefix, number)
        if number >= 0 and before[0] == prefix and before[1] >= 0:
            if self._padding and number - before[1] > self._step:
                self._doubtful += self._padding
            elif not self._padding:
                self._step = max(self._step, number - before[1])
        self._padding = 0

    def scan(self, size: int, damage: DamagedTar | None) -> Scan:
        """The result, for a tar of `size` bytes that may end in a damage."""
        if damage is not None and damage.zeros is not None:
            self.pass_zeros(damage.zeros._replace(end=damage.zeros.start, padding=False))
        behind = _missing_behind(damage, [*self.images.values()], size, self._bytes_of_zeros, self._doubtful)
        images, further = self.images, self._further
        places = sorted(
            [*((*image, *self._texts.get(key, _NO_MEMBER)) for key, image in images.items()), *self.refused]
        )
        if damage is not None:
            places.append((damage.offset, 0, DAMAGED, 0))
        misnamed = [name for key, names in further.items() if key not in images for name in names]
        ignored = self._ignored + sum(key not in images for key in self._texts)
        ignored += sum(map(len, further.values())) - len(misnamed)
        missing = Missing(behind, len(misnamed), tuple(name[:_NAME_LENGTH] for name in misnamed[:_FIRST_NAMES]))
        others = tuple(self._suffixes.most_common(_SHOWN_SUFFIXES))
        return Scan(np.array(places, dtype=ROW), ignored, missing, others, self._inner_zeros)


def _missing_behind(
    damage: DamagedTar | None, images: list[tuple[int, int]], size: int, zeros: int, doubtful: int
) -> int:
    """About how many images are missing behind a damage and in zeros: the bytes over those of an image so far.

    How a file that ends inside a member would have gone on is unknown: as many images again are presumed.

    Args:
        zeros: bytes in which at least one image is missing.
        doubtful: bytes of zeros in which as many are missing as fit.
    """
    if not images or (damage is None and not zeros + doubtful):
        return 0
    whole = [(offset, length) for offset, length in images if offset + length <= size]
    end = max((offset + length for offset, length in whole), default=0)
    each = max(1, (end - zeros - doubtful) / len(whole)) if whole else size
    in_zeros = (max(1, round(zeros / each)) if zeros else 0) + round(doubtful / each)
    if damage is None:
        return in_zeros
    missing = (size - (end if damage.cut else damage.offset)) / each if each else 0
    return in_zeros + max(round(missing), len(images) if damage.cut else 0)


def _why_refused(found: Mapping[str, object], key: str, member: tarfile.TarInfo) -> int:
    """0, or by REFUSED why a member cannot be used: the first one of a key counts."""
    if key in found:
        return _SECOND
    if not member.isreg() or member.issparse():
        return _LINK
    return _LARGE if member.size > _LARGEST else 0


def refusal(place: Any) -> str:
    """Why a row of an index is bad by its place in the tar; "" where nothing speaks against it."""
    return "" if place["json_size"] else REFUSED.get(int(place["json_offset"]), "")


class OpenFile:
    """A descriptor that closes when its last reader drops it, so a bounded cache may forget it at any time.

    Args:
        listed: size and version that the file had when it was listed, and must have at every read; None: any.
    """

    def __init__(self, path: str | os.PathLike[str], listed: tuple[int, str] | None = None) -> None:
        self.path, self._listed = str(path), listed
        self.fd = tried_again(lambda: os.open(path, os.O_RDONLY), self.path)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at a place; safe from many threads.

        Raises:
            ValueError: they are not all there, or the file is no longer the one that was listed.
        """
        data = tried_again(lambda: os.pread(self.fd, size, offset), self.path)
        if self._listed is not None:
            self._compare(self._listed)
        if len(data) != size:
            raise ValueError(
                f"{self.path}: {len(data)} of {size} bytes at {offset}; the file changed after it was indexed"
            )
        return data

    def _compare(self, listed: tuple[int, str]) -> None:
        stat = tried_again(lambda: os.fstat(self.fd), self.path)
        now = (stat.st_size, version_of(stat))
        if now != listed:
            raise ValueError(
                f"{self.path}: its size and time of change (s) are {now[0]}, {now[1]}, but were {listed[0]}, "
                f"{listed[1]} when the run listed it; the file changed after it was indexed (a copy on another "
                "node needs the same time: cp -p, rsync -t)"
            )

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def entry(shard: Shard) -> dict[str, Any]:
    """A shard's line in an index file: all but where it lies; missing images only where there are any."""
    line = {key: value for key, value in asdict(shard).items() if key not in ("path", "version", "missing", "others")}
    line |= {"others": [list(pair) for pair in shard.others]} if shard.others else {}
    return line | {"lost": asdict(shard.missing)} if shard.missing.images else line


def shard_of(line: Any, path: str, where: Path | str) -> Shard:
    """The shard that a line of the index file `where` describes.

    Raises:
        ValueError: the line is not as `entry` makes it; a name is no path, a fingerprint names files we keep.
    """
    names: tuple[Any, ...] = ()
    counts: tuple[Any, ...] = ()
    others: list[tuple[Any, Any]] = []
    try:
        missing = line.get("lost", {"behind": 0, "misnamed": 0, "names": []})
        others = [(suffix, number) for suffix, number in line.get("others", [])]
        names = (line["name"], line["fingerprint"], *missing["names"], *(suffix for suffix, _ in others))
        counts = (line["rows"], line["bytes"], line["ignored"], missing["behind"], missing["misnamed"])
        counts += tuple(number for _, number in others)
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    right = bool(names) and all(type(name) is str for name in names) and all(type(n) is int and n >= 0 for n in counts)
    if not right or names[0] in ("", ".", "..") or {"/", "\0"} & set(names[0]) or not _FINGERPRINT.fullmatch(names[1]):
        raise ValueError(
            f"{where}: not an index of shards; each needs a name without /, rows, bytes and ignored from 0 on, and a "
            f"fingerprint of 64 hex digits, got {line!r:.300}"
        )
    rows, size, ignored, behind, misnamed = counts[:5]
    lost = Missing(behind, misnamed, names[2 : len(names) - len(others)]) if "lost" in line else NONE_MISSING
    return Shard(names[0], path, rows, size, names[1], ignored, missing=lost, others=tuple(others))


def read_index(text: bytes, where: Path | str) -> list[Shard]:
    """The shards that the index file `where`, local or remote, lists; their paths are empty.

    Raises:
        ValueError: it is no such file.
    """
    rename = "; rename it if another program made it"
    try:
        content = parse_json(text, where)
    except ValueError as error:
        raise ValueError(f"{error}{rename}") from None
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise ValueError(f"{where}: not an index of shards; expected an object with a list `shards`{rename}")
    shards = [shard_of(line, "", where) for line in content["shards"]]
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: has two shards of one name; expected each once")
    return shards


def is_foreign_index(text: bytes) -> bool:
    """Whether a file of the name of our index is JSON that another program wrote, as wids and MosaicML do.

    What is no JSON may be one of ours that is damaged, so it is none of another program.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    lines = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(lines, list):
        return True
    ours = content.get("version") == INDEX_VERSION or any(isinstance(x, dict) and "fingerprint" in x for x in lines)
    return not ours


def read_rows(file: IO[bytes], shard: Shard, where: str, *, remedy: str = "") -> NDArray[Any]:
    """The rows that an index file `where` has of a shard, (P,) of ROW: mapped if it is a local file, else in memory.

    Args:
        remedy: the end of the message: what to do about a file that is refused.

    Raises:
        ValueError: it is no such file, or has the length of another shard's.
    """
    try:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: not an index of a shard: {type(error).__name__}: {reason}{remedy}") from None
    start = file.tell()
    size = file.seek(0, os.SEEK_END) - start
    if dtype != ROW or shape != (shard.rows,) or size != shard.rows * ROW.itemsize:
        raise ValueError(
            f"{where}: an array of {dtype}, shape {shape}, in {size} bytes, but {shard.path} needs {shard.rows} rows "
            f"of {ROW.itemsize} bytes; it is cut off, or the index of another shard{remedy}"
        )
    if isinstance(file, BufferedReader):
        return map_file(where)[start:].view(ROW)
    file.seek(start)
    return np.frombuffer(file.read(size), dtype=ROW)


def check_places(rows: NDArray[Any], shard: Shard, file: OpenFile, where: str) -> None:
    """Compares the first and the last image of an index with the headers in front of them.

    Raises:
        ValueError: there is no header of a file of that size, so this is the index of another shard.
    """
    places = [place for place in (rows[:1], rows[-1:]) if len(place) and not refusal(place[0])]
    for offset, size in ((int(place[0]["offset"]), int(place[0]["size"])) for place in places):
        try:
            header = file.read(offset - 512, 512) if 512 <= offset <= shard.bytes else b""
            found = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
        except tarfile.HeaderError:
            found = -1
        if found != size:
            raise ValueError(
                f"{where}: has an image of {size} bytes at {offset}, where {shard.path} has none; it is the index of "
                "another shard"
            )


@dataclass(frozen=True)
class MissingImages:
    """Some images of a shard without a row, for a list of bad images."""

    shard: Shard
    key: str  # a member's name; "" where none is known
    reason: str
    images: int


def count_missing(shards: Sequence[Shard]) -> int:
    """How many images have no row, by an estimate behind damages."""
    return sum(shard.missing.images for shard in shards)


def list_missing(shards: Sequence[Shard]) -> Iterator[MissingImages]:
    """What is missing by shard, the first of the names one by one."""
    behind = "missing in zeros, or behind the place where the shard is damaged or cut off, as an estimate"
    misnamed = "a further dot in its name, which ends a key at the first one, and no image of just that key: rename it"
    for shard in shards:
        missing = shard.missing
        if missing.behind:
            yield MissingImages(shard, "", behind, missing.behind)
        yield from (MissingImages(shard, name, misnamed, 1) for name in missing.names)
        if missing.misnamed > len(missing.names):
            yield MissingImages(shard, "and others", misnamed, missing.misnamed - len(missing.names))


def describe_missing(shards: Sequence[Shard]) -> Iterator[str]:
    """A line for each way in which images are missing, with the first shards and what to do; none where none are."""
    behind, where = _count_and_shards(shards, lambda missing: missing.behind)
    if behind:
        yield (
            f"about {pluralize(behind, 'image is', 'images are')} missing in {where}: "
            f"damaged or cut off after the rows that are read, or zeros "
            "where images should be; fetch or make these shards again"
        )
    misnamed, where = _count_and_shards(shards, lambda missing: missing.misnamed)
    if misnamed:
        name = next(name for shard in shards for name in shard.missing.names)
        stem, _, suffix = name.rpartition(".")
        folder, slash, base = stem.rpartition("/")
        right = f"{folder}{slash}{base.replace('.', '_')}.{suffix}"
        yield (
            f"{pluralize(misnamed, 'image is', 'images are')} left out in {where}: "
            f"a key ends at the first dot of a name, and theirs have no "
            f"image of just that key; rename {name!r:.200} to {right!r:.200}, and so on"
        )


def _count_and_shards(shards: Sequence[Shard], count: Callable[[Missing], int]) -> tuple[int, str]:
    """How many images are missing in one way, and the first shards where."""
    of = [shard for shard in shards if count(shard.missing)]
    more = f" and {len(of) - _SHOWN} more" if len(of) > _SHOWN else ""
    return sum(count(shard.missing) for shard in of), ", ".join(shard.path for shard in of[:_SHOWN]) + more
