"""Shards that changed after their index was made: noticed by their times, judged by their checksum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from grappa_dist.data.index import COMMITTED, Shard, sha256_of
from grappa_dist.data.index_cache import Notes


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
