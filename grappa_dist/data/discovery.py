"""Finds shards and their indexes, and builds what is missing.

What to do about a folder that was named for shards and has none.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.decoding import TAKEN
from grappa_dist.data.index import (
    COMMITTED,
    IMAGE_SUFFIXES,
    Shard,
    describe_missing,
    index_shard,
    read_index,
    version_of,
    write_rows,
)
from grappa_dist.data.index_cache import Notes, State, check_unchanged, local_state
from grappa_dist.data.remote import RemoteObject, is_remote
from grappa_dist.data.remote_index import RemoteRows, committed_indexes, index_remote, list_remote

_LOOKED_AT = 10_000  # entries below a folder, at most
_SHOWN = 3
_IN_THE_MAKING = re.compile(r".*/\.[^/]+\.partial(?=/|$)")


def instead_of(entry: str) -> str:
    """The end of an error about a local path without a tar: where its shards are, or what makes some; else ""."""
    if not os.path.isdir(entry):
        return ""
    files = _files(entry)
    below = sorted({os.path.dirname(path) for path in files if path.endswith(".tar")})
    if making := [match[0] for path in below if (match := _IN_THE_MAKING.match(path))]:
        return f"; {making[0]} is in the making: run the command that began it again, and it is finished"
    if below:
        more = f" and {len(below) - _SHOWN} more" if len(below) > _SHOWN else ""
        return f"; there are tars one level or more below: name {' or '.join(map(shlex.quote, below[:_SHOWN]))}{more}"
    image = next((path for path in files if path.lower().endswith(tuple(f".{s}" for s in TAKEN))), None)
    if image is None:
        return ""
    folder = os.path.normpath(entry)
    folder = f"./{folder}" if folder.startswith("-") else folder
    out = f"{folder if os.path.basename(folder) not in ('.', '..') else os.path.abspath(folder)}-shards"
    command = f"python launch/make_shards.py --images {shlex.quote(folder)} --split none --out {shlex.quote(out)}"
    return (
        f". It holds images, such as {image!r}, and no shards of them: make these by `{command}`, "
        f"then name {shlex.quote(os.path.join(out, 'train'))}"
    )


def _files(folder: str) -> list[str]:
    """The first files at and below a folder, nearer ones first; links to folders are left out."""
    paths = (entry.path for entry in islice(_entries(folder), _LOOKED_AT) if _is_file(entry))
    return sorted(paths, key=lambda path: (path.count("/"), path))


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a link that leads to itself
        return False


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    folders = deque([folder])
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.popleft()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)


Tar = Path | RemoteObject
Index = str | RemoteRows | NDArray[Any]  # a .npy of ROW, one that is fetched when it is wanted, or the rows
IndexedShard = tuple[Shard, Index]
Progress = Callable[[int], object]


def find_shards(
    paths: Sequence[str | os.PathLike[str]],
    index_dir: Path | None,
    cache: CacheSettings | None = None,
    *,
    write: bool = True,
    tell: Progress = lambda count: None,
) -> list[IndexedShard]:
    """Shards that `paths` name, each with its index file, or, where there is none and none may be written, its rows.

    Args:
        index_dir: where indexes of tars lie that brought none, and notes of what was checked; None: nowhere.
        write: whether missing ones are put there.
        tell: hears how many tars had to be read, for want of an index or since they are newer than theirs.

    Raises:
        ValueError: nothing is there, no shard has an image, or a shard is damaged or not what its index describes.
    """
    tars = _list_tars(paths)
    notes = Notes(None if index_dir is None else index_dir.absolute(), write)
    folders = {tar.parent: _LocalIndex(tar.parent) for tar in tars if isinstance(tar, Path)}
    far = [tar for tar in tars if isinstance(tar, RemoteObject)]
    whole = [str(path).rstrip("/") for path in paths if is_remote(str(path))]
    remote = committed_indexes(far, whole, notes)
    settings, indexer = cache or CacheSettings(), _Indexer(notes, tell)

    def find(tar: Tar) -> IndexedShard:
        if isinstance(tar, RemoteObject):
            return remote.get(tar.url) or indexer.indexed(tar, lambda: index_remote(tar, settings))
        folder = folders[tar.parent]
        if folder.shards is None:
            return indexer.indexed(tar, lambda: index_shard(tar))
        shard, rows = folder.shard(tar)
        check_unchanged(tar, shard, folder.written_ns, notes, tell=indexer.tell_one_more)
        return replace(shard, version=version_of(tar.stat())), rows

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(find, tars))
    _check_images([shard for shard, _ in found], paths)
    return found


def _check_images(shards: Sequence[Shard], paths: Sequence[str | os.PathLike[str]]) -> None:
    if not any(shard.rows for shard in shards):
        ignored = sum(shard.ignored for shard in shards)
        lost = "".join(f"; {line}" for line in describe_missing(shards))
        raise ValueError(
            f"shards: no images in {', '.join(map(str, paths))} ({len(shards)} tars, {ignored} other members); "
            f"expected members <key>.{'|'.join(IMAGE_SUFFIXES)}{lost}"
        )


def _list_tars(paths: Sequence[str | os.PathLike[str]]) -> list[Tar]:
    """The tars that all entries name, in their order."""
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"shards: expected a list of paths, got {paths!r}")
    tars = [tar for path in paths for tar in _tars_of(str(path))]
    for address, times in Counter(map(_address, tars)).items():
        if times > 1:
            raise ValueError(f"shards: {address} is named {times} times; expected once")
    return tars


def _address(tar: Tar) -> str:
    return tar.url if isinstance(tar, RemoteObject) else str(tar)


def _state(tar: Tar) -> State:
    if isinstance(tar, RemoteObject):
        return {"path": tar.url, "size": tar.size, "version": tar.version}
    return {**local_state(tar), "version": version_of(tar.stat())}


def _tars_of(entry: str) -> Sequence[Tar]:
    """The tars that one entry names, sorted."""
    if not is_remote(entry):
        return _local_tars(entry)
    found = list_remote(entry)
    if not found:
        raise ValueError(
            f"shards: nothing at {entry}; expected a folder of .tar objects, a .tar, a pattern such as DIR/*.tar or a "
            "range such as DIR/shard-{000..127}.tar"
        )
    return found


def _local_tars(entry: str) -> list[Path]:
    """Absolute paths of the tars that one entry names, sorted; a pattern names what ends in .tar."""
    if os.path.isdir(entry):
        tars: Iterable[str] = (str(tar) for tar in Path(entry).glob("*.tar"))
    elif os.path.isfile(entry):
        tars = [entry]
    else:
        tars = (path for path in glob.glob(entry, recursive=True) if path.endswith(".tar"))
    found = sorted(Path(os.path.abspath(tar)) for tar in tars)
    if not found:
        raise ValueError(
            f"shards: nothing at {entry}; expected a folder of .tar files, a .tar file or a pattern such as DIR/*.tar"
            f"{instead_of(entry)}"
        )
    for tar in found:
        if not tar.is_file():
            raise ValueError(f"shards: {tar} is no file, or a link to none; expected a tar")
    return found


def committed_index(folder: Path) -> dict[str, tuple[Shard, str]] | None:
    """Shards by name with their index files, as the writer left them; None where no writer finished.

    Raises:
        ValueError: the folder's tars are no longer those that the index describes.
    """
    where = folder / COMMITTED
    if not where.is_file():
        return None
    shards = read_index(where.read_bytes(), where)
    sizes = {tar.name: tar.stat().st_size for tar in folder.glob("*.tar") if tar.is_file()}
    described = {shard.name: shard.bytes for shard in shards}
    for name in sorted(sizes.keys() | described.keys()):
        if sizes.get(name) != described.get(name):
            has, said = sizes.get(name, "missing"), described.get(name, "absent")
            raise ValueError(
                f"{folder / name}: its size is {has} but {where} says {said}; the shards changed after indexing"
            )
    return {s.name: (replace(s, path=str(folder / s.name)), str(folder / f"{s.name}.npy")) for s in shards}


class _LocalIndex:
    """The index that a writer left beside the tars of a folder.

    Attributes:
        shards: None where there is no such index.
        written_ns: when it was written, which was after the tars.
    """

    def __init__(self, folder: Path) -> None:
        self.shards, self._where = committed_index(folder), folder / COMMITTED
        self.written_ns = 0 if self.shards is None else self._where.stat().st_mtime_ns

    def shard(self, tar: Path) -> tuple[Shard, str]:
        known = {} if self.shards is None else self.shards
        if tar.name not in known:
            raise ValueError(f"shards: {tar} is none of the shards of {self._where}; expected one of these, or all")
        return known[tar.name]


class _Indexer:
    """Indexes of tars that brought none: read from where they were written, else made."""

    def __init__(self, notes: Notes, tell: Progress) -> None:
        self._notes, self._tell = notes, tell
        self._lock, self._count = threading.Lock(), 0

    def indexed(self, tar: Tar, make: Callable[[], tuple[NDArray[Any], Shard]]) -> IndexedShard:
        """The shard of a tar with its index, reused while the tar is in the same state."""
        address, state = _address(tar), _state(tar)
        known = self._notes.indexed(address, state)
        kept = None if known is None else self._notes.rows_path(known)
        if known is not None and kept is not None and kept.is_file():
            return known, str(kept)
        rows, shard = make()
        self.tell_one_more()
        kept = self._notes.rows_path(shard)
        if kept is None or not self._notes.writes:
            return shard, rows
        write_rows(kept, rows)
        self._notes.note_indexed(address, state, shard)
        return shard, str(kept)

    def tell_one_more(self) -> None:
        with self._lock:
            self._count += 1
            self._tell(self._count)
