"""Where the images of one tar lie. Shapes: P images of one shard."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from grappa_dist.files import replacing

ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("json_offset", "<u8"), ("json_size", "<u4")])  # 24 bytes an image
COMMITTED = "index.json"  # written last beside finished shards
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INDEX_VERSION = 1
_NAME = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]*)$", re.DOTALL)  # WebDataset's grouping: the first dot of the base name
_BLOCK = 512
_LARGEST = 2**32 - 1
# Why a row is bad already by its place in the tar: told by `json_offset`, where a JSON member cannot begin, and no size
REFUSED = {
    1: "a second image of its key, which names one image",
    2: "a link or a sparse file, no plain file",
    3: f"more than {_LARGEST} bytes",
    4: "the shard is damaged or cut off from here on, and what follows is lost",
}
_SECOND, _LINK, _LARGE, DAMAGED = REFUSED


@dataclass(frozen=True)
class Shard:
    """One tar of images, as its index saw it."""

    name: str
    path: str
    rows: int
    bytes: int
    fingerprint: str  # sha256 of the tar
    ignored: int = 0  # members that are neither an image nor the JSON of one
    version: str = ""  # of a remote tar: its ETag when it was found


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case suffix) of a member, or None where the name has none."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def index_shard(path: str | os.PathLike[str]) -> tuple[NDArray[Any], Shard]:
    """Places of a tar's images in file order, (P,) of ROW, and the shard they make."""
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        rows, ignored = scan(file, path)
        fingerprint = sha256_of(file)
    return rows, Shard(path.name, str(path.absolute()), len(rows), size, fingerprint, ignored)


def scan(file: IO[bytes], path: Path | str) -> tuple[NDArray[Any], int]:
    """Places of a tar's images in file order, (P,) of ROW, and how many other members it has.

    What cannot be used keeps a row, which says why. A tar that is damaged further on ends with such a row.
    """
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int]] = {}
    refused: list[tuple[int, int, int, int]] = []
    ignored = 0
    try:
        for member in members_of(file, path):
            key, suffix = (None if member.isdir() else split_name(member.name)) or ("", "")
            why = _why_refused(images, key, member) if _is_image(suffix) else 0
            if why:
                refused.append((member.offset_data, 0, why, 0))
            elif _is_image(suffix):
                images[key] = (member.offset_data, member.size)
            elif suffix == "json" and not _why_refused(texts, key, member):
                texts[key] = (member.offset_data, member.size)
            else:
                ignored += not member.isdir()
    except DamagedTar as error:
        if not images and not refused:
            raise
        refused.append((error.offset, 0, DAMAGED, 0))
    empty = (0, 0)
    places = sorted([*((*image, *texts.get(key, empty)) for key, image in images.items()), *refused])
    return np.array(places, dtype=ROW), ignored + sum(key not in images for key in texts)


class DamagedTar(ValueError):
    """A file that is no plain tar, or is none from some byte on."""

    def __init__(self, path: Path | str, offset: int, reason: str) -> None:
        super().__init__(f"{path}: not a plain tar, or cut off or damaged, at byte {offset}: {reason}")
        self.offset = offset


def members_of(file: IO[bytes], path: Path | str) -> Iterator[tarfile.TarInfo]:
    """Headers of a plain tar, to its end.

    Raises:
        DamagedTar: it is another kind of file, or cut off or damaged anywhere but inside a member's data.
    """
    offset = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                yield member
                offset = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise DamagedTar(path, offset, str(error)) from None
    # tarfile takes any nonsense after the first member for the end; the real end is a block of zeros
    file.seek(offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise DamagedTar(path, offset, "a header or the end mark of a tar should be there")


def _is_image(suffix: str) -> bool:
    return suffix in IMAGE_SUFFIXES


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


def sha256_of(file: BufferedReader) -> str:
    """Of all bytes of a file."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


class OpenFile:
    """A descriptor that closes when the last reader lets go of it, so a bounded cache may forget it at any time."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = str(path)
        self.fd = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at a place; safe from many threads."""
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise ValueError(
                f"{self.path}: {len(data)} of {size} bytes at {offset}; the file changed after it was indexed"
            )
        return data

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


def key_at(file: IO[bytes], start: int, offset: int) -> str:
    """Key of the member whose data begin at `offset`; `start` is the end of any member before it.

    Reading forward from a member's end meets the extra headers of a long name in their order.
    """
    file.seek(-(-start // _BLOCK) * _BLOCK)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.offset_data == offset:
                named = split_name(member.name)
                assert named is not None, f"{member.name} was indexed without a key"
                return named[0]
    raise ValueError(f"{file.name}: no member begins at byte {offset}; the shard changed after it was indexed")


def write_rows(path: Path, rows: NDArray[Any]) -> None:
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.save(file, rows, allow_pickle=False)


def entry(shard: Shard) -> dict[str, Any]:
    """A shard's line in an index file: all but where it lies."""
    return {key: value for key, value in asdict(shard).items() if key not in ("path", "version")}


def shard_of(line: Mapping[str, Any], path: str, where: Path | str) -> Shard:
    """The shard that a line of the index file `where` describes."""
    try:
        return Shard(
            str(line["name"]),
            path,
            int(line["rows"]),
            int(line["bytes"]),
            str(line["fingerprint"]),
            int(line["ignored"]),
        )
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{where}: not an index of shards; each needs name, rows, bytes, fingerprint, ignored"
        ) from None
