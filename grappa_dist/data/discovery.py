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
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any, TypeVar

from numpy.typing import NDArray

from grappa_dist.console import pluralize
from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.entries import (
    copies_among,
    describe_passed_over,
    expand_braces,
    is_shard_name,
    originals_of,
    resembles_shard,
    stem_of,
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
    rows_are_whole,
    state_of,
    verify_unchanged,
)
from grappa_dist.data.remote import RemoteObject
from grappa_dist.data.remote_index import RemoteRows, committed_indexes, index_remote, list_remote
from grappa_dist.files import read_bytes, save_array
from grappa_dist.object_store import is_remote
from grappa_dist.storage import open_to_read, tried_again

Item = TypeVar("Item")
Result = TypeVar("Result")
Tar = str | RemoteObject  # the absolute path of a local one
Index = str | RemoteRows | NDArray[Any]  # a .npy of ROW, one that is fetched when it is needed, or the rows
IndexedShard = tuple[Shard, Index]

_NO_SHARDS = "which by their names are no shards"
_COPIES = "which are copies of other shards there"
_LOOKED_AT = 10_000  # entries below a folder, at most
_SHOWN = 3  # folders that a message names
_AT_ONCE, _ROUNDS = 8, 16  # threads that look at tars, and how often each takes some of them
_MOST_TAKEN = 256  # tars at a time: handing them over one by one takes longer than looking at them
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
    parents = dict.fromkeys(os.path.dirname(tar) for tar in tars if isinstance(tar, str))
    folders = {parent: _LocalIndex(parent, log) for parent in parents}
    remote_tars = [tar for tar in tars if isinstance(tar, RemoteObject)]
    remote_folders = [str(path).rstrip("/") for path in paths if is_remote(str(path))]
    remote = committed_indexes(remote_tars, remote_folders, cache, settings, log)

    def find(tar: Tar) -> IndexedShard | None:
        if isinstance(tar, RemoteObject):
            return remote.get(tar.url) or _indexed(tar, lambda: index_remote(tar, settings), cache, on_read, log)
        folder = folders[os.path.dirname(tar)]
        if folder.listed is None:
            return _indexed(tar, lambda: index_shard(tar), cache, on_read, log)
        return None if os.path.basename(tar) in folder.copies else folder.shard(tar, cache, on_read)

    found = _without_copies([one for one in _in_threads(find, tars) if one is not None], log)
    _check_images([shard for shard, _ in found], paths)
    return found


