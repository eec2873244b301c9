"""The rows of a tar: which members are images of which key, and what is kept of a tar that is damaged."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from grappa_dist.data.decoding import BadImage
from grappa_dist.data.index import DAMAGED, REFUSED, ROW, index_shard
from grappa_dist.data.shards import ImageShards
from tests.data.written import write_tar


def test_a_row_of_index_takes_24_bytes() -> None:
    assert ROW.itemsize == 24


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


def test_a_tar_cut_anywhere_keeps_what_is_whole_and_a_row_for_what_is_missing(tmp_path: Path) -> None:
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
        assert "what follows is missing" in bad[-1][1]
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
