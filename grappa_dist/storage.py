"""Errors of storage: those that may pass are tried again within a bound, those that last say what to do.

A network file system, or a disk that is about to fail, answers an error now and then and works a moment later. Whatever
reads or writes the files of a run goes through `tried_again`, most of it by `files.py`. Left out are files that are
mapped into memory: an error there ends the process, and the runner tries its work again.
"""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

PASSING = frozenset(
    {
        *(errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ECONNABORTED, errno.ECONNRESET, errno.ECONNREFUSED, errno.ESHUTDOWN),
    }
)
WITHOUT_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
LASTING = WITHOUT_SPACE | {errno.EMFILE, errno.ENFILE}  # another attempt a moment later would end alike
MOST_OPEN_FILES = 2**16
PAUSES_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0)  # before the second attempt, the third, ...
# How other languages' libraries state the number of an error: "(os error 5)"; "...: Input/output error (5)"
_NUMBER = re.compile(r"\(os error (\d+)\)|: [A-Z][A-Za-z/ -]+ \((\d+)\)")
Result = TypeVar("Result")


class StorageError(OSError):
    """An error of storage that is not tried again: it lasts until somebody does something, or has lasted too long."""

    def __str__(self) -> str:
        return str(self.strerror)


def tried_again(attempt: Callable[[], Result], where: Path | str, remedy: str = "") -> Result:
    """What `attempt()` returns; after an error that may pass it is called again, PAUSES_S apart.

    Args:
        where: the path that is worked on, for messages.
        remedy: which setting names another place; by default --out, or TMPDIR for what lies there.

    Raises:
        StorageError: the file system is full or read-only, too many files are open, or every attempt failed.
    """
    for pause_s in (*PAUSES_S, None):
        try:
            return attempt()
        except Exception as error:
            number = error_number(error)
            if isinstance(error, StorageError) or number is None or number not in PASSING | LASTING:
                raise
            if number in LASTING:
                raise explained(number, where, remedy) from error
            if pause_s is None:
                times = f"{len(PAUSES_S) + 1} times within {sum(PAUSES_S):.0f} s, on {socket.gethostname()}"
                raise StorageError(number, f"{where}: {os.strerror(number)}, {times}") from error
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def error_number(error: BaseException) -> int | None:
    """The errno of an error, also of one that a library states in its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBER.search(str(error)) if type(error).__name__ in ("SafetensorError", "RuntimeError") else None
    return int(found[1] or found[2]) if found else None


def explained(number: int, where: Path | str, remedy: str = "") -> StorageError:
    """An error that lasts, with the file system, what is free there, and what to do."""
    reason, host = os.strerror(number), socket.gethostname()
    if number in (errno.EMFILE, errno.ENFILE):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        return StorageError(
            number, f"{where}: {reason}: a process may have {soft} on {host}; raise the limit (`ulimit -n`, now {hard})"
        )
    place = _existing(Path(where))
    mount = _mount_of(place)
    if number == errno.EROFS:
        what = "make it writable"
    else:
        what = "free some, or raise the quota" if number == errno.EDQUOT else "free some"
        reason += f", {shutil.disk_usage(place).free:,} bytes are free"
    temporary = Path(where).absolute().is_relative_to(tempfile.gettempdir())
    other = remedy or f"{'TMPDIR or --out' if temporary else '--out'} names another place"
    return StorageError(
        number,
        f"{where}: {reason} on the file system {mount} of {host}; {what} ({other}), then run the same command again: "
        "what is finished is kept",
    )


def described(error: Exception) -> Exception:
    """The error, or where a file system without space, or too many open files, is its cause, one that says so."""
    if not isinstance(error, OSError) or isinstance(error, StorageError) or error.errno not in LASTING:
        return error
    found = explained(error.errno, error.filename or tempfile.gettempdir())
    found.__cause__ = error
    return found


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _mount_of(path: Path) -> Path:
    return next((folder for folder in (path, *path.parents) if folder.is_mount()), path)


class PatientFile(io.FileIO):
    """A file whose every read and write is tried again after an error that may pass."""

    def readinto(self, buffer: Any) -> int | None:
        return tried_again(lambda: super(PatientFile, self).readinto(buffer), self.name)

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        return tried_again(lambda: super(PatientFile, self).read(size), self.name) or b""

    def readall(self) -> bytes:
        start = self.tell() if self.seekable() else 0

        def attempt() -> bytes:
            if self.seekable():
                self.seek(start)
            return super(PatientFile, self).readall() or b""

        return tried_again(attempt, self.name)

    def write(self, data: Any) -> int:
        return tried_again(lambda: super(PatientFile, self).write(data), self.name) or 0


def open_to_read(path: Path | str) -> io.BufferedReader:
    """A file of bytes, opened for reading; safe against errors that pass."""
    return io.BufferedReader(tried_again(lambda: PatientFile(path, "r"), path))


def open_to_write(path: Path | str) -> io.BufferedWriter:
    """A new or emptied file of bytes, opened for writing; safe against errors that pass, but for those of a sync."""
    return io.BufferedWriter(tried_again(lambda: PatientFile(path, "w"), path))


def open_to_append(path: Path | str) -> io.BufferedWriter:
    """A file of bytes whose end is written to; as `open_to_write` otherwise."""
    return io.BufferedWriter(tried_again(lambda: PatientFile(path, "a"), path))


def allocate(handle: int, num_bytes: int, where: Path | str, remedy: str = "") -> None:
    """Takes the disk space of an open file: a full disk is an error here, not the end of the process at some write."""
    tried_again(lambda: os.posix_fallocate(handle, 0, num_bytes), where, remedy)


def raise_open_files() -> None:
    """Lets this process, and those that it starts, have MOST_OPEN_FILES, or as many as the administrator allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
