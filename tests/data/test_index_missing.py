from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.data.index import Missing, count_missing, describe_missing, list_missing
from grappa_dist.data.shards import ImageShards
from tests.data.written import write_tar


def missing_in(folder: Path, data: bytes) -> tuple[int, Missing]:
    """Rows of a tar and what is missing; the same from the index cache."""
    (folder / "t.tar").write_bytes(data)
    for _ in range(2):
        shards = ImageShards.open([folder / "t.tar"], folder / "index")
    return len(shards), shards.shards[0].missing


def test_images_behind_a_damage_are_estimated_from_the_bytes_that_are_left(tmp_path: Path) -> None:
    whole = write_tar(
        tmp_path / "t.tar", {f"{row:04d}.jpg": bytes(700 + row % 7 * 200) for row in range(1000)}
    ).read_bytes()
    assert missing_in(tmp_path, whole) == (1000, Missing())
    damaged = bytearray(whole)
    quarter = next(
        at for at in range(len(whole) // 4 // 512 * 512, len(whole), 512) if whole[at + 257 :][:5] == b"ustar"
    )
    damaged[quarter : quarter + 512] = b"?" * 512
    rows, missing = missing_in(tmp_path, bytes(damaged))
    assert rows < 350
    assert rows - 1 + missing.behind == pytest.approx(1000, rel=0.1)
    damaged[quarter : quarter + 512] = whole[quarter : quarter + 124] + b"77777777777\0" + whole[quarter + 136 :][:376]
    damaged[quarter + 148 : quarter + 156] = b" " * 8
    damaged[quarter + 148 : quarter + 156] = b"%06o\0 " % sum(damaged[quarter : quarter + 512])
    assert missing_in(tmp_path, bytes(damaged))[1].behind == pytest.approx(1000 - rows, rel=0.1)  # beyond the end


def test_a_tar_that_ends_inside_a_member_is_presumed_to_miss_as_much_as_it_has(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "t.tar", {f"{row:04d}.jpg": bytes(900) for row in range(1000)}).read_bytes()
    rows, missing = missing_in(tmp_path, whole[: len(whole) // 2])
    assert (rows, missing) == (505, Missing(behind=504))
    end = 1000 * 1536
    assert missing_in(tmp_path, whole[:end]) == (1001, Missing())  # what lacks is the end mark


def test_images_with_a_dot_in_their_name_are_missing_unless_their_key_has_an_image(tmp_path: Path) -> None:
    members = {
        "a.jpg": b"a",
        "a.mask.png": b"1",
        "b.left.jpg": b"2",
        "b.json": b"{}",
        "x/.hidden.jpg": b"3",
        "n.tif": b"",
    }
    members |= {f"IMG.{row}.jpg": b"4" for row in range(50)}
    rows, missing = missing_in(tmp_path, write_tar(tmp_path / "t.tar", members).read_bytes())
    names = ("b.left.jpg", *(f"IMG.{row}.jpg" for row in range(19)))
    assert (rows, missing) == (1, Missing(misnamed=51, names=names))
    shards = ImageShards.open([tmp_path / "t.tar"], None).shards
    assert shards[0].ignored == 4  # mask, JSON, what has no key, another suffix
    assert count_missing(shards) == sum(some.images for some in list_missing(shards)) == 51
    assert [some.key for some in list_missing(shards)] == [*names, "and others"]
    assert [line.partition(" in ")[0] for line in describe_missing(shards)] == ["51 images are left out"]
    assert "rename 'b.left.jpg' to 'b_left.jpg'" in next(describe_missing(shards))
    write_tar(tmp_path / "t.tar", {"v1.0/IMG.1.jpg": b"", "v1.0/IMG.2.jpg": b""})
    with pytest.raises(ValueError, match=r"no images in .* 'v1\.0/IMG\.1\.jpg' to 'v1\.0/IMG_1\.jpg'"):
        ImageShards.open([tmp_path / "t.tar"], None)
