"""Indexes of remote shards: fetched where a writer left one beside the tars, else made in one pass over each tar."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

from numpy.typing import NDArray

from grappa_dist.data.block_cache import CacheSettings, fetchers
from grappa_dist.data.index import (
    COMMITTED,
    REMADE,
    Shard,
    is_foreign_index,
    read_index,
    read_rows,
    scan,
)
from grappa_dist.data.index_cache import IndexCache, forget_rows, rows_are_whole
from grappa_dist.data.remote import RemoteFile, RemoteObject, fetch_whole, is_folder, list_tars, objects_at
from grappa_dist.files import write_bytes
from grappa_dist.object_store import check_url, is_http
from grappa_dist.prefetch import prefetch_with
from grappa_dist.storage import open_to_read

_PIECE = 8 * 2**20  # bytes of one request while a tar is read through
_PIECES_AHEAD = 3


@dataclass(frozen=True)
class RemoteRows:
    """The index file of a remote shard, fetched when its first image is read."""

    url: str
    local: str | None  # where it is kept; None: in memory

    def load(self, shard: Shard) -> NDArray[Any]:
        """Places of the shard's images, (P,) of ROW."""
        kept = None if self.local is None else Path(self.local)
        if kept is not None and kept.is_file() and not rows_are_whole(kept, write=True):
            forget_rows(kept)
        if kept is None or not kept.is_file():
            data = fetch_whole(self.url)
            if data is None:
                raise ValueError(f"{self.url}: not there; {shard.path} was indexed with it")
            rows = read_rows(io.BytesIO(data), shard, self.url)
            if (end := int((rows["offset"] + rows["size"]).max(initial=0))) > shard.bytes:
                raise ValueError(
                    f"{self.url}: its rows end at byte {end}, but {shard.path} has {shard.bytes}; it is the index of "
                    "another shard"
                )
            if kept is None:
                return rows
            write_bytes(kept, data)
            rows_are_whole(kept, write=True)
        with open_to_read(kept) as file:
            return read_rows(file, shard, str(kept), remedy=REMADE)


def index_remote(source: RemoteObject, settings: CacheSettings) -> tuple[NDArray[Any], Shard]:
    """Places of a remote tar's images in file order, (P,) of ROW, and its shard; the tar is read once."""
    stream = _Stream(_pieces(source, settings))
    found = scan(cast(IO[bytes], stream), source.url, source.size)
    return found.rows, found.shard(source.name, source.url, source.size, stream.finish(), source.version)


def _pieces(source: RemoteObject, settings: CacheSettings) -> Iterator[bytes]:
    """The bytes of an object in order, some requests ahead."""
    remote = RemoteFile(source)

    def fetch(start: int) -> bytes:
        return remote.fetch(start, min(start + _PIECE, source.size))

    return prefetch_with(fetchers(settings), fetch, range(0, source.size, _PIECE), depth=_PIECES_AHEAD)


