"""A bounded cache of blocks on a local disk, shared by the processes of a machine."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_LEDGER = ".bytes"
_KEPT_SHARE = 0.9  # of the bound, after an eviction: the folder is listed once for many blocks


def default_folder() -> str:
    return str(Path(tempfile.gettempdir()) / f"grappa-cache-{os.getuid()}")


@dataclass(frozen=True)
class CacheSettings:
    """Where blocks of remote shards are kept, and how much is asked for at a time."""

    folder: str | None = None  # None: grappa-cache-<uid> in the temporary folder
    max_bytes: int = 16 * 2**30  # 0: nothing is kept
    in_flight: int = 16  # requests of one process


class BlockCache:
    """Blocks by key. All of them together, also those being written, never take more than `max_bytes`.

    A block appears by one rename. The least recently read go first; a reader that holds one open keeps its bytes.
    """

    def __init__(self, settings: CacheSettings) -> None:
        self.max_bytes = settings.max_bytes
        self.folder = Path(settings.folder or default_folder())
        if self.max_bytes:
            try:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                mine = settings.folder is not None or self.folder.stat().st_uid == os.getuid()
            except OSError as error:
                raise self._unusable(error.strerror) from error
            if not mine:
                raise self._unusable("it belongs to another user")

    def _unusable(self, reason: str | None) -> ValueError:
        return ValueError(
            f"resources.cache_dir={self.folder}: {reason}; expected a folder on a local disk with room for "
            f"resources.cache_bytes={self.max_bytes}, or cache_bytes=0"
        )

    def read(self, key: str, offset: int, size: int) -> bytes | None:
        """Bytes of a block, or None where it is not kept."""
        try:
            handle = os.open(self.folder / key, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            os.utime(handle)
            data = os.pread(handle, size, offset)
        finally:
            os.close(handle)
        return data if len(data) == size else None

    def has(self, key: str) -> bool:
        return (self.folder / key).exists()

    def put(self, key: str, data: bytes) -> None:
        """Keeps a block, unless it alone is larger than the bound."""
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
                    file.truncate(len(data))  # counted by whoever lists the folder from now on
                os.ftruncate(ledger, 0)
                os.pwrite(ledger, str(total + len(data)).encode(), 0)
            with temporary.open("rb+") as file:
                file.write(data)
            with self._ledger():  # or whoever lists the folder might see neither name
                temporary.replace(self.folder / key)
        except FileNotFoundError:  # evicted while it was written: a bound that holds little more than this block
            return
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unusable(error.strerror) from error

    @contextmanager
    def _ledger(self) -> Iterator[int]:
        """The file that says how many bytes are kept, locked against other threads and processes."""
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
            if entry.name == _LEDGER:
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
