"""Images where they lie: folders, CSVs, single files, shards; what is passed over is said."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from grappa_dist.data.decoding import BadImage, decode
from grappa_dist.data.shards import ImageShards
from grappa_dist.retrieval.images import ImageFiles, open_images
from tests.retrieval.photos import write_photos
from tests.stages import tiny


def test_a_folder_is_read_where_it_lies_with_names_and_classes(tmp_path: Path) -> None:
    names = write_photos(tmp_path / "photos")
    images = open_images([str(tmp_path / "photos")], labelled=True)
    assert [images.name(row) for row in range(len(images))] == names
    assert list(images.images(range(len(images)))) == [(tmp_path / "photos" / name).read_bytes() for name in names]
    assert images.labels(0) == {"label": "anemone", "task": "photos"}
    assert images.labels(4) == {"label": "brücke", "task": "photos"}


def test_names_of_folders_mean_nothing_where_no_labels_are_needed(tmp_path: Path) -> None:
    (tmp_path / "flat.png").write_bytes(tiny.picture(0))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(tiny.picture(1))
    images = open_images([str(tmp_path)])
    assert [images.labels(row) for row in range(2)] == [{"label": None, "task": tmp_path.name}] * 2


def test_of_a_folder_that_is_split_the_test_images_are_evaluated(tmp_path: Path) -> None:
    write_photos(tmp_path / "data" / "train")
    write_photos(tmp_path / "data" / "test")
    said: list[str] = []
    images = open_images([str(tmp_path / "data")], labelled=True, log=said.append)
    assert {images.name(row).partition("/")[0] for row in range(len(images))} == {"test"}
    assert any("taken as a split" in line for line in said)


def test_a_csv_names_files_beside_it_and_its_label_column(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    path = tmp_path / "photos" / "list.csv"
    path.write_text("file,kind,task\nanemone/0.png,x,one\ncat/1.png,y,two\n")
    images = open_images([str(path)], labelled=True, label_column="kind")
    assert [images.labels(row) for row in range(2)] == [{"label": "x", "task": "one"}, {"label": "y", "task": "two"}]
    with pytest.raises(ValueError, match="no column 'knd'; it has file, kind, task"):
        open_images([str(path)], labelled=True, label_column="knd")


def test_of_a_list_with_a_split_it_is_said_how_many_images_are_scored(tmp_path: Path) -> None:
    write_photos(tmp_path)
    path = tmp_path / "l.csv"
    path.write_text("file,label,split\ncat/0.png,x,train\ncat/1.png,x,test\ncat/2.png,x,test\n")
    said: list[str] = []
    assert len(open_images([str(path)], labelled=True, log=said.append)) == 2
    assert said == [f"{path}: 2 images that test are scored, 1 that trains is not"]
    assert len(open_images([str(path)], log=said.append)) == 3
    assert len(said) == 1


def test_several_places_have_their_folder_in_the_names_and_what_is_no_image_is_said(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(tiny.picture(0))
    (tmp_path / "b" / "notes.txt").write_text("no image")
    said: list[str] = []
    images = open_images([str(tmp_path / "a"), str(tmp_path / "b" / "0.png"), str(tmp_path / "b")], log=said.append)
    expected = [str(tmp_path / folder / "0.png") for folder in ("a", "b", "b")]
    assert [images.name(row) for row in range(3)] == expected
    (line,) = said
    assert line.startswith(f"{tmp_path / 'b'}: left out: 1 file, of the suffix '.txt' (")
    assert line.endswith("/b/notes.txt)")


def test_shards_are_read_as_a_run_reads_them(tmp_path: Path) -> None:
    paths = tiny.write_shards(tmp_path / "shards", (3, 2), bad=())
    images = open_images(paths)
    assert isinstance(images, ImageShards)
    assert len(images) == 5
    with pytest.raises(ValueError, match="is a shard, or has some, and other images are none"):
        open_images([paths[0], str(tmp_path)])


def test_formats_that_shards_do_not_have_are_read_as_make_shards_writes_them(tmp_path: Path) -> None:
    image = decode(tiny.picture(0))
    image.save(tmp_path / "a.tif")
    image.save(tmp_path / "b.bmp")
    (tmp_path / "c.tif").write_bytes(b"no image")
    (tmp_path / "d.png").write_bytes(b"")
    found = list(open_images([str(tmp_path)]).images(range(4)))
    for data in found[:2]:
        assert isinstance(data, bytes)
        assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()
    assert isinstance(found[2], BadImage)
    assert found[3] == b""  # a loader says why it is bad


def test_a_file_that_went_away_is_a_bad_image_and_not_the_end(tmp_path: Path) -> None:
    write_photos(tmp_path)
    images = open_images([str(tmp_path)])
    assert isinstance(images, ImageFiles)
    (tmp_path / images.name(0)).unlink()
    gone, there = images.images([0, 1])
    assert isinstance(gone, BadImage)
    assert "cannot be read: No such file" in str(gone)
    assert isinstance(there, bytes)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "does not exist; expected a folder of images, a CSV or JSONL list, parquet, or shards"),
        ("empty", "no images; expected files ending in jpg"),
        ("notes.txt", "is no folder, image, list or table"),
    ],
)
def test_where_there_are_no_images_it_is_said(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=message):
        open_images([str(tmp_path / place)])


def test_images_in_no_class_folder_cannot_be_evaluated(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / "flat.png").write_bytes(tiny.picture(0))
    with pytest.raises(ValueError, match=r"photos: 'flat.png' lies in no class folder; expected CLASS/FILE"):
        open_images([str(tmp_path / "photos")], labelled=True)
