"""The injected faults are those that were asked for, and only where they were."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.injection import OPEN, READ, RENAME, SYNC, WRITE, StorageErrors, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

PROGRAM = """
import errno, os, sys
folder, calls = sys.argv[1], int(sys.argv[2])
def attempt(call, *args):
    try:
        return "", call(*args)
    except OSError as error:
        return errno.errorcode[error.errno] + " ", None
def opened(path, flags=os.O_RDWR | os.O_CREAT):
    while True:
        said, file = attempt(os.open, path, flags, 0o600)
        if file is not None:
            return file
def numpy_array(path):
    import numpy as np
    np.save(path, np.zeros(1000))
"""


def attempts(storage: StorageErrors, folder: Path, body: str, calls: int = 1) -> str:
    """What the errors of calls under these faults are called, in order."""
    command = [sys.executable, "-c", PROGRAM + body, str(folder), str(calls)]
    done = subprocess.run(command, env=os.environ | storage.environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


KINDS = {
    READ: "print(attempt(os.pread, file, 10, 0)[0], end='')",
    WRITE: "print(attempt(os.write, file, b'x')[0], end='')",
    SYNC: "print(attempt(os.fsync, file)[0], end='')",
    OPEN: "print(attempt(open, folder + '/b', 'w')[0], end='')",
    RENAME: "print(attempt(os.rename, folder + '/a', folder + '/a')[0], end='')",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_the_calls_of_one_kind_fails_below_the_folder_alone(tmp_path: Path, kind: int) -> None:
    (inside := tmp_path / "inside").mkdir()
    (outside := tmp_path / "inside-not").mkdir()
    body = "file = opened(folder + '/a')\nfor _ in range(calls):\n    " + KINDS[kind]
    with StorageErrors(tmp_path / "control", [inside], seed=3) as storage:
        storage.err(0.25, errno.ESTALE, kind)
        failed = attempts(storage, inside, body, 400).split()
        assert set(failed) == {"ESTALE"}
        assert 60 < len(failed) < 140
        assert storage.counts.failed >= len(failed)
        assert attempts(storage, outside, body, 400) == ""
        storage.err(0)
        assert attempts(storage, inside, body, 400) == ""


def test_a_disk_is_full_after_so_many_bytes_of_all_processes(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    body = "file = opened(folder + '/a')\nprint(*(attempt(os.write, file, b'x' * 100) for _ in range(calls)))"
    with StorageErrors(tmp_path / "control", [tmp_path]) as storage:
        storage.full_after(450)
        assert attempts(storage, tmp_path, body, 3) == "('', 100) ('', 100) ('', 100)"
        assert attempts(storage, tmp_path, body, 3) == "('', 100) ('', 50) ('ENOSPC ', None)"
        assert attempts(storage, tmp_path, "print(attempt(numpy_array, folder + '/n.npy'))").startswith("('ENOSPC")
        assert storage.counts.full > 1
        storage.full_after(None)
        assert attempts(storage, tmp_path, body, 1) == "('', 100)"


def test_a_read_only_disk_refuses_what_would_change_it(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"kept")
    changes = (
        "open, folder + '/new', 'w'",
        "os.mkdir, folder + '/new'",
        "os.unlink, folder + '/kept'",
        "os.rename, folder + '/kept', folder + '/new'",
        "os.symlink, 'kept', folder + '/new'",
        "numpy_array, folder + '/new'",
    )
    body = "".join(f"print(attempt({change})[0], end='')\n" for change in changes)
    with StorageErrors(tmp_path / "control", [tmp_path]) as storage:
        storage.read_only()
        assert attempts(storage, tmp_path, body).split() == ["EROFS"] * len(changes)
        assert attempts(storage, tmp_path, "print(open(folder + '/kept').read())") == "kept"
        storage.read_only(False)
        assert attempts(storage, tmp_path, f"print(attempt({changes[0]})[0])") == ""
