"""What lies behind zeros in a tar is read, or counted as missing."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from grappa_dist.data.index import describe_missing, index_shard
from grappa_dist.data.index_cache import READER
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.tars import members_of
from grappa_dist.make_shards.sources import TarSource
from tests.data.written import write_tar

IMAGE = b"\xff" * 2000  # 2,560 bytes in a tar with its header
BLOCK, EACH = 512, 2560


def tar_of(folder: Path, rows: range) -> bytes:
    return write_tar(folder / "made.tar", {f"{row:03d}.jpg": IMAGE for row in rows}).read_bytes()


def opened(folder: Path, data: bytes) -> ImageShards:
    (folder / "t.tar").write_bytes(data)
    return ImageShards.open([folder / "t.tar"], None)


def read_and_missing(folder: Path, data: bytes) -> tuple[int, int]:
    shards = opened(folder, data)
    found = [data for data in shards.images(range(len(shards))) if data == IMAGE]
    return len(found), shards.shards[0].missing.behind


def put(data: bytes, start: int, other: bytes) -> bytes:
    return data[:start] + other + data[start + len(other) :]


@pytest.mark.parametrize(
    "between", [b"", None, bytes(BLOCK), bytes(2 * BLOCK)], ids=["as written", "short", "one block", "two blocks"]
)
def test_tars_behind_each_other_are_read_as_one(tmp_path: Path, between: bytes | None) -> None:
    parts = [tar_of(tmp_path, range(first, first + 8)) for first in (0, 8, 16)]
    if between != b"":
        between = bytes(2 * BLOCK) if between is None else between
        parts = [part[: 8 * EACH] + between for part in parts]
    assert read_and_missing(tmp_path, b"".join(parts)) == (24, 0)
    assert opened(tmp_path, b"".join(parts)).key(23) == "023"
    assert TarSource(tmp_path / "t.tar").has("023.jpg")


def test_a_second_image_of_a_key_in_a_tar_behind_another_is_bad_and_said(tmp_path: Path) -> None:
    whole = tar_of(tmp_path, range(4))
    assert read_and_missing(tmp_path, whole + whole) == (4, 0)
    assert len(opened(tmp_path, whole + whole)) == 8


@pytest.mark.parametrize("blocks", [20, 64, 128, 512, 2048])
def test_zeros_that_fill_up_a_tar_are_no_damage(tmp_path: Path, blocks: int) -> None:
    made, size = tar_of(tmp_path, range(3))[: 3 * EACH], BLOCK * blocks
    for data in (made + bytes(BLOCK), made + bytes(2 * BLOCK), made + bytes(2 * BLOCK + -(3 * EACH + 1024) % size)):
        assert read_and_missing(tmp_path, data) == (3, 0)
        assert index_shard(tmp_path / "t.tar")[1].fingerprint == hashlib.sha256(data).hexdigest()
        assert not list(describe_missing(opened(tmp_path, data).shards))


def test_what_gnu_tar_appends_and_joins_is_read(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(IMAGE)

    def run(*words: str) -> None:
        subprocess.run(["tar", *words], cwd=tmp_path, check=True)

    run("-cf", "a.tar", "0.jpg")
    run("-rf", "a.tar", "1.jpg")
    run("-cf", "b.tar", "2.jpg")
    assert read_and_missing(tmp_path, (tmp_path / "a.tar").read_bytes()) == (2, 0)
    assert read_and_missing(tmp_path, b"".join((tmp_path / f"{x}.tar").read_bytes() for x in "ab")) == (3, 0)
    run("-Af", "a.tar", "b.tar")  # leaves the zeros of both at the end: more than fill up one, so they are suspected
    assert read_and_missing(tmp_path, (tmp_path / "a.tar").read_bytes())[0] == 3


def test_images_in_a_hole_between_members_are_counted(tmp_path: Path) -> None:
    whole = tar_of(tmp_path, range(40))
    assert read_and_missing(tmp_path, put(whole, 7 * EACH, bytes(10 * EACH))) == (30, 10)
    first_gone = put(whole, 0, bytes(9 * EACH))
    assert read_and_missing(tmp_path, first_gone)[0] == 31
    assert read_and_missing(tmp_path, first_gone)[1] > 5
    assert "zeros where images should be" in next(describe_missing(opened(tmp_path, first_gone).shards))
    opened(tmp_path, put(whole, 7 * EACH, bytes(10 * EACH)))
    with pytest.raises(ValueError, match=r"t\.tar: .*25600 bytes of zeros, more than fill up a tar"):
        TarSource(tmp_path / "t.tar")


def test_a_hole_that_begins_and_ends_inside_images_is_a_damage(tmp_path: Path) -> None:
    whole = tar_of(tmp_path, range(40))
    rows = opened(tmp_path, put(whole, 7 * EACH - 900, bytes(10 * EACH)))
    found = [data for data in rows.images(range(len(rows))) if data == IMAGE]
    assert len(found) == 6  # the seventh ends in zeros and is refused
    assert 30 <= rows.shards[0].missing.behind <= 38
    assert rows.shards[0].fingerprint != hashlib.sha256((tmp_path / "t.tar").read_bytes()).hexdigest()


@pytest.mark.parametrize("start", [8 * EACH, 8 * EACH + 5, 8 * EACH + 1024, 9 * EACH - 600])
def test_images_in_a_tail_that_was_never_written_are_counted(tmp_path: Path, start: int) -> None:
    whole = tar_of(tmp_path, range(40))
    read, missing = read_and_missing(tmp_path, put(whole, start, bytes(len(whole) - start)))
    assert read == 8
    assert missing == pytest.approx(32, abs=6)


def test_a_file_that_is_allocated_and_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.tar: .*3000000 bytes of zeros"):
        opened(tmp_path, bytes(3_000_000))


@pytest.mark.parametrize("more", [b"garbage", b"old" * 5000, IMAGE * 20], ids=["short", "long", "images"])
def test_other_bytes_behind_the_end_are_a_damage_that_is_named(tmp_path: Path, more: bytes) -> None:
    shards = opened(tmp_path, tar_of(tmp_path, range(8)) + more)
    assert len(shards) == 9
    assert "the shard is damaged or cut off from here on" in str(next(iter(shards.images([8]))))


def test_an_index_kept_by_an_earlier_reader_does_not_hide_what_lies_behind_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tar_of(tmp_path, range(8)) + tar_of(tmp_path, range(8, 12))
    (tmp_path / "t.tar").write_bytes(data)

    def first_tar_alone(file: io.BufferedReader, path: Path, size: int, **_: object) -> Iterator[tarfile.TarInfo]:
        return islice(members_of(file, path, size), 8)

    with monkeypatch.context() as patch:
        patch.setattr("grappa_dist.data.index.members_of", first_tar_alone)
        patch.setattr("grappa_dist.data.index_cache.READER", READER - 1)
        before = ImageShards.open([tmp_path / "t.tar"], tmp_path / "index")
    after = ImageShards.open([tmp_path / "t.tar"], tmp_path / "index")
    assert (len(before), len(after)) == (8, 12)
    assert before.fingerprint != after.fingerprint  # else features of 8 rows would count for 12


def test_a_hole_that_looks_like_an_end_mark_is_told_by_the_numbers_of_keys(tmp_path: Path) -> None:
    whole = tar_of(tmp_path, range(40))
    assert 4 * EACH == 10_240  # so a hole may end where the record of a tar would
    assert read_and_missing(tmp_path, put(whole, 4 * EACH, bytes(4 * EACH))) == (36, 4)
    every_third = [tar_of(tmp_path, range(first, first + 21, 3)) for first in (0, 21, 42)]
    assert read_and_missing(tmp_path, b"".join(every_third)) == (21, 0)
    assert read_and_missing(tmp_path, tar_of(tmp_path, range(20, 28)) + tar_of(tmp_path, range(8))) == (16, 0)


def test_a_hole_in_place_of_a_label_is_counted(tmp_path: Path) -> None:
    members = {f"{row}.{suffix}": IMAGE if suffix == "jpg" else b"{}" for row in range(9) for suffix in ("jpg", "json")}
    whole = write_tar(tmp_path / "made.tar", members).read_bytes()
    at = next(at for at in range(0, len(whole), BLOCK) if whole[at : at + 7] == b"5.json\0")
    assert read_and_missing(tmp_path, put(whole, at, bytes(2 * BLOCK))) == (9, 1)
    assert read_and_missing(tmp_path, whole) == (9, 0)
