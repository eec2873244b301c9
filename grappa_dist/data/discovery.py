"""Finds shards and their indexes, makes missing indexes, and, where there are no shards, says where some are."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from grappa_dist.console import pluralize
from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.entries import (
    copies_among,
    describe_passed_over,
    expand_braces,
    is_named_like_a_copy,
    is_shard_name,
    resembles_shard,
)
from grappa_dist.data.index import (
    COMMITTED,
    IMAGE_SUFFIXES,
    Shard,
    describe_missing,
    index_shard,
    is_foreign_index,
    read_index,
    sha256_of,
    version_of,
)
from grappa_dist.data.index_cache import (
    IndexCache,
    State,
    forget_rows,
    local_state,
    rows_are_whole,
    verify_unchanged,
)
from grappa_dist.data.remote import RemoteObject, is_remote
from grappa_dist.data.remote_index import RemoteRows, committed_indexes, index_remote, list_remote
from grappa_dist.files import read_bytes, save_array
from grappa_dist.storage import open_to_read

Tar = Path | RemoteObject
Index = str | RemoteRows | NDArray[Any]  # a .npy of ROW, one that is fetched when it is needed, or the rows
IndexedShard = tuple[Shard, Index]

_NO_SHARDS = "which by their names are no shards"
_COPIES = "which are copies of other shards there"
_LOOKED_AT = 10_000  # entries below a folder, at most
_SHOWN = 3  # folders that a message names
_UNFINISHED = re.compile(r".*/\.[^/]+\.partial(?=/|$)")


def find_shards(
    paths: Sequence[str | os.PathLike[str]],
    index_dir: Path | None,
    settings: CacheSettings,
    *,
    write: bool = True,
    on_read: Callable[[], object] = lambda: None,
    log: Callable[[str], object] = lambda line: None,
) -> list[IndexedShard]:
    """Shards that `paths` name, each with its index file, or, where there is none and none may be written, its rows.

    Args:
        index_dir: of the index cache, which also takes the rows of tars that brought no index; None: nowhere.
        write: whether anything is put there.
        on_read: called, by any of several threads, for each tar that had to be read to the end.
        log: called with a line for what is passed over: hidden files, folders, copies, indexes of other programs.

    Raises:
        ValueError: nothing is there, no shard has an image, or a shard is damaged or not what its index describes.
    """
    tars = _list_tars(paths, log)
    cache = IndexCache(None if index_dir is None else index_dir.absolute(), write)
    parents = dict.fromkeys(tar.parent for tar in tars if isinstance(tar, Path))
    folders = {parent: _LocalIndex(parent, log) for parent in parents}
    remote_tars = [tar for tar in tars if isinstance(tar, RemoteObject)]
    remote_folders = [str(path).rstrip("/") for path in paths if is_remote(str(path))]
    remote = committed_indexes(remote_tars, remote_folders, cache, settings, log)

    def find(tar: Tar) -> IndexedShard | None:
        if isinstance(tar, RemoteObject):
            return remote.get(tar.url) or _indexed(tar, lambda: index_remote(tar, settings), cache, on_read, log)
        folder = folders[tar.parent]
        if folder.shards is None:
            return _indexed(tar, lambda: index_shard(tar), cache, on_read, log)
        return None if tar.name in folder.copies else folder.shard(tar, cache, on_read)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = _without_copies([one for one in pool.map(find, tars) if one is not None], log)
    _check_images([shard for shard, _ in found], paths)
    return found


def _indexed(
    tar: Tar,
    make: Callable[[], tuple[NDArray[Any], Shard]],
    cache: IndexCache,
    on_read: Callable[[], object],
    log: Callable[[str], object],
) -> IndexedShard:
    """The shard of a tar that brought no index: from the index cache while the tar is in the same state, else made."""
    address, state = _address(tar), _state(tar)
    known = cache.shard(address, state)
    kept = None if known is None else cache.rows_path(known)
    if known is not None and kept is not None and kept.is_file():
        if rows_are_whole(kept, write=cache.writes):
            return known, str(kept)
        log(f"{kept}: damaged, so {address} is read again")
        if cache.writes:
            forget_rows(kept)
    rows, shard = make()
    on_read()
    kept = cache.rows_path(shard)
    if kept is None or not cache.writes:
        return shard, rows
    save_array(kept, rows)
    rows_are_whole(kept, write=True)
    cache.put_shard(address, state, shard)
    return shard, str(kept)


def _without_copies(found: list[IndexedShard], log: Callable[[str], object]) -> list[IndexedShard]:
    """All but those that are copies, by name and bytes, of another one of their folder."""
    folders: dict[str, list[int]] = {}
    for place, (shard, _) in enumerate(found):
        folders.setdefault(shard.path.rpartition("/")[0], []).append(place)
    left_out = set[int]()
    for folder, places in folders.items():
        copies = copies_among([(found[place][0].name, found[place][0].fingerprint) for place in places])
        left_out.update(places[copy] for copy in copies)
        _log_any(log, describe_passed_over(folder, (found[places[copy]][0].name for copy in copies), _COPIES))
    return [one for place, one in enumerate(found) if place not in left_out]


def _log_any(log: Callable[[str], object], line: str) -> None:
    if line:
        log(line)


class _LocalIndex:
    """The index that a writer left beside the tars of a folder.

    Attributes:
        shards: None where there is no such index.
        copies: names of tars that are none of the shards, but have the bytes of one.
    """

    def __init__(self, folder: Path, log: Callable[[str], object]) -> None:
        self.shards, self._where = _listed(folder), folder / COMMITTED
        if self.shards is None and self._where.is_file():
            log(f"passed over: {self._where}, which is no index of shards, but another program's")
        self.copies = set() if self.shards is None else _unlisted(folder, self.shards)
        _log_any(log, describe_passed_over(str(folder), self.copies, _COPIES))
        self._written_ns = 0 if self.shards is None else self._where.stat().st_mtime_ns

    def shard(self, tar: Path, cache: IndexCache, on_read: Callable[[], object]) -> IndexedShard:
        """The shard of a tar with its index file, compared with the checksum where the tar is newer."""
        known = {} if self.shards is None else self.shards
        if tar.name not in known:
            raise ValueError(f"shards: {tar} is none of the shards of {self._where}; expected one of these, or all")
        shard, rows = known[tar.name]
        if verify_unchanged(tar, shard, self._written_ns, cache):
            on_read()
        return replace(shard, version=version_of(tar.stat())), rows


def committed_index(folder: Path) -> dict[str, tuple[Shard, str]] | None:
    """Shards by name with their index files, as the writer left them; None where no writer of ours finished.

    Raises:
        ValueError: the folder's tars are no longer those that the index describes.
    """
    listed = _listed(folder)
    if listed is not None:
        _unlisted(folder, listed)
    return listed


def refuse_other_files(folder: Path) -> None:
    """Raises ValueError when a folder that no writer finished has anything in it: shards are not mixed with it."""
    if folder.is_dir() and (names := os.listdir(folder)):
        raise ValueError(
            f"{folder}: not empty (it has {min(names)!r:.100}) and without the {COMMITTED} of finished shards; "
            "expected a new or a finished folder"
        )


def _listed(folder: Path) -> dict[str, tuple[Shard, str]] | None:
    """The same; tars that the index does not list are not looked at."""
    where = folder / COMMITTED
    text = read_bytes(where) if where.is_file() else None
    if text is None or is_foreign_index(text):
        return None
    shards = read_index(text, where)
    for shard in sorted(shards, key=lambda shard: shard.name):
        tar = folder / shard.name
        has = tar.stat().st_size if tar.is_file() else "missing"
        if has != shard.bytes:
            raise ValueError(
                f"{tar}: its size is {has} but {where} says {shard.bytes}; the shards changed after indexing"
            )
    return {s.name: (replace(s, path=str(folder / s.name)), str(folder / f"{s.name}.npy")) for s in shards}


def _unlisted(folder: Path, listed: Mapping[str, tuple[Shard, str]]) -> set[str]:
    """Names of tars that are none of the listed shards but copies of one, by name and bytes.

    Raises:
        ValueError: there is another tar.
    """
    unlisted = (name for name in os.listdir(folder) if is_shard_name(name) and name not in listed)
    names = sorted(name for name in unlisted if (folder / name).is_file())
    for name in names:
        size = (folder / name).stat().st_size
        alike = [s for s, _ in listed.values() if s.bytes == size and is_named_like_a_copy(name, s.name)]
        fingerprint = ""
        if alike:
            with open_to_read(folder / name) as file:
                fingerprint = sha256_of(file)
        if fingerprint not in {shard.fingerprint for shard in alike}:
            raise ValueError(
                f"{folder / name}: is none of the shards that {folder / COMMITTED} lists, from which it is absent; "
                "move it to another folder and name that as well, or delete the index to have all tars indexed anew"
            )
    return set(names)


def _check_images(shards: Sequence[Shard], paths: Sequence[str | os.PathLike[str]]) -> None:
    if not any(shard.rows for shard in shards):
        ignored = sum(shard.ignored for shard in shards)
        missing = "".join(f"; {line}" for line in describe_missing(shards))
        raise ValueError(
            f"shards: no images in {', '.join(map(str, paths))} ({pluralize(len(shards), 'tar')}, "
            f"{pluralize(ignored, 'other member')}); "
            f"expected members <key>.{'|'.join(IMAGE_SUFFIXES)}{missing}"
        )


def _list_tars(paths: Sequence[str | os.PathLike[str]], log: Callable[[str], object]) -> list[Tar]:
    """The tars that all entries name, in their order."""
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"shards: expected a list of paths, got {paths!r}")
    tars = [tar for path in paths for tar in _tars_of(str(path), log)]
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


def _tars_of(entry: str, log: Callable[[str], object]) -> Sequence[Tar]:
    """The tars that one entry names, sorted; names in braces in their order."""
    if not is_remote(entry):
        return _local_tars(entry, log)
    found, passed = list[RemoteObject](), list[str]()
    for tar in list_remote(entry):
        if is_shard_name(tar.name) or entry.endswith(tar.name):
            found.append(tar)
        else:
            passed.append(tar.name)
    _log_any(log, describe_passed_over(entry, passed, _NO_SHARDS))
    if not found:
        raise ValueError(
            f"shards: nothing at {entry}; expected a folder of .tar objects, a .tar, a pattern such as DIR/*.tar or a "
            "range such as DIR/shard-{000..127}.tar"
        )
    return found


def _local_tars(entry: str, log: Callable[[str], object]) -> list[Path]:
    """Absolute paths of the tars that one entry names, sorted; a pattern names what ends in .tar.

    Braces stand for several entries, unless something has them in its name.
    """
    passed = list[str]()
    if os.path.isdir(entry):
        names = os.listdir(entry)
        tars: Iterable[str] = (os.path.join(entry, name) for name in names if is_shard_name(name))
        passed = [name for name in names if resembles_shard(name)]
    elif os.path.isfile(entry):
        return [Path(os.path.abspath(entry))]
    else:
        tars = [path for path in glob.glob(entry, recursive=True) if path.endswith(".tar")]
        if not tars and (names := expand_braces(entry)) != [entry]:
            return [tar for name in names for tar in _local_tars(name, log)]
    found = list[Path]()
    for tar in sorted(Path(os.path.abspath(tar)) for tar in tars):
        if tar.is_file():
            found.append(tar)
        elif tar.is_dir():
            passed.append(f"{tar.name}/")
        else:
            raise ValueError(f"shards: {tar} is no file, or a link to none; expected a tar")
    line = describe_passed_over(entry, passed, _NO_SHARDS)
    if not found:
        elsewhere = f"; {line}" if line else instead_of(entry)
        raise ValueError(
            f"shards: nothing at {entry}; expected a folder of images or of .tar files, a list of images, parquet, a "
            f".tar file, a pattern such as DIR/*.tar or names such as DIR/shard-{{000..127}}.tar{elsewhere}"
        )
    _log_any(log, line)
    return found


def instead_of(entry: str) -> str:
    """The end of an error about a local path without a tar: where its shards are; else ""."""
    if not os.path.isdir(entry):
        return ""
    files = _files(entry)
    below = sorted({os.path.dirname(path) for path in files if path.endswith(".tar")})
    if unfinished := [match[0] for path in below if (match := _UNFINISHED.match(path))]:
        return f"; {unfinished[0]} is unfinished: run the command that began it again to finish it"
    if below:
        more = f" and {len(below) - _SHOWN} more" if len(below) > _SHOWN else ""
        return f"; there are tars one level or more below: name {' or '.join(map(shlex.quote, below[:_SHOWN]))}{more}"
    return ""


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
