"""Shards that changed after their index was made: noticed by their time of change, judged by their checksum."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from grappa_dist.data.index import COMMITTED, Shard, sha256_of
from grappa_dist.files import write_json


def check_newer(tar: Path, described: Shard, indexed_ns: int, notes: Path | None, *, write: bool) -> None:
    """Holds a shard that is newer than the index beside it against the checksum there.

    A copy may well be newer, so time alone says nothing; but it says where to look, and only there all bytes are read.

    Args:
        indexed_ns: when that index was written.
        notes: where it is noted that a shard was found unchanged, so that it is read once; None: nowhere.
        write: whether notes may be added.

    Raises:
        ValueError: the bytes are not those that were indexed.
    """
    stat = tar.stat()
    if stat.st_mtime_ns <= indexed_ns:
        return
    state = f"{tar}\n{stat.st_size}\n{stat.st_mtime_ns}\n{described.fingerprint}"
    note = None if notes is None else notes / f"{hashlib.sha256(os.fsencode(state)).hexdigest()[:32]}.unchanged.json"
    if note is not None and note.is_file():
        return
    with open(tar, "rb") as file:
        found = sha256_of(file)
    if found != described.fingerprint:
        raise ValueError(
            f"{tar}: its bytes are no longer those that {COMMITTED} describes (sha256 {found[:12]}..., expected "
            f"{described.fingerprint[:12]}...); make the shards again, or delete {COMMITTED} to have them indexed anew"
        )
    if note is not None and write:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"unchanged": str(tar)})
