"""Tars read by row id: their index, their writer, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset

from grappa_dist.data.cache import CacheSettings
from grappa_dist.data.decoding import BadImage
from grappa_dist.data.index import DAMAGED, REFUSED, ROW, index_shard
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from tests.conftest import Bucket


def write_tar(
    path: Path, members: dict[str, bytes] | list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_folder(folder: Path, rows: int, **limits: int | None) -> ShardWriter:
    with ShardWriter(folder, **limits) as writer:  # type: ignore[arg-type]
        for row in range(rows):
            writer.write(bytes([row]) * (row + 1), "jpg", f"class {row % 3}" if row % 2 else None)
    return writer


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_row_of_index_takes_24_bytes() -> None:
    assert ROW.itemsize == 24


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


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_come_back_whatever_the_length_of_the_name(tmp_path: Path, format: int) -> None:
    names = ["a", "v1.0/b", "d" * 60 + "/" + "e" * 90, "f" * 90 + "/g"]
    if format != tarfile.USTAR_FORMAT:
        names += ["h" * 300, "ü" * 80 + "/ß" * 60]
    members = {f"{name}{suffix}": name.encode() for name in names for suffix in (".JPG", ".json", ".txt")}
    shards = ImageShards.open([write_tar(tmp_path / "t.tar", members, format)], None)
    assert [shards.key(row) for row in range(len(shards))] == names
    assert [shards.image_bytes(row).decode() for row in range(len(shards))] == names


def test_json_may_come_first_later_or_never_and_lone_json_is_no_row(tmp_path: Path) -> None:
    members = {
        "a.json": b'{"label": "x"}',
        "b.png": b"b",
        "a.webp": b"a",
        "c.json": b"{}",
        "d.jpeg": b"",
        ".e.jpg": b"?",
    }
    rows, shard = index_shard(write_tar(tmp_path / "t.tar", members))
    assert (len(rows), shard.ignored) == (3, 2)
    shards = ImageShards.open([tmp_path], None)
    assert [shards.image_bytes(row) for row in range(3)] == [b"b", b"a", b""]
    assert [shards.labels(row) for row in range(3)] == [None, {"label": "x"}, None]


def bad_rows(folder: Path) -> list[tuple[str, str]]:
    """(key, why) of the rows whose image cannot be had."""
    shards, found = ImageShards.open([folder], None), []
    for row in range(len(shards)):
        try:
            shards.image_bytes(row)
        except BadImage as error:
            found.append((shards.key(row), str(error)))
    return found


def test_of_two_images_of_a_key_the_second_is_a_bad_row(tmp_path: Path) -> None:
    members = [("j.jpg", b"j"), ("k.jpg", b"1"), ("k.json", b"{}"), ("k.jpg", b"2" * 2000), ("k.png", b"3")]
    write_tar(tmp_path / "t.tar", [*members, ("k.json", b"[]"), ("l.jpg", b"l")])
    found = bad_rows(tmp_path)
    assert [key for key, _ in found] == ["k", "k"]
    assert all("second image of its key" in why for _, why in found)
    shards = ImageShards.open([tmp_path], None)
    assert [shards.key(row) for row in range(5)] == ["j", "k", "k", "k", "l"]
    assert (shards.image_bytes(1), shards.image_bytes(4)) == (b"1", b"l")
    assert [shards.labels(row) for row in range(5)] == [None, {}, None, None, None]
    assert shards.shards[0].ignored == 1  # the second JSON member


def test_a_link_in_place_of_an_image_is_a_bad_row(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo(f"a{kind.decode()}.jpg")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    assert [key for key, why in bad_rows(tmp_path) if "link" in why] == ["a1", "a2", "a6"]


def test_a_tar_cut_anywhere_keeps_what_is_whole_and_a_row_for_what_is_lost(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": b"a" * 700, "b.jpg": b"b" * 10, "b.json": b"{}"})
    whole, end = tar.read_bytes(), 512 + 1024 + 512 + 512 + 512 + 512  # of the last member
    for length in (0, 1, 511):
        tar.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"t\.tar: .*at byte \d+"):
            ImageShards.open([tmp_path], None)
    for length in range(512, end + 512, 37):
        tar.write_bytes(whole[:length])
        shards, bad = ImageShards.open([tmp_path], None), bad_rows(tmp_path)
        good = [shards.image_bytes(row) for row in range(len(shards) - len(bad))]
        assert good == [b"a" * 700, b"b" * 10][: (length >= 512 + 700) + (length >= 512 + 1024 + 512 + 10)]
        assert bad[-1][0] == ""
        assert "what follows is lost" in bad[-1][1]
        assert [why for _, why in bad[:-1]] in ([], ["cut off: the shard ends inside it"])
        assert [shards.labels(row) for row in range(len(good))] in ([], [None], [None, None], [None, {}])
    tar.write_bytes(whole[: end + 512])
    assert bad_rows(tmp_path) == []


def test_a_tar_damaged_inside_keeps_the_images_before_the_damage(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {f"{i}.jpg": bytes([i]) * 100 for i in range(9)})
    data = bytearray(tar.read_bytes())
    data[5 * 1024 : 5 * 1024 + 512] = b"?" * 512
    tar.write_bytes(data)
    assert bad_rows(tmp_path) == [("", f"{REFUSED[DAMAGED]} (byte 5120)")]
    assert len(ImageShards.open([tmp_path], None)) == 6


def test_names_need_not_be_utf8(tmp_path: Path) -> None:
    tar = os.fsencode(tmp_path) + b"/t\xff\xfe.tar"
    with tarfile.open(tar, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as file:
        member = tarfile.TarInfo("caf\xe9")
        member.name, member.size = "caf\xe9.jpg", 1
        file.addfile(member, io.BytesIO(b"x"))
    for _ in range(2):  # indexed, then found again
        shards = ImageShards.open([tmp_path], tmp_path / "index")
        assert shards.image_bytes(0) == b"x"
        assert shards.key(0).encode(errors="surrogateescape") == b"caf\xe9"
        assert "caf" in shards.where(0)


def test_garbage_and_compressed_tars_are_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    for data in (b"no tar" * 500, (tmp_path / "z.tar").read_bytes()):
        (tmp_path / "t.tar").write_bytes(data)
        with pytest.raises(ValueError, match=r"t\.tar.*byte"):
            index_shard(tmp_path / "t.tar")


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
    for path, said in (
        ("empty", "nothing at"),
        ("none", "nothing at"),
        ("none/*.tar", "nothing at"),
        ("text", "1 other"),
    ):
        with pytest.raises(ValueError, match=said):
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
    write_folder(tmp_path / "f", 9, rows_per_shard=None, max_bytes=5000)
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
    for text in ("{", "[]", '{"shards": [{"name": "x"}]}'):
        (tmp_path / "f" / "index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index\.json"):
            ImageShards.open([tmp_path / "f"], None)


def test_json_that_does_not_parse_names_shard_and_key(tmp_path: Path) -> None:
    write_tar(tmp_path / "t.tar", {"a/k.jpg": b"", "a/k.json": b"{", "b.jpg": b"", "b.json": b"[]"})
    shards = ImageShards.open([tmp_path], None)
    for row, key in enumerate(("a/k", "b")):
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


def test_the_writer_notes_names_beside_labels_and_writes_none_where_there_is_nothing_to_say(tmp_path: Path) -> None:
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
