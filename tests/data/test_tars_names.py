"""Names in tars are names: none becomes a path, and none reaches a terminal as it is."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from grappa_dist.data.decoding import BadImage
from grappa_dist.data.index import describe_missing, list_missing
from grappa_dist.data.shards import ImageShards

NAMES = [
    "../../escaped",
    "/etc/escaped",
    "a/../../../b",
    "C:\\escaped",
    "\\\\host\\share",
    "clear\x1b[2J\x1b]0;title\x07",
    "line\nbreak\r",
    "right\u202eleft",
    "long/" * 1000 + "x",
    "-rf",
    "~root",
    "$HOME",
    "caf\udce9",
]


def tar_of(path: Path, kinds: dict[bytes, str]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for number, name in enumerate(NAMES):
            for suffix, data in (("jpg", b"image"), ("json", json.dumps({"name": name}).encode())):
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            for kind, target in kinds.items():
                link = tarfile.TarInfo(f"{number}{kind.decode()}{name}.jpg")
                link.type, link.linkname = kind, target
                tar.addfile(link)
    return path


def test_names_devices_and_links_make_no_file_and_no_text_of_control_characters(tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    kinds = {tarfile.SYMTYPE: str(secret), tarfile.LNKTYPE: str(secret), tarfile.CHRTYPE: "", tarfile.FIFOTYPE: ""}
    (tmp_path / "in").mkdir()
    tar_of(tmp_path / "in" / "t.tar", kinds)
    before = set(tmp_path.rglob("*"))
    images = ImageShards.open([tmp_path / "in"], tmp_path / "index")
    read = list(images.images(range(len(images))))
    assert [data for data in read if not isinstance(data, BadImage)] == [b"image"] * len(NAMES)
    assert all("a link or a sparse file" in str(why) for why in read if isinstance(why, BadImage))
    for row in range(len(images)):
        where = images.where(row)
        assert where.isprintable(), where
        assert len(where.encode()) < 1200
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "index") for path in made)
    assert all(len(path.name) < 60 for path in made)


def test_messages_about_names_without_a_key_are_escaped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("a.jpg", "x\x1b[2J.left.jpg"):
            member = tarfile.TarInfo(name)
            tar.addfile(member, io.BytesIO(b""))
    shards = ImageShards.open([tmp_path / "t.tar"], None).shards
    assert all(line.isprintable() for line in describe_missing(shards))
    assert sum(some.images for some in list_missing(shards)) == 1
