"""A lock names who holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grappa_dist.artifacts import Store
from grappa_dist.files import lock_file

HOLDS = "import sys; from pathlib import Path; from grappa_dist.files import lock_file\n"
HOLDS += "held = lock_file(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


def test_the_holder_is_named_to_others_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("process 1 on a-machine-with-a-much-longer-name since 1999-01-01T00:00:00Z\n" * 3, encoding="utf-8")
    call = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):  # looking does not change what the file says
            with pytest.raises(
                BlockingIOError, match=rf"^ \(process {holder.pid} on {socket.gethostname()} since 2\S+Z\)$"
            ):
                lock_file(path)
        holder.kill()
    with lock_file(path):
        assert path.read_text(encoding="utf-8").startswith(f"process {os.getpid()} on ")


def test_a_lock_without_a_holders_name_is_still_refused(tmp_path: Path) -> None:
    with lock_file(tmp_path / "lock"):
        (tmp_path / "lock").write_text("", encoding="utf-8")
        with pytest.raises(BlockingIOError, match=r"^$"):
            lock_file(tmp_path / "lock")


def test_a_file_system_without_locks_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    expected = r"cannot be written to: No locks available, it cannot be locked"
    with pytest.raises(ValueError, match=expected), Store(tmp_path).lock():
        pass
