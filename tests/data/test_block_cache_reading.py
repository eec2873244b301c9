"""Which requests are made: whole blocks where a shard is read through, single images where it is not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from grappa_dist.data import block_cache
from grappa_dist.data.block_cache import BLOCK, BlockFile, CacheSettings, count_damaged
from grappa_dist.data.remote import objects_at
from tests.stores import StoreProxy, proxy_to, ranged

NUM_BLOCKS, IMAGE = 6, 50_000
DATA = np.random.default_rng(0).integers(0, 256, NUM_BLOCKS * BLOCK - 12_345, dtype=np.uint8).tobytes()
PLACES = range(0, len(DATA) - IMAGE, IMAGE)


@pytest.fixture(scope="module")
def web() -> Iterator[StoreProxy]:
    """A web server of one large object, held in memory."""
    with proxy_to(lambda method, _, headers, __: ranged(DATA, headers, '"1"', head=method == "HEAD")) as proxy:
        yield proxy


def open_file(web: StoreProxy, folder: Path, cache_bytes: int) -> BlockFile:
    web.reset()
    about = objects_at([f"{web.url}/t.tar"])[0]
    return BlockFile(about, CacheSettings(str(folder / "cache"), cache_bytes, 4))


def read_alone(file: BlockFile) -> None:
    """The first images of a block, after which it is wanted whole."""
    for _ in range(3):
        assert file.read(0, 10) == DATA[:10]


def sent(web: StoreProxy) -> int:
    return web.sent("t.tar")


def test_reading_through_takes_whole_blocks_and_hardly_more_bytes_than_there_are(
    web: StoreProxy, tmp_path: Path
) -> None:
    file = open_file(web, tmp_path, 2**26)
    for at in PLACES:
        assert file.read(at, IMAGE) == DATA[at : at + IMAGE]
    assert len(web.ranges()) <= 3 * NUM_BLOCKS + 3 < len(PLACES) / 20
    assert sent(web) < 1.05 * len(DATA)
    before = sent(web)
    assert all(file.read(at, IMAGE) == DATA[at : at + IMAGE] for at in PLACES)
    assert open_file(web, tmp_path, 2**26).read(0, len(DATA)) == DATA  # as another process would
    assert sent(web) in (0, before)


def test_a_shuffled_window_takes_each_block_once(web: StoreProxy, tmp_path: Path) -> None:
    file = open_file(web, tmp_path, 2**26)
    for at in np.random.default_rng(1).permutation(list(PLACES)).tolist():
        assert file.read(at, IMAGE) == DATA[at : at + IMAGE]
    assert sent(web) < 1.3 * len(DATA)


def test_a_lone_image_is_all_that_is_fetched_of_its_block(web: StoreProxy, tmp_path: Path) -> None:
    file = open_file(web, tmp_path, 2**26)
    for number in range(NUM_BLOCKS - 1):
        file.read(number * BLOCK + 100, 1000)
    assert web.ranges() == [(n * BLOCK + 100, n * BLOCK + 1099) for n in range(NUM_BLOCKS - 1)]


@pytest.mark.parametrize("cache_bytes", [0, BLOCK - 1, BLOCK, 2 * BLOCK])
def test_a_cache_that_is_too_small_reads_at_most_three_times_the_bytes(
    web: StoreProxy, tmp_path: Path, cache_bytes: int
) -> None:
    file, asked = open_file(web, tmp_path, cache_bytes), 0
    for at in np.random.default_rng(2).choice(list(PLACES), 4 * len(PLACES)).tolist():
        assert file.read(at, IMAGE) == DATA[at : at + IMAGE]
        asked += IMAGE
    assert sent(web) <= 3.1 * asked + NUM_BLOCKS * BLOCK
    assert cache_bytes or sent(web) == asked


def test_threads_that_want_one_block_fetch_it_once(web: StoreProxy, tmp_path: Path) -> None:
    file = open_file(web, tmp_path, 2**26)
    read_alone(file)
    web.latency_s = 0.2
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda at: file.read(at, IMAGE), PLACES[:40]))
    web.latency_s = 0
    assert parts == [DATA[at : at + IMAGE] for at in PLACES[:40]]
    assert web.ranges().count((0, BLOCK - 1)) == 1


def test_many_threads_that_read_through_take_each_block_once(web: StoreProxy, tmp_path: Path) -> None:
    file = open_file(web, tmp_path, 2**26)
    with ThreadPoolExecutor(8) as pool:
        for at, data in zip(PLACES, pool.map(lambda at: file.read(at, IMAGE), PLACES), strict=True):
            assert data == DATA[at : at + IMAGE]
    whole = [span for span in web.ranges() if span[0] % BLOCK == 0 and span[1] - span[0] > IMAGE]
    assert len(whole) == len(set(whole)) <= NUM_BLOCKS
    assert sent(web) < 1.1 * len(DATA)


def test_an_error_of_a_block_fails_every_reader_that_waits_for_it_and_the_next_one_asks_again(
    web: StoreProxy, tmp_path: Path
) -> None:
    file = open_file(web, tmp_path, 2**26)
    read_alone(file)
    web.latency_s, web.refuse = 0.2, lambda method, path: 403

    def read(at: int) -> str:
        with pytest.raises(ValueError, match=f"bytes 0-{BLOCK - 1} cannot be read") as caught:
            file.read(at, IMAGE)
        return str(caught.value)

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(read, PLACES[:4]))) == 1
    web.reset()
    assert file.read(5, 10) == DATA[5:15]


def test_places_beyond_the_object_are_refused_without_asking(web: StoreProxy, tmp_path: Path) -> None:
    file = open_file(web, tmp_path, 0)
    with pytest.raises(ValueError, match=rf"t\.tar: has {len(DATA)} bytes, but the index has 20 bytes at"):
        file.read(len(DATA) - 10, 20)
    assert file.read(len(DATA), 0) == b""
    assert web.ranges() == []


def test_no_more_requests_are_in_flight_than_asked_for(web: StoreProxy) -> None:
    pool = block_cache.fetchers(CacheSettings(in_flight=3))
    running, most, lock = 0, 0, threading.Lock()
    gate = threading.Barrier(3, timeout=10)

    def work(_: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait()
        with lock:
            running -= 1

    list(pool.map(work, range(9)))
    assert most == 3


def test_a_block_that_was_damaged_on_the_disk_is_fetched_again(web: StoreProxy, tmp_path: Path) -> None:
    file = open_file(web, tmp_path, 2**26)
    assert all(file.read(at, IMAGE) == DATA[at : at + IMAGE] for at in PLACES)
    kept = sorted(path for path in (tmp_path / "cache").iterdir() if path.stat().st_size > IMAGE)
    for path in kept[:3]:
        with path.open("r+b") as handle:
            handle.seek(1_000_000)
            handle.write(b"damage")
    assert all(file.read(at, IMAGE) == DATA[at : at + IMAGE] for at in PLACES)
    assert count_damaged(CacheSettings(str(tmp_path / "cache"))) == 3
