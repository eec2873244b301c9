"""The file of an index of faiss with inverted lists, filled row by row from where the rows are mapped.

faiss itself holds all lists in memory before it writes them, and doubles a list that is full. Here only the file has
them: it has its whole length from the start, and every row is written to its place in it. So a process holds one block
of rows, and the system drops the pages of the file as it needs memory. The bytes are those that faiss would write.

Shapes: n rows, D channels, L lists.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from grappa_dist.storage import allocate, open_to_write

AT_ONCE = 4096  # rows whose places are worked out together: 8 bytes for each of their numbers
_UNIT = 4  # bytes of a channel; all places behind the head are multiples of it
_ID_BYTES = 8
# What an index without rows ends with: a mark, how many lists, bytes of a row, and that none of them has rows.
_EMPTY = struct.Struct("<4sQQ4sQ")
_LISTS, _ALL, _SOME = b"ilar", b"full", b"sprs"
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class ListedBlock:
    """Some rows, the id of each, and the list that it goes to."""

    rows: NDArray[np.float32]  # (b, D)
    ids: Ids  # (b,)
    lists: NDArray[np.int32]  # (b,)


def write_lists(path: Path, empty: bytes, sizes: Ids, blocks: Iterable[ListedBlock]) -> None:
    """Writes an index, whose lists have their rows in the order of the blocks.

    Args:
        empty: the index as faiss writes it when no list has a row, but with the number of rows that it is to have.
        sizes: (L,) rows of each list, which `blocks` must have together.
    """
    row_bytes = row_bytes_of(empty, len(sizes))
    assert row_bytes, "this faiss writes lists in another way"
    head = empty[: -_EMPTY.size] + _size_table(sizes, row_bytes)
    ends = np.cumsum(sizes * (row_bytes + _ID_BYTES)) // _UNIT
    starts = ends - sizes * (row_bytes + _ID_BYTES) // _UNIT  # behind the head, counted in units of _UNIT
    with open_to_write(path) as file:
        file.write(head)
        file.flush()
        if not len(ends) or not ends[-1]:
            return
        allocate(file.fileno(), len(head) + int(ends[-1]) * _UNIT, path)
    words = np.memmap(path, dtype="<u4", mode="r+", offset=len(head), shape=(int(ends[-1]),))
    filled = np.zeros(len(sizes), np.int64)  # rows that a list has so far
    for block in blocks:
        for first in range(0, len(block.ids), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            some = ListedBlock(block.rows[part], block.ids[part], block.lists[part])
            places = _places(some.lists, filled)
            _put(words, starts[some.lists] + places * (row_bytes // _UNIT), some.rows.astype("<f4", copy=False))
            behind = starts[some.lists] + sizes[some.lists] * (row_bytes // _UNIT)  # the ids of a list
            _put(words, behind + places * (_ID_BYTES // _UNIT), some.ids.astype("<i8", copy=False)[:, None])
    assert np.array_equal(filled, sizes), "the blocks have other rows than the lists"
    words.flush()


def row_bytes_of(empty: bytes, num_lists: int) -> int:
    """Bytes of a row in a list; 0 where this faiss writes lists in another way than versions 1.9 to 1.15.

    Args:
        empty: the index as faiss writes it when no list has a row.
    """
    if len(empty) < _EMPTY.size:
        return 0
    mark, lists, row_bytes, form, count = _EMPTY.unpack(empty[-_EMPTY.size :])
    known = (mark, lists, form, count) == (_LISTS, num_lists, _SOME, 0) and row_bytes % _UNIT == 0
    return int(row_bytes) if known else 0


def _size_table(sizes: Ids, row_bytes: int) -> bytes:
    """What stands before the rows of the first list: how many rows each has."""
    with_rows = np.flatnonzero(sizes)
    start = struct.pack("<4sQQ", _LISTS, len(sizes), row_bytes)
    if len(with_rows) > len(sizes) // 2:
        return start + struct.pack("<4sQ", _ALL, len(sizes)) + sizes.astype("<u8").tobytes()
    pairs = np.stack([with_rows, sizes[with_rows]], 1).astype("<u8")
    return start + struct.pack("<4sQ", _SOME, pairs.size) + pairs.tobytes()


def _places(lists: NDArray[np.int32], filled: Ids) -> Ids:
    """The place of each row in its list, (b,), behind those that are there; counts them in `filled`."""
    order = np.argsort(lists, kind="stable")
    there, firsts, counts = np.unique(lists[order], return_index=True, return_counts=True)
    places = np.empty(len(lists), np.int64)
    places[order] = np.arange(len(lists)) - np.repeat(firsts, counts) + np.repeat(filled[there], counts)
    filled[there] += counts
    return places


def _put(words: NDArray[np.uint32], starts: Ids, values: NDArray[np.float32] | Ids) -> None:
    """Writes each row of values to where it starts."""
    as_words = np.ascontiguousarray(values).view("<u4")
    words[starts[:, None] + np.arange(as_words.shape[1])] = as_words