class _Stream(io.RawIOBase):
    """A file that is read forwards once and hashed as it is read; the last two pieces can be read again."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._digest = hashlib.sha256()
        self._kept = b""
        self._kept_at = self._at = 0

    def _advance(self) -> bool:
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self._digest.update(piece)
        dropped = max(0, len(self._kept) - _PIECE)
        self._kept, self._kept_at = self._kept[dropped:] + piece, self._kept_at + dropped
        return True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "a tar is read from its start"
        assert offset >= self._kept_at, "a tar is read forwards"
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "a tar is read by sizes"
        while self._at + size > self._kept_at + len(self._kept) and self._advance():
            pass
        data = self._kept[max(0, self._at - self._kept_at) :][:size]
        self._at += len(data)
        return data

    def finish(self) -> str:
        """The sha256 of all bytes."""
        while self._advance():
            pass
        return self._digest.hexdigest()


def committed_remote(
    folder: str, log: Callable[[str], object] = lambda line: None
) -> dict[str, tuple[Shard, str]] | None:
    """Shards by name with the URLs of their index files, as a writer left them; None where there is no such index."""
    where = f"{folder}/{COMMITTED}"
    text = fetch_whole(where)
    if text is None:
        return None
    if is_foreign_index(text):
        log(f"passed over: {where}, which is no index of shards, but another program's")
        return None
    return {s.name: (replace(s, path=f"{folder}/{s.name}"), f"{folder}/{s.name}.npy") for s in read_index(text, where)}


def list_remote(entry: str) -> list[RemoteObject]:
    """The tars that one entry names; a folder on http(s) has those of its index, or of its HTML listing."""
    if is_folder(entry) and is_http(entry):
        known = committed_remote(check_url(entry))
        if known is not None:
            return objects_at(shard.path for shard, _ in known.values())
    return list_tars(entry)


def committed_indexes(
    tars: Sequence[RemoteObject],
    whole_folders: Sequence[str],
    cache: IndexCache,
    settings: CacheSettings,
    log: Callable[[str], object] = lambda line: None,
) -> dict[str, tuple[Shard, RemoteRows]]:
    """Shard and index of each tar, by URL, that has an index beside it.

    Args:
        whole_folders: those whose shards are all among the tars.
        log: called with a line for each index of another program.
    """
    folders: dict[str, list[RemoteObject]] = {}
    for tar in tars:
        folders.setdefault(tar.folder, []).append(tar)
    result = {}
    for folder, found in folders.items():
        known = committed_remote(folder, log)
        if known is None:
            continue
        gone = known.keys() - {tar.name for tar in found} if folder in whole_folders else set()
        for name in sorted(gone):
            raise ValueError(f"{folder}/{name}: missing, but the index beside it has it; the shards changed")
        _check_committed(folder, known, found, cache, settings, log)
        for tar in found:
            shard, rows = known[tar.name]
            kept = cache.rows_path(shard)
            local = str(kept) if kept is not None and cache.writes else None
            result[tar.url] = (replace(shard, version=tar.version), RemoteRows(rows, local))
    return result


def _check_committed(
    folder: str,
    known: dict[str, tuple[Shard, str]],
    found: Sequence[RemoteObject],
    cache: IndexCache,
    settings: CacheSettings,
    log: Callable[[str], object],
) -> None:
    """Compares the objects of a folder with its index, and with what an earlier run listed there.

    An object of another version under the same index is read, since its bytes may be the same: it was copied, or the
    store once gave a wrong version. A plan, which cannot keep the result, leaves that to the run.

    Raises:
        ValueError: an object is new, has another size, or has changed under an index that has not.
    """
    before = cache.versions(folder)
    now = {}
    for tar in found:
        if tar.name not in known:
            raise ValueError(
                f"{tar.url}: is none of the shards that the index beside it lists, from which it is absent; move it to "
                "another folder and name that as well, or delete the index to have all tars indexed anew"
            )
        shard = known[tar.name][0]
        if shard.bytes != tar.size:
            raise ValueError(
                f"{tar.url}: its size is {tar.size} but the index beside it says {shard.bytes}; "
                "the shards changed after indexing"
            )
        now[tar.name] = (shard.fingerprint, tar.version)
        fingerprint, version = before.get(tar.name, now[tar.name])
        if fingerprint == shard.fingerprint and version != tar.version and cache.writes:
            log(f"{tar.url}: another version than in an earlier run, is read to see whether its bytes are the same")
            _check_content(tar, shard, version, settings)
    if (merged := {**before, **now}) != before:
        cache.put_versions(folder, merged)


def _check_content(tar: RemoteObject, shard: Shard, before: str, settings: CacheSettings) -> None:
    """Raises ValueError when an object, of another version than before, no longer has the bytes that were indexed."""
    content = _Stream(_pieces(tar, settings)).finish()
    if content != shard.fingerprint:
        raise ValueError(
            f"{tar.url}: its version is {tar.version} but was {before} in an earlier run, and its bytes are no longer "
            f"those that the index beside it describes (sha256 {content[:12]}..., expected "
            f"{shard.fingerprint[:12]}...); the shard changed after indexing"
        )
