from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from grappa_dist.data import checksums
from grappa_dist.data.shards import ImageShards
from tests.data.test_shards import write_folder


def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "f", 4, rows_per_shard=2)
    return tmp_path / "f"


def make_newer(tar: Path) -> None:
    later = tar.with_name("index.json").stat().st_mtime_ns + 10**9
    os.utime(tar, ns=(later, later))


def test_a_shard_of_the_same_size_with_other_bytes_is_refused(tmp_path: Path) -> None:
    tar = folder(tmp_path) / "shard-000001.tar"
    changed = bytearray(tar.read_bytes())
    changed[600] ^= 1
    tar.write_bytes(changed)
    make_newer(tar)
    for notes in (None, tmp_path / "notes", tmp_path / "notes"):
        with pytest.raises(ValueError, match=r"shard-000001\.tar: its bytes are no longer those that index\.json"):
            ImageShards.open([tar.parent], notes)


def test_a_copy_that_is_newer_is_read_once_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(folder(tmp_path), tmp_path / "copy"))
    make_newer(copy / "shard-000000.tar")
    read: list[str] = []
    sha256_of = checksums.sha256_of
    monkeypatch.setattr(checksums, "sha256_of", lambda file: read.append(Path(file.name).name) or sha256_of(file))
    before = ImageShards.open([tmp_path / "f"], tmp_path / "notes")
    assert read == []
    for _ in range(2):
        assert ImageShards.open([copy], tmp_path / "notes").fingerprint == before.fingerprint
    assert read == ["shard-000000.tar"]
    make_newer(copy / "shard-000001.tar")
    ImageShards.open([copy], None)
    assert sorted(read) == ["shard-000000.tar", "shard-000000.tar", "shard-000001.tar"]  # side by side, in any order
