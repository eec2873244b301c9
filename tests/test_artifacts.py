from __future__ import annotations

import json
import os
import socket
import threading
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash

from grappa_dist import artifacts
from grappa_dist.artifacts import (
    Artifact,
    Look,
    NotSeen,
    RowArrays,
    Store,
    look_at,
    rows_file,
    wait_until_seen,
)
from grappa_dist.checksums import MANIFEST, DamagedArtifact
from grappa_dist.files import replace, write_json


def artifact(root: Path, **settings: object) -> Artifact:
    return Store(root).artifact("labels/k=4", settings, {"features": "abc"})


def finished(root: Path, content: str = "hello", **settings: object) -> Artifact:
    made = artifact(root, **settings)
    (made.begin() / "file.txt").write_text(content)
    made.commit()
    return made


def test_an_artifact_appears_when_it_is_whole(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    (made.begin() / "inner").mkdir()
    (made.partial / "inner" / "file.txt").write_text("hello")
    assert not made.complete
    assert not made.path.exists()
    made.commit()
    assert made.complete
    assert not made.partial.exists()
    assert (made.path / "inner" / "file.txt").read_text() == "hello"
    manifest = json.loads((made.path / MANIFEST).read_text())
    hello = {"bytes": 5, "xxh3": xxhash.xxh3_128_hexdigest(b"hello")}
    assert manifest["files"] == {"inner/file.txt": hello}
    assert (manifest["kind"], manifest["fingerprint"]) == ("labels/k=4", made.fingerprint)
    assert manifest["inputs"] == {"features": "abc"}
    made.check()


def test_what_an_earlier_attempt_left_is_kept(tmp_path: Path) -> None:
    (artifact(tmp_path).begin() / "shard-0.npy").write_text("done")
    again = artifact(tmp_path)
    assert not again.complete
    assert (again.begin() / "shard-0.npy").read_text() == "done"


def test_a_commit_drops_what_only_a_restart_needed(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    (made.begin() / "checkpoints").mkdir()
    (made.partial / "checkpoints" / "step-1").write_text("state")
    (made.partial / "knn" / "epoch-0.partial").mkdir(parents=True)
    (made.partial / "result.txt").write_text("result")
    made.commit(discard=["checkpoints", "knn/*.partial", "nothing-like-it"])
    assert sorted(p.name for p in made.path.iterdir()) == ["knn", MANIFEST, "result.txt"]


def test_an_attempt_killed_before_its_last_rename_is_committed_by_the_next(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    (made.begin() / "file.txt").write_text("hello")
    (made.partial / MANIFEST).write_text("{}")  # written, but not renamed
    (made.partial / ".weights.safetensors.123").write_text("cut sh")
    made.commit()
    made.check()
    assert sorted(p.name for p in made.path.iterdir()) == ["file.txt", MANIFEST]


def test_a_finished_artifact_is_not_overwritten(tmp_path: Path) -> None:
    made = finished(tmp_path)
    (made.begin() / "file.txt").write_text("other")
    with pytest.raises(OSError, match="not empty"):
        made.commit()
    assert (made.path / "file.txt").read_text() == "hello"


@pytest.mark.parametrize("content", ["hell", "hello!", None])
def test_a_file_that_went_missing_or_changed_its_size_is_named(content: str | None, tmp_path: Path) -> None:
    made = finished(tmp_path)
    path = made.path / "file.txt"
    path.unlink() if content is None else path.write_text(content)
    words = "is missing" if content is None else f"has {len(content)} bytes, its manifest says 5"
    with pytest.raises(ValueError, match=rf"file\.txt {words}; the same run again sets .*labels/k=4"):
        made.check()


def test_what_is_not_finished_cannot_be_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"is not finished: it has no {MANIFEST}"):
        artifact(tmp_path).check()


def test_what_another_machine_finishes_is_waited_for_and_named_if_it_never_comes(tmp_path: Path) -> None:
    late = Store(tmp_path).artifact("late", {}, {})
    late.begin()
    threading.Timer(0.2, late.commit).start()
    wait_until_seen([late])
    assert late.complete
    with pytest.raises(
        TimeoutError, match=r"never-.*manifest.json .*not seen here after 0.5 s; is .* on storage that all"
    ):
        wait_until_seen([late, Store(tmp_path).artifact("never", {}, {})], 0.5)


def test_a_commit_waits_for_the_files_that_others_write(tmp_path: Path) -> None:
    artifact = Store(tmp_path).artifact("x", {}, {})
    folder = artifact.begin()
    threading.Timer(0.2, lambda: (folder / "rows-1.npy").write_bytes(b"x")).start()
    artifact.commit(expected=["rows-1.npy"])
    assert artifact.files["rows-1.npy"].bytes == 1


def test_the_fingerprint_tells_settings_inputs_and_kind_and_not_the_place(tmp_path: Path) -> None:
    store, other = Store(tmp_path), Store(tmp_path / "elsewhere")
    source = store.artifact("features", {}, {})
    first = store.artifact("labels", {"a": 1, "b": 2}, {"x": source})
    assert first == store.artifact("labels", {"b": 2, "a": 1}, {"x": source.fingerprint})
    assert first.fingerprint == other.artifact("labels", {"a": 1, "b": 2}, {"x": source}).fingerprint
    changed = [
        store.artifact("labels", {"a": 1, "b": 3}, {"x": source}),
        store.artifact("labels", {"a": 1, "b": 2}, {"y": source}),
        store.artifact("labels", {"a": 1, "b": 2}, {"x": store.artifact("features", {"seed": 1}, {})}),
        store.artifact("label", {"a": 1, "b": 2}, {"x": source}),
    ]
    assert len({first.fingerprint, *(a.fingerprint for a in changed)}) == 5
    assert first.path == tmp_path / f"labels-{first.fingerprint}"


def test_a_second_driver_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet" / "there"
    with (
        Store(root).lock(),
        pytest.raises(
            ValueError,
            match=rf"another run is writing to {root} \(process {os.getpid()} on {socket.gethostname()} since .*\)",
        ),
        Store(root).lock(),
    ):
        pass
    with Store(root).lock(), Store(tmp_path / "other").lock():
        pass


def test_a_failed_run_gives_its_lock_back(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError), Store(tmp_path).lock():
        raise ArithmeticError
    with Store(tmp_path).lock():
        pass


def test_publishing_replaces_the_link_and_keeps_what_it_pointed_to(tmp_path: Path) -> None:
    store, old, new = Store(tmp_path), finished(tmp_path, "old", v=1), finished(tmp_path, "new", v=2)
    assert (store.publish("report", old) / "file.txt").read_text() == "old"
    (tmp_path / ".report.new").symlink_to("nowhere")  # a run was killed right here
    assert (store.publish("report", new) / "file.txt").read_text() == "new"
    assert (old.path / "file.txt").read_text() == "old"
    assert not (tmp_path / ".report.new").is_symlink()
    tmp_path.rename(tmp_path.with_name("moved"))  # links are relative
    assert (tmp_path.with_name("moved") / "report" / "file.txt").read_text() == "new"


def rows(tmp_path: Path, sizes: tuple[int, ...] = (3, 0, 2, 0, 1)) -> tuple[RowArrays, np.ndarray]:
    whole = np.arange(2 * sum(sizes), dtype=np.float32).reshape(-1, 2)
    starts = np.cumsum([0, *sizes])
    for i, (first, after) in enumerate(pairwise(starts.tolist())):
        np.save(tmp_path / f"rows-{i}.npy", whole[first:after])
    paths = tuple(str(tmp_path / f"rows-{i}.npy") for i in range(len(sizes)))
    return RowArrays(paths, tuple(starts.tolist())), whole


@pytest.mark.parametrize("sizes", [(3, 0, 2, 0, 1), (0, 6), (6,), (0, 0, 5, 0)])
def test_rows_are_taken_across_shards_in_the_order_asked_for(sizes: tuple[int, ...], tmp_path: Path) -> None:
    arrays, whole = rows(tmp_path, sizes)
    for wanted in ([], [0], [4, 0, 3, 4, 2], list(range(len(whole)))[::-1]):
        index = np.array(wanted, dtype=np.int64)
        found = arrays.take(index)
        assert found.dtype == np.float32
        assert np.array_equal(found, whole[index])
    assert [len(arrays.shard(i)) for i in range(len(sizes))] == list(sizes)


@pytest.mark.parametrize("row", [-1, 6, 100])
def test_a_row_that_is_not_there_is_an_error_and_no_other_row(row: int, tmp_path: Path) -> None:
    arrays, _ = rows(tmp_path)
    with pytest.raises((IndexError, ValueError)):
        arrays.take(np.array([0, row]))


def test_a_shard_of_another_length_is_refused(tmp_path: Path) -> None:
    arrays, _ = rows(tmp_path)
    wrong = RowArrays(arrays.paths, (0, 3, 3, 6, 6, 7))
    with pytest.raises(ValueError, match=r"rows-2\.npy has 2 rows, its shard has 3"):
        wrong.take(np.array([4]))


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        RowArrays((str(tmp_path / "rows.npy"),), (0, 1)).shard(0)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "inner" / "value.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        def write(temporary: Path) -> None:
            temporary.write_text("{half")
            raise ArithmeticError

        replace(path, write)

    with pytest.raises(ArithmeticError):
        fail()
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["value.json"]


def test_a_folder_that_lost_its_manifest_is_set_aside_and_not_in_the_way(tmp_path: Path) -> None:
    made = finished(tmp_path, "lost")
    (made.path / MANIFEST).unlink()
    assert finished(tmp_path, "again").path.joinpath("file.txt").read_text() == "again"
    assert (made.path.with_name(f"{made.path.name}.damaged") / "file.txt").read_text() == "lost"


def test_a_link_to_nothing_is_not_in_the_way_of_an_artefact(tmp_path: Path) -> None:
    made = artifact(tmp_path)
    made.begin()
    made.path.symlink_to(tmp_path / "gone")
    made.commit()
    assert made.complete
    assert made.path.with_name(f"{made.path.name}.damaged").is_symlink()


def test_what_is_not_seen_is_told_by_what_lies_there(tmp_path: Path) -> None:
    never = artifact(tmp_path)
    partial = never.begin()
    with pytest.raises(NotSeen, match=rf"its job has ended and left {partial} unfinished: run again"):
        wait_until_seen([never], 0.1)
    partial.rename(never.path)
    with pytest.raises(NotSeen, match=rf"{never.path} is there without it: run again, which sets it aside"):
        wait_until_seen([never], 0.1)


def test_waiting_counts_looks_and_not_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late, slept = Store(tmp_path).artifact("late", {}, {}), list[float]()

    def sleep(seconds: float) -> None:  # each nap is an hour by any clock
        slept.append(seconds)
        if len(slept) == 3:
            late.begin()
            late.commit()

    clock = SimpleNamespace(
        sleep=sleep, monotonic=lambda: 3600.0 * len(slept), strftime=time.strftime, gmtime=time.gmtime
    )
    monkeypatch.setattr(artifacts, "time", clock)
    wait_until_seen([late])
    assert len(slept) == 3


def many(root: Path) -> list[Artifact]:
    """Three finished artefacts of two files each: 1, 10 and 100 bytes, and as many more."""
    made = []
    for number in range(3):
        made.append(artifact(root, number=number))
        folder = made[-1].begin()
        (folder / "a.bin").write_bytes(b"a" * 10**number)
        (folder / "b.bin").write_bytes(b"b" * 10**number)
        made[-1].commit()
    return made


def flip(path: Path, at: int = 0) -> None:
    """Changes one bit of a file, and neither its size nor its times."""
    data, stat = bytearray(path.read_bytes()), path.stat()
    data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_sizes_are_all_checked_and_contents_from_the_smallest_on(tmp_path: Path) -> None:
    made = many(tmp_path)
    assert look_at(made) == Look([], [], 222, 222)
    assert look_at(made, 22).num_bytes == 22
    for number in (1, 2):
        flip(made[number].path / "b.bin")
    assert [d.path for d in look_at(made, 22).damages] == [str(made[1].path / "b.bin")]
    assert [d.folder for d in look_at(made).damages] == [str(made[1].path), str(made[2].path)]
    (made[2].path / "a.bin").write_bytes(b"cut")
    (made[0].path / "a.bin").unlink()
    found = [str(damage) for damage in look_at(made, 0).damages]
    assert f"{made[0].path}/a.bin is missing; the same run again sets {made[0].path} aside" in found[0]
    assert "a.bin has 3 bytes, its manifest says 100" in found[1]


def test_artefacts_made_before_checksums_are_held_against_their_sizes(tmp_path: Path) -> None:
    made = finished(tmp_path)
    manifest = json.loads((made.path / MANIFEST).read_text())
    del manifest["xxh3"]
    (made.path / MANIFEST).write_text(json.dumps(manifest | {"files": {"file.txt": 5}}))
    assert look_at([made]) == Look([], [made], 0, 5)
    (made.path / "file.txt").write_text("hallo")
    made.check(None)
    (made.path / "file.txt").write_text("hello!")
    assert "has 6 bytes" in str(look_at([made]).damages[0])


def test_labels_out_of_range_and_rows_of_another_length_are_damages_where_no_checksum_knows(tmp_path: Path) -> None:
    folder = artifact(tmp_path).begin()
    save = [np.array([-1, 0, 3], np.int32), np.array([-2, 0], np.int32), np.array([4], np.int32)]
    for number, labels in enumerate(save):
        np.save(folder / rows_file(number), labels)
    arrays = RowArrays.of((folder / rows_file(i) for i in range(3)), np.array([0, 3, 5, 6]), below=4)
    assert arrays.shard(0).tolist() == [-1, 0, 3]
    for shard, words in ((1, "has labels from -2 to 0, expected -1 to 3"), (2, "has labels from 4 to 4")):
        with pytest.raises(DamagedArtifact, match=words):
            arrays.shard(shard)
    rows = np.eye(2, 4, dtype=np.float32)
    rows[1, 1] = np.nan
    np.save(folder / "features.npy", np.concatenate([rows, rows * 0]))
    features = RowArrays.of([folder / "features.npy"], np.array([0, 4]))
    assert features.take_unit(np.array([0])).tolist() == [[1, 0, 0, 0]]
    for row, norm in ((1, "nan"), (2, "0"), (3, "nan")):
        with pytest.raises(
            DamagedArtifact, match=rf"features.npy has a row {row} of norm {norm}, features must be unit"
        ):
            features.take_unit(np.array([0, row]))
    good = np.array([True, False, False, False])
    assert features.unit_shard(0, good).shape == (4, 4)
    with pytest.raises(DamagedArtifact, match="has a row 2 of norm 0"):
        features.unit_shard(0, ~good & [False, False, True, False])


def test_a_run_directory_that_is_a_file_or_below_one_is_refused_by_that_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "run"):
        with (
            pytest.raises(ValueError, match=rf"^{root}: {tmp_path / 'file'} is a file, expected a folder"),
            Store(root).lock(),
        ):
            pass


def test_a_folder_in_the_place_of_a_link_is_named(tmp_path: Path) -> None:
    """As a copy of a run directory without its links has it."""
    store = Store(tmp_path)
    (tmp_path / "report").mkdir()
    with pytest.raises(ValueError, match=r"report is a folder, expected a link .*: remove or rename it"):
        store.point("report", "reports/report-1")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_is_finished_is_known_by_one_listing_of_each_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, listed = Store(tmp_path), list[Path]()
    made = [store.artifact(f"features/{m}/{i:03d}", {}, {}) for m in ("backbone", "k=4") for i in range(50)]
    for artifact in made[::3]:
        artifact.begin()
        artifact.commit()
    made[1].begin()
    listdir = os.listdir
    monkeypatch.setattr("grappa_dist.artifacts.os.listdir", lambda path: (listed.append(path), listdir(path))[1])
    monkeypatch.setattr(Artifact, "complete", property(lambda _: pytest.fail("asked for each manifest")))
    other = store.artifact("labels/k=4", {}, {})
    assert artifacts.finished([*made, other]) == [*(i % 3 == 0 for i in range(100)), False]
    assert len(listed) == 3


def test_a_look_opens_only_so_many_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [finished(tmp_path, "x", number=number) for number in range(6)]
    monkeypatch.setattr(artifacts, "CONTENT_FILES", 4)
    (made[5].path / "file.txt").write_text("y")
    assert artifacts.look_at(made, 2**30).num_bytes == 4
    looked = artifacts.look_at(made)
    assert (looked.num_bytes, [damage.folder for damage in looked.damages]) == (6, [str(made[5].path)])
