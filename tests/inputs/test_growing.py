"""Folders that grow, shrink or change between two runs: which shards stay, and which are made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grappa_dist.inputs import growing, living_shards_of, shards_of
from grappa_dist.inputs.growing import Growing
from grappa_dist.inputs.growing import images_per_shard as growing_images_per_shard
from grappa_dist.make_shards.class_folders import folder_items
from grappa_dist.make_shards.sources import FolderSource
from tests.inputs.test_entries import names_of, write_images


@pytest.fixture(autouse=True)
def _two_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "images_per_shard", lambda count: 2)


def tars_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.tar")}


def test_a_folder_that_has_grown_keeps_its_shards_and_gets_one_more(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{n}.png" for n in range(4)])
    first = shards_of([str(photos)], tmp_path / "run")
    before = tars_below(tmp_path)
    write_images(photos, ["00.png", "9.png"], first=10)
    lines = list[str]()
    second = shards_of([str(photos)], tmp_path / "run", log=lines.append)
    assert names_of(second) == ["0.png", "1.png", "2.png", "3.png", "00.png", "9.png"]
    assert second[:1] == first
    assert before.items() <= tars_below(tmp_path).items()
    assert len(tars_below(tmp_path)) == 3
    assert lines[-1].endswith("; 4 of 6 were there")


def test_what_is_gone_or_changed_makes_its_own_shard_be_made_anew(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{n}.png" for n in range(6)])
    [folder] = shards_of([str(photos)], tmp_path / "run")
    (photos / "0.png").unlink()
    write_images(photos, ["3.png"], first=30)
    changed = shards_of([str(photos)], tmp_path / "run")
    assert changed == (f"{folder}/shard-000002.tar", str(Path(folder).with_name("001")))
    assert names_of(changed) == ["4.png", "5.png", "1.png", "2.png", "3.png"]
    again = shards_of([str(photos)], tmp_path / "run")
    assert again == changed


def test_who_passes_over_rows_makes_shards_of_new_and_changed_images_alone_until_few_are_left(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", [f"{n}.png" for n in range(6)])
    run = tmp_path / "run"
    [folder], gone = living_shards_of([str(photos)], run)
    assert gone == {}
    (photos / "0.png").unlink()
    write_images(photos, ["3.png"], first=30)
    changed, gone = living_shards_of([str(photos)], run)
    assert changed == (folder, str(Path(folder).with_name("001")))
    assert names_of(changed[1:]) == ["3.png"]
    assert gone == {f"{folder}/shard-000000.tar": [0], f"{folder}/shard-000001.tar": [1]}
    (photos / "1.png").unlink()
    fewer, gone = living_shards_of([str(photos)], run)
    assert fewer == (f"{folder}/shard-000001.tar", f"{folder}/shard-000002.tar", changed[1])
    assert gone == {f"{folder}/shard-000001.tar": [1]}
    write_images(photos, ["1.png"], first=1)
    assert names_of(living_shards_of([str(photos)], run)[0][-1:]) == ["1.png"]
    assert names_of(shards_of([str(photos)], run)) == ["4.png", "5.png", "3.png", "1.png", "2.png"]


def test_a_file_that_comes_back_is_in_one_shard(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["0.png", "1.png"])
    first = shards_of([str(photos)], tmp_path / "run")
    (photos / "0.png").rename(tmp_path / "0.png")
    assert names_of(shards_of([str(photos)], tmp_path / "run")) == ["1.png"]
    (tmp_path / "0.png").rename(photos / "0.png")
    assert shards_of([str(photos)], tmp_path / "run") == first


def test_a_changed_time_alone_makes_the_same_bytes_again(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["0.png", "1.png", "2.png"])
    shards_of([str(photos)], tmp_path / "run")
    for path in photos.iterdir():
        os.utime(path, (1, 1))
    shards_of([str(photos)], tmp_path / "run")
    tars = tars_below(tmp_path / "run")
    assert len(tars) == 4
    assert len(set(tars.values())) == 2


def test_making_goes_on_after_a_kill_and_starts_over_where_the_folder_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_images(tmp_path / "photos", [f"{n}.png" for n in range(4)])
    items = folder_items(FolderSource(photos), None, "none", lambda line: None)

    def killed(*arguments: object, **options: object) -> None:
        real(*arguments, **options)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    from grappa_dist.make_shards import filling

    real = filling._commit
    monkeypatch.setattr(filling, "_commit", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Growing("photos", tmp_path / "made", "test", items, photos).make(lambda line: None)
    monkeypatch.setattr(filling, "_commit", real)
    partial = tmp_path / "made" / ".000.partial"
    assert sorted(path.name for path in partial.glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    kept = (partial / "shard-000000.tar").stat().st_ino
    lines = list[str]()
    made = Growing("photos", tmp_path / "made", "test", items, photos).make(lines.append)
    assert (tmp_path / "made" / "000" / "shard-000000.tar").stat().st_ino == kept
    assert made.holds.all()
    assert any("2 of 2 shards were there" in line for line in lines)

    write_images(photos, ["7.png", "8.png", "9.png"])
    monkeypatch.setattr(filling, "_commit", killed)
    with pytest.raises(KeyboardInterrupt):
        shards_of([str(photos)], tmp_path / "run")
    monkeypatch.setattr(filling, "_commit", real)
    (photos / "9.png").unlink()
    assert len(names_of(shards_of([str(photos)], tmp_path / "run"))) == 6


def test_a_damaged_folder_of_shards_is_made_again_beside_it(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", ["0.png"])
    [folder] = shards_of([str(photos)], tmp_path / "run")
    (Path(folder) / "shard-000000.tar").write_bytes(b"")
    [other] = shards_of([str(photos)], tmp_path / "run")
    assert other != folder
    assert names_of((other,)) == ["0.png"]


def test_few_images_are_of_several_shards_of_whole_batches() -> None:
    found = [growing_images_per_shard(count) for count in (1, 100, 300, 600, 8000, 10**6)]
    assert found == [32, 32, 32, 64, 992, 1000]
