from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from grappa_dist.data import index_cache
from grappa_dist.data.shards import ImageShards
from tests.data.written import write_folder


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
    for index in (None, tmp_path / "index", tmp_path / "index"):
        with pytest.raises(ValueError, match=r"shard-000001\.tar: its bytes are no longer those that index\.json"):
            ImageShards.open([tar.parent], index)


def test_a_copy_that_is_newer_is_read_once_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(folder(tmp_path), tmp_path / "copy"))  # with the times of the originals
    read: list[str] = []
    sha256_of = index_cache.sha256_of
    monkeypatch.setattr(index_cache, "sha256_of", lambda file: read.append(Path(file.name).name) or sha256_of(file))
    before = ImageShards.open([tmp_path / "f"], tmp_path / "index")
    assert read == []
    for _ in range(2):
        assert ImageShards.open([copy], tmp_path / "index").fingerprint == before.fingerprint
    assert sorted(read) == ["shard-000000.tar", "shard-000001.tar"]  # side by side, in any order
    make_newer(copy / "shard-000001.tar")
    ImageShards.open([copy], tmp_path / "index", write=False)  # a plan leaves it to the run, which can keep the result
    assert len(read) == 2
    ImageShards.open([copy], tmp_path / "index")
    assert sorted(read)[1:] == ["shard-000001.tar"] * 2
    later = (copy / "shard-000001.tar").stat().st_mtime_ns
    os.utime(copy / "index.json", ns=(later, later))  # who copied them vouches for them: touch index.json
    ImageShards.open([copy], None)
    ImageShards.open([copy], tmp_path / "index")
    assert len(read) == 3


def test_an_old_file_moved_over_a_shard_is_refused_though_it_is_older_than_the_index(tmp_path: Path) -> None:
    tar = folder(tmp_path) / "shard-000000.tar"
    changed = bytearray(tar.read_bytes())
    changed[600] ^= 1
    other = tmp_path / "old.tar"
    other.write_bytes(changed)
    os.utime(other, (10**9, 10**9))
    ImageShards.open([tar.parent], tmp_path / "index")
    other.replace(tar)
    for index in (None, tmp_path / "index"):
        with pytest.raises(ValueError, match=r"shard-000000\.tar: its bytes are no longer those"):
            ImageShards.open([tar.parent], index)


def test_a_link_that_is_turned_to_another_shard_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.tar"
    tar = folder(tmp_path) / "shard-000000.tar"
    changed = bytearray(tar.read_bytes())
    changed[600] ^= 1
    other.write_bytes(changed)
    (tar.parent / "index.json").touch()  # so both files are older
    tar.rename(tmp_path / "first.tar")
    tar.symlink_to(tmp_path / "first.tar")
    ImageShards.open([tar.parent], None)
    os.utime(tar.parent / "index.json", ns=(other.stat().st_ctime_ns,) * 2)
    tar.unlink()
    tar.symlink_to(other)
    with pytest.raises(ValueError, match=r"shard-000000\.tar: its bytes are no longer those"):
        ImageShards.open([tar.parent], None)


def test_a_copy_that_was_found_good_is_held_against_its_checksum_again_when_any_time_of_it_changes(
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(folder(tmp_path), tmp_path / "copy"))
    ImageShards.open([copy], tmp_path / "index")
    tar = copy / "shard-000001.tar"
    before, changed = tar.stat(), bytearray(tar.read_bytes())
    changed[600] ^= 1
    tar.write_bytes(changed)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ValueError, match=r"shard-000001\.tar: its bytes are no longer those"):
        ImageShards.open([copy], tmp_path / "index")
