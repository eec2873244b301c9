from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grappa_dist import storage
from grappa_dist.storage import StorageError, error_number, open_to_append, open_to_read, open_to_write, tried_again
from tests.faults.injection import StorageErrors, why_unavailable


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    return slept


def failing(times: int, error: BaseException) -> Callable[[], str]:
    left = [error] * times

    def attempt() -> str:
        if left:
            raise left.pop()
        return "done"

    return attempt


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR])
def test_an_error_that_may_pass_is_tried_again_after_longer_and_longer_pauses(pauses: list[float], number: int) -> None:
    assert tried_again(failing(3, OSError(number, "?")), "/a") == "done"
    assert pauses == list(storage.PAUSES_S[:3])


def test_the_attempts_have_a_bound_and_an_attempt_inside_another_is_not_multiplied(pauses: list[float]) -> None:
    attempt = failing(1000, OSError(errno.EIO, "?"))
    with pytest.raises(StorageError, match=r"^/a: Input/output error, 9 times within 8 s, on ") as caught:
        tried_again(lambda: tried_again(attempt, "/a"), "/b")
    assert pauses == list(storage.PAUSES_S)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "?"), OSError(errno.EACCES, "?"), ValueError("Errno 5")])
def test_any_other_error_is_raised_as_it_is(pauses: list[float], error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        tried_again(failing(1, error), "/a")
    assert caught.value is error
    assert pauses == []


def test_a_full_disk_is_named_with_what_is_free_and_what_to_do(tmp_path: Path, pauses: list[float]) -> None:
    where = tmp_path / "not" / "there" / "rows.npy"
    with pytest.raises(StorageError) as caught:
        tried_again(failing(1, OSError(errno.ENOSPC, "?")), where)
    message = str(caught.value)
    assert message.startswith(f"{where}: No space left on device, ")
    assert " bytes are free on the file system /" in message
    assert "--out names another place" in message
    assert "what is finished is kept" in message
    with pytest.raises(StorageError, match=r"Read-only file system on the file system .*TMPDIR names another place"):
        tried_again(failing(1, OSError(errno.EROFS, "?")), where, "TMPDIR names another place")
    assert pauses == []


def test_too_many_open_files_names_the_limit() -> None:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    with pytest.raises(StorageError, match=rf"/a: Too many open files: a process may have {soft} .*ulimit -n"):
        tried_again(failing(1, OSError(errno.EMFILE, "?")), "/a")


def test_the_limit_of_open_files_is_raised_as_far_as_is_allowed() -> None:
    program = (
        "import resource; from grappa_dist.storage import raise_open_files; limit = resource.RLIMIT_NOFILE;"
        "resource.setrlimit(limit, (40, 90)); raise_open_files(); print(resource.getrlimit(limit))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "(90, 90)"


@pytest.mark.parametrize(
    "text",
    [
        "Error while serializing: I/O error: Input/output error (os error 5)",
        "unable to open file <a>: Input/output error (5)",
    ],
)
def test_the_number_of_a_library_s_error_is_read_from_its_message(text: str) -> None:
    assert error_number(RuntimeError(text)) == errno.EIO
    assert error_number(ValueError(text)) is None


IO = """
from pathlib import Path
import sys
from grappa_dist.storage import open_to_append, open_to_read, open_to_write
path, content = Path(sys.argv[1]), bytes(range(256)) * 4000
with open_to_write(path) as file:
    for at in range(0, len(content), 5000):
        file.write(content[at : at + 5000])
with open_to_append(path) as file:
    for _ in range(100):
        file.write(b"end")
        file.flush()
for _ in range(20):
    with open_to_read(path) as file:
        assert file.read() == content + b"end" * 100
        file.seek(100)
        assert file.read(1000) == content[100:1100]
"""


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_no_byte_is_lost_where_a_tenth_of_all_calls_fail(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with StorageErrors(tmp_path / "control", [tmp_path / "disk"]) as errors:
        errors.err(0.1, errno.ESTALE)
        command = [sys.executable, "-c", IO, str(tmp_path / "disk" / "file")]
        done = subprocess.run(
            command, env=os.environ | errors.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert errors.counts.failed > 20


def test_files_are_read_written_and_appended_to(tmp_path: Path) -> None:
    with open_to_write(tmp_path / "a") as file:
        file.write(b"one")
    with open_to_append(tmp_path / "a") as file:
        file.write(b"two")
    with open_to_read(tmp_path / "a") as reader:
        assert reader.read() == b"onetwo"
