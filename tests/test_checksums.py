"""What was written is what is read: every file of an artefact against its checksum, whoever wrote it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from grappa_dist import checksums, files
from grappa_dist.artifacts import Artifact, RowArrays, Store
from grappa_dist.checksums import (
    MANIFEST,
    DamagedArtifact,
    load_array,
    load_json,
    map_rows,
    read_manifest,
    set_aside,
    verified,
)
from grappa_dist.files import Sum, record, recorded, replace, save_array
from tests.test_artifacts import flip


def artifact(root: Path) -> Artifact:
    """A finished artefact with an array and, further down, an object."""
    made = Store(root).artifact("labels/k=4", {}, {})
    folder = made.begin()
    save_array(folder / "rows.npy", np.arange(5))
    files.write_json(folder / "knn" / "epoch-0" / "statistics.json", {"a": 1})
    made.commit()
    return made


def test_the_writer_of_a_file_records_its_checksum_and_the_manifest_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Store(tmp_path).artifact("labels/k=4", {}, {})
    path = made.begin() / "rows.npy"
    save_array(path, np.arange(5), summed=True)
    expected = Sum(path.stat().st_size, xxhash.xxh3_128_hexdigest(path.read_bytes()))
    assert recorded(path) == expected == Sum.of(path)
    monkeypatch.setattr(Sum, "of", lambda path: pytest.fail("read again"))
    made.commit()
    assert made.files == {"rows.npy": expected}
    assert sorted(p.name for p in made.path.iterdir()) == [MANIFEST, "rows.npy"]


def test_an_older_record_does_not_count(tmp_path: Path) -> None:
    made = Store(tmp_path).artifact("x", {}, {})
    path = made.begin() / "a.bin"
    for content in (b"one", b"two"):
        replace(path, lambda temporary, content=content: temporary.write_bytes(content), summed=True)
    assert recorded(path) == Sum(3, xxhash.xxh3_128_hexdigest(b"two"))
    replace(path, lambda temporary: temporary.write_bytes(b"three"))
    assert recorded(path) is None
    for text in ("", "[]", '{"bytes": 1}'):
        (made.partial / ".b.bin.xxh3").write_text(text)
        assert recorded(made.partial / "b.bin") is None
    made.commit()
    assert made.files["a.bin"] == Sum(5, xxhash.xxh3_128_hexdigest(b"three"))


def test_a_file_that_is_cut_before_the_commit_is_damaged_after_it(tmp_path: Path) -> None:
    made = Store(tmp_path).artifact("labels/k=4", {}, {})
    save_array(made.begin() / "rows.npy", np.arange(5), summed=True)
    with (made.partial / "rows.npy").open("rb+") as file:
        file.truncate(140)
    made.commit()
    with pytest.raises(DamagedArtifact, match="has 140 bytes, its manifest says 168"):
        load_array(made.path / "rows.npy")


def test_a_file_is_read_whole_once_by_a_process_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, reads = artifact(tmp_path), list[Path]()
    of = Sum.of
    monkeypatch.setattr(Sum, "of", lambda path: (reads.append(path), of(path))[1])
    path = made.path / "rows.npy"
    for _ in range(2):
        assert verified(path) == path
        assert load_array(path).tolist() == [0, 1, 2, 3, 4]
    assert reads == [path]
    path.write_bytes(path.read_bytes()[:-1] + b"\x07")
    with pytest.raises(DamagedArtifact, match=rf"{path} does not hold what was written: its xxh3 is \w+, its manifest"):
        verified(path)
    assert verified(tmp_path / "no artefact" / "x.npy") == tmp_path / "no artefact" / "x.npy"


READERS: list[Callable[[Path], object]] = [
    lambda path: load_array(path / "rows.npy"),
    lambda path: RowArrays((str(path / "rows.npy"),), (0, 5)).shard(0),
    lambda path: RowArrays((str(path / "rows.npy"),), (0, 5)).take(np.array([1])),
]


@pytest.mark.parametrize("read", READERS)
def test_every_reader_of_arrays_refuses_one_changed_bit(read: Callable[[Path], object], tmp_path: Path) -> None:
    made = artifact(tmp_path)
    flip(made.path / "rows.npy", -1)
    with pytest.raises(DamagedArtifact) as caught:
        read(made.path)
    assert (caught.value.path, caught.value.folder) == (str(made.path / "rows.npy"), str(made.path))


def test_a_deep_file_belongs_to_its_artefact(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    path = made.path / "knn" / "epoch-0" / "statistics.json"
    assert load_json(path) == {"a": 1}
    flip(path, 6)
    checksums.forget()
    with pytest.raises(DamagedArtifact, match=r"statistics.json does not hold what was written"):
        load_json(path)
    path.unlink()
    with pytest.raises(DamagedArtifact, match=r"statistics.json is missing"):
        load_json(path)


def test_a_file_that_the_manifest_does_not_list_is_not_read(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    (made.path / "other.json").write_text("{}")
    with pytest.raises(DamagedArtifact, match=r"other.json is not listed in manifest.json"):
        load_json(made.path / "other.json")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("[]", "lists no files"),
        ('{"files": {"rows.npy": "5"}}', "lists 'rows.npy' with '5', expected bytes and xxh3"),
        (None, "is missing"),
    ],
)
def test_a_damaged_manifest_damages_its_artefact(text: str | None, why: str, tmp_path: Path) -> None:
    made = artifact(tmp_path)
    path = made.path / MANIFEST
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(DamagedArtifact, match=why) as caught:
        load_array(made.path / "rows.npy")
    assert caught.value.path == str(path)


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    text = (artifact(tmp_path).path / MANIFEST).read_text()
    assert read_manifest(text.encode(), "here").keys() == {"rows.npy", "knn/epoch-0/statistics.json"}
    for old, new in (("labels/k=4", "labels/k=5"), ('"created": "2', '"created": "3'), ("rows.npy", "rowt.npy")):
        with pytest.raises(ValueError, match=r"here: is not what was written: its checksum is \w+, it says '\w+'"):
            read_manifest(text.replace(old, new).encode(), "here")


def test_folders_that_were_exchanged_are_told_by_their_names(tmp_path: Path) -> None:
    first, second = artifact(tmp_path), Store(tmp_path).artifact("labels/k=8", {}, {})
    second.begin()
    second.commit()
    first.path.rename(tmp_path / "x")
    second.path.rename(first.path)
    (tmp_path / "x").rename(second.path)
    for each, other in ((first, second), (second, first)):
        with pytest.raises(DamagedArtifact, match=rf"manifest.json is the manifest of {other.path.name}"):
            each.check()


def test_files_of_an_unfinished_artefact_are_compared_with_their_records(tmp_path: Path) -> None:
    made = Store(tmp_path).artifact("fusion/neighbours", {}, {})
    path = made.begin() / "knn" / "epoch-0" / "rows-000000.npy"
    path.parent.mkdir(parents=True)
    np.save(path, np.arange(4))
    assert load_array(path).tolist() == [0, 1, 2, 3]  # nothing is recorded
    record(path)
    flip(path, -1)
    with pytest.raises(DamagedArtifact) as caught:
        load_array(path)
    assert caught.value.folder == str(made.partial)


def test_text_that_is_no_json_or_array_damages_what_has_no_checksum(tmp_path: Path) -> None:
    folder = Store(tmp_path).artifact("x", {}, {}).begin()
    (folder / "a.json").write_text("{")
    (folder / "a.npy").write_bytes(b"")
    with pytest.raises(DamagedArtifact, match=r"a.json is not JSON"):
        load_json(folder / "a.json")
    with pytest.raises(DamagedArtifact, match=r"a.npy is no array"):
        load_array(folder / "a.npy")


def test_the_error_travels_between_processes(tmp_path: Path) -> None:
    damage = pickle.loads(pickle.dumps(DamagedArtifact("/a/b-0123456789/c.npy", "/a/b-0123456789", "is missing")))
    assert (damage.path, damage.folder, damage.why) == ("/a/b-0123456789/c.npy", "/a/b-0123456789", "is missing")
    assert str(damage) == (
        "/a/b-0123456789/c.npy is missing; the same run again sets /a/b-0123456789 aside and makes it anew"
    )


def test_what_is_set_aside_keeps_all_that_was_in_it(tmp_path: Path) -> None:
    places = []
    for _ in range(2):
        made = artifact(tmp_path)
        map_rows(str(made.path / "rows.npy"), None)
        places.append(set_aside(made.path))
        assert not made.complete
    assert [place.name for place in places] == [f"{made.path.name}.damaged", f"{made.path.name}.damaged-2"]
    assert all(np.load(place / "rows.npy").tolist() == [0, 1, 2, 3, 4] for place in places)
    assert json.loads((places[0] / MANIFEST).read_text())["kind"] == "labels/k=4"
    assert not checksums._verified
