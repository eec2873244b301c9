"""Parquet files and saved data sets: columns, labels, parts; damaged or unfit ones are errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from grappa_dist.data.shards import ImageShards
from grappa_dist.inputs import growing, kind_of, prepared, shards_of
from tests.inputs.test_entries import config, rows_of
from tests.stages import tiny

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def table(rows: int, first: int = 0, classes: list[str] | None = None, **columns: list[Any]) -> pyarrow.Table:
    """A table as `datasets` writes it."""
    images = [{"bytes": tiny.picture(first + n), "path": f"{first + n}.png"} for n in range(rows)]
    made = pyarrow.table({"image": pyarrow.array(images, IMAGE), **columns})
    features = {"image": {"_type": "Image"}}
    if classes is not None:
        features["label"] = {"names": classes, "_type": "ClassLabel"}  # type: ignore[dict-item]
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path: Path, written: pyarrow.Table, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(written, path, **options)
    return path


def write_saved(folder: Path, *tables: pyarrow.Table) -> Path:
    """A folder as `save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(tables):05d}.arrow" for number in range(len(tables))]
    for name, written in zip(names, tables, strict=True):
        with pyarrow.ipc.new_stream(folder / name, written.schema) as stream:
            stream.write_table(written, max_chunksize=2)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def contents(paths: tuple[str, ...]) -> list[bytes]:
    images = ImageShards.open(paths, None)
    return [images.image_bytes(row) for row in range(len(images))]


def test_a_parquet_file_keeps_its_order_its_bytes_and_the_names_of_its_classes(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "images.parquet",
        table(70, classes=["cat", "dog"], label=[0, 1, -1, None, 1, 0, 5] * 10),
        row_group_size=33,
    )
    paths = prepared(config(path), tmp_path / "run").data.train
    assert contents(paths) == [tiny.picture(n) for n in range(70)]
    rows = rows_of(paths)
    assert [row["label"] for row in rows[:7]] == ["cat", "dog", None, None, "dog", "cat", None]
    assert [row["name"] for row in rows[:2]] == ["images.parquet/000000000/0.png", "images.parquet/000000001/1.png"]


def test_files_of_a_repository_train_and_test_by_their_names(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_parquet(repository / "data" / "train-00000-of-00002.parquet", table(2))
    write_parquet(repository / "data" / "train-00001-of-00002.parquet", table(1, first=2))
    write_parquet(repository / "data" / "test-00000-of-00001.parquet", table(1, first=3))
    write_parquet(repository / "data" / "validation-00000-of-00001.parquet", table(1, first=4))
    (repository / "README.png").write_bytes(tiny.picture(9))
    lines = list[str]()
    made = prepared(config(repository), tmp_path / "run", log=lines.append).data
    assert contents(made.train) == [tiny.picture(n) for n in range(3)]
    assert contents(made.test) == [tiny.picture(3)]
    assert any("left out: 1 file, in val, which neither trains nor tests" in line for line in lines)
    pattern = str(repository / "data" / "train-*.parquet")
    assert contents(shards_of([pattern], tmp_path / "out")) == contents(made.train)


def test_a_new_file_of_a_folder_adds_shards(tmp_path: Path) -> None:
    write_parquet(tmp_path / "images" / "a.parquet", table(2))
    first = shards_of([str(tmp_path / "images")], tmp_path / "run")
    write_parquet(tmp_path / "images" / "b.parquet", table(2, first=2))
    second = shards_of([str(tmp_path / "images")], tmp_path / "run")
    assert second[:1] == first
    assert contents(second) == [tiny.picture(n) for n in range(4)]


def test_saved_data_sets_are_read_by_their_own_lists_of_files(tmp_path: Path) -> None:
    columns = {"classes": ["cat", "dog"], "label": [0, 1, 1]}
    one = write_saved(tmp_path / "one", table(3, **columns), table(3, first=3, **columns))
    assert contents(shards_of([str(one)], tmp_path / "run")) == [tiny.picture(n) for n in range(6)]
    both = tmp_path / "both"
    write_saved(both / "train", table(3, **columns))
    write_saved(both / "test", table(3, first=3, **columns))
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    made = prepared(config(both), tmp_path / "run").data
    assert (contents(made.train), contents(made.test)) == (
        [tiny.picture(n) for n in range(3)],
        [tiny.picture(n) for n in range(3, 6)],
    )
    assert [row["label"] for row in rows_of(made.test)] == ["cat", "dog", "dog"]


def test_columns_of_plain_bytes_and_of_numbers_do_as_well(tmp_path: Path) -> None:
    plain = pyarrow.table({"jpg": [tiny.picture(0), None], "label": [3, 4], "task": ["birds", "food"]})
    path = write_parquet(tmp_path / "plain.parquet", plain)
    paths = shards_of([str(path)], tmp_path / "run")
    assert [(row["label"], row["task"]) for row in rows_of(paths)] == [("3", "birds"), ("4", "food")]
    assert contents(paths) == [tiny.picture(0), b""]  # an empty cell is a bad image of the run


@pytest.mark.parametrize(
    ("written", "label_field", "message"),
    [
        (pyarrow.table({"text": ["x"]}), None, r"no column of images .*; it has text \(string\)"),
        (table(0), None, "no rows; expected images"),
        (table(1), "breed", "no column 'breed', which data.label_field names; it has image"),
        (table(1, breed=[None]), "breed", "column 'breed', which data.label_field names, has no label in any row"),
        (
            pyarrow.table({"front_image": [b"x"], "back_image": [b"x"]}),
            None,
            "several columns of images, front_image, back",
        ),
        (pyarrow.table({"image": pyarrow.array([{"bytes": None, "path": "/etc/a.png"}], IMAGE)}), None, "no bytes"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_file_and_columns(
    tmp_path: Path, written: pyarrow.Table, label_field: str | None, message: str
) -> None:
    path = write_parquet(tmp_path / "x.parquet", written)
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        shards_of([str(path)], tmp_path / "run", label_field=label_field)
    assert not (tmp_path / "run" / "shards").exists()


def test_damaged_files_and_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"x\.parquet: no parquet file that can be read"):
        shards_of([str(tmp_path / "x.parquet")], tmp_path / "run")
    saved = write_saved(tmp_path / "saved", table(1))
    (saved / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(ValueError, match=r"saved: names '\.\./x\.arrow'; expected a file or folder in it"):
        shards_of([str(saved)], tmp_path / "run")
    with pytest.raises(ValueError, match=r"no \.parquet files; expected"):
        shards_of([str(tmp_path / "no*.parquet")], tmp_path / "run")


def test_rows_may_be_read_in_any_order_by_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "images_per_shard", lambda count: 7)
    path = write_parquet(tmp_path / "a.parquet", table(50), row_group_size=20)
    from grappa_dist.inputs.tables import Table

    opened = Table(path)
    for row in (49, 0, 17, 16, 20, 19, 48):
        assert opened.place(f"{row:09d}").read() == tiny.picture(row)
    assert contents(shards_of([str(path)], tmp_path / "run")) == [tiny.picture(n) for n in range(50)]


def test_what_an_entry_is_is_told_from_its_name_and_files(tmp_path: Path) -> None:
    for name in ("tars/00000.tar", "tars/00000.parquet", "tars/00000_stats.json", "tars/00000.jpg", "photos/a/b.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    kinds = {"tars": "shards", "photos": "folder", "x.csv": "list", "x.jsonl": "list", "y/*.parquet": "table"}
    assert {name: kind_of(str(tmp_path / name)) for name in kinds} == kinds
    assert kind_of("s3://bucket/images") == kind_of(str(tmp_path / "{a,b}.tar")) == "shards"


def test_a_file_that_was_replaced_is_read_anew_in_the_same_process(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", table(3))
    assert contents(shards_of([str(path)], tmp_path / "one")) == [tiny.picture(row) for row in range(3)]
    write_parquet(tmp_path / "b.parquet", table(4, first=7)).replace(path)
    assert contents(shards_of([str(path)], tmp_path / "two")) == [tiny.picture(row) for row in range(7, 11)]
