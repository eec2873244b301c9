"""A run's bucket on a store that fails now and then, or answers wrongly: what is sent and fetched is whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from grappa_dist import bucket as module
from grappa_dist import object_store
from grappa_dist.artifacts import Artifact, Store
from grappa_dist.bucket import folder_of
from grappa_dist.object_store import StoreUnavailable
from grappa_dist.storage import StorageError
from tests.conftest import Bucket
from tests.faults.faulty_http import PASSING, Fault, always, in_turn, now_and_then
from tests.stores import Answer


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PAUSE_S", 0.001)


def artifact_on(bucket: Bucket, machine: Path, *, made: bool) -> Artifact:
    artifact = Store(folder_of(f"{bucket.url}/runs/x", str(machine))).artifact("labels/k=2", {}, {})
    if made:
        folder = artifact.begin()
        for number in range(8):
            (folder / f"rows-{number}.npy").write_bytes(bytes([number]) * 1001)
        artifact.commit()
    return artifact


@pytest.mark.parametrize("seed", range(2))
def test_what_goes_over_a_store_that_fails_now_and_then_is_whole(bucket: Bucket, tmp_path: Path, seed: int) -> None:
    bucket.allow_writing()
    bucket.proxy.spoil = now_and_then(seed, 0.3, PASSING - {Fault.RESET})  # s3fs has no end of its own after these
    made, fetched = artifact_on(bucket, tmp_path / "a", made=True), artifact_on(bucket, tmp_path / "b", made=False)
    fetched.check(None)
    for path in made.path.iterdir():
        assert (fetched.path / path.name).read_bytes() == path.read_bytes()


def without_checksums(answer: Answer) -> Answer:
    """As a store answers that keeps none; a client cannot tell then that an answer is short."""
    status, headers, body = answer
    return status, {name: value for name, value in headers.items() if "checksum" not in name.lower()}, body


def test_a_small_object_is_asked_for_again_where_less_of_it_came_than_the_store_has(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put("runs/x/.lease/1.json", b"0123456789")
    run = module.bucket_of(folder_of(f"{bucket.url}/runs/x", str(tmp_path)))
    assert run is not None
    bucket.proxy.change = without_checksums
    bucket.proxy.spoil = in_turn(*[Fault.SHORT] * 4)  # of which requests for headers have nothing to lose
    assert run.read(".lease/1.json") == b"0123456789"
    bucket.proxy.spoil = always(Fault.SHORT)
    with pytest.raises(StoreUnavailable, match=r"/runs/x: .*\(.lease/1.json read\): .*5 of 10 bytes came"):
        run.read(".lease/1.json")
    bucket.proxy.spoil = always(None)
    assert run.read(".lease/2.json") is None


def test_a_store_that_keeps_failing_is_named_with_the_request_and_nothing_appears(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.allow_writing()
    artifact_on(bucket, tmp_path / "a", made=True)
    there = artifact_on(bucket, tmp_path / "b", made=False)
    for fault, said in ((Fault.SHORT, "bytes came|hecksum"), (Fault.SLOW_DOWN, "request rate|Service Unavailable")):
        bucket.proxy.spoil = always(fault)
        with pytest.raises(StoreUnavailable, match=rf"out={bucket.url}/runs/x: .*\(labels/k=2.*read\): .*({said})"):
            there.check(None)
    assert not there.path.exists()


def test_a_full_disk_is_no_fault_of_the_store_or_a_setting(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    artifact_on(bucket, tmp_path / "a", made=True)
    there = artifact_on(bucket, tmp_path / "b", made=False)

    def refuse(fs: object, name: str, path: Path) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(module, "_get", refuse)
    with pytest.raises(StorageError, match=r"No space left on device, [\d,]+ bytes are free on the file"):
        there.check(None)
    assert not there.path.exists()
