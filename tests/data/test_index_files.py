"""Index files, and those of the index cache, that are cut, swapped, hostile or another program's: each is refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.index import COMMITTED, ROW, Shard, read_rows
from grappa_dist.data.shards import ImageShards
from tests.data.test_tars_damaged import time_limit
from tests.data.written import write_folder, write_tar
from tests.stores import folder_backend, proxy_to

WRONG = [
    ("fingerprint", "/tmp/x"),
    ("fingerprint", "../" * 20 + "a" * 4),
    ("fingerprint", "A" * 64),
    ("fingerprint", "a" * 65),
    ("fingerprint", 7),
    ("name", "../f/shard-000000.tar"),
    ("name", "/etc/passwd"),
    ("name", ".."),
    ("name", ""),
    ("name", None),
    ("rows", -1),
    ("rows", 2.5),
    ("rows", "2"),
    ("rows", True),
    ("bytes", -10240),
    ("ignored", None),
    ("lost", [1]),
    ("lost", {"behind": -1, "misnamed": 0, "names": []}),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_an_index_with_a_wrong_line_is_refused_here_and_on_a_store_and_nothing_is_written(
    tmp_path: Path, key: str, value: object
) -> None:
    write_folder(tmp_path / "web" / "f", 4, rows_per_shard=2)
    where = tmp_path / "web" / "f" / COMMITTED
    content = json.loads(where.read_bytes())
    content["shards"][0][key] = value
    where.write_text(json.dumps(content))
    message = rf"f/index\.json: not an index of shards; each needs .*fingerprint of 64 hex digits, got .*{key}"
    with proxy_to(folder_backend(tmp_path / "web")) as proxy:
        for folder in (tmp_path / "web" / "f", f"{proxy.url}/f"):
            with pytest.raises(ValueError, match=message):
                ImageShards.open([folder], tmp_path / "index", CacheSettings(str(tmp_path / "cache"), 2**20, 4))
    assert not list((tmp_path).glob("index/*"))


def test_a_shard_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 2)
    content = json.loads((tmp_path / "f" / COMMITTED).read_bytes())
    (tmp_path / "f" / COMMITTED).write_text(json.dumps({"shards": content["shards"] * 2}))
    with pytest.raises(ValueError, match=r"index\.json: has two shards of one name"):
        ImageShards.open([tmp_path / "f"], None)


def test_a_pattern_names_tars_alone_and_a_file_beside_an_index_must_be_in_it(tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 4, rows_per_shard=2)
    (tmp_path / "f" / "folder").mkdir()
    assert len(ImageShards.open([tmp_path / "f" / "*"], None).shards) == 2
    with pytest.raises(ValueError, match=r"f/index\.json is none of the shards of .*f/index\.json"):
        ImageShards.open([tmp_path / "f" / COMMITTED], None)
    with pytest.raises(ValueError, match=r"nothing at .*f/index\*"):
        ImageShards.open([tmp_path / "f" / "index*"], None)
    (tmp_path / "g" / "folder.tar").mkdir(parents=True)
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "link.tar").symlink_to(tmp_path / "nowhere")
    for entry in ("g", "g/*.tar"):
        with pytest.raises(ValueError, match=r"nothing at .*passed over in .*'folder\.tar/'"):
            ImageShards.open([tmp_path / entry], None)
    for entry in ("h", "*/*.tar"):
        with pytest.raises(ValueError, match=r"link\.tar is no file, or a link to none"):
            ImageShards.open([tmp_path / entry], None)


def swapped(index: Path) -> None:
    other = index.with_name("shard-000001.tar.npy")
    first, second = index.read_bytes(), other.read_bytes()
    index.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.write_bytes(index.read_bytes()[:-1]), "cut off, or the index of another"),
        (lambda index: index.write_bytes(index.read_bytes()[:60]), "not an index of a shard"),
        (lambda index: index.write_bytes(b""), "not an index of a shard"),
        (lambda index: index.write_bytes(b"<html>404</html>" * 99), "not an index of a shard"),
        (lambda index: np.save(index, np.zeros(3)), "an array of float64"),
        (lambda index: np.save(index, np.zeros((3, 1), dtype=ROW)), r"shape \(3, 1\)"),
        (lambda index: index.write_bytes(index.with_name("shard-000002.tar.npy").read_bytes()), "needs 3 rows"),
        (swapped, "it is the index of another shard"),
    ],
)
def test_rows_that_are_cut_or_of_another_shard_are_refused(
    tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "f"
    write_folder(folder, 8, rows_per_shard=3)
    images = {f"{row}.jpg": bytes(2000 * row) for row in range(3)}
    write_tar(tmp_path / "one" / "t.tar", images)
    kept = ImageShards.open([tmp_path / "one"], tmp_path / "index")
    content = json.loads((folder / COMMITTED).read_bytes())
    shutil.copy(tmp_path / "one" / "t.tar", folder / "shard-000001.tar")  # of other places, as swapped indexes need
    shutil.copy(str(kept.indexes[0]), folder / "shard-000001.tar.npy")
    made = {"bytes": kept.shards[0].bytes, "fingerprint": kept.shards[0].fingerprint}
    content["shards"][1] |= made
    (folder / COMMITTED).write_text(json.dumps(content))
    assert len(ImageShards.open([folder], None).image_bytes(4)) == 2000
    change(folder / "shard-000000.tar.npy")
    again = ImageShards.open([folder.rename(tmp_path / "g")], None)  # or the map would be at hand
    with pytest.raises(ValueError, match=rf"g/shard-000000\.tar\.npy: .*{message}"):
        again.image_bytes(1)


def test_any_bytes_are_the_rows_of_a_shard_or_refused() -> None:
    file = io.BytesIO()
    np.save(file, np.zeros(4, dtype=ROW))
    whole, draws, refused = file.getvalue(), np.random.default_rng(0), 0
    shard = Shard("t.tar", "/t.tar", 4, 10240, "0" * 64)
    assert len(read_rows(io.BytesIO(whole), shard, "t.npy")) == 4
    for _ in range(2000):
        data = bytearray(whole[: draws.integers(len(whole))] if draws.random() < 0.1 else whole)
        for place in draws.integers(0, max(1, len(data)), draws.integers(1, 9)):
            data[place : place + 1] = bytes(draws.choice(list(b"(['{,:}\n\\#0198 u<"), 1).astype(np.uint8).tolist())
        with time_limit():
            try:
                assert len(read_rows(io.BytesIO(bytes(data)), shard, "t.npy")) == 4
            except ValueError as error:
                refused += str(error).startswith("t.npy: ")
    assert refused > 1000


@pytest.mark.parametrize("text", ["[1]", '{"state"', "7", '"x"'])
def test_a_damaged_file_of_the_index_cache_is_refused_and_one_of_another_version_is_made_again(
    tmp_path: Path, text: str
) -> None:
    write_folder(tmp_path / "web" / "f", 4, rows_per_shard=2)
    write_tar(tmp_path / "t.tar", {"a.jpg": b"a"})
    copy = Path(shutil.copytree(tmp_path / "web" / "f", tmp_path / "copy"))
    with proxy_to(folder_backend(tmp_path / "web")) as proxy:
        for entry, kinds in ((tmp_path / "t.tar", ""), (copy, ".unchanged"), (f"{proxy.url}/f", ".seen")):
            index = tmp_path / f"index{kinds}"
            settings = CacheSettings(str(tmp_path / "cache"), 2**20, 4)
            before = ImageShards.open([entry], index, settings)
            kept = next(index.glob(f"*{kinds}.json"))
            for content in ("{}", '{"state": {}, "shard": {}}') if kinds != ".seen" else ("{}",):
                kept.write_text(content)
                assert ImageShards.open([entry], index, settings) == before
            kept.write_text(text)
            with pytest.raises(ValueError, match=rf"{kept.name}: a damaged file of the index cache: .*; remove it"):
                ImageShards.open([entry], index, settings)
        kept.write_text('{"shard-000000.tar": ["a"]}')
        with pytest.raises(
            ValueError,
            match=r"seen\.json: a damaged file of the index cache: 'shard-000000\.tar' has \['a'\], expected a",
        ):
            ImageShards.open([f"{proxy.url}/f"], index, settings)
