"""The cache of blocks: never above its bound, whoever writes, and never a wrong byte."""

from __future__ import annotations

import fcntl
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from grappa_dist.data.block_cache import PIECE, BlockCache, CacheSettings, count_damaged

WRITER = """
import random, sys
from grappa_dist.data.block_cache import BlockCache, CacheSettings
cache, draw = BlockCache(CacheSettings(sys.argv[1], 100_000)), random.Random(int(sys.argv[2]))
for _ in range(600):
    number = draw.randrange(80)
    size = 1 + 500 * (number % 13)
    data = cache.read(str(number), 0, size)
    assert data in (None, bytes([number]) * size), number
    if data is None:
        cache.put(str(number), bytes([number]) * size)
"""


def block(number: int, size: int = 1000) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * (size // 32) + bytes(size % 32)


def taken(folder: Path) -> int:
    """Bytes in the folder at one moment: nobody writes while its ledger is locked."""
    with (folder / ".bytes").open("a") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.iterdir() if path.name != ".bytes")


def test_a_block_comes_back_in_parts_until_it_is_pushed_out_by_newer_ones(tmp_path: Path) -> None:
    cache = BlockCache(CacheSettings(str(tmp_path), 10_080))
    for number in range(10):
        cache.put(str(number), block(number))
    assert cache.read("0", 10, 90) == block(0)[10:100]  # read last of all now
    cache.put("10", block(10))
    assert cache.read("1", 0, 1000) is None
    assert [cache.read(str(n), 0, 1000) == block(n) for n in (0, 9, 10)] == [True] * 3
    assert taken(tmp_path) <= 10_080


@pytest.mark.parametrize("limit", [0, 1, 1007, 1008, 1009, 2500])  # a checksum has 8 bytes
def test_a_bound_near_one_block_or_nothing_holds_too(tmp_path: Path, limit: int) -> None:
    cache = BlockCache(CacheSettings(str(tmp_path / "c"), limit))
    for number in range(7):
        cache.put(str(number), block(number))
        assert cache.read(str(number), 0, 1000) == (block(number) if limit >= 1008 else None)
        assert not limit or taken(tmp_path / "c") <= limit
    assert (tmp_path / "c").exists() == (limit > 0)


def test_processes_on_one_cache_hold_the_bound_and_read_what_was_written(tmp_path: Path) -> None:
    cache_folder = tmp_path / "c"
    BlockCache(CacheSettings(str(cache_folder), 100_000))
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(cache_folder), str(seed)]) for seed in range(3)]
    most = 0
    while any(writer.poll() is None for writer in writers):
        most = max(most, taken(cache_folder))
        time.sleep(0.001)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert 50_000 < most <= 100_000
    assert all(len(path.name) < 3 or path.name == ".bytes" for path in cache_folder.iterdir())  # nothing half written


def test_threads_on_one_cache_hold_the_bound(tmp_path: Path) -> None:
    cache = BlockCache(CacheSettings(str(tmp_path), 20_000))

    def write(first: int) -> None:
        for number in range(first, first + 100):
            cache.put(str(number % 37), block(number % 37))

    threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 10_000 < taken(tmp_path) <= 20_000


def test_what_a_killed_writer_left_counts_and_goes_first(tmp_path: Path) -> None:
    cache = BlockCache(CacheSettings(str(tmp_path), 5_000))
    (tmp_path / ".x.123.abc").write_bytes(bytes(4_500))
    for number in range(4):
        cache.put(str(number), block(number))
        assert taken(tmp_path) <= 5_000
    assert cache.read("3", 0, 1000) == block(3)
    assert not (tmp_path / ".x.123.abc").exists()


LONG = block(1, 3 * PIECE + 77)


@pytest.mark.parametrize(
    "damage",
    {
        "a bit of the data": lambda data: flipped(data, PIECE + 5),
        "a bit of a checksum": lambda data: flipped(data, len(LONG) + 9),
        "cut off": lambda data: data[: PIECE + 20],
        "empty": lambda data: b"",
        "a tail that was never written": lambda data: data[:PIECE] + bytes(len(data) - PIECE),
        "zeros": lambda data: bytes(len(data)),
        "more than was written": lambda data: data + b"x",
    }.items(),
    ids=lambda damage: damage[0],
)
def test_a_damaged_block_is_dropped_and_said_once(tmp_path: Path, damage: tuple[str, Callable[[bytes], bytes]]) -> None:
    settings = CacheSettings(str(tmp_path), 10**6)
    cache = BlockCache(settings)
    cache.put("k", LONG)
    file = tmp_path / "k"
    file.write_bytes(damage[1](file.read_bytes()))
    for _ in range(2):
        assert cache.read("k", PIECE - 10, 30) is None
        assert count_damaged(settings) == 1
    cache.put("k", LONG)
    assert [cache.read("k", at, 1000) for at in (0, PIECE - 1, len(LONG) - 1000)] == [
        LONG[at : at + 1000] for at in (0, PIECE - 1, len(LONG) - 1000)
    ]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


def test_the_file_of_another_block_is_damaged_too(tmp_path: Path) -> None:
    cache = BlockCache(CacheSettings(str(tmp_path), 10**6))
    cache.put("a", LONG)
    (tmp_path / "a").rename(tmp_path / "b")
    assert cache.read("b", 0, 10) is None


def test_a_folder_that_cannot_be_used_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"resources\.cache_dir=.*file.*: .*expected a folder"):
        BlockCache(CacheSettings(str(tmp_path / "file" / "c"), 10))
