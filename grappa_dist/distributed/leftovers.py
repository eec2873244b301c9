"""Ends what a run's own Ray leaves behind when the run dies: processes, and the temporary folder that they use.

This file is also a program: the watcher, which a run starts beside its Ray and which waits for the run's death. The
next run removes a folder whose watcher was killed as well. Needs /proc to find processes; imports only the standard
library, so that the watcher starts at once and stays small.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path

PREFIX = "grappa-"
LOCK = "run.lock"  # held by the run that made the folder, as long as it lives
TOKEN = "token"
TOKEN_VARIABLE = "RAY_AUTH_TOKEN_PATH"  # of every process of Ray's, with the path of this run's token
END_S = 10.0


def make_folder(parent: Path) -> tuple[Path, int]:
    """A new folder below `parent` that no other user may enter, and its lock, which this process holds while it lives.

    Raises:
        OSError: nothing can be made there, or nothing can be locked.
    """
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        lock = os.open(folder / "new.lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(folder / "new.lock", folder / LOCK)  # never seen without an owner
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder, lock


def sweep(parent: Path) -> None:
    """Removes the folders of this user's dead runs below `parent`, and ends processes that still use them."""
    for folder in parent.glob(PREFIX + "?" * 8):
        with contextlib.suppress(OSError):  # another user's, not ours, or another run is removing it
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)
            finally:
                os.close(lock)


def remove(folder: Path, sparing: Collection[int] = ()) -> None:
    """Ends the processes that use the folder, except those of `sparing` and this one, and removes it."""
    end = time.monotonic() + END_S
    while (users := list(_users(folder, {*sparing, os.getpid()}))) and time.monotonic() < end:
        for pid in users:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def _users(folder: Path, sparing: Collection[int]) -> Iterator[int]:
    """This user's processes that write to a file of the folder, or have its token in their environment.

    Some of Ray's processes overwrite their environment with their title, and all of them write a log. Whoever only
    reads one is left alone.
    """
    mark = f"{TOKEN_VARIABLE}={folder / TOKEN}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        with contextlib.suppress(OSError):  # it has ended
            if pid in sparing or entry.stat().st_uid != os.getuid():
                continue
            if mark in (entry / "environ").read_bytes().split(b"\0") or _writes(entry / "fd", f"{folder}/"):
                yield pid


def _writes(descriptors: Path, below: str) -> bool:
    for link in descriptors.iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(link).startswith(below) and link.lstat().st_mode & stat.S_IWUSR:  # as it was opened
                return True
    return False


def watch(folder: Path) -> None:
    """Waits until the run that holds the folder's lock has died; one that ends by itself ends its watcher first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # as its terminal or its group may get
        signal.signal(number, signal.SIG_IGN)
    lock = os.open(folder / LOCK, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    remove(folder)


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
