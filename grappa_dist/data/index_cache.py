"""What runs note of shards in their index folder: small JSON files, checked when they are read.

Three kinds: the shard that a tar without an index was found to be, the state in which a shard was held against its
checksum, and the versions of the objects of a remote folder that has an index.

Shards that changed after their index was made: noticed by their times, judged by their checksum.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grappa_dist.data.index import COMMITTED, Shard, entry, sha256_of, shard_of
from grappa_dist.files import read_json, write_json

State = Mapping[str, str | int]  # of a tar: what changes whenever its bytes do, as far as its store tells
Seen = Mapping[str, tuple[str, str]]  # name of an object -> fingerprint in the index beside it, and version
READER = 2  # raise it when the same tar gives other rows, or something else is kept of it


@dataclass(frozen=True)
class Notes:
    """The notes of a folder.

    Args:
        folder: None: there are none, and none are made.
        write: whether notes may be added; a folder that may only be read is read.
    """

    folder: Path | None
    write: bool = True

    @property
    def writes(self) -> bool:
        return self.folder is not None and self.write

    def rows_path(self, shard: Shard) -> Path | None:
        """Where the rows of a shard are kept."""
        return None if self.folder is None else self.folder / f"{shard.fingerprint[:32]}.npy"

    def indexed(self, tar: str, state: State) -> Shard | None:
        """The shard that a tar was found to be, with its path; None where it has changed since, or never was read."""
        path, content = self._read(tar, ".json")
        if path is None or content.get("state") != {**state, "reader": READER}:
            return None
        return replace(shard_of(content.get("shard"), tar, path), version=str(state["version"]))

    def note_indexed(self, tar: str, state: State, shard: Shard) -> None:
        self._write(tar, ".json", {"state": {**state, "reader": READER}, "shard": entry(shard)})

    def is_unchanged(self, tar: str, state: State) -> bool:
        """Whether a shard was held against its checksum in this state."""
        return self._read(tar, ".unchanged.json")[1] == dict(state)

    def note_unchanged(self, tar: str, state: State) -> None:
        self._write(tar, ".unchanged.json", state)

    def seen(self, folder: str) -> Seen:
        """What an earlier run saw in a remote folder; empty where none did."""
        path, content = self._read(folder, ".seen.json")
        for name, pair in content.items():
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
                raise _broken(path, f"{name!r:.100} has {pair!r:.100}, expected a fingerprint and a version")
        return {name: (pair[0], pair[1]) for name, pair in content.items()}

    def note_seen(self, folder: str, seen: Seen) -> None:
        self._write(folder, ".seen.json", seen)

    def _path(self, about: str, kind: str) -> Path | None:
        name = f"{hashlib.sha256(os.fsencode(about)).hexdigest()[:32]}{kind}"
        return None if self.folder is None else self.folder / name

    def _read(self, about: str, kind: str) -> tuple[Path | None, dict[str, Any]]:
        """A note with its path; None and nothing where there is none."""
        path = self._path(about, kind)
        if path is None or not path.is_file():
            return None, {}
        try:
            content = read_json(path)
        except ValueError as error:
            raise _broken(path, str(error).removeprefix(f"{path}: ")) from None
        if not isinstance(content, dict):
            raise _broken(path, f"a {type(content).__name__}, expected an object")
        return path, content

    def _write(self, about: str, kind: str, content: Mapping[str, Any]) -> None:
        path = self._path(about, kind)
        if path is not None and self.write:
            write_json(path, content)


def _broken(path: Path | None, reason: str) -> ValueError:
    return ValueError(f"{path}: a damaged note: {reason}; remove it, what it says is looked up anew")


def local_state(tar: Path) -> dict[str, str | int]:
    """What changes with the bytes of a file: many a tool sets `mtime` back to what it was elsewhere, none `ctime`.

    A link has a `ctime` of its own: it may be turned to an older file.
    """
    stat = tar.stat()
    ctime_ns = max(stat.st_ctime_ns, tar.lstat().st_ctime_ns)
    return {"path": str(tar), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": ctime_ns}


def check_unchanged(
    tar: Path, described: Shard, indexed_ns: int, notes: Notes, *, tell: Callable[[], object] = lambda: None
) -> None:
    """Holds a shard that was touched after the index beside it was written against the checksum there, once.

    A writer leaves the index last, so what it wrote is older. A copy may well be newer, so time alone says nothing; but
    it says where to look, and only there all bytes are read. What was found good is noted with its size and times.

    Args:
        indexed_ns: when that index was written.
        tell: hears that a shard had to be read.

    Raises:
        ValueError: the bytes are not those that were indexed.
    """
    state = local_state(tar)
    if max(int(state["mtime_ns"]), int(state["ctime_ns"])) <= indexed_ns:
        return
    if notes.folder is not None and not notes.write:
        return  # a plan, say, which leaves the reading to the run that can note it
    checked = {**state, "fingerprint": described.fingerprint}
    if notes.is_unchanged(str(tar), checked):
        return
    with open(tar, "rb") as file:
        found = sha256_of(file)
    tell()
    if found != described.fingerprint:
        raise ValueError(
            f"{tar}: its bytes are no longer those that {COMMITTED} describes (sha256 {found[:12]}..., expected "
            f"{described.fingerprint[:12]}...); make the shards again, or delete {COMMITTED} to have them indexed anew"
        )
    notes.note_unchanged(str(tar), checked)
