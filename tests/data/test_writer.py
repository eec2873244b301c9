"""Shards as they are written: the same bytes each time, or nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from grappa_dist.data.index import index_shard
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter, TarShard
from grappa_dist.storage import StorageError
from tests.data.written import files_in, write_folder


def test_the_writer_writes_the_same_bytes_every_time(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_folder(tmp_path / folder, 10, rows_per_shard=4)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "a", tmp_path / "b"]
    shards = ImageShards.open([tmp_path / "a"], None)
    assert [shard.rows for shard in shards.shards] == [4, 4, 2]
    assert [shards.key(row) for row in (0, 9)] == ["000000000", "000000009"]
    assert [shards.labels(row) for row in (4, 5)] == [None, {"label": "class 2", "task": None}]


def test_the_writers_index_is_what_indexing_finds(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 9, rows_per_shard=4)
    shards = ImageShards.open([tmp_path / "f"], None)
    assert len(shards.shards) > 1
    for number, shard in enumerate(shards.shards):
        rows, indexed = index_shard(shard.path)
        assert indexed == shard
        assert np.array_equal(rows, shards.index(number))


def test_a_finished_folder_is_reused_or_left_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 10, rows_per_shard=4)
    before = files_in(tmp_path / "f")
    assert write_folder(tmp_path / "f", 10, rows_per_shard=4).reused
    for rows, per_shard in ((9, 4), (11, 4), (8, 4), (12, 4), (10, 5)):
        with pytest.raises(ValueError, match="with other shards"):
            write_folder(tmp_path / "f", rows, rows_per_shard=per_shard)
    assert files_in(tmp_path / "f") == before
    assert list(tmp_path.iterdir()) == [tmp_path / "f"]


def test_a_broken_off_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "f", rows_per_shard=1) as writer:  # noqa: PT012
        writer.write(b"a", "jpg")
        writer.write(b"b", "jpg")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write_folder(tmp_path / "f", 1)
    with pytest.raises(ValueError, match="suffix 'gif'"), ShardWriter(tmp_path / "g") as writer:
        writer.write(b"a", "gif")


def test_a_full_disk_is_named_with_the_tar_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").symlink_to("/dev/full")
    tar = TarShard(tmp_path / "shard-000000.tar")
    try:
        with pytest.raises(StorageError, match=rf"{tmp_path}/shard-000000.tar: No space left on device, .* free some"):
            tar.add(0, [("jpg", bytes(2**20))])
    finally:
        tar.close()  # raises nothing more
