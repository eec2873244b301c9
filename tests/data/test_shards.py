"""Shards read by row id: what a handle says, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset

from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from tests.conftest import Bucket
from tests.data.written import files_in, write_folder, write_tar


@pytest.mark.parametrize("index_dir", [None, "index"])
def test_rows_of_tars_by_webdataset_come_back_in_order(tmp_path: Path, index_dir: str | None) -> None:
    for shard, rows in enumerate((10, 5)):
        with webdataset.TarWriter(str(tmp_path / f"w-{shard}.tar")) as sink:
            for row in range(rows):
                sample = {"__key__": f"s{shard}/{row:04d}", "jpg": b"j" * (600 * row), "json": {"label": f"c{row}"}}
                sink.write(sample | {"left.png": b"another", "cls": row})
    shards = ImageShards.open([tmp_path], index_dir and tmp_path / index_dir)
    samples = list(webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False))
    assert len(shards) == len(samples) == 15
    assert [shard.ignored for shard in shards.shards] == [20, 10]
    for row, sample in enumerate(samples):
        assert shards.key(row) == sample["__key__"]
        assert shards.image_bytes(row) == sample["jpg"]
        assert shards.labels(row) == json.loads(sample["json"])


def test_an_empty_shard_among_others_has_no_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {})
    write_tar(tmp_path / "b.tar", {"x.jpg": b"x"})
    write_tar(tmp_path / "c.tar", {})
    shards = ImageShards.open([tmp_path], tmp_path / "index")
    assert shards.starts.tolist() == [0, 0, 1, 1]
    assert [len(shards.shard_rows(shard)) for shard in range(3)] == [0, 1, 0]
    assert [len(shards.index(shard)) for shard in range(3)] == [0, 1, 0]
    assert shards.locate(0) == (1, 0)
    for row in (-1, 1):
        with pytest.raises(IndexError, match=f"row {row} "):
            shards.image_bytes(row)


def test_paths_that_name_no_images_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "text" / "a.tar", {"x.txt": b"x"})
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("empty", "nothing at"),
        ("none", "nothing at"),
        ("none/*.tar", "nothing at"),
        ("text", "1 other"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageShards.open([tmp_path / path], None)
    with pytest.raises(ValueError, match=r"ftp:// is not read; expected one of s3://, gs://, http://, https://"):
        ImageShards.open(["ftp://host/shards"], None)
    with pytest.raises(ValueError, match="named 2 times"):
        ImageShards.open([tmp_path / "text", tmp_path / "text" / "*.tar"], None)
    with pytest.raises(ValueError, match="expected a list"):
        ImageShards.open(str(tmp_path), None)


def test_an_index_is_built_once_and_again_when_the_tar_changes(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": b"x"})
    first = ImageShards.open([tmp_path], tmp_path / "index")
    made = files_in(tmp_path / "index")
    assert ImageShards.open([tmp_path / "*.tar"], tmp_path / "index") == first
    assert files_in(tmp_path / "index") == made
    write_tar(tmp_path / "a.tar", {"x.jpg": b"yy", "z.jpg": b"z"})
    second = ImageShards.open([tmp_path], tmp_path / "index")
    assert second.fingerprint != first.fingerprint
    assert [second.image_bytes(row) for row in range(2)] == [b"yy", b"z"]


def test_without_an_index_folder_nothing_is_written(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"x.jpg": b"x"})
    before = sorted(tmp_path.rglob("*"))
    assert len(ImageShards.open([tmp_path], None)) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_handle_is_small_and_reads_the_same_after_travelling(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 200, rows_per_shard=100)
    shards = ImageShards.open([tmp_path / "f"], None)
    assert shards.image_bytes(3) == bytes([3]) * 4
    travelled = pickle.loads(pickle.dumps(shards))
    assert travelled == shards
    assert travelled.image_bytes(150) == shards.image_bytes(150)
    assert len(pickle.dumps(shards)) < 1500


def test_many_threads_read_more_shards_than_files_stay_open(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 250, rows_per_shard=1)
    shards = ImageShards.open([tmp_path / "f"], None)
    rows = np.random.default_rng(0).integers(0, 250, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for row, data in zip(rows, pool.map(shards.image_bytes, rows), strict=True):
            assert data == bytes([row]) * (row + 1)


def test_shards_that_changed_after_they_were_written_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 4, rows_per_shard=2)
    shards = ImageShards.open([tmp_path / "f"], None)
    tar = tmp_path / "f" / "shard-000001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"shard-000001\.tar.* changed"):
        ImageShards.open([tmp_path / "f"], None)
    with pytest.raises(ValueError, match="changed after it was indexed"):
        shards.image_bytes(3)
    tar.unlink()
    with pytest.raises(ValueError, match=r"shard-000001\.tar.*missing"):
        ImageShards.open([tmp_path / "f"], None)
    tar.write_bytes(whole)
    write_tar(tmp_path / "f" / "more.tar", {"a.jpg": b"a"})
    with pytest.raises(ValueError, match=r"more\.tar.*absent"):
        ImageShards.open([tmp_path / "f"], None)


def test_a_broken_index_file_is_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 2)
    for text in ("{", "", '{"version": 1, "shards": [{"name": "x"}]}'):
        (tmp_path / "f" / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            ImageShards.open([tmp_path / "f"], None)


def test_json_that_does_not_parse_names_shard_and_key(tmp_path: Path) -> None:
    bad = {"a/k": b"{", "b": b"[]", "c": b"[" * 60_000, "d": b'{"label": "x", "label": "y"}'}
    members = {f"{key}.{end}": data for key, text in bad.items() for end, data in (("jpg", b""), ("json", text))}
    write_tar(tmp_path / "t.tar", members)
    shards = ImageShards.open([tmp_path], None)
    for row, key in enumerate(bad):
        with pytest.raises(ValueError, match=f"t.tar: image '{key}': its JSON"):
            shards.labels(row)


def test_some_shards_are_whole_ones_drawn_by_the_seed_with_enough_rows(tmp_path: Path) -> None:
    for number, rows in enumerate((4, 2, 3, 9, 1, 5)):
        write_folder(tmp_path / f"{number}", rows)
    images = ImageShards.open([tmp_path / f"{number}" for number in range(6)], None)
    assert images.some(24, 0) is images
    drawn = {seed: images.some(6, seed) for seed in range(20)}
    assert len({some.shards for some in drawn.values()}) > 3
    for some in drawn.values():
        assert 6 <= len(some) <= 6 + 8
        assert [shard for shard in images.shards if shard in some.shards] == list(some.shards)  # in their order
        for shard, index in zip(some.shards, some.indexes, strict=True):
            assert index == images.indexes[images.shards.index(shard)]
    assert images.some(6, 3) == drawn[3]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_shard_replaced_in_the_middle_of_a_run_is_refused(tmp_path: Path, with_index: bool) -> None:
    write_folder(tmp_path / "f", 4, rows_per_shard=2)
    if not with_index:
        (tmp_path / "f" / "index.json").unlink()
    shards = ImageShards.open([tmp_path / "f"], None)
    assert shards.image_bytes(0) == b"\0"
    for name, row in (("shard-000000.tar", 1), ("shard-000001.tar", 3)):  # open already, and not yet
        tar = tmp_path / "f" / name
        tar.write_bytes(tar.read_bytes()[::-1])
        os.utime(tar, (10**9, 10**9))
        with pytest.raises(ValueError, match=rf"{name}: its size and time .* 10240, 1000000000, but were 10240, \d+ "):
            shards.image_bytes(row)


def test_the_name_of_a_file_is_that_of_its_json_whatever_else_lies_there(tmp_path: Path) -> None:
    named = b'{"label": null, "task": "a", "name": "b/\\u00e9 \\udcff.png"}'
    hostile = [b"", b"{", b"[" * 100_000, b'"name"', b'["name"]', b"{}", b'{"name": 3}', b'{"name": null}', b"\xff"]
    contents = [named, *hostile, b'{"name": "' + b"x" * 2**24 + b'"}']
    made = [pair for i, text in enumerate(contents) for pair in ((f"{i}.jpg", b"image"), (f"{i}.json", text))]
    path = write_tar(tmp_path / "a.tar", [*made, ("last.jpg", b"image")])
    images = ImageShards.open([path], None)
    assert [images.name(row) for row in range(len(images))] == ["b/é \udcff.png", *[""] * (len(contents))]
    assert images.where(0) == f"{path}: image '0' ('b/é \\udcff.png')"
    assert images.where(1) == f"{path}: image '1'"


def test_the_writer_writes_names_beside_labels_and_no_json_where_there_is_nothing_to_write(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "images") as writer:
        writer.write(b"0", "jpg")
        writer.write(b"1", "jpg", name="a\n.jpg")
        writer.write(b"2", "jpg", label="x", task="y", name="b.jpg")
        writer.write(b"3", "jpg", label="x")
    images = ImageShards.open([tmp_path / "images"], None)
    assert [images.name(row) for row in range(4)] == ["", "a\n.jpg", "b.jpg", ""]
    assert [images.labels(row) for row in range(4)] == [
        None,
        {"label": None, "task": None, "name": "a\n.jpg"},
        {"label": "x", "task": "y", "name": "b.jpg"},
        {"label": "x", "task": None},
    ]


def test_names_of_remote_shards_are_read_from_there(tmp_path: Path, bucket: Bucket) -> None:
    with ShardWriter(tmp_path / "images") as writer:
        writer.write(b"0", "jpg", name="a.jpg")
    url = bucket.upload(tmp_path / "images", "images/")
    images = ImageShards.open([url], None, CacheSettings(str(tmp_path / "cache")))
    assert images.name(0) == "a.jpg"
