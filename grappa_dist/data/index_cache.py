"""What runs note of shards in their index folder: small JSON files, checked when they are read.

Three kinds: the shard that a tar without an index was found to be, the state in which a shard was held against its
checksum, and the versions of the objects of a remote folder that has an index.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from grappa_dist.data.index import Shard, entry, shard_of
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
