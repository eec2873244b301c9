"""Remote shards read in blocks, kept in a bounded cache on a local disk that the processes of a machine share.

Whole blocks are fetched where a shard is read through, single images where it is not. A block's file ends with a
checksum of each PIECE of it, and is held against these whenever it is read: a file with another bit in it, cut off,
zeroed or under another block's name is removed, and the block fetched again.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash

from grappa_dist.data.remote import RemoteFile, RemoteObject

BLOCK = 4 * 2**20  # bytes: a request's latency is small beside it
_ALONE = 3  # images of a block that are fetched alone: about what the whole block costs in latency and bytes
_AHEAD = 2  # blocks fetched beyond one that was read in sequence
PIECE = 2**16  # bytes with a checksum of their own: so many at least are read where an image lies
_SUM_BYTES = 8
_LEDGER = ".bytes"  # the file that holds how many bytes are kept
DAMAGED_LOG = "damaged.log"  # a line for each file that was removed because it was damaged
_LOG_BYTES = 2**16  # about; then it is left as it is
_KEPT_SHARE = 0.9  # of the bound, after an eviction: the folder is listed once for many blocks


@dataclass(frozen=True)
class CacheSettings:
    """Where blocks of remote shards are kept, and how many requests are made at a time."""

    folder: str | None = None  # None: grappa-cache-<uid> in the temporary folder
    max_bytes: int = 16 * 2**30  # 0: nothing is kept
    in_flight: int = 16  # requests of one process

    @property
    def path(self) -> Path:
        return Path(self.folder or Path(tempfile.gettempdir()) / f"grappa-cache-{os.getuid()}")


class BlockCache:
    """Blocks by key; all of them together, also those being written, never take more than `max_bytes`.

    A block appears by one rename. The least recently read are evicted first; an open one keeps its bytes.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self.max_bytes = settings.max_bytes
        self.folder = settings.path
        if self.max_bytes:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                is_own = settings.folder is not None or self.folder.stat().st_uid == os.getuid()
            except OSError as error:
                raise self._unusable(error.strerror) from error
            if not is_own:
                raise self._unusable("it belongs to another user")

    def _unusable(self, reason: str | None) -> ValueError:
        return ValueError(
            f"resources.cache_dir={self.folder}: {reason}; expected a folder on a local disk with space for "
            f"resources.cache_bytes={self.max_bytes}, or cache_bytes=0"
        )

    def read(self, key: str, offset: int, size: int) -> bytes | None:
        """Bytes of a block, or None where it is not kept, or was damaged and is no longer kept."""
        try:
            handle = os.open(self.folder / key, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            os.utime(handle)
            first = offset // PIECE * PIECE
            length = _length_of(os.fstat(handle).st_size)
            pieces = range(first // PIECE, -(-(offset + size) // PIECE))
            data = os.pread(handle, min(pieces.stop * PIECE, length) - first, first)
            sums = os.pread(handle, len(pieces) * _SUM_BYTES, length + pieces.start * _SUM_BYTES)
        finally:
            os.close(handle)
        if offset + size > length:  # whoever asks knows the block's length: the file is cut off
            self._drop(key, f"has no byte {offset + size}")
            return None
        if sums != _sums(key, data, first):
            self._drop(key, f"bytes {first} to {first + len(data)} are not those that were written")
            return None
        return data[offset - first : offset - first + size]

    def _drop(self, key: str, why: str) -> None:
        """Removes a damaged file, and says so in the log of the folder."""
        (self.folder / key).unlink(missing_ok=True)
        log = self.folder / DAMAGED_LOG
        with suppress(OSError):
            if not log.exists() or log.stat().st_size < _LOG_BYTES:
                with log.open("a") as file:
                    file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {key}: {why}\n")

    def has(self, key: str) -> bool:
        return (self.folder / key).exists()

    def put(self, key: str, data: bytes) -> None:
        """Keeps a block with its checksums, unless it alone is larger than the bound."""
        data += _sums(key, data, 0)
        if len(data) > self.max_bytes:
            return
        temporary = self.folder / f".{key}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            with self._ledger() as ledger:
                text = os.pread(ledger, 32, 0)
                total = int(text) if text else self._evict(self.max_bytes)
                if total + len(data) > self.max_bytes:
                    total = self._evict(min(int(_KEPT_SHARE * self.max_bytes), self.max_bytes - len(data)))
                with temporary.open("wb") as file:
                    file.truncate(len(data))  # counted by every listing of the folder from now on
                os.ftruncate(ledger, 0)
                os.pwrite(ledger, str(total + len(data)).encode(), 0)
            with temporary.open("rb+") as file:
                file.write(data)
            with self._ledger():  # or a listing of the folder might have neither name
                temporary.replace(self.folder / key)
        except FileNotFoundError:  # evicted while it was written: a bound that holds little more than this block
            return
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unusable(error.strerror) from error

    @contextmanager
    def _ledger(self) -> Iterator[int]:
        """The file that holds how many bytes are kept, locked against other threads and processes."""
        handle = os.open(self.folder / _LEDGER, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)

    def _evict(self, limit: int) -> int:
        """Removes the blocks that were read longest ago until `limit` holds; how many bytes are left."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name in (_LEDGER, DAMAGED_LOG):
                continue
            try:
                stat = entry.stat()
            except FileNotFoundError:  # removed by hand
                continue
            found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        return total


def _sums(key: str, data: bytes, first: int) -> bytes:
    """Checksums of the pieces of a block's bytes from `first` on, which also tell blocks and places apart."""
    name = xxhash.xxh3_64_intdigest(key.encode())
    pieces = memoryview(data)
    sums = [
        xxhash.xxh3_64_intdigest(pieces[at : at + PIECE], seed=(name + first + at) % 2**64)
        for at in range(0, len(data), PIECE)
    ]
    return np.array(sums, dtype="<u8").tobytes()


def _length_of(file_bytes: int) -> int:
    """Bytes of the block in a file of this size: what `len(data) + len(_sums(data))` makes of them, inverted."""
    whole, rest = divmod(file_bytes, PIECE + _SUM_BYTES)
    return whole * PIECE + max(0, rest - _SUM_BYTES)


def count_damaged(settings: CacheSettings) -> int:
    """Lines in the log of damaged files; 0 where there is none."""
    try:
        return (settings.path / DAMAGED_LOG).read_bytes().count(b"\n")
    except OSError:
        return 0


class _State(Enum):
    UNSEEN = auto()
    TOUCHED = auto()  # images of it were read alone
    WHOLE = auto()  # it went to the cache
    EVICTED = auto()  # before half of it was read: the cache is too small for whole blocks


@dataclass
class _Seen:
    """How a process has read a block so far."""

    state: _State = _State.UNSEEN
    used: int = 0  # bytes read of it since it came to this state
    alone: int = 0  # images read alone since it was touched


@lru_cache(maxsize=8)
def _pool(pid: int, in_flight: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(in_flight, thread_name_prefix="fetch")


def fetchers(settings: CacheSettings) -> ThreadPoolExecutor:
    """The threads of this process that fetch from remote stores; their number bounds the requests in flight."""
    return _pool(os.getpid(), settings.in_flight)


@lru_cache(maxsize=4096)  # no descriptor is held; what is kept is which blocks were seen
def open_blocks(source: RemoteObject, settings: CacheSettings) -> BlockFile:
    return BlockFile(source, settings)


class BlockFile:
    """Reads like an OpenFile, and is safe from many threads.

    The first images read from a block are fetched alone: a neighbour drawn for a pair may be all that is ever read of
    its block. A further one fetches the block whole, and for blocks fetched in sequence the next ones are prefetched. A
    block that left the cache with less than half of it read is read image by image until that much is made up for: with
    a cache that is too small, requests are many, but at most three times the bytes asked for are read.
    """

    def __init__(self, source: RemoteObject, settings: CacheSettings) -> None:
        self.source = source
        self._remote = RemoteFile(source)
        self._cache = BlockCache(settings)
        self._settings = settings
        self._seen: dict[int, _Seen] = defaultdict(_Seen)
        self._fetching: dict[int, Future[bytes]] = {}
        self._lock = threading.Lock()
        self._name = hashlib.sha256(f"{source.url}\n{source.size}\n{source.version}\nsums".encode()).hexdigest()[:32]

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at a place."""
        end = offset + size
        if end > self.source.size:
            raise ValueError(
                f"{self.source.url}: has {self.source.size} bytes, but the index has {size} bytes at {offset}"
            )
        numbers = range(offset // BLOCK, -(-end // BLOCK))
        parts = []
        for number in numbers if self._cache.max_bytes else ():
            start = max(offset, number * BLOCK)
            part = self._part(number, start, min(end, (number + 1) * BLOCK))
            if part is None:
                break
            parts.append(part)
        if len(parts) < len(numbers) or not self._cache.max_bytes:
            return self._remote.fetch(offset, end)
        return b"".join(parts)

    def _part(self, number: int, start: int, end: int) -> bytes | None:
        """Bytes inside one block, kept or fetched with it; None where they are to be fetched alone."""
        first = number * BLOCK
        kept = self._cache.read(self._key(number), start - first, end - start)
        with self._lock:
            seen = self._seen[number]
            if kept is None and seen.state is _State.WHOLE:  # it may have come in between
                kept = self._cache.read(self._key(number), start - first, end - start)
            alone = kept is None and number not in self._fetching and self._is_read_alone(number)
            if kept is not None:
                seen.state = _State.WHOLE
            seen.used += end - start
        if kept is not None or alone:
            return kept
        data = self._fetch_whole(number)
        self._fetch_next(number)
        return data[start - first : end - first]

    def _is_read_alone(self, number: int) -> bool:
        """Whether the next image of a block that is not kept is fetched without the rest of it."""
        seen, half = self._seen[number], self._length(number) // 2
        if seen.state is _State.TOUCHED:
            seen.alone += 1
            return seen.alone <= _ALONE
        if seen.state is _State.UNSEEN or seen.used >= half:  # or it was evicted only after most of it had been read
            seen.state, seen.used, seen.alone = _State.TOUCHED, 0, 1
        elif seen.state is _State.WHOLE:
            seen.state, seen.used = _State.EVICTED, 0
        return True

    def _fetch_whole(self, number: int) -> bytes:
        """A block, fetched once however many threads read it."""
        with self._lock:
            coming = self._fetching.get(number)
            own: Future[bytes] = Future()
            if coming is None:
                self._fetching[number] = own
        if coming is not None:
            return coming.result()
        try:
            data = self._remote.fetch(number * BLOCK, number * BLOCK + self._length(number))
            self._cache.put(self._key(number), data)
            own.set_result(data)
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            with self._lock:
                if own.exception() is None:
                    self._seen[number] = _Seen(_State.WHOLE)
                del self._fetching[number]
        return data

    def _fetch_next(self, number: int) -> None:
        with self._lock:
            if self._seen[number - 1].state is not _State.WHOLE:
                return
            following = range(number + 1, min(number + 1 + _AHEAD, -(-self.source.size // BLOCK)))
            new = (_State.UNSEEN, _State.TOUCHED)
            missing = [n for n in following if n not in self._fetching and self._seen[n].state in new]
        for n in missing:
            if not self._cache.has(self._key(n)):
                fetchers(self._settings).submit(self._prefetch, n)  # an error is raised when the block itself is read

    def _prefetch(self, number: int) -> None:
        with self._lock:
            if self._seen[number].state is _State.WHOLE:  # several readers asked for it
                return
        self._fetch_whole(number)

    def _length(self, number: int) -> int:
        return min(BLOCK, self.source.size - number * BLOCK)

    def _key(self, number: int) -> str:
        return f"{self._name}-{number}"


class ReadAt(io.RawIOBase):
    """A file object over a BlockFile, for readers of headers."""

    def __init__(self, file: BlockFile) -> None:
        self.name, self._file, self._at = file.source.url, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET, "headers are sought from the start"
        self._at = offset
        return offset

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(self._at, max(0, min(size, self._file.source.size - self._at)))
        self._at += len(data)
        return data
