"""A mirror on a store that fails now and then, or answers wrongly: what is copied and fetched is whole all the same."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from grappa_dist import object_store
from grappa_dist.artifacts import Artifact, Store
from grappa_dist.object_store import StoreUnavailable
from grappa_dist.stages.mirror import Mirror
from grappa_dist.storage import StorageError
from tests.conftest import Bucket
from tests.faults.faulty_http import PASSING, Fault, always, now_and_then
from tests.stages.test_mirror import mending_in


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PAUSE_S", 0.001)


def artifact_in(root: Path, *, made: bool) -> Artifact:
    artifact = Store(root).artifact("labels/k=2", {}, {})
    if made:
        folder = artifact.begin()
        for number in range(12):
            (folder / f"rows-{number}.npy").write_bytes(bytes([number]) * 1001)
        artifact.commit()
    return artifact


@pytest.mark.parametrize("seed", range(3))
def test_a_copy_over_a_store_that_fails_now_and_then_is_whole(bucket: Bucket, tmp_path: Path, seed: int) -> None:
    bucket.allow_writing()
    bucket.proxy.spoil = now_and_then(seed, 0.3, PASSING - {Fault.RESET})  # s3fs has no end of its own after these
    made, fetched = artifact_in(tmp_path / "a", made=True), artifact_in(tmp_path / "b", made=False)
    Mirror(bucket.url).save([made])
    assert Mirror(bucket.url).fetch([fetched], mending_in(tmp_path / "b")) == [fetched]
    for path in made.path.iterdir():
        assert (fetched.path / path.name).read_bytes() == path.read_bytes()


def test_a_store_that_keeps_failing_is_named_with_the_request(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    made, fetched = artifact_in(tmp_path / "a", made=True), artifact_in(tmp_path / "b", made=False)
    Mirror(bucket.url).save([made])
    mirror = Mirror(bucket.url)
    bucket.proxy.spoil = always(Fault.SHORT)
    with pytest.raises(StoreUnavailable, match=rf"mirror={bucket.url}: .*\(labels/k=2.*read\): .*(not JSON|hecksum)"):
        mirror.fetch([fetched], mending_in(tmp_path / "b"))
    bucket.proxy.spoil = always(Fault.SLOW_DOWN)
    with pytest.raises(StoreUnavailable, match=r"request rate|Service Unavailable"):
        mirror.fetch([fetched], mending_in(tmp_path / "b"))
    assert not fetched.path.exists()


def test_a_full_disk_is_no_fault_of_the_store_or_a_setting(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    Mirror(bucket.url).save([artifact_in(tmp_path / "a", made=True)])
    mirror, fetched = Mirror(bucket.url), artifact_in(tmp_path / "b", made=False)

    def refuse(_: str, local: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), local)

    monkeypatch.setattr(mirror.remote._fs, "get_file", refuse)
    with pytest.raises(StorageError, match=r"rows-0.npy: No space left on device, [\d,]+ bytes are free on the file"):
        mirror.fetch([fetched], mending_in(tmp_path / "b"))