def _in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """function(item) of all items, in order; threads take several at a time where there are many."""
    taken = max(1, min(_MOST_TAKEN, len(items) // (_AT_ONCE * _ROUNDS)))
    parts = [items[start : start + taken] for start in range(0, len(items), taken)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return [one for some in pool.map(lambda part: [function(item) for item in part], parts) for one in some]


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
        listed: None where there is no such index.
        copies: names of tars that are none of the shards, but have the bytes of one.
    """

    def __init__(self, folder: str, log: Callable[[str], object]) -> None:
        self._where = Path(folder, COMMITTED)
        self.listed = _listed(Path(folder))
        if self.listed is None and self._where.is_file():
            log(f"passed over: {self._where}, which is no index of shards, but another program's")
        self.copies = set() if self.listed is None else _unlisted(Path(folder), self.listed)
        _log_any(log, describe_passed_over(folder, self.copies, _COPIES))
        self._written_ns = 0 if self.listed is None else self._where.stat().st_mtime_ns

    def shard(self, tar: str, cache: IndexCache, on_read: Callable[[], object]) -> IndexedShard:
        """The shard of a tar with its index file, compared with the checksum where the tar is newer."""
        known = {} if self.listed is None else self.listed
        found = known.get(os.path.basename(tar))
        if found is None:
            raise ValueError(f"shards: {tar} is none of the shards of {self._where}; expected one of these, or all")
        state = state_of(tar, found.stat, may_be_link=found.may_be_link)
        if verify_unchanged(state, found.shard, self._written_ns, cache):
            on_read()
        return replace(found.shard, path=tar, version=version_of(found.stat)), f"{tar}.npy"


@dataclass(frozen=True, slots=True)
class _Listed:
    """A shard of an index, and its tar as it was found."""

    shard: Shard  # without its path
    stat: os.stat_result
    may_be_link: bool


def committed_index(folder: Path) -> dict[str, tuple[Shard, str]] | None:
    """Shards by name with their index files, as the writer left them; None where no writer of ours finished.

    Raises:
        ValueError: the folder's tars are no longer those that the index describes.
    """
    listed = _listed(folder)
    if listed is None:
        return None
    _unlisted(folder, listed)
    paths = {name: str(folder / name) for name in listed}
    return {name: (replace(found.shard, path=paths[name]), f"{paths[name]}.npy") for name, found in listed.items()}


def refuse_other_files(folder: Path) -> None:
    """Raises ValueError when a folder that no writer finished has anything in it: shards are not mixed with it."""
    if folder.is_dir() and (names := os.listdir(folder)):
        raise ValueError(
            f"{folder}: not empty (it has {min(names)!r:.100}) and without the {COMMITTED} of finished shards; "
            "expected a new or a finished folder"
        )


def _listed(folder: Path) -> dict[str, _Listed] | None:
    """The shards by name; tars that the index does not list are not looked at, others once."""
    where = folder / COMMITTED
    text = read_bytes(where) if where.is_file() else None
    if text is None or is_foreign_index(text):
        return None
    shards = read_index(text, where)
    with os.scandir(folder) as entries:
        links = {entry.name for entry in entries if not entry.is_file(follow_symlinks=False)}
    ordered = sorted(shards, key=lambda shard: shard.name)
    found = dict(zip((s.name for s in ordered), _in_threads(partial(_look, folder), ordered), strict=True))
    for shard in ordered:
        stat = found[shard.name]
        has = "missing" if stat is None else stat.st_size
        if has != shard.bytes:
            raise ValueError(
                f"{folder / shard.name}: its size is {has} but {where} says {shard.bytes}; the shards changed after "
                "indexing"
            )
    of = ((shard, found[shard.name]) for shard in shards)
    return {shard.name: _Listed(shard, stat, shard.name in links) for shard, stat in of if stat is not None}


def _look(folder: Path, shard: Shard) -> os.stat_result | None:
    """What a tar is; None: no file."""
    path = os.path.join(folder, shard.name)
    try:
        stat = tried_again(lambda: os.stat(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat if S_ISREG(stat.st_mode) else None


def _unlisted(folder: Path, listed: Mapping[str, _Listed]) -> set[str]:
    """Names of tars that are none of the listed shards but copies of one, by name and bytes.

    Raises:
        ValueError: there is another tar.
    """
    unlisted = (name for name in os.listdir(folder) if is_shard_name(name) and name not in listed)
    names = sorted(name for name in unlisted if (folder / name).is_file())
    by_stem: dict[str, list[Shard]] = {}
    for found in listed.values() if names else ():
        by_stem.setdefault(stem_of(found.shard.name), []).append(found.shard)
    for name in names:
        size = (folder / name).stat().st_size
        originals = (shard for stem in originals_of(name) for shard in by_stem.get(stem, ()))
        alike = {shard.fingerprint for shard in originals if shard.bytes == size}
        fingerprint = ""
        if alike:
            with open_to_read(folder / name) as file:
                fingerprint = sha256_of(file)
        if fingerprint not in alike:
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
    return tar.url if isinstance(tar, RemoteObject) else tar


def _state(tar: Tar) -> State:
    if isinstance(tar, RemoteObject):
        return {"path": tar.url, "size": tar.size, "version": tar.version}
    stat = tried_again(lambda: os.stat(tar), tar)
    return {**state_of(tar, stat), "version": version_of(stat)}


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


def _local_tars(entry: str, log: Callable[[str], object]) -> list[str]:
    """Absolute paths of the tars that one entry names, sorted by their parts; a pattern names what ends in .tar.

    Braces stand for several entries, unless something has them in its name.
    """
    passed, files = list[str](), set[str]()
    if os.path.isdir(entry):
        with os.scandir(entry) as found_there:
            entries = list(found_there)
        folder, shards = os.path.abspath(entry), [e for e in entries if is_shard_name(e.name)]
        tars: Iterable[str] = (os.path.join(folder, e.name) for e in shards)
        # Of a file that is no link the folder itself tells what it is
        files = {os.path.join(folder, e.name) for e in shards if e.is_file(follow_symlinks=False)}
        passed = [e.name for e in entries if resembles_shard(e.name)]
    elif os.path.isfile(entry):
        return [os.path.abspath(entry)]
    else:
        tars = [os.path.abspath(path) for path in glob.glob(entry, recursive=True) if path.endswith(".tar")]
        if not tars and (names := expand_braces(entry)) != [entry]:
            return [tar for name in names for tar in _local_tars(name, log)]
    found = list[str]()
    for tar in sorted(tars, key=lambda tar: tar.split("/")):
        if tar in files or os.path.isfile(tar):
            found.append(tar)
        elif os.path.isdir(tar):
            passed.append(f"{os.path.basename(tar)}/")
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
