"""A store that answers wrongly: what may pass is asked for again, and what is another object is never taken for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from grappa_dist import object_store
from grappa_dist.data.block_cache import BlockFile, CacheSettings
from grappa_dist.data.remote import RemoteFile, fetch_whole, list_tars, objects_at
from grappa_dist.data.shards import ImageShards
from grappa_dist.object_store import StoreUnavailable
from tests.conftest import Bucket
from tests.data.written import write_folder, write_tar
from tests.faults.faulty_http import PASSING, Fault, always, in_turn, now_and_then
from tests.stores import StoreProxy, folder_backend, proxy_to

DATA = bytes(range(251)) * 400
CHANGED = {
    Fault.NO_RANGE: "status 416, no such bytes, but it had 100400 when it was indexed; the shard changed",
    Fault.OTHER_TAG: 'its version is "another", but was .* the shard changed',
    Fault.WHOLE: "status 200 for bytes 7000-8999; the server has no ranges",
    Fault.REDIRECT: "bytes 7000-8999 cannot be read: TooManyRedirects",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "PAUSE_S", 0.001)
    monkeypatch.setattr(object_store, "_SILENT_S", 0.2)


@pytest.fixture
def web(tmp_path: Path) -> Iterator[StoreProxy]:
    (tmp_path / "t.tar").write_bytes(DATA)
    with proxy_to(folder_backend(tmp_path)) as proxy:
        yield proxy


def opened(web: StoreProxy) -> RemoteFile:
    file = RemoteFile(objects_at([f"{web.url}/t.tar"])[0])
    assert file.fetch(0, 1) == DATA[:1]
    return file


@pytest.mark.parametrize("fault", sorted(PASSING | {Fault.HANG}, key=lambda fault: fault.name))
def test_what_passes_costs_further_attempts_and_never_a_byte(web: StoreProxy, fault: Fault) -> None:
    file = opened(web)
    web.spoil = in_turn(fault, fault, None, fault)
    for at in (7000, 9000):
        assert file.fetch(at, at + 2000) == DATA[at : at + 2000]


@pytest.mark.parametrize("fault", sorted(PASSING, key=lambda fault: fault.name))
def test_what_lasts_ends_after_some_attempts_as_an_error_of_the_store(web: StoreProxy, fault: Fault) -> None:
    file, before = opened(web), len(web.requests)
    web.spoil = always(fault)
    with pytest.raises(StoreUnavailable, match=r"t\.tar: bytes 7000-8999 cannot be read in 6 attempts: "):
        file.fetch(7000, 9000)
    assert fault in (Fault.CUT, Fault.RESET) or len(web.requests) - before == object_store.ATTEMPTS


@pytest.mark.parametrize("fault", list(CHANGED))
def test_an_answer_of_another_object_is_named_at_once(web: StoreProxy, fault: Fault) -> None:
    file = opened(web)
    web.spoil = in_turn(*[fault] * 12)
    with pytest.raises(ValueError, match=rf"t\.tar: {CHANGED[fault]}"):
        file.fetch(7000, 9000)


def test_headers_and_whole_files_are_asked_for_again_too(web: StoreProxy, tmp_path: Path) -> None:
    write_folder(tmp_path / "f", 6, rows_per_shard=3)
    local = ImageShards.open([tmp_path / "f"], None)
    for seed in range(3):
        web.spoil = now_and_then(seed, 0.3, PASSING | {Fault.HANG})
        shards = ImageShards.open([f"{web.url}/f"], None, CacheSettings(str(tmp_path / f"cache-{seed}"), 2**20, 4))
        assert shards.fingerprint == local.fingerprint
        assert list(shards.images(range(6))) == list(local.images(range(6)))


def test_less_than_a_whole_object_is_never_taken_for_it(bucket: Bucket) -> None:
    bucket.put("index.json", DATA)
    bucket.proxy.change = lambda answer: (
        answer[0],
        {k: v for k, v in answer[1].items() if "checksum" not in k},
        answer[2],
    )
    bucket.proxy.spoil = in_turn(*[Fault.SHORT] * 4)  # of which requests for headers have nothing to lose
    assert fetch_whole(f"{bucket.url}/index.json") == DATA
    bucket.proxy.spoil = always(Fault.SHORT)
    with pytest.raises(StoreUnavailable, match=r"index.json: all of it cannot be read in 6 attempts: .*of 100400"):
        fetch_whole(f"{bucket.url}/index.json")


def test_a_short_block_never_reaches_the_cache(web: StoreProxy, tmp_path: Path) -> None:
    settings = CacheSettings(str(tmp_path / "cache"), 2**20, 4)
    file = BlockFile(objects_at([f"{web.url}/t.tar"])[0], settings)
    assert [file.read(0, 10) for _ in range(3)] == [DATA[:10]] * 3  # after that the block is wanted whole
    web.spoil = always(Fault.SHORT)
    with pytest.raises(StoreUnavailable, match="of 100400 bytes came"):
        file.read(0, 10)
    web.spoil = always(None)
    assert file.read(0, len(DATA)) == DATA
    assert BlockFile(file.source, settings).read(0, len(DATA)) == DATA


def test_the_query_of_a_signed_address_is_in_no_message(web: StoreProxy) -> None:
    file = opened(web)
    web.change = lambda answer: (302, {"Location": "/elsewhere?signature=hidden"}, b"")
    web.refuse = lambda method, path: 403 if "elsewhere" in path else None
    with pytest.raises(ValueError, match=r"403.*elsewhere") as caught:
        file.fetch(7000, 9000)
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("fault", [Fault.SLOW_DOWN, Fault.RESET, Fault.CUT, Fault.SHORT])
def test_what_passes_on_s3_costs_further_attempts_and_never_a_byte(
    bucket: Bucket, tmp_path: Path, fault: Fault
) -> None:
    bucket.put("t.tar", DATA)
    file = RemoteFile(objects_at([f"{bucket.url}/t.tar"])[0])
    assert file.fetch(0, 1) == DATA[:1]
    bucket.proxy.spoil = in_turn(fault, fault)
    assert file.fetch(7000, 9000) == DATA[7000:9000]


def test_another_version_on_s3_is_refused_whoever_compares(bucket: Bucket) -> None:
    bucket.put("t.tar", DATA)
    file = RemoteFile(objects_at([f"{bucket.url}/t.tar"])[0])
    assert file.fetch(0, 1) == DATA[:1]
    bucket.proxy.spoil = always(Fault.OTHER_TAG)
    with pytest.raises(ValueError, match=r"t\.tar: bytes 7000-8999: another object .* the shard changed"):
        file.fetch(7000, 9000)
    bucket.proxy.spoil = always(Fault.NO_RANGE)
    with pytest.raises(ValueError, match=r"t\.tar: bytes 7000-8999: another object .* the shard changed"):
        file.fetch(7000, 9000)


def test_a_listing_that_is_cut_off_is_no_listing(bucket: Bucket, tmp_path: Path) -> None:
    for name in "abc":
        bucket.put(f"f/{name}.tar", write_tar(tmp_path / "t.tar", {f"{name}.jpg": b"x"}).read_bytes())
    for fault in (Fault.HALF_LISTING, Fault.NO_TOKEN):
        bucket.proxy.spoil = in_turn(fault, fault)
        assert [tar.name for tar in list_tars(f"{bucket.url}/f")] == ["a.tar", "b.tar", "c.tar"]
        bucket.proxy.spoil = always(fault)
        with pytest.raises(StoreUnavailable, match=r"/f: listing cannot be read in 6 attempts"):
            list_tars(f"{bucket.url}/f")
