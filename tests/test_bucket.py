"""A run's bucket and the folders of its machines: what is fetched, what is sent, and what is never mixed up."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from grappa_dist import bucket as module
from grappa_dist import object_store
from grappa_dist.artifacts import Artifact, Store, finished, look_at
from grappa_dist.bucket import (
    bucket_of,
    folder_of,
    here,
    keep_at_most,
    marked,
    refreshed,
    refreshed_folder,
    send,
    withdraw,
)
from grappa_dist.checksums import DamagedArtifact, forget, set_aside, verified
from grappa_dist.files import Sum, record
from tests.conftest import Bucket
from tests.test_artifacts import flip


def root_on(bucket: Bucket, machine: Path) -> Path:
    return folder_of(f"{bucket.url}/runs/x", str(machine))


def artifact_on(bucket: Bucket, machine: Path, *, made: bool = True, size: int = 1000) -> Artifact:
    artifact = Store(root_on(bucket, machine)).artifact("labels/k=2", {"number": 2}, {})
    if made:
        folder = artifact.begin()
        (folder / "deep").mkdir(exist_ok=True)
        for name, count in (("rows-0.npy", size), ("empty.bin", 0), ("deep/x.json", 7)):
            (folder / name).write_bytes(b"x" * count)
        artifact.commit()
    return artifact


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://key:planted@bucket/x", "was given with a user, password or query"),
        ("s3://", "expected s3://<bucket>/<prefix>"),
        ("s3://bucket/" + "x" * 300, "expected at most 255"),
    ],
)
def test_a_url_that_can_be_no_run_directory_is_refused_in_a_line_without_secrets(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why) as refused:
        folder_of(url)
    assert "planted" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_folder_is_private_and_one_of_another_user_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own, planted = (tmp_path / name for name in ("own", "planted"))
    assert bucket_of(folder_of("s3://b/x", str(own)) / "labels") is not None
    assert own.stat().st_mode & 0o777 == 0o700
    planted.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: planted.stat().st_uid + 1)
    with pytest.raises(ValueError, match=r"out=s3://b/x: .*planted belongs to another user; resources.copies_dir, or"):
        bucket_of(folder_of("s3://b/x", str(planted)) / "labels")


def test_a_path_knows_its_bucket_and_paths_elsewhere_have_none(tmp_path: Path) -> None:
    root = folder_of("gs://bucket/runs/a b", str(tmp_path))
    found = bucket_of(root / "labels" / "x.npy")
    assert found is not None
    assert (found.url, found.root, found.name_of(root / "labels" / "x.npy")) == (
        "gs://bucket/runs/a b",
        root,
        "labels/x.npy",
    )
    assert bucket_of(tmp_path / "s3:" / "x") is None
    assert here(tmp_path / "nothing") == tmp_path / "nothing"
    send(tmp_path / "nothing")
    assert marked(tmp_path, "x") is None


def test_an_artefact_of_one_machine_is_complete_on_another_and_its_files_come_when_they_are_read(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.allow_writing()
    assert not artifact_on(bucket, tmp_path / "b", made=False).complete
    assert not artifact_on(bucket, tmp_path / "b", made=False).path.exists()  # which would be taken for a damage
    made = artifact_on(bucket, tmp_path / "a")
    writes = [r.path.split("?")[0].rpartition("/")[2] for r in bucket.proxy.requests if r.method == "PUT"]
    assert writes[-1] == "manifest.json"
    there = artifact_on(bucket, tmp_path / "b", made=False)
    assert there.complete
    assert {path.name for path in there.path.iterdir()} == {"manifest.json"}
    assert look_at([there], 0).damages == []
    assert verified(there.path / "deep/x.json").read_bytes() == b"x" * 7
    assert not (there.path / "rows-0.npy").exists()
    there.check(None)
    assert (there.path / "rows-0.npy").read_bytes() == (made.path / "rows-0.npy").read_bytes()


def test_one_listing_shows_what_is_finished_and_of_which_sizes(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()

    def artifacts_on(machine: str) -> list[Artifact]:
        store = Store(root_on(bucket, tmp_path / machine))
        return [store.artifact(kind, {"n": n}, {}) for kind in ("features/x", "labels/k=2") for n in range(3)]

    made, there = artifacts_on("a"), artifacts_on("b")
    for number, artifact in enumerate(made):
        (artifact.begin() / "rows.npy").write_bytes(bytes(number))
        if number % 2:
            artifact.commit()
    for some, known in ((there, [False, True] * 3), (there[:3], [False, True, False]), (there[1:2], [True])):
        bucket.proxy.requests.clear()
        assert finished(some) == known
        assert len(bucket.proxy.requests) == 1
    assert finished([]) == []
    bucket.proxy.requests.clear()
    assert look_at(there, 0).all_bytes == 1 + 3 + 5
    assert [r.path.partition("?")[0] for r in bucket.proxy.requests].count(f"/{bucket.name}") == 1
    fetched = {r.path.rpartition("/")[2].partition("?")[0] for r in bucket.proxy.requests} - {bucket.name}
    assert fetched == {"manifest.json"}


def test_who_finishes_second_takes_what_the_first_has_made(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    late = artifact_on(bucket, tmp_path / "b", made=False)
    folder = late.begin()
    (folder / "rows-0.npy").write_bytes(b"y" * 5)
    first = artifact_on(bucket, tmp_path / "a")
    bucket.proxy.requests.clear()
    late.commit()
    assert late.complete
    assert late.files == first.files
    late.check(None)  # and the first one's files are as they were
    assert not late.partial.exists()


def test_an_upload_that_ended_before_its_manifest_does_not_count_and_is_made_again(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.allow_writing()
    bucket.proxy.refuse = lambda method, path: 403 if method == "PUT" and "manifest" in path else None
    with pytest.raises(ValueError, match=rf"out={bucket.url}/runs/x: cannot be used \(labels.*created\): Permission"):
        artifact_on(bucket, tmp_path / "a")
    assert not artifact_on(bucket, tmp_path / "b", made=False).complete
    bucket.proxy.refuse = lambda method, path: None
    artifact_on(bucket, tmp_path / "a").check(None)


def test_files_of_other_machines_are_committed_without_being_read_here(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    own, other = (artifact_on(bucket, tmp_path / name, made=False) for name in "ab")
    for artifact, name in ((own, "rows-0.npy"), (other, "rows-1.npy")):
        path = artifact.begin() / name
        path.write_bytes(name.encode() * 3)
        record(path)
        send(path)
    own.commit(expected=["rows-0.npy", "rows-1.npy"])
    assert [r for r in bucket.proxy.requests if r.method == "GET" and r.path.endswith("/rows-1.npy")] == []
    assert own.files["rows-1.npy"] == Sum.of(other.partial / "rows-1.npy")
    own.check(None)
    assert not [name for name in bucket.names() if ".partial" in name]


@pytest.mark.parametrize("damage", ["content", "short", "missing", "manifest"])
def test_a_damaged_object_is_found_set_aside_in_the_bucket_and_made_anew(
    bucket: Bucket, tmp_path: Path, damage: str
) -> None:
    bucket.allow_writing()
    made = artifact_on(bucket, tmp_path / "a")
    key = f"runs/x/{made.name}/{'manifest.json' if damage == 'manifest' else 'rows-0.npy'}"
    if damage == "missing":
        bucket.client.delete_object(Bucket=bucket.name, Key=key)
    else:
        bucket.put(key, b"y" * (1000 if damage == "content" else 3))
    there = artifact_on(bucket, tmp_path / "b", made=False)
    if damage == "short":
        assert [d.why for d in look_at([there], 0).damages] == ["has 3 bytes, its manifest says 1000"]
    with pytest.raises(DamagedArtifact):
        there.check(None)
    aside = set_aside(there.path)
    assert not there.complete
    assert f"runs/x/{made.name}.damaged/manifest.json" in bucket.names()
    assert aside.name == f"{there.path.name}.damaged"
    artifact_on(bucket, tmp_path / "b").check(None)
    forget()
    made.check(None)  # the first machine does not go on with what was set aside


def test_what_was_damaged_on_one_machine_is_fetched_from_the_bucket(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    made = artifact_on(bucket, tmp_path / "a")
    for name in ("rows-0.npy", "manifest.json"):
        flip(made.path / name)
        forget()
        made.check(None)
    assert verified(made.path / "rows-0.npy").read_bytes() == b"x" * 1000


def test_a_file_that_changes_in_place_is_what_the_bucket_has(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    a, b = (root_on(bucket, tmp_path / name) / "x.partial" / "progress" for name in "ab")
    a.parent.mkdir(parents=True)
    for text in ("first", "second"):
        a.write_text(text)
        send(a)
        assert refreshed(b).read_text() == text
    withdraw(a)
    assert not refreshed(b).exists()


def test_a_folder_is_never_mixed_of_two_contents(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    a, b = (root_on(bucket, tmp_path / name) / "steps" / "step-1" for name in "ab")
    for number in (1, 2):
        for path in (a / "one", a / "two", a / "mark"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{path.name} {number}")
        send(a / "one", a / "two", a / "mark")
        refreshed_folder(b, "mark")
        assert here(b / "one").read_text() == f"one {number}"
    assert here(b / "two").read_text() == "two 2"
    assert marked(b.parent, "mark") == [b]
    withdraw(a, "mark")
    assert marked(b.parent, "mark") == []
    assert not refreshed_folder(b, "mark").exists()


def test_what_was_used_longest_ago_goes_first_and_comes_again(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    monkeypatch.setattr(module._Kept, "most", None)
    keep_at_most(2500)
    made = [Store(root_on(bucket, tmp_path / "a")).artifact("features/x", {"n": n}, {}) for n in range(4)]
    for artifact in made:
        (artifact.begin() / "rows.npy").write_bytes(bytes(1000))
        artifact.commit()
    there = [Store(root_on(bucket, tmp_path / "b")).artifact("features/x", {"n": n}, {}) for n in range(4)]
    for age, artifact in enumerate(there):
        path = verified(artifact.path / "rows.npy")
        os.utime(path, ns=(time.time_ns() - (900 - age) * 10**9, path.stat().st_mtime_ns))
    assert [(artifact.path / "rows.npy").exists() for artifact in there] == [False, False, True, True]
    assert all(artifact.complete for artifact in there)
    assert verified(there[0].path / "rows.npy").stat().st_size == 1000


def test_a_store_that_fails_for_a_moment_is_asked_again_and_then_named(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    monkeypatch.setattr(object_store, "PAUSE_S", 0.001)
    made = artifact_on(bucket, tmp_path / "a")
    left = [2]

    def busy(method: str, path: str) -> int | None:
        left[0] -= 1
        return 503 if left[0] >= 0 else None

    bucket.proxy.refuse = busy
    there = artifact_on(bucket, tmp_path / "b", made=False)
    there.check(None)
    bucket.proxy.refuse = lambda method, path: 503
    with pytest.raises(object_store.StoreUnavailable, match=rf"out={bucket.url}/runs/x: cannot be used"):
        artifact_on(bucket, tmp_path / "c", made=False).check(None)
    assert made.complete


def test_a_manifest_cannot_name_a_file_outside_of_its_folder(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    there = artifact_on(bucket, tmp_path / "b", made=False)
    manifest = {"kind": there.kind, "fingerprint": there.fingerprint, "files": {"../../../outside": 3}}
    bucket.put(f"runs/x/{there.name}/manifest.json", json.dumps(manifest).encode())
    bucket.put("runs/outside", b"xyz")
    assert there.complete
    with pytest.raises(ValueError, match=r"names labels/k=2-.*/\.\./\.\./\.\./outside, outside of its folder"):
        here(there.path / next(iter(there.files)))
    assert not (tmp_path / "b" / "outside").exists()
