"""Folders of images as the data of a run: what trains, what tests, and which shards are made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grappa_dist.clean import clean
from grappa_dist.config import Config
from grappa_dist.console import Console, Events, read_events
from grappa_dist.data.shards import ImageShards
from grappa_dist.inputs import look, prepared, shards_of
from grappa_dist.make_shards.sources import on_disk
from grappa_dist.plan import plan
from tests.stages import tiny


def write_images(folder: Path, names: list[str], first: int = 0) -> Path:
    for number, name in enumerate(names, start=first):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny.picture(number))
    return folder


def config(train: Path | str, test: Path | str | None = None, **data: Any) -> Config:
    return tiny.config([str(train)], data={"test": [str(test)] if test else [], **data})


def rows_of(paths: tuple[str, ...]) -> list[dict[str, Any]]:
    """The JSON members of all rows."""
    images = ImageShards.open(paths, None)
    return [images.labels(row) or {} for row in range(len(images))]


def names_of(paths: tuple[str, ...]) -> list[str]:
    return [row["name"] for row in rows_of(paths)]


def test_a_folder_of_images_becomes_shards_below_the_run_directory_once(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{number}.png" for number in range(7)])
    lines = list[str]()
    made = prepared(config(photos), tmp_path / "run", log=lines.append).data
    assert sorted(names_of(made.train)) == sorted(path.name for path in photos.iterdir())
    assert made.test == ()
    assert all(Path(path).is_relative_to(tmp_path / "run" / "shards") for path in made.train)
    assert lines[0] == f"{photos}: 7 images to adapt to, without labels"
    assert lines[1].startswith(
        f"{photos}: makes shards of 7 images, once, in {tmp_path / 'run' / 'shards'}/photos-train-"
    )
    before = tiny.files_below(tmp_path)
    lines.clear()
    assert prepared(config(photos), tmp_path / "run", log=lines.append).data == made
    assert tiny.files_below(tmp_path) == before
    assert lines == [f"{photos}: 7 images to adapt to, without labels"]


def test_making_shards_is_a_stage_with_its_images_counted_and_none_where_all_are_there(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{number}.png" for number in range(7)])
    console = Console(Events(tmp_path / "events.jsonl"))
    made = prepared(config(photos), tmp_path / "run", log=console.log, console=console)
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [event.get("stage") for event in events if event["name"] == "stage_begins"] == ["shards"]
    assert events[-1]["name"] == "stage_ends"
    (last,) = [(event["done"], event["of"], event["unit"]) for event in events if event["name"] == "progress"][-1:]
    assert last == (7, 7, "images")
    assert prepared(config(photos), tmp_path / "run", log=console.log, console=console) == made
    console.close()
    assert len(list(read_events(tmp_path / "events.jsonl"))) == len(events)


def test_shards_stay_what_they_are(tmp_path: Path) -> None:
    given = tiny.config(tiny.write_shards(tmp_path / "shards"))
    assert prepared(given, tmp_path / "run") == given
    assert not (tmp_path / "run").exists()
    assert look(given, tmp_path / "run").sizes == {"train": 40, "test": 0}


def test_class_folders_give_labels_and_all_of_them_train(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["cat/1.png", "cat/old/2.png", "dog/1.png"])
    made = prepared(config(photos), tmp_path / "run").data
    assert {(row["label"], row["name"]) for row in rows_of(made.train)} == {
        ("cat", "cat/1.png"),
        ("cat", "cat/old/2.png"),
        ("dog", "dog/1.png"),
    }
    assert made.test == ()


def test_folders_of_a_split_train_and_test(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["train/a/1.png", "train/b/1.png", "valid/a/2.png", "valid/b/2.png"])
    made = prepared(config(photos), tmp_path / "run").data
    assert sorted(names_of(made.train)) == ["train/a/1.png", "train/b/1.png"]
    assert names_of(made.test) == ["valid/a/2.png", "valid/b/2.png"]
    assert [row["label"] for row in rows_of(made.test)] == ["a", "b"]
    assert prepared(config(photos, photos), tmp_path / "run").data == made
    alone = prepared(config(photos, split="none"), tmp_path / "run").data
    assert (len(names_of(alone.train)), alone.test) == (4, ())


def test_a_test_set_that_is_named_replaces_the_test_part_and_a_line_says_so(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["train/1.png", "test/2.png"])
    other = write_images(tmp_path / "other", ["3.png"])
    lines = list[str]()
    made = prepared(config(photos, other), tmp_path / "run", log=lines.append).data
    assert (names_of(made.train), names_of(made.test)) == (["train/1.png"], ["3.png"])
    assert "the test parts of data.train are not used, for data.test names other images" in lines


def test_classes_are_divided_where_the_setting_says_so(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{label}/{n}.png" for label in "abc" for n in range(2)])
    made = prepared(config(photos, split="classes"), tmp_path / "run").data
    assert {row["label"] for row in rows_of(made.train)} == {"a", "b"}
    assert {row["label"] for row in rows_of(made.test)} == {"c"}


def test_looking_writes_nothing_and_knows_how_many_images_there_are(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["train/a/1.png", "train/b/1.png", "test/a/2.png"])
    before = tiny.files_below(tmp_path)
    found = look(config(photos), tmp_path / "run")
    assert (found.sizes, found.missing) == ({"train": 2, "test": 1}, 3)
    assert tiny.files_below(tmp_path) == before
    found.make(lambda line: None)
    again = look(config(photos), tmp_path / "run")
    assert (again.missing, again.config) == (0, found.make(lambda line: None))


def test_shards_may_be_made_elsewhere_for_several_runs(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["1.png", "2.png"])
    given = config(photos, shards_dir=str(tmp_path / "cache"))
    first = prepared(given, tmp_path / "run").data
    assert all(Path(path).is_relative_to(tmp_path / "cache") for path in first.train)
    before = tiny.files_below(tmp_path)
    assert prepared(given, tmp_path / "another").data == first
    assert tiny.files_below(tmp_path) == before


def test_names_may_be_anything_that_files_may_be_called(tmp_path: Path) -> None:
    names = ["Füße im Schnee/1 (Kopie).png", "Füße im Schnee/二.png", "x/bad\udcff.png", 'x/"quoted",\n.png']
    photos = write_images(tmp_path / "a folder, größer", names)
    made = prepared(config(photos), tmp_path / "run").data
    assert sorted(map(on_disk, names_of(made.train))) == sorted(names)


def test_one_image_is_enough_and_bad_ones_are_kept_for_the_run_to_count(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "one", ["1.png"])
    assert names_of(prepared(config(photos), tmp_path / "run").data.train) == ["1.png"]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "1.jpg").write_bytes(b"no image")
    assert names_of(shards_of([str(bad)], tmp_path / "run")) == ["1.jpg"]


def test_a_folder_of_nothing_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path / 'empty'}.*expected"):
        ImageShards.open(prepared(config(tmp_path / "empty"), tmp_path / "run").data.train, None)


def test_paths_of_commands_keep_their_order(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["train/1.png", "test/2.png"])
    shards = tiny.write_shards(tmp_path / "shards")
    paths = shards_of([*shards, str(photos)], tmp_path / "out")
    assert paths[:-1] == tuple(shards)
    assert names_of(paths[-1:]) == ["test/2.png", "train/1.png"]  # all of it, for no run divides it


def test_cleaning_names_the_shards_of_images_that_are_gone_and_no_others(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{n}.png" for n in range(12)])
    other = write_images(tmp_path / "other", ["1.png"])
    run = tmp_path / "run"
    prepared(config(other), run)
    prepared(config(photos), run)
    (photos / "0.png").unlink()
    prepared(config(photos), run)
    (run / "shards" / "mine").mkdir()
    found = {path.relative_to(run / "shards").as_posix() for path in look(config(photos), run).unneeded()}
    photos_dir, other_dir = (next((run / "shards").glob(f"{name}-train-*")).name for name in ("photos", "other"))
    assert found == {other_dir, f"{photos_dir}/000", f"{photos_dir}/000.npy"}
    listed = clean(config(photos), run, remove=True)
    assert f"shards/{photos_dir}/000  (shards of images that are not named now)" in listed
    assert look(config(photos), run).unneeded() == []
    assert len(names_of(prepared(config(photos), run).data.train)) == 11


def test_cleaning_before_shards_are_made_is_refused_and_planning_is_not(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{n}.png" for n in range(30)])
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match=r"30 images of data\.train and data\.test are in no shard yet"):
        clean(config(photos), tmp_path / "run", remove=True)
    before = tiny.files_below(tmp_path)
    text = plan(config(photos), tmp_path / "run")
    assert tiny.files_below(tmp_path) == before
    assert "shards         to be made of 30 images, once" in text
    assert "30 training images" in text


def test_settings_about_labels_that_are_about_nothing_given_are_refused(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["a/1.png", "b/1.png"])
    with pytest.raises(ValueError, match=r"data\.label_field=breed: there is no column or key of that name in folders"):
        look(config(photos, label_field="breed"), tmp_path / "run")
    with pytest.raises(ValueError, match=r"data\.label_member=txt: is for shards; .*photos is none"):
        look(config(photos, label_member="txt"), tmp_path / "run")
    (photos / "list.csv").write_text("file,breed\na/1.png,x\n")
    [shards, *_] = tiny.write_shards(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"data\.label_field=breed: would be a key of the shards"):
        look(config(shards, photos / "list.csv", label_field="breed"), tmp_path / "run")
    made = prepared(config(photos, photos / "list.csv", label_field="breed"), tmp_path / "run").data
    assert ([row["label"] for row in rows_of(made.test)], made.label_field) == (["x"], None)
