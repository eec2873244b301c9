"""Many shards: what is asked of the file system and what is sent to workers grows with their number, and no faster."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.driver import measure_listing, write_listing
from grappa_dist.data import discovery, entries, index_cache
from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.entries import copies_among, is_named_like_a_copy
from grappa_dist.data.index import Missing, Shard
from grappa_dist.data.remote_index import RemoteRows
from grappa_dist.data.shards import ImageShards
from tests.data.written import write_tar


@pytest.mark.parametrize("shards", [20, 40])
def test_a_tar_of_an_index_is_looked_at_once_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    write_listing(tmp_path / "f", shards, 3)
    calls, (stat, lstat) = Counter[str](), (os.stat, os.lstat)

    def noted(name: str, function: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += str(path).startswith(str(tmp_path)) and ".tar" in str(path)
            return function(path, *args, **kwargs)

        return call

    for name, function in {"stat": stat, "lstat": lstat}.items():
        monkeypatch.setattr(os, name, noted(name, function))
    monkeypatch.setattr(discovery, "index_shard", pytest.fail)
    monkeypatch.setattr(index_cache, "sha256_of", pytest.fail)
    images = ImageShards.open([tmp_path / "f"], None)
    assert len(images) == 3 * shards
    assert calls == Counter(stat=shards)
    monkeypatch.undo()
    assert images.image_bytes(3 * shards - 1) == bytes(1000)


def test_copies_are_found_as_by_comparing_all_pairs_with_one_look_at_each_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.tar", "A.tar", "a (copy).tar", "Copy of A.tar", "copy of b.tar", "a b.tar", "a b(1).tar", "ab.tar"]
    names += ["copy of copy of a.tar", "copy.tar", "copy of .tar", " x.tar", "b (1) (copy).tar", "B.tar"]
    tars = [(name, f"bytes {number % 2}") for number, name in enumerate(names)] + [("a-1.tar", "alone")]
    pairs = {
        place
        for place, (name, content) in enumerate(tars)
        for other, of_other in tars
        if content == of_other and is_named_like_a_copy(name, other)
    }
    assert set(copies_among(tars)) == pairs
    assert {names[place] for place in pairs} >= {"a (copy).tar", "Copy of A.tar", "a b.tar"}
    asked, originals_of = list[str](), entries.originals_of
    monkeypatch.setattr(entries, "originals_of", lambda name: asked.append(name) or originals_of(name))
    alike = [(f"{number}.tar", "the same bytes") for number in range(3000)]
    assert copies_among(alike) == []
    assert asked == [name for name, _ in alike]


def test_of_names_that_differ_in_capitals_alone_none_is_a_copy(tmp_path: Path) -> None:
    for name in ("a.tar", "A.tar"):
        write_tar(tmp_path / name, {"x.jpg": b"image"})
    assert [shard.name for shard in ImageShards.open([tmp_path], None).shards] == ["A.tar", "a.tar"]


def test_tars_of_several_folders_are_in_the_order_of_their_parts(tmp_path: Path) -> None:
    for folder in ("a", "a-b", "a/c"):
        write_tar(tmp_path / folder / "s.tar", {"x.jpg": folder.encode()})
    images = ImageShards.open([f"{tmp_path}/**/*.tar"], None)
    assert [images.image_bytes(row) for row in range(3)] == [b"a/c", b"a", b"a-b"]


def test_a_message_with_all_shards_takes_some_80_bytes_for_each_and_a_task_is_sent_its_own_alone(
    tmp_path: Path,
) -> None:
    sizes = []
    for shards in (200, 400):
        write_listing(tmp_path / f"f{shards}", shards, 2)
        images = ImageShards.open([tmp_path / f"f{shards}"], None)
        sums = tuple(f"/runs/mine/features/backbone/shard-{n:06d}-0123456789/sums.npy" for n in range(shards))
        images = ImageShards(images.shards, images.indexes, images.cache, sums)
        sizes.append((len(pickle.dumps(images)), len(pickle.dumps(images.part(shards - 1)))))
    (half, one), (whole, of_more) = sizes
    assert whole - half < 200 * 100
    assert one == pytest.approx(of_more, abs=8)
    assert one < 1000


def test_what_is_sent_is_what_is_received(tmp_path: Path) -> None:
    odd = "ä\udce4 b\n"
    shards = (
        Shard(f"{odd}.tar", f"/f/{odd}.tar", 3, 2**40, "0" * 64, 7, "etag", Missing(2, 1, (odd,)), (("txt", 3),)),
        Shard("b.tar", "s3://b/f/b.tar", 0, 0, "1" * 64),
        Shard("c.tar", "s3://b/f/c.tar", 2**33, 1, "2" * 64),
        Shard("d.tar", "/d.tar", 1, 1, "3" * 64),
    )
    rows = np.zeros(1, "u1")
    indexes = (f"/f/{odd}.tar.npy", RemoteRows("s3://b/f/b.tar.npy", None), RemoteRows("s3://b", "/c.npy"), rows)
    given = ImageShards(shards, indexes, CacheSettings("/c", 5, 2), ("", "/a", odd, "x"), np.zeros(2, np.uint64))
    got = pickle.loads(pickle.dumps(given))
    assert (got.shards, got.indexes, got.cache, got.sums) == (shards, indexes, given.cache, given.sums)
    assert got.record.tolist() == [0, 0]
    nothing = pickle.loads(pickle.dumps(ImageShards((), ())))
    assert (nothing.shards, nothing.indexes, nothing.sums, nothing.record) == ((), (), (), None)


@pytest.mark.long
def test_a_plan_of_a_billion_rows_in_10_to_the_5_shards_takes_less_than_a_minute_of_cpu_and_a_gigabyte(
    tmp_path: Path,
) -> None:
    write_listing(tmp_path / "f", 100_000, 10_000)
    found = measure_listing(tmp_path / "f")
    assert found.shards == 100_000
    assert found.plan_s < 60
    assert found.plan_bytes < 10**9
    assert found.images_bytes < 10**7
    assert found.part_bytes < 1000
