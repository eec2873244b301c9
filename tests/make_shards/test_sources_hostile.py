"""Folders as they are found: loops, links, names of any bytes, what cannot be read, and what is there twice."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from grappa_dist.make_shards.collection import CollectionConfig, Work, make_shards
from grappa_dist.make_shards.sources import FolderSource, TarSource

NAMES = [
    "new\nline.jpg",
    "tab\t.jpg",
    "\x1b[31m.jpg",
    "\u202egpj.jpg",
    "\udcff.jpg",
    "x" * 250 + ".jpg",
    "漢 é.jpg",
    " .jpg",
]


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(name))
    return folder


def names_in(out: Path) -> list[str]:
    """What the JSON of each image says its file was called."""
    with tarfile.open(out / "train" / "shard-000000.tar") as tar:
        members = [tar.extractfile(m) for m in tar.getmembers() if m.name.endswith(".json")]
        return [json.load(member)["name"] for member in members if member is not None]


def make(images: Path, out: Path, **settings: object) -> list[str]:
    logged: list[str] = []
    cfg = CollectionConfig(split="none", **settings)  # type: ignore[arg-type]
    make_shards([(None, str(images))], out, cfg, Work(1, logged.append))
    return logged


def test_names_of_any_bytes_come_back_as_they_were(tmp_path: Path) -> None:
    make(write(tmp_path / "pile", *NAMES), tmp_path / "out")
    assert sorted(map(os.fsencode, names_in(tmp_path / "out"))) == sorted(map(os.fsencode, NAMES))


def test_links_that_loop_or_lead_nowhere_are_left_out_and_others_are_followed(tmp_path: Path) -> None:
    pile = write(tmp_path / "pile", "a/1.jpg", "b/2.jpg")
    (pile / "self.jpg").symlink_to("self.jpg")
    (pile / "ping").symlink_to("pong")
    (pile / "pong").symlink_to("ping")
    (pile / "a" / "up").symlink_to("..")
    (pile / "a" / "b").symlink_to("../b")
    (pile / "b" / "a").symlink_to("../a")
    source = FolderSource(pile)
    assert source.names() == ["a/1.jpg", "a/b/2.jpg", "b/2.jpg", "b/a/1.jpg"]
    assert source.left_out.counts["a link to nothing, a pipe or another special file"] == 3
    assert source.left_out.counts["a link to a folder that holds it"] == 4


def test_folders_may_be_as_deep_as_the_file_system_has_them(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1100):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    write(tmp_path, "1.jpg")
    assert FolderSource(tmp_path).names() == ["1.jpg"]
    subprocess.run(["rm", "-r", tmp_path / "d"], check=True)  # deeper than Python's own removal goes


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["a/1.jpg", "a"])
def test_what_this_user_cannot_read_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    pile = write(tmp_path / "pile", "a/1.jpg", "b/2.jpg")
    (pile / name).chmod(0)
    try:
        with pytest.raises(ValueError, match=f"{name}: .*cannot be read"):
            make(pile, tmp_path / "out")
    finally:
        (pile / name).chmod(0o755)
    assert not (tmp_path / "out").exists()


def test_a_file_without_permission_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pile = write(tmp_path / "pile", "1.jpg", "2.jpg")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("2.jpg"))
    with pytest.raises(ValueError, match=r"pile/2\.jpg: cannot be read by this user"):
        make(pile, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_of_two_files_of_one_name_in_a_tar_the_last_is_taken_and_the_other_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "pile.tar", "w") as tar:
        for data in (b"first", b"second"):
            member = tarfile.TarInfo("./1.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = TarSource(tmp_path / "pile.tar")
    assert source.names() == ["1.jpg"]
    assert source.place("1.jpg").read() == b"second"
    assert source.left_out.counts["an earlier file of the same name in a tar"] == 1


def test_no_image_is_taken_twice_through_two_folders_or_lists(tmp_path: Path) -> None:
    pile = write(tmp_path / "pile", "a/1.jpg")
    with pytest.raises(ValueError, match=r"pile/a: lies in .*pile, whose images would be there twice"):
        make_shards([(None, str(pile / "a")), (None, str(pile))], tmp_path / "out", CollectionConfig(), Work())
    (tmp_path / "list.csv").write_text("file,fine,dataset\na/1.jpg,x,t\n", encoding="utf-8")
    with pytest.raises(ValueError, match="pile: named twice"):
        make_shards([(str(tmp_path / "list.csv"), str(pile))] * 2, tmp_path / "out", CollectionConfig(), Work())


@pytest.mark.parametrize(("folder", "remark"), [("nan", "'nan'"), ("null", "'null'"), ("-1", "-1"), (" ", "blank")])
def test_a_class_folder_that_evaluation_would_not_count_is_refused(tmp_path: Path, folder: str, remark: str) -> None:
    pile = write(tmp_path / "pile", "a/1.jpg", f"{folder}/2.jpg")
    with pytest.raises(ValueError, match=rf"class folder '{folder}' counts as no label \({remark}\); rename it"):
        make_shards([(None, str(pile))], tmp_path / "out", CollectionConfig(), Work())


def test_folders_that_are_one_class_to_evaluation_are_one_class_and_it_is_said(tmp_path: Path) -> None:
    logged = make(write(tmp_path / "pile", "1/1.jpg", "1.0/2.jpg", "b/3.jpg"), tmp_path / "out")
    assert any("the folders '1.0' and '1' are one class, '1'" in line for line in logged)
