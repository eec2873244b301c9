"""The index cache of a run: what is known of shards from earlier runs, in small JSON files checked when they are read.

Three kinds: the shard that a tar without an index was found to be (its rows lie in a .npy beside), the state in which a
shard had the checksum of its index, and the versions of the objects of a remote folder that has an index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from grappa_dist.bucket import here
from grappa_dist.data.index import COMMITTED, Shard, entry, sha256_of, shard_of
from grappa_dist.files import Sum, read_bytes, read_json, write_json, write_utf8
from grappa_dist.storage import open_to_read, tried_again

State = Mapping[str, str | int]  # of a tar: what changes whenever its bytes do, as far as its store tells
Versions = Mapping[str, tuple[str, str]]  # name of an object -> fingerprint in the index beside it, and version
SUM_SUFFIX = ".sum"  # of the checksum beside kept rows
READER = 3  # raise it when the same tar gives other rows, or something else is kept of it


@dataclass(frozen=True)
class IndexCache:
    """What a folder keeps of shards.

    Args:
        folder: None: nothing is kept.
        write: whether anything may be added; else what is there is read.
    """

    folder: Path | None
    write: bool = True

    @property
    def writes(self) -> bool:
        return self.folder is not None and self.write

    def rows_path(self, shard: Shard) -> Path | None:
        """Where the rows of a shard are kept."""
        return None if self.folder is None else self.folder / f"{shard.fingerprint[:32]}.npy"

    def shard(self, tar: str, state: State) -> Shard | None:
        """The shard that a tar was found to be, with its path; None where it has changed since, or was never read."""
        path, content = self._read(tar, ".json")
        if path is None or content.get("state") != {**state, "reader": READER}:
            return None
        return replace(shard_of(content.get("shard"), tar, path), version=str(state["version"]))

    def put_shard(self, tar: str, state: State, shard: Shard) -> None:
        self._write(tar, ".json", {"state": {**state, "reader": READER}, "shard": entry(shard)})

    def is_verified(self, tar: str, state: State) -> bool:
        """Whether a shard had the checksum of its index in this state."""
        return self._read(tar, ".unchanged.json")[1] == dict(state)

    def put_verified(self, tar: str, state: State) -> None:
        self._write(tar, ".unchanged.json", state)

    def versions(self, folder: str) -> Versions:
        """What an earlier run listed in a remote folder; empty where none did."""
        path, content = self._read(folder, ".seen.json")
        for name, pair in content.items():
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise _damaged(path, f"{name!r:.100} has {pair!r:.100}, expected a fingerprint and a version")
        return {name: (pair[0], pair[1]) for name, pair in content.items()}

    def put_versions(self, folder: str, versions: Versions) -> None:
        self._write(folder, ".seen.json", versions)

    def names_of(self, shards: Sequence[Shard]) -> set[str]:
        """The names of all files that may be kept of some shards."""
        kinds = (".json", ".unchanged.json")
        paths = [self._path(shard.path, kind) for shard in shards for kind in kinds]
        paths += [self._path(shard.path.rpartition("/")[0], ".seen.json") for shard in shards]
        rows = [path for path in map(self.rows_path, shards) if path is not None]
        return {path.name for path in (*paths, *rows, *(path.with_suffix(SUM_SUFFIX) for path in rows)) if path}

    def _path(self, address: str, kind: str) -> Path | None:
        name = f"{hashlib.sha256(os.fsencode(address)).hexdigest()[:32]}{kind}"
        return None if self.folder is None else self.folder / name

    def _read(self, address: str, kind: str) -> tuple[Path | None, dict[str, Any]]:
        """The path and the content of a file; None and nothing where there is none."""
        path = self._path(address, kind)
        if path is None or not path.is_file():
            return None, {}
        try:
            content = read_json(path)
        except ValueError as error:
            raise _damaged(path, str(error).removeprefix(f"{path}: ")) from None
        if not isinstance(content, dict):
            raise _damaged(path, f"a {type(content).__name__}, expected an object")
        checksum = content.pop("xxh3", None)  # absent in files of earlier versions
        if checksum not in (None, found := _checksum(content)):
            raise _damaged(path, f"its content has the checksum {found}, and was written with {checksum!r:.100}")
        return path, content

    def _write(self, address: str, kind: str, content: Mapping[str, Any]) -> None:
        path = self._path(address, kind)
        if path is not None and self.write:
            write_json(path, {**content, "xxh3": _checksum(content)})


def _checksum(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())


_whole: dict[Path, State] = {}  # rows that this process has read and found whole, with the state they were in


def rows_are_whole(path: Path, *, write: bool) -> bool:
    """Whether the rows that an index cache keeps are those that were written, by the checksum beside them.

    A process reads them once, and again when the file changes: of many shards, rows are mapped again and again.

    Args:
        write: whether a checksum may be put beside rows that have none, which are then taken as they are.
    """
    beside, state = here(path.with_suffix(SUM_SUFFIX)), local_state(path)
    has_checksum = beside.is_file()
    if has_checksum and _whole.get(path) == state:
        return True
    found = str(Sum.of(path).xxh3)
    if has_checksum and read_bytes(beside).decode("ascii", "replace") != found:
        return False
    if write and not has_checksum:
        write_utf8(beside, found)
    _whole[path] = state
    return True


def forget_rows(path: Path) -> None:
    """Removes damaged rows with their checksum."""
    path.with_suffix(SUM_SUFFIX).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _damaged(path: Path | None, reason: str) -> ValueError:
    return ValueError(f"{path}: a damaged file of the index cache: {reason}; remove it, and it is made anew")


def local_state(tar: Path) -> dict[str, str | int]:
    """What changes with the bytes of a file: many tools restore `mtime` on a copy, none `ctime`.

    A link has its own `ctime`: it may be pointed to an older file.
    """
    stat = tried_again(lambda: os.stat(tar), tar)
    return state_of(tar, stat)


def state_of(tar: Path | str, stat: os.stat_result, *, may_be_link: bool = True) -> dict[str, str | int]:
    """The same of a file that was looked at already.

    Args:
        may_be_link: False: it is known to be none, so that it is not looked at again.
    """
    ctime_ns = stat.st_ctime_ns
    if may_be_link:
        ctime_ns = max(ctime_ns, tried_again(lambda: os.lstat(tar), tar).st_ctime_ns)
    return {"path": str(tar), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": ctime_ns}


def verify_unchanged(tar: State, described: Shard, indexed_ns: int, cache: IndexCache) -> bool:
    """Compares the checksum of a shard that was touched after the index beside it was written, once.

    A writer leaves the index last, so what it wrote is older. A copy may be newer, so time alone proves nothing;
    but only where it is newer are all bytes read. A shard that was found good is kept with its size and times.

    Args:
        tar: its state.
        indexed_ns: when that index was written.

    Returns:
        Whether the shard had to be read.

    Raises:
        ValueError: the bytes are not those that were indexed.
    """
    if max(int(tar["mtime_ns"]), int(tar["ctime_ns"])) <= indexed_ns:
        return False
    if cache.folder is not None and not cache.write:
        return False  # a plan, say, which leaves the reading to the run that can keep the result
    path, checked = str(tar["path"]), {**tar, "fingerprint": described.fingerprint}
    if cache.is_verified(path, checked):
        return False
    with open_to_read(path) as file:
        found = sha256_of(file)
    if found != described.fingerprint:
        raise ValueError(
            f"{path}: its bytes are no longer those that {COMMITTED} describes (sha256 {found[:12]}..., expected "
            f"{described.fingerprint[:12]}...); make the shards again, or delete {COMMITTED} to have them indexed anew"
        )
    cache.put_verified(path, checked)
    return True
