"""Indexes with lists that are written row by row: the bytes that faiss writes, in memory that does not grow with n."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from grappa_dist.retrieval import faiss_index, faiss_lists
from grappa_dist.retrieval.faiss_index import Kind, NumberedRows, read, write
from grappa_dist.retrieval.faiss_lists import _EMPTY, row_bytes_of
from grappa_dist.retrieval.nearest import Rows, blocks_of

MIB = 2**20


def kind_of(lists: int, rows: int) -> Kind:
    return Kind(f"IVF{lists},Flat", lists, probes=1, trained_for=rows)


def drawn(count: int, channels: int, seed: int = 0) -> Rows:
    rows = np.random.default_rng(seed).normal(size=(count, channels)).astype(np.float32)
    unit: Rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def numbered(rows: Rows, bad: Sequence[int] = (), parts: int = 3) -> NumberedRows:
    """Rows in uneven parts, an empty one among them, with ids that are not consecutive."""
    cuts = [0, 0, *(len(rows) * i // (parts + 1) + i for i in range(1, parts))]
    return NumberedRows(np.split(rows, cuts), 3 * np.arange(len(rows)) + 5, np.array(sorted(bad), np.int64))


def by_faiss(path: Path, rows: NumberedRows, lists: int) -> bytes:
    """The file that faiss itself writes of an index that it filled in memory."""
    index = faiss.index_factory(rows.parts[0].shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(rows.take(rows.sample(faiss_index.TRAIN_PER_LIST * lists, lists)))
    for first, block in blocks_of(rows.parts, faiss_index.BLOCK):
        good = rows.good[first : first + len(block)]
        index.add_with_ids(block[good], rows.ids[first : first + len(block)][good])
    faiss.write_index(index, str(path))
    return path.read_bytes()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "BLOCK", 300)
    monkeypatch.setattr(faiss_lists, "AT_ONCE", 128)


@pytest.mark.parametrize(("count", "lists", "bad"), [(1000, 16, (0, 1, 2, 500, 999)), (2, 1, (1,)), (1, 1, ())])
@pytest.mark.filterwarnings("ignore")
def test_the_file_has_the_bytes_that_faiss_writes(count: int, lists: int, bad: Sequence[int], tmp_path: Path) -> None:
    rows = numbered(drawn(count, 5), bad)
    write(tmp_path / "ours", rows, kind_of(lists, count))
    assert (tmp_path / "ours").read_bytes() == by_faiss(tmp_path / "theirs", rows, lists)


@pytest.mark.parametrize("left", [0, 1, 5, 40])
def test_lists_of_which_few_have_rows_are_written_as_faiss_writes_them(left: int, tmp_path: Path) -> None:
    count, lists = 640, 64
    whole, rows = numbered(drawn(count, 5)), numbered(drawn(count, 5), range(count - left))
    write(tmp_path / "whole", whole, kind_of(lists, count))
    write(tmp_path / "ours", rows, kind_of(lists, count), tmp_path / "whole")
    index = faiss.read_index(str(tmp_path / "whole"))
    index.remove_ids(faiss.IDSelectorBatch(whole.ids[rows.bad]))
    faiss.write_index(index, str(tmp_path / "theirs"))
    assert held(tmp_path / "ours") == held(tmp_path / "theirs")
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size


def held(path: Path) -> list[list[int]]:
    """The ids of every list, sorted: faiss fills a place that is freed with the last row of its list."""
    index = read(path)
    lists: Any = index.invlists  # lives as long as the index
    sizes = map(lists.list_size, range(lists.nlist))
    return [sorted(faiss.rev_swig_ptr(lists.get_ids(i), size).tolist()) if size else [] for i, size in enumerate(sizes)]


def test_rows_stay_in_their_lists_when_others_come_and_go(tmp_path: Path) -> None:
    rows, count, lists = drawn(600, 5), 400, 8
    first = NumberedRows([rows[:count]], np.arange(count), np.array([7], np.int64))
    write(tmp_path / "first", first, kind_of(lists, count))
    before = {row: number for number, ids in enumerate(held(tmp_path / "first")) for row in ids}
    kept = np.r_[0:100, 150:600]
    write(
        tmp_path / "then",
        NumberedRows([rows[kept]], kept, np.array([3], np.int64)),
        kind_of(lists, count),
        tmp_path / "first",
    )
    after = {row: number for number, ids in enumerate(held(tmp_path / "then")) for row in ids}
    assert sorted(after) == [row for row in kept.tolist() if row != 3]
    assert all(after[row] == number for row, number in before.items() if row in after)
    write(tmp_path / "again", first, kind_of(lists, count), tmp_path / "first")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "first").read_bytes()
    found = read(tmp_path / "then", mapped=True)
    assert found.ntotal == len(after)
    assert found.search(rows[kept[-5:]], 1)[1][:, 0].tolist() == kept[-5:].tolist()


def own_bytes() -> int:
    """What this process holds that is of no file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watched(list[Rows]):
    """Parts that note what the process holds whenever they are read."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        super().__init__(parts)
        self.seen: list[int] = []

    def __iter__(self) -> Iterator[Rows]:
        for part in super().__iter__():
            self.seen.append(own_bytes())
            yield part


def test_a_process_that_writes_an_index_does_not_hold_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_index, "BLOCK", 4096)
    count, channels = 150_000, 64
    np.save(tmp_path / "rows.npy", drawn(count, channels))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    rows = NumberedRows(
        Watched([np.asarray(mapped)[i : i + 1000] for i in range(0, count, 1000)]),
        np.arange(count),
        np.array([], np.int64),
    )
    write(tmp_path / "index", rows, kind_of(32, count))
    seen = rows.parts.seen  # type: ignore[attr-defined]
    assert max(seen) - seen[0] < count * channels * 4 / 2 - 2 * MIB  # 37 MiB are the rows
    index = read(tmp_path / "index", mapped=True)
    assert (index.ntotal, index.d) == (count, channels)


@pytest.mark.parametrize("empty", [b"", b"\0" * 100, b"\0" * 50 + _EMPTY.pack(b"ilar", 5, 8, b"sprs", 0)])
def test_another_layout_of_lists_is_not_taken_for_the_known_one(empty: bytes) -> None:
    assert row_bytes_of(empty, 4) == 0
    assert row_bytes_of(b"\0" * 50 + _EMPTY.pack(b"ilar", 4, 8, b"sprs", 0), 4) == 8


def test_a_faiss_with_another_layout_writes_the_index_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = numbered(drawn(500, 8), bad=(3, 499))
    write(tmp_path / "row by row", rows, kind_of(16, 500))
    monkeypatch.setattr(faiss_index, "row_bytes_of", lambda empty, num_lists: 0)
    write(tmp_path / "at once", rows, kind_of(16, 500))
    assert (tmp_path / "at once").read_bytes() == (tmp_path / "row by row").read_bytes()
    write(tmp_path / "kept", rows, kind_of(16, 500), tmp_path / "at once")
    assert (tmp_path / "kept").read_bytes() == (tmp_path / "at once").read_bytes()
