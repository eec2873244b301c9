"""Files that appear whole or not at all, stay after a power cut, and have a checksum; errors that pass are tried again.

The checksum is xxh3 of 128 bits (xxhash): it tells damage by chance, at the speed of memory, and guards against nobody.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from grappa_dist.storage import Result, open_to_read, open_to_write, tried_again

_READ_BYTES = 2**20
LOCK_TRIES, LOCK_PAUSE_S = 3, 0.05


@dataclass(frozen=True)
class Sum:
    """The size and the checksum of a file."""

    bytes: int
    xxh3: str | None  # 32 hex digits; None: not known

    @staticmethod
    def of(path: Path | str) -> Sum:
        """Reads all of a file."""
        digest, size = xxhash.xxh3_128(), 0
        with open_to_read(path) as file:
            # a buffer of the largest size takes longer to make than a small file to read
            buffer = memoryview(bytearray(min(_READ_BYTES, os.fstat(file.fileno()).st_size + 1)))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
                size += count
        return Sum(size, digest.hexdigest())


def replace(path: Path, write: Callable[[Path], object], *, summed: bool = False) -> None:
    """Lets `write(temporary)` write a file beside `path`, which then takes its place, whole and synced.

    The last rename wins. No other writer has the same temporary name, not even a process with the same id on another
    machine. After an error that may pass, also in the sync, `write` is called again: a system may forget what it
    failed to write, so that another sync alone would report success.

    Args:
        summed: whether to record the checksum of the file beside it, for `recorded`: another process, perhaps on
            another machine, then need not read the file.
    """

    def attempt() -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            write(temporary)
            _sync(temporary)
            found = Sum.of(temporary) if summed else None  # still in this machine's memory
            os.chmod(temporary, 0o666 & ~_umask())  # some writers make private files; others share this storage
            record_of(path).unlink(missing_ok=True)  # of an older file under this name
            os.replace(temporary, path)
            if found is not None:
                record(path, found)
        finally:
            with suppress(OSError):  # the disk may be read-only by now; a commit removes what is left
                temporary.unlink(missing_ok=True)

    make_folder(path.parent)
    tried_again(attempt, path)


def record(path: Path, found: Sum | None = None) -> None:
    """Records the checksum of a file, for `recorded`; without `found` the file is read."""
    write_json(record_of(path), vars(found or Sum.of(path)))


def recorded(path: Path) -> Sum | None:
    """The checksum that was recorded of a file; None where none was, or none that can be read."""
    try:
        found = read_json(record_of(path))
        return Sum(int(found["bytes"]), str(found["xxh3"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def remove_recorded(path: Path) -> None:
    """Removes a file, and the checksum that was recorded of it."""
    for one in (path, record_of(path)):
        one.unlink(missing_ok=True)


def record_of(path: Path) -> Path:
    """Where the checksum of a file is recorded."""
    return path.with_name(f".{path.name}.xxh3")


def write_bytes(path: Path, data: bytes) -> None:
    def write(temporary: Path) -> None:
        with open_to_write(temporary) as file:
            file.write(data)

    replace(path, write)


def write_utf8(path: Path, text: str) -> None:
    """Writes a text as UTF-8; a file name that was not UTF-8 keeps its bytes."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of a JSON text; a ValueError names a key that is given twice, of which json would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r:.80} is given twice")
    return found


def parse_json(text: bytes, where: Path | str) -> Any:
    """The value of a JSON text without repeated keys; a ValueError names `where` the text is from."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def read_bytes(path: Path) -> bytes:
    with open_to_read(path) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """The value of a JSON file; a ValueError names the file."""
    return parse_json(read_bytes(path), path)


def write_json(path: Path, value: Any) -> None:
    write_utf8(path, json.dumps(value, indent=1) + "\n")


def write_json_list(path: Path, values: Callable[[], Iterable[Any]]) -> None:
    """Writes the same as `write_json` of a list, without holding the list in memory.

    Args:
        values: begins to yield them, again if they have to be written again.
    """

    def write(temporary: Path) -> None:
        with open_to_write(temporary) as file:
            between = "[\n "
            for value in values():
                file.write(f"{between}{json.dumps(value)}".encode())
                between = ",\n "
            file.write(b"[]\n" if between.startswith("[") else b"\n]\n")

    replace(path, write)


class _Plain:
    """A file that numpy takes for none of the C library, whose errors have no number."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.write = file.write


def save_array(path: Path, array: NDArray[Any], *, summed: bool = False) -> None:
    """A .npy file; `path` ends in .npy, `summed` is as for `replace`."""

    def write(temporary: Path) -> None:
        with open_to_write(temporary) as file:
            np.save(_Plain(file), array, allow_pickle=False)

    replace(path, write, summed=summed)


