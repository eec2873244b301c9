"""The names of files in shards: which they are, whatever bytes they have; and shards of an unknown plan."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from grappa_dist.data.shards import ImageShards
from grappa_dist.files import read_json, write_json
from grappa_dist.make_shards.collection import CollectionConfig, Work, make_shards
from grappa_dist.make_shards.planning import prefixes_of


def make(out: Path, *sources: Path, split: str = "none", task: str | None = "all", **settings: int) -> list[str]:
    logged: list[str] = []
    cfg = CollectionConfig(split=split, task=task, **settings)  # type: ignore[arg-type]
    make_shards([(None, str(source)) for source in sources], out, cfg, Work(1, logged.append))
    return logged


def write(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"file {number}".encode())


def names_in(folder: Path) -> dict[str, bytes]:
    """Content of every row, by the name of its file."""
    images = ImageShards.open([folder], None)
    return {images.name(row): images.image_bytes(row) for row in range(len(images))}


@pytest.mark.parametrize(("split", "parts"), [("none", ["train"]), ("classes", ["train", "test"])])
def test_each_image_has_the_path_of_its_file_labelled_or_not_and_in_mixed_order(
    tmp_path: Path, split: str, parts: list[str]
) -> None:
    write(tmp_path / "pile", *(f"{label}/{number}.jpg" for label in "abc" for number in range(9)))
    make(tmp_path / "out", tmp_path / "pile", split=split, images_per_shard=5)
    found = {name: data for part in parts for name, data in names_in(tmp_path / "out" / part).items()}
    assert len(found) == 27
    assert all((tmp_path / "pile" / name).read_bytes() == data for name, data in found.items())


def test_names_of_several_sources_say_which_and_do_not_depend_on_where_they_lie(tmp_path: Path) -> None:
    for place in ("here", "there"):
        root = tmp_path / place
        write(root, "one/same/1.jpg", "two/same/1.jpg")
        with tarfile.open(root / "three.tar", "w") as tar:
            member = tarfile.TarInfo("./1.jpg")
            member.size = 3
            tar.addfile(member, io.BytesIO(b"tar"))
        make(root / "out", root / "one" / "same", root / "two" / ".." / "two" / "same", root / "three.tar")
    found = names_in(tmp_path / "here" / "out" / "train")
    assert found == {"one/same/1.jpg": b"file 0", "two/same/1.jpg": b"file 1", "three.tar/1.jpg": b"tar"}
    tars = [tmp_path / place / "out" / "train" / "shard-000000.tar" for place in ("here", "there")]
    assert tars[0].read_bytes() == tars[1].read_bytes()


def test_names_count_from_the_folder_that_is_given_for_it() -> None:
    assert prefixes_of([Path("/d/cub")]) == {Path("/d/cub"): ""}
    assert prefixes_of([Path("/d/cub")], Path("/d")) == {Path("/d/cub"): "cub/"}
    assert prefixes_of([Path("/d/cub"), Path("/d")]) == {Path("/d/cub"): "cub/", Path("/d"): ""}


def test_names_may_be_long_or_have_any_bytes(tmp_path: Path) -> None:
    hostile = [b"caf\xe9.jpg", b"\xff\xfe\x80.jpg", b"tab\tline\nescape\x1b[2J\x7f.jpg", "é\u202e日本.jpg".encode()]
    hostile += [b'quo"te\\.jpg', b"x" * 251 + b".jpg", b"a b/" * 40 + b"deep.jpg", b"{}.jpg"]
    write(tmp_path / "pile", *map(os.fsdecode, hostile))
    make(tmp_path / "out", tmp_path / "pile")
    found = names_in(tmp_path / "out" / "train")
    assert {os.fsencode(name) for name in found} == set(hostile)
    assert all((tmp_path / "pile" / name).read_bytes() == data for name, data in found.items())


def test_a_name_in_a_tar_may_be_longer_than_any_file_system_has(tmp_path: Path) -> None:
    name = "deep/" * 20_000 + "\udcff1.jpg"
    with tarfile.open(tmp_path / "long.tar", "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        member = tarfile.TarInfo(name)
        member.size = 3
        tar.addfile(member, io.BytesIO(b"tar"))
    make(tmp_path / "out", tmp_path / "long.tar")
    assert names_in(tmp_path / "out" / "train") == {name: b"tar"}
    images = ImageShards.open([tmp_path / "out" / "train"], None)
    assert len(images.where(0)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("finished", [True, False])
def test_shards_of_an_unknown_plan_are_refused_with_what_to_do(tmp_path: Path, finished: bool) -> None:
    write(tmp_path / "pile", "a.jpg", "b.jpg", "c.jpg")
    make(tmp_path / "out", tmp_path / "pile")
    folder, partial = tmp_path / "out" / "train", tmp_path / "out" / ".train.partial"
    if finished:
        write_json(folder / "index.json", {**read_json(folder / "index.json"), "plan": "0" * 64})
        what = "finished, with other shards than these; remove it or write to another folder"
    else:
        folder.rename(partial)
        (partial / "index.json").unlink()
        write_json(partial / "making" / "plan.json", {"plan": "0" * 64, "settings": {"images": 3, "other": 1}})
        what = "begun with another plan .*; run that again to go on, or remove the folder to start over"
    with pytest.raises(ValueError, match=what):
        make(tmp_path / "out", tmp_path / "pile")


def test_no_tar_is_larger_than_asked_for_with_the_names_in_it(tmp_path: Path) -> None:
    write(tmp_path / "pile", *(f"{'n' * 200}{number}.jpg" for number in range(60)))
    make(tmp_path / "out", tmp_path / "pile", shard_bytes=30_720)
    sizes = [tar.stat().st_size for tar in sorted((tmp_path / "out" / "train").glob("*.tar"))]
    assert len(sizes) == 5
    assert max(sizes) <= 30_720
