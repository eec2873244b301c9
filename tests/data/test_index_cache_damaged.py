"""What the index cache keeps is held against its checksum: damaged rows are made or fetched again, and said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from grappa_dist.data import index_cache, shards
from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.shards import ImageShards
from tests.data.written import write_folder, write_tar
from tests.stores import folder_backend, proxy_to

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit": lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:],
    "cut off": lambda data: data[:-30],
    "zeros": lambda data: bytes(len(data)),
    "empty": lambda data: b"",
}


def damage(path: Path, kind: str) -> bytes:
    """Damages a file behind the maps that this process has of it, as if that was before it began; what was in it."""
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(DAMAGE[kind](whole))
    shards._map.cache_clear()
    return whole


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damaged_rows_of_a_tar_are_made_again(tmp_path: Path, kind: str) -> None:
    tar = write_tar(tmp_path / "t.tar", {f"{n}.jpg": bytes([n]) * (n + 1) for n in range(9)})
    before = ImageShards.open([tar], tmp_path / "index")
    expected = [before.image_bytes(row) for row in range(9)]
    (kept,) = (tmp_path / "index").glob("*.npy")
    damage(kept, kind)
    for write in (False, True):
        said: list[str] = []
        again = ImageShards.open([tar], tmp_path / "index", write=write, log=said.append)
        assert again == before
        assert [again.image_bytes(row) for row in range(9)] == expected
        assert said == [f"{kept}: damaged, so {tar} is read again"]
    ImageShards.open([tar], tmp_path / "index", log=pytest.fail)


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damaged_rows_of_a_remote_shard_are_fetched_again(tmp_path: Path, kind: str) -> None:
    write_folder(tmp_path / "web" / "f", 4, rows_per_shard=4)
    cache = CacheSettings(str(tmp_path / "cache"), 2**20, 4)
    with proxy_to(folder_backend(tmp_path / "web")) as proxy:
        assert ImageShards.open([f"{proxy.url}/f"], tmp_path / "index", cache).image_bytes(3) == bytes([3]) * 4
        (kept,) = (tmp_path / "index").glob("*.npy")
        whole = damage(kept, kind)
        other = CacheSettings(str(tmp_path / "another"), 2**20, 4)  # as another process would, which has no map of it
        found = ImageShards.open([f"{proxy.url}/f"], tmp_path / "index", other)
        rows = found.indexes[0].load(found.shards[0])  # type: ignore[union-attr]
        assert kept.read_bytes() == whole
        assert int(rows["size"][3]) == 4


def test_a_process_reads_rows_once_however_often_they_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = ImageShards.open([write_tar(tmp_path / "t.tar", {"a.jpg": b"a"})], tmp_path / "index")
    (kept,) = (tmp_path / "index").glob("*.npy")
    monkeypatch.setattr(index_cache, "read_bytes", lambda path: pytest.fail("read again"))
    for _ in range(2):
        shards._map.cache_clear()
        assert images.image_bytes(0) == b"a"
    monkeypatch.undo()
    damage(kept, "a bit")
    with pytest.raises(ValueError, match=r"damaged since the run began; remove it"):
        images.image_bytes(0)


def test_a_changed_digit_in_what_is_known_of_a_shard_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": b"a"})
    ImageShards.open([tar], tmp_path / "index")
    (kept,) = (tmp_path / "index").glob("*.json")
    text = kept.read_text()
    kept.write_text(text.replace('"ignored": 0', '"ignored": 1'))
    with pytest.raises(ValueError, match=r"a damaged file of the index cache: its content has the checksum .*; remove"):
        ImageShards.open([tar], tmp_path / "index")


def test_rows_of_an_earlier_version_have_no_checksum_and_get_one(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": b"a"})
    before = ImageShards.open([tar], tmp_path / "index")
    (kept,) = (tmp_path / "index").glob("*.sum")
    kept.unlink()
    assert ImageShards.open([tar], tmp_path / "index", write=False) == before
    assert not kept.exists()
    assert ImageShards.open([tar], tmp_path / "index") == before
    assert kept.exists()
