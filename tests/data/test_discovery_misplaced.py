from __future__ import annotations

from pathlib import Path

import pytest

from grappa_dist.data.discovery import instead_of
from grappa_dist.data.shards import ImageShards
from launch.make_shards import main
from tests.stages.tiny import picture


def refused(path: Path | str) -> str:
    with pytest.raises(ValueError, match="shards: nothing at ") as error:
        ImageShards.open([path], None)
    return str(error.value)


def test_parts_one_level_below_are_named(tmp_path: Path) -> None:
    for label in "abc":
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "1.png").write_bytes(picture(1))
    assert main(["--images", str(tmp_path / "photos"), "--out", str(tmp_path / "shards")]) == 0
    assert f"name {tmp_path}/shards/test or {tmp_path}/shards/train" in refused(tmp_path / "shards")
    (tmp_path / "shards" / "train").rename(tmp_path / "shards" / ".train.partial")
    assert f"{tmp_path}/shards/.train.partial is unfinished" in refused(tmp_path / "shards")
    deep = tmp_path / "begun" / ".train.partial" / "making" / "unfinished-1"
    deep.mkdir(parents=True)
    (deep / "shard-000000.tar").write_bytes(b"")
    assert f"{tmp_path}/begun/.train.partial is unfinished" in refused(tmp_path / "begun")


def test_nothing_is_presumed_where_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path)
    for path in ("empty", "gone"):
        assert refused(tmp_path / path).endswith("or names such as DIR/shard-{000..127}.tar")


def test_a_link_that_leads_to_itself_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "a").symlink_to(tmp_path / "loop" / "a")
    assert instead_of(str(tmp_path)) == ""
