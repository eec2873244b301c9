from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grappa_dist import files, storage
from grappa_dist.files import (
    map_array,
    read_json,
    read_tensors,
    rename,
    replace,
    save_array,
    sync,
    write_bytes,
    write_json_list,
)
from tests.faults.injection import StorageErrors, why_unavailable


def test_a_file_whose_sync_fails_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system may drop what it could not write: to sync once more would report success for bytes that are gone."""
    synced: list[int] = []

    def fsync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        if len(synced) == 1:
            os.truncate(os.readlink(f"/proc/self/fd/{handle}"), 0)
            raise OSError(errno.EIO, "?")

    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(files.os, "fsync", fsync)
    write_bytes(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"
    assert len(synced) == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_finished_file_that_cannot_be_synced_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path := tmp_path / "a").write_bytes(b"content")
    before, failures = path.stat().st_ino, [OSError(errno.EIO, "?")]

    def fsync(handle: int) -> None:
        if failures:
            raise failures.pop()

    monkeypatch.setattr(files.os, "fsync", fsync)
    sync(path)
    assert path.read_bytes() == b"content"
    assert path.stat().st_ino != before


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (path := tmp_path / "a").write_bytes(b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, "?")

    with pytest.raises(storage.StorageError, match="No space left on device"):
        replace(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_that_was_done_though_it_reported_an_error_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    real = os.rename

    def renamed(source: Path, target: Path) -> None:
        real(source, target)
        if not calls:
            calls.append(1)
            raise OSError(errno.ETIMEDOUT, "?")

    calls: list[int] = []
    monkeypatch.setattr(files.os, "rename", renamed)
    rename(tmp_path / "a", tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    with pytest.raises(FileNotFoundError):
        rename(tmp_path / "a", tmp_path / "c")


def test_arrays_and_lists_have_the_bytes_of_numpy_and_of_one_json_text(tmp_path: Path) -> None:
    for array in (np.arange(12.0).reshape(3, 4), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 2), "f4")):
        np.save(tmp_path / "expected.npy", array)
        save_array(tmp_path / "found.npy", array)
        assert (tmp_path / "found.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
        assert np.array_equal(map_array(tmp_path / "found.npy"), array)
    for values in ([], [1], ["a", None, {"b": 2}]):
        write_json_list(tmp_path / "list.json", lambda values=values: values)
        assert json.loads((tmp_path / "list.json").read_text()) == values


def test_weights_that_are_not_there_are_missed_and_nothing_is_tried_again(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors")


EVERYTHING = """
import sys
from pathlib import Path
import numpy as np, torch
from grappa_dist.console import Events, read_events
from grappa_dist.files import *
folder = Path(sys.argv[1])
for i in range(3):
    at = folder / str(i)
    tensors = {f"{j}": torch.full((50, 7), float(j)) for j in range(20)}
    save_tensors(at / "a.safetensors", tensors, {"step": "1"})
    assert all(torch.equal(found, tensors[name]) for name, found in read_tensors(at / "a.safetensors").items())
    save_array(at / "a.npy", np.arange(10000))
    assert np.array_equal(map_array(at / "a.npy"), np.arange(10000))
    write_json(at / "a.json", {"i": i})
    assert read_json(at / "a.json") == {"i": i}
    write_json_list(at / "l.json", lambda: range(1000))
    assert read_json(at / "l.json") == list(range(1000))
    sync(at / "a.json")
    rename(at / "a.json", at / "b.json")
    sync(at)
    events = Events(at / "events.jsonl")
    for j in range(20):
        events("step", j=j)
    events.close()
    assert [event["j"] for event in read_events(at / "events.jsonl")] == list(range(20))
    assert sorted(path.name for path in at.iterdir()) == [
        "a.npy", "a.safetensors", "b.json", "events.jsonl", "l.json"
    ], list(at.iterdir())
remove_folder(folder / "0")
"""


@pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))
def test_what_is_written_and_read_is_whole_where_calls_fail_at_random(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    with StorageErrors(tmp_path / "control", [tmp_path / "disk"], seed=1) as errors:
        errors.err(0.1, kinds=31)
        command = [sys.executable, "-c", EVERYTHING, str(tmp_path / "disk")]
        done = subprocess.run(
            command, env=os.environ | errors.environment, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr
        assert errors.counts.failed > 5


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is given twice"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("9" * 5000, "not JSON"),
        ("\udcff", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_json_that_repeats_a_key_nests_or_is_none_is_an_error_of_its_file(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"a\.json: .*{why}"):
        read_json(tmp_path / "a.json")
