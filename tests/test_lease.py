"""The lease of a run on an object store: one driver at a time, by the store's clock, taken over when it has expired."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from grappa_dist import lease as module
from grappa_dist.artifacts import Store
from grappa_dist.bucket import bucket_of, folder_of
from grappa_dist.lease import FOLDER, Lease, holder, leased
from tests.conftest import Bucket
from tests.stores import Answer


def root_on(bucket: Bucket, machine: Path) -> Path:
    root = folder_of(f"{bucket.url}/runs/x", str(machine))
    root.mkdir(parents=True, exist_ok=True)
    return root


def lease_on(bucket: Bucket, machine: Path) -> Lease:
    found = bucket_of(root_on(bucket, machine))
    assert found is not None
    return Lease(found)


def test_a_second_driver_is_refused_with_who_holds_the_run_until_it_is_released(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    with leased(root_on(bucket, tmp_path / "a")) as first:
        assert first is not None
        second = lease_on(bucket, tmp_path / "b")
        with pytest.raises(ValueError, match=rf"writing to {bucket.url}/runs/x \(process \d+ on .*ends in [56]\d s"):
            second.take()
    second.take()
    found = holder(second.bucket)
    assert found is not None
    assert (found.id, found.holds) == (second.id, True)
    assert [name for name in bucket.names() if "clock" in name] == []


def test_an_expired_lease_is_taken_over_and_whoever_had_it_knows(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    first, second = lease_on(bucket, tmp_path / "a"), lease_on(bucket, tmp_path / "b")
    first.take()
    monkeypatch.setattr(module, "LEASE_S", 0.0)
    second.take()
    assert not first._write()
    heard = []
    monkeypatch.setattr(module.signal, "raise_signal", heard.append)
    monkeypatch.setattr(module, "RENEW_S", 0.01)
    first.renew()
    assert heard == [module.signal.SIGTERM]
    assert first.lost.startswith("it was taken over by process")
    assert second._write()


def test_of_many_who_take_an_expired_lease_one_gets_it(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    lease_on(bucket, tmp_path / "dead").take()
    monkeypatch.setattr(module, "LEASE_S", 0.0)
    several, got = [lease_on(bucket, tmp_path / str(number)) for number in range(4)], list[str]()
    for lease in several:
        lease.number = 1

    def take(lease: Lease) -> None:
        if lease._write():
            got.append(lease.id)

    threads = [threading.Thread(target=take, args=(lease,)) for lease in several]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1


def test_a_driver_that_slept_through_its_successors_is_not_fooled_by_a_number_that_is_free_again(
    bucket: Bucket, tmp_path: Path
) -> None:
    bucket.allow_writing()
    slept, other = lease_on(bucket, tmp_path / "a"), lease_on(bucket, tmp_path / "b")
    slept.take()
    other.number = slept.number
    for _ in range(4):
        assert other._write()
    assert f"runs/x/{FOLDER}/{slept.number + 1:012d}.json" not in bucket.names()
    assert not slept._write()


def test_a_driver_killed_on_the_same_machine_is_followed_at_once(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    lease_on(bucket, tmp_path / "a").take()  # and it is never released
    began = time.monotonic()
    with Store(root_on(bucket, tmp_path / "a")).lock() as again:
        assert again is not None
        assert again.resumed
    assert time.monotonic() - began < module.LEASE_S / 2


def test_a_clock_that_is_wrong_by_hours_changes_nothing(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    lease_on(bucket, tmp_path / "a").take()
    second = lease_on(bucket, tmp_path / "b")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    found = holder(second.bucket)
    assert found is not None
    assert found.holds


def test_a_store_without_conditional_writes_is_refused_with_what_is_needed(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()

    def ignoring(answer: Answer) -> Answer:
        return (200, {"ETag": '"x"'}, b"") if answer[0] == 412 else answer

    bucket.proxy.change = ignoring
    with pytest.raises(ValueError, match=r"lets an object be created twice; expected a store .*If-None-Match"):
        lease_on(bucket, tmp_path / "a").take()


def test_a_bucket_that_is_not_there_is_named(bucket: Bucket, tmp_path: Path) -> None:
    bucket.allow_writing()
    root = folder_of("s3://no-such-bucket-anywhere/runs/x", str(tmp_path))
    with pytest.raises(ValueError, match="out=s3://no-such-bucket-anywhere/runs/x: cannot be used"):
        Store(root).lock().__enter__()


def test_a_run_that_ends_because_its_lease_is_lost_says_so(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.allow_writing()
    monkeypatch.setattr(module, "RENEW_S", 0.01)
    heard = threading.Event()
    monkeypatch.setattr(module.signal, "raise_signal", lambda number: heard.set())
    other = lease_on(bucket, tmp_path / "b")

    def lose() -> None:
        with leased(root_on(bucket, tmp_path / "a")) as lease:
            assert lease is not None
            while not heard.is_set():
                other.number = lease.number
                other._write()
            raise InterruptedError("as SIGTERM does")

    with pytest.raises(RuntimeError, match=rf"the lease of {bucket.url}/runs/x was lost: it was taken over by process"):
        lose()
