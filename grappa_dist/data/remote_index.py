"""Indexes of remote shards: fetched where a writer left one beside the tars, else made in one pass over each tar."""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from grappa_dist.data.blocks import fetchers
from grappa_dist.data.cache import CacheSettings
from grappa_dist.data.index import ROW, Shard, scan, shard_of
from grappa_dist.data.remote import (
    RemoteFile,
    RemoteObject,
    check_url,
    fetch_whole,
    is_folder,
    is_http,
    list_tars,
    objects_at,
)
from grappa_dist.files import replacing, write_json

_PIECE = 8 * 2**20  # bytes of one request while a tar is read through
_PIECES_AHEAD = 2


@dataclass(frozen=True)
class RemoteRows:
    """The index file of a remote shard, fetched when its first image is wanted."""

    url: str
    local: str | None  # where it is kept; None: in memory

    def load(self, shard: Shard) -> NDArray[Any]:
        """Places of the shard's images, (P,) of ROW."""
        if self.local is None or not Path(self.local).is_file():
            data = fetch_whole(self.url)
            if data is None:
                raise ValueError(f"{self.url}: not there; {shard.path} was indexed with it")
            rows = _parse(data, self.url)
            end = int((rows["offset"] + rows["size"]).max(initial=0))
            if len(rows) != shard.rows or end > shard.bytes:
                raise ValueError(
                    f"{self.url}: {len(rows)} rows that end at byte {end}, but {shard.path} has {shard.rows} in "
                    f"{shard.bytes} bytes; it is the index of another shard"
                )
            if self.local is None:
                return rows
            with replacing(Path(self.local)) as temporary:
                temporary.write_bytes(data)
        kept: NDArray[Any] = np.load(self.local, mmap_mode="r", allow_pickle=False)
        return kept


def _parse(data: bytes, url: str) -> NDArray[Any]:
    try:
        rows: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{url}: not an index of a shard: {error}") from None
    if rows.dtype != ROW or rows.ndim != 1:
        raise ValueError(f"{url}: not an index of a shard: an array of {rows.dtype}, expected {ROW}")
    return rows


def index_remote(about: RemoteObject, settings: CacheSettings) -> tuple[NDArray[Any], Shard]:
    """Places of a remote tar's images in file order, (P,) of ROW, and the shard they make; the tar is read once."""
    stream = _Stream(_pieces(about, settings))
    rows, ignored = scan(cast(IO[bytes], stream), about.url)
    fingerprint = stream.finish()
    return rows, Shard(about.name, about.url, len(rows), about.size, fingerprint, ignored, about.version)


def _pieces(about: RemoteObject, settings: CacheSettings) -> Iterator[bytes]:
    """The bytes of an object in order, some requests ahead."""
    remote, pool = RemoteFile(about), fetchers(settings)
    starts = iter(range(0, about.size, _PIECE))

    def ask(count: int) -> Iterable[Future[bytes]]:
        return (pool.submit(remote.fetch, at, min(at + _PIECE, about.size)) for at in islice(starts, count))

    ahead = deque(ask(1 + _PIECES_AHEAD))
    while ahead:
        yield ahead.popleft().result()
        ahead.extend(ask(1))


class _Stream(io.RawIOBase):
    """A file that is read forwards once and hashed on its way; the last two pieces can be gone back to."""

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


def committed_remote(folder: str, name: str) -> dict[str, tuple[Shard, str]] | None:
    """Shards by name with the URLs of their index files, as a writer left them; None where there is no such index."""
    where = f"{folder}/{name}"
    text = fetch_whole(where)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("shards"), list):
        raise ValueError(f"{where}: not an index of shards; expected an object with a list `shards`")
    shards = [shard_of(line, "", where) for line in content["shards"]]
    return {s.name: (replace(s, path=f"{folder}/{s.name}"), f"{folder}/{s.name}.npy") for s in shards}


def list_remote(entry: str, index_name: str) -> list[RemoteObject]:
    """The tars that one entry names; a folder on http(s) has those of its index, or of its HTML listing."""
    if is_folder(entry) and is_http(entry):
        known = committed_remote(check_url(entry), index_name)
        if known is not None:
            return objects_at(shard.path for shard, _ in known.values())
    return list_tars(entry)


def committed_indexes(
    tars: Sequence[RemoteObject], whole: Sequence[str], index_dir: Path | None, index_name: str
) -> dict[str, tuple[Shard, RemoteRows]]:
    """Shard and index of the tars, by URL, that have an index beside them.

    Args:
        whole: folders of which every shard was asked for.
    """
    folders: dict[str, list[RemoteObject]] = {}
    for tar in tars:
        folders.setdefault(tar.folder, []).append(tar)
    result = {}
    for folder, found in folders.items():
        known = committed_remote(folder, index_name)
        if known is None:
            continue
        gone = known.keys() - {tar.name for tar in found} if folder in whole else set()
        for name in sorted(gone):
            raise ValueError(f"{folder}/{name}: missing, but the index beside it has it; the shards changed")
        _check_committed(folder, known, found, index_dir)
        for tar in found:
            shard, rows = known[tar.name]
            local = None if index_dir is None else str(index_dir.absolute() / f"{shard.fingerprint[:32]}.npy")
            result[tar.url] = (replace(shard, version=tar.version), RemoteRows(rows, local))
    return result


def _check_committed(
    folder: str, known: dict[str, tuple[Shard, str]], found: Sequence[RemoteObject], index_dir: Path | None
) -> None:
    """Holds the objects of a folder against its index, and against what an earlier run saw there.

    Raises:
        ValueError: an object is new, has another size, or has changed under an index that has not.
    """
    note = None if index_dir is None else index_dir / f"{hashlib.sha256(folder.encode()).hexdigest()[:32]}.seen.json"
    before = json.loads(note.read_bytes()) if note is not None and note.is_file() else {}
    now = {}
    for about in found:
        shard = known[about.name][0] if about.name in known else None
        if shard is None or shard.bytes != about.size:
            said = "absent" if shard is None else shard.bytes
            raise ValueError(
                f"{about.url}: its size is {about.size} but the index beside it says {said}; "
                "the shards changed after indexing"
            )
        now[about.name] = [shard.fingerprint, about.version]
        if (
            about.name in before
            and before[about.name][0] == shard.fingerprint
            and before[about.name] != now[about.name]
        ):
            raise ValueError(
                f"{about.url}: its version is {about.version} but was {before[about.name][1]} in an earlier run, "
                "and the index beside it is the same; the shard changed after indexing"
            )
    if note is not None and (merged := {**before, **now}) != before:
        write_json(note, merged)
