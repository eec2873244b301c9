"""Finds shards and their indexes, and builds what is missing."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from grappa_dist.data.cache import CacheSettings
from grappa_dist.data.checksums import check_newer
from grappa_dist.data.index import COMMITTED, IMAGE_SUFFIXES, Shard, entry, index_shard, shard_of, write_rows
from grappa_dist.data.remote import RemoteObject, is_remote
from grappa_dist.data.remote_index import RemoteRows, committed_indexes, index_remote, list_remote
from grappa_dist.files import write_json

Index = str | RemoteRows | NDArray[Any]  # a .npy of ROW, one that is fetched when it is wanted, or the rows
_Found = tuple[Shard, Index]
Progress = Callable[[int], object]


def find_shards(
    paths: Sequence[str | os.PathLike[str]],
    index_dir: Path | None,
    cache: CacheSettings | None = None,
    *,
    write: bool = True,
    tell: Progress = lambda count: None,
) -> list[_Found]:
    """Shards that `paths` name, each with its index file, or, where there is none and none may be written, its rows.

    Args:
        index_dir: where indexes of tars lie that brought none; None: nowhere.
        write: whether missing ones are put there.
        tell: hears how many tars had to be read for want of an index.

    Raises:
        ValueError: nothing is there, no shard has an image, or a shard is damaged or not what its index describes.
    """
    tars = _all_tars(paths)
    local = {tar.parent for tar in tars if isinstance(tar, Path)}
    committed = {folder: committed_index(folder) for folder in local}
    indexed_ns = {folder: (folder / COMMITTED).stat().st_mtime_ns for folder, known in committed.items() if known}
    far = [tar for tar in tars if isinstance(tar, RemoteObject)]
    whole = [str(path).rstrip("/") for path in paths if is_remote(str(path))]
    remote = committed_indexes(far, whole, index_dir if write else None, COMMITTED)
    settings, missing = cache or CacheSettings(), _Missing(index_dir, write, tell)

    def find(tar: Path | RemoteObject) -> _Found:
        if isinstance(tar, RemoteObject):
            return remote.get(tar.url) or missing.of(tar, lambda: index_remote(tar, settings))
        known = committed[tar.parent]
        if known is None:
            return missing.of(tar, lambda: index_shard(tar))
        check_newer(tar, known[tar.name][0], indexed_ns[tar.parent], index_dir, write=write)
        return known[tar.name]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(find, tars))
    _check_images([shard for shard, _ in found], paths)
    return found


def _check_images(shards: Sequence[Shard], paths: Sequence[str | os.PathLike[str]]) -> None:
    if not any(shard.rows for shard in shards):
        ignored = sum(shard.ignored for shard in shards)
        raise ValueError(
            f"shards: no images in {', '.join(map(str, paths))} ({len(shards)} tars, {ignored} other members); "
            f"expected members <key>.{'|'.join(IMAGE_SUFFIXES)}"
        )


def _all_tars(paths: Sequence[str | os.PathLike[str]]) -> list[Path | RemoteObject]:
    if isinstance(paths, (str, os.PathLike)):
        raise ValueError(f"shards: expected a list of paths, got {paths!r}")
    tars = [tar for path in paths for tar in _named(str(path))]
    for said, times in Counter(map(_said, tars)).items():
        if times > 1:
            raise ValueError(f"shards: {said} is named {times} times; expected once")
    return tars


def _said(tar: Path | RemoteObject) -> str:
    return tar.url if isinstance(tar, RemoteObject) else str(tar)


def _named(path: str) -> Sequence[Path | RemoteObject]:
    """The tars that one entry names, sorted."""
    if not is_remote(path):
        return _tars(path)
    found = list_remote(path, COMMITTED)
    if not found:
        raise ValueError(
            f"shards: nothing at {path}; expected a folder of .tar objects, a .tar, a pattern such as DIR/*.tar or a "
            "range such as DIR/shard-{000..127}.tar"
        )
    return found


def _tars(path: str) -> list[Path]:
    """Absolute paths of the tars that one entry names, sorted."""
    if os.path.isdir(path):
        tars: Iterable[str] = (str(tar) for tar in Path(path).glob("*.tar"))
    else:
        tars = [path] if os.path.isfile(path) else glob.glob(path, recursive=True)
    found = sorted(Path(os.path.abspath(tar)) for tar in tars)
    if not found:
        raise ValueError(
            f"shards: nothing at {path}; expected a folder of .tar files, a .tar file or a pattern such as DIR/*.tar"
        )
    return found


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def committed_index(folder: Path) -> dict[str, tuple[Shard, str]] | None:
    """Shards by name with their index files, as the writer left them; None where no writer finished.

    Raises:
        ValueError: the folder's tars are no longer those that the index describes.
    """
    where = folder / COMMITTED
    if not where.is_file():
        return None
    content = read_json(where)
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise ValueError(f"{where}: not an index of shards; expected an object with a list `shards`")
    shards = [shard_of(line, "", where) for line in content["shards"]]
    sizes = {tar.name: tar.stat().st_size for tar in folder.glob("*.tar")}
    described = {shard.name: shard.bytes for shard in shards}
    for name in sorted(sizes.keys() | described.keys()):
        if sizes.get(name) != described.get(name):
            has, said = sizes.get(name, "missing"), described.get(name, "absent")
            raise ValueError(
                f"{folder / name}: its size is {has} but {where} says {said}; the shards changed after indexing"
            )
    return {
        shard.name: (shard_of(entry(shard), str(folder / shard.name), where), str(folder / f"{shard.name}.npy"))
        for shard in shards
    }


class _Missing:
    """Indexes of tars that brought none: read from where they were written, else made."""

    def __init__(self, index_dir: Path | None, write: bool, tell: Progress) -> None:
        self._folder = None if index_dir is None else index_dir.absolute()
        self._write, self._tell = write, tell
        self._lock, self._made = threading.Lock(), 0

    def of(self, tar: Path | RemoteObject, make: Callable[[], tuple[NDArray[Any], Shard]]) -> _Found:
        """The shard of a tar with its index, reused while path, size and time of change or version agree."""
        said, state = _said(tar), _state(tar)
        if self._folder is None:
            rows, shard = self._make(make)
            return shard, rows
        note = self._folder / f"{hashlib.sha256(os.fsencode(said)).hexdigest()[:32]}.json"
        if note.is_file():
            content = read_json(note)
            if content["state"] == state:
                shard = replace(shard_of(content["shard"], said, note), version=str(state.get("version", "")))
                if (rows_path := _rows_path(self._folder, shard)).is_file():
                    return shard, str(rows_path)
        rows, shard = self._make(make)
        if not self._write:
            return shard, rows
        self._folder.mkdir(parents=True, exist_ok=True)
        write_rows(_rows_path(self._folder, shard), rows)
        write_json(note, {"state": state, "shard": entry(shard)})
        return shard, str(_rows_path(self._folder, shard))

    def _make(self, make: Callable[[], tuple[NDArray[Any], Shard]]) -> tuple[NDArray[Any], Shard]:
        made = make()
        with self._lock:
            self._made += 1
            self._tell(self._made)
        return made


def _state(tar: Path | RemoteObject) -> dict[str, str | int]:
    if isinstance(tar, RemoteObject):
        return {"path": tar.url, "size": tar.size, "version": tar.version}
    stat = tar.stat()
    return {"path": str(tar), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _rows_path(index_dir: Path, shard: Shard) -> Path:
    return index_dir / f"{shard.fingerprint[:32]}.npy"
