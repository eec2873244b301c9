"""Files that appear whole or not at all, and stay after a power cut."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, whole and synced, when the block ends without an error.

    The last rename wins. No other writer has the same temporary name, not even a process with the same id on another
    machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        yield temporary
        sync(temporary)
        os.chmod(temporary, 0o666 & ~_umask())  # some writers make private files; others share this storage
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_json(text: bytes, where: Path | str) -> Any:
    """The value of a JSON text; a ValueError names `where` the text is from."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file; a ValueError names the file."""
    return parse_json(path.read_bytes(), path)


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_json_list(path: Path, values: Iterable[Any]) -> None:
    """Writes the same as `write_json` of a list, without holding the list in memory."""
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        between = "[\n "
        for value in values:
            file.write(between + json.dumps(value))
            between = ",\n "
        file.write("[]\n" if between.startswith("[") else "\n]\n")


def lock_file(path: Path) -> IO[str]:
    """The file, held by this process alone until it is closed, with who holds it since when as its content.

    Raises:
        BlockingIOError: another process holds it; the error says which one, as far as the file has it.
    """
    file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed by the caller
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = " ".join(file.read(500).split())
        file.close()
        raise BlockingIOError(f" ({holder})" if holder else "") from None
    try:
        file.truncate(0)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        file.flush()
    except OSError:  # a full disk: the lock holds without
        pass
    return file


def sync(path: Path) -> None:
    """Flushes a file to the disk, or makes renames inside a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
