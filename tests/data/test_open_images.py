from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from grappa_dist.artifacts import Store
from grappa_dist.config import DataConfig
from grappa_dist.data.open_images import (
    ends_of,
    generate_data_set,
    generated_data_set,
    generated_sizes,
    is_generated,
    open_images,
    read_a_little,
)
from grappa_dist.data.shards import ImageShards
from grappa_dist.stages.run import run_root
from tests.stages import tiny

COLLECTION = "tests.data.test_open_images:draw"


@dataclass(frozen=True)
class Item:
    split: str
    task: str
    label: str
    encoded: bytes
    suffix: str


def sizes(count: int = 6) -> dict[str, int]:
    return {"train": count, "test": 3}


def draw(count: int = 6, seed: int = 0) -> Iterator[Item]:
    for split, number in sizes(count).items():
        for row in range(number):
            yield Item(split, "boxes", str(row % 2), tiny.picture(row, seed), "png")


def of(**kwargs: int) -> DataConfig:
    return DataConfig(collection=COLLECTION, collection_kwargs=kwargs)


def test_a_data_set_is_generated_once_into_shards_of_train_and_test(tmp_path: Path) -> None:
    store, data = Store(tmp_path), of(count=6)
    assert not is_generated(data, store)
    generate_data_set(data, generated_data_set(store, data))
    assert is_generated(data, store)
    before = tiny.files_below(tmp_path)
    generate_data_set(data, generated_data_set(store, data))
    assert tiny.files_below(tmp_path) == before
    train, test = open_images(data, store)
    assert isinstance(test, ImageShards)
    assert (len(train), len(test)) == (6, 3)
    assert {train.image_bytes(row) for row in range(6)} == {
        tiny.picture(row) for row in range(6)
    }  # in a shuffled order
    assert all((test.labels(row) or {})["task"] == "boxes" for row in range(3))


def test_another_seed_is_another_data_set(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert len({generated_data_set(store, of(**k)).name for k in ({}, {"seed": 1}, {"count": 7})}) == 3


def test_sizes_of_a_data_set_are_known_before_it_is_generated() -> None:
    assert generated_sizes(of(count=50, seed=3)) == {"train": 50, "test": 3}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataConfig(collection="nowhere:draw"), r"data\.collection=nowhere:draw.*PYTHONPATH"),
        (DataConfig(collection="tests.data.test_open_images:none"), r"has no 'none'"),
        (of(colour=3), r"data\.collection_kwargs=\{'colour': 3\}"),
    ],
)
def test_a_data_set_that_cannot_be_generated_is_refused(tmp_path: Path, data: DataConfig, message: str) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=message):
        generate_data_set(data, generated_data_set(store, data))
    assert not is_generated(data, store)


def test_shards_of_the_user_are_opened_and_indexed_below_the_run(tmp_path: Path) -> None:
    path = Path(tiny.write_shards(tmp_path / "images", (4,), bad=())[0])
    (path / "index.json").unlink()  # as if some other program had written them
    store, data = Store(tmp_path / "run"), DataConfig(train=str(path))  # type: ignore[arg-type]
    train, test = open_images(data, store, write_index=False)
    assert (len(train), test) == (4, None)
    assert not (tmp_path / "run").exists()
    assert len(open_images(data, store)[0]) == 4
    assert any((tmp_path / "run" / "index").iterdir())


def test_a_tar_without_an_index_is_read_once_also_when_nothing_may_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = tiny.write_shards(tmp_path / "images", (4, 5), bad=())
    for path in paths:
        (Path(path) / "index.json").unlink()
    monkeypatch.setattr("grappa_dist.data.open_images.INDEXING_S", 0)
    store, data, logged = Store(tmp_path / "run"), DataConfig(train=tuple(paths)), list[str]()
    first, _ = open_images(data, store, log=logged.append)
    assert logged == [
        f"load: {count} without an index, or newer than it, read to the end" for count in ("1 tar", "2 tars")
    ]
    again, _ = open_images(data, store, write_index=False, log=logged.append)
    assert again == first
    assert len(logged) == 2


def test_what_every_node_reads_first_is_two_shards_at_most(tmp_path: Path) -> None:
    images = ImageShards.open(tiny.write_shards(tmp_path, (3, 2, 5, 1)), None)
    first, last = ends_of(images)
    assert [part.shards[0] for part in (first, last)] == [images.shards[0], images.shards[3]]
    assert [len(part) for part in (first, last)] == [3, 1]
    assert [last.image_bytes(0), first.image_bytes(2)] == [images.image_bytes(10), images.image_bytes(2)]
    assert len(ends_of(images.part(2))) == 1


def test_shards_without_an_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"nothing at .*empty"):
        open_images(DataConfig(train=(str(tmp_path / "empty"),)), Store(tmp_path / "run"))


def test_a_run_lies_where_out_says_or_below_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_root(None, "demo") == tmp_path / "runs" / "demo"
    assert run_root("x", "demo") == tmp_path / "x"


def test_a_run_directory_on_a_web_server_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"out=http://host/runs: expected a folder .*, s3://<bucket>/<prefix> or gs://"
    ):
        run_root("http://host/runs", "demo")


def test_a_little_is_read_of_both_ends_and_a_bad_image_is_no_obstacle(tmp_path: Path) -> None:
    last = sum(tiny.SIZES) - 1
    whole, torn = (tiny.write_shards(tmp_path / name, bad=(0, last)) for name in ("whole", "torn"))
    train, test = (ImageShards.open(paths, tmp_path / "index") for paths in (whole, torn))
    next(Path(torn[-1]).glob("*.tar")).unlink()
    read_a_little(ends_of(train, train))
    with pytest.raises(FileNotFoundError, match="torn"):
        read_a_little(ends_of(train, test))