def map_array(path: Path | str, mode: Literal["r", "c"] = "r") -> NDArray[Any]:
    """The array of a .npy file, as `map_file` maps it; with "c" it may be written to, and the file stays as it is."""

    def load() -> NDArray[Any]:
        found = np.load(path, mmap_mode="r", allow_pickle=False)  # checks the header, and is dropped again
        array: NDArray[Any] = np.ndarray(found.shape, found.dtype, map_file(path), found.offset, found.strides)
        array.setflags(write=mode == "c")
        return array

    return tried_again(load, path)


def map_file(path: Path | str) -> NDArray[np.uint8]:
    """The bytes of a file that is not empty, mapped into memory without an open file for it, as numpy's maps have.

    A process may have far more maps than open files, so it can map every shard of a run at once.
    """
    import torch

    size = tried_again(lambda: os.path.getsize(path), path)
    storage = tried_again(lambda: torch.UntypedStorage.from_file(str(path), False, size), path)
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[arg-type]


def save_tensors(
    path: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None, *, summed: bool = False
) -> None:
    """A .safetensors file of torch tensors; `summed` is as for `replace`."""
    from safetensors.torch import save_file

    named = {name: tensor.contiguous() for name, tensor in tensors.items()}
    about = None if metadata is None else dict(metadata)
    replace(path, lambda temporary: save_file(named, temporary, metadata=about), summed=summed)


def read_tensors(path: Path) -> dict[str, Any]:
    """The torch tensors of a .safetensors file, on the CPU."""
    from safetensors.torch import load_file

    return open_tensors(path, lambda: load_file(path))


def open_tensors(path: Path, load: Callable[[], Result]) -> Result:
    """What `load()` returns, a call of safetensors that reads a file, whose every error is "No such file" there."""

    def attempt() -> Result:
        try:
            return load()
        except FileNotFoundError:
            open_to_read(path).close()  # says why, unless there is no such file
            raise OSError(errno.EIO, "opened only at the second attempt", str(path)) from None

    return tried_again(attempt, path)


def make_folder(path: Path) -> None:
    """A folder and those above it, unless they are there."""
    tried_again(lambda: path.mkdir(parents=True, exist_ok=True), path)


def lock_file(path: Path) -> IO[str]:
    """The file, held by this process alone until it is closed, with who holds it since when as its content.

    Who only looks whether it is held has it for a moment, so it is tried LOCK_TRIES times.

    Raises:
        BlockingIOError: another process holds it; the error says which one, as far as the file has it.
        OSError: it cannot be written, or its file system has no locks.
    """
    file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by the caller
    try:
        _lock(file)
    except OSError as error:
        file.seek(0)
        holder = " ".join(file.read(500).split())
        file.close()
        if isinstance(error, BlockingIOError):
            raise BlockingIOError(f" ({holder})" if holder else "") from None
        raise OSError(error.errno, f"{error.strerror}, it cannot be locked") from error
    try:
        file.truncate(0)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
    except OSError:  # a full disk: the lock holds without
        pass
    return file


def _lock(file: IO[str]) -> None:
    for left in reversed(range(LOCK_TRIES)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not left:
                raise
            time.sleep(LOCK_PAUSE_S)


def is_locked(path: Path) -> bool:
    """Whether a process holds the file with `lock_file`, as far as this machine can see; writes nothing.

    Raises:
        OSError: there is no such file, it cannot be read, or its file system has no locks.
    """
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def rename(source: Path, target: Path) -> None:
    """Renames a file or folder. An error may come though it was done, as when a reply was lost on its way."""

    def attempt() -> None:
        try:
            os.rename(source, target)
        except FileNotFoundError:
            if source.exists() or not target.exists():
                raise

    tried_again(attempt, target)


def hide_damaged(damaged: Path) -> Path:
    """Renames a damaged file or folder, so that nothing finds it; its new path, `.damaged-<name>` with a number."""
    return rename_to_free(damaged, (f".damaged-{damaged.name}-{number}" for number in count(1)))


def rename_to_free(path: Path, names: Iterable[str]) -> Path:
    """Gives a file or folder the first of the names that nothing beside it has; its new path."""
    target = next(one for one in map(path.with_name, names) if not os.path.lexists(one))
    rename(path, target)
    sync(path.parent)
    return target


def remove_folder(path: Path) -> None:
    """A folder with all that is in it; nothing where there is none."""

    def attempt() -> None:
        with suppress(FileNotFoundError):
            shutil.rmtree(path)

    tried_again(attempt, path)


def sync(path: Path) -> None:
    """Flushes a file to the disk, or makes renames inside a folder survive a power cut.

    A file that cannot be flushed is written anew: a system may forget what it failed to write, and report it once.
    """
    if path.is_dir():
        tried_again(lambda: _sync(path), path)
        return
    try:
        _sync(path)
    except OSError:
        replace(path, lambda temporary: shutil.copyfile(path, temporary))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
