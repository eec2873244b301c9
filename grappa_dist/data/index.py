"""Where the images of one tar lie. Shapes: P images of one shard."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

ROW = np.dtype([("offset", "<u8"), ("size", "<u4"), ("json_offset", "<u8"), ("json_size", "<u4")])  # 24 bytes an image
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
INDEX_VERSION = 1
_NAME = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]*)$", re.DOTALL)  # WebDataset's grouping: the first dot of the base name
_BLOCK = 512
_LARGEST = 2**32 - 1


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
        fingerprint = _sha256(file)
    return rows, Shard(path.name, str(path.absolute()), len(rows), size, fingerprint, ignored)


def scan(file: IO[bytes], path: Path | str) -> tuple[NDArray[Any], int]:
    """Places of a tar's images in file order, (P,) of ROW, and how many other members it has."""
    images: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int]] = {}
    ignored = 0
    for member in members_of(file, path):
        named = None if member.isdir() else split_name(member.name)
        found = None if named is None else {"json": texts}.get(named[1], images if _is_image(named[1]) else None)
        if named is not None and found is not None:
            found[_new_key(found, named[0], member, path)] = (member.offset_data, member.size)
        else:
            ignored += not member.isdir()
    empty = (0, 0)
    places = sorted((*image, *texts.get(key, empty)) for key, image in images.items())
    return np.array(places, dtype=ROW), ignored + sum(key not in images for key in texts)


def members_of(file: IO[bytes], path: Path | str) -> Iterator[tarfile.TarInfo]:
    """Headers of a plain tar, to its end.

    Raises:
        ValueError: it is another kind of file, or cut off or damaged anywhere but inside a member's data.
    """
    offset = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                yield member
                offset = tar.offset
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: not a plain tar, or cut off, at byte {offset}: {error}") from None
    # tarfile takes any nonsense after the first member for the end; the real end is a block of zeros
    file.seek(offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise ValueError(
            f"{path}: cut off or damaged at byte {offset}, where a header or the end mark of a tar should be"
        )


def _is_image(suffix: str) -> bool:
    return suffix in IMAGE_SUFFIXES


def _new_key(found: Mapping[str, object], key: str, member: tarfile.TarInfo, path: Path | str) -> str:
    """The key, after checking that the member is a plain file and the first of its kind under this key."""
    if key in found:
        kind = "JSON member" if member.name.lower().endswith(".json") else "image"
        raise ValueError(f"{path}: key {key!r} has a second {kind}, {member.name!r}; a key names one image")
    if not member.isreg() or member.issparse():
        raise ValueError(f"{path}: member {member.name!r} is a link or a sparse file; write it as a plain file")
    if member.size > _LARGEST:
        raise ValueError(f"{path}: member {member.name!r} has {member.size} bytes; at most {_LARGEST} are read")
    return key


def _sha256(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


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


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that appears complete or not at all; whoever renames last wins."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_rows(path: Path, rows: NDArray[Any]) -> None:
    write_atomic(path, lambda file: np.save(file, rows, allow_pickle=False))


def write_json(path: Path, value: object) -> None:
    write_atomic(path, lambda file: file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()))


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
