"""Indexes of faiss: which kind for how many rows, built a block at a time, grown, measured against exact search.

Up to FLAT_ROWS rows are compared one by one (Flat), which is exact. More lie in inverted lists (IVF): the lists of the
nearest `probes` centroids are searched. A graph (HNSW) would be searched faster, but takes no row out again, and each
row of it costs a search. An index holds unit rows in float32 under ids of their own, and none of bad images.

Shapes: n rows, q queries, D channels, k hits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.data.rng import Purpose, philox
from grappa_dist.retrieval.faiss_lists import ListedBlock, row_bytes_of, write_lists
from grappa_dist.retrieval.nearest import BLOCK, Rows, blocks_of, nearest

FLAT_ROWS = 100_000  # read whole for each query, in some milliseconds
LISTS_PER_ROOT = 4  # of the number of rows, as faiss's guidelines say
TRAIN_PER_LIST = 50  # rows; faiss asks for 30 to 256
RECALL_K, RECALL_QUERIES, RECALL = 10, 500, 0.99  # what the number of probes is chosen for
Ids = NDArray[np.int64]
Index = Any  # of faiss, which has no types


@dataclass(frozen=True)
class Kind:
    """How an index searches, and which share of the true neighbours it finds."""

    factory: str  # as faiss's index_factory reads it
    lists: int = 0  # 0: all rows are searched
    probes: int = 0  # lists that are searched for a query
    trained_for: int = 0  # rows there were when the lists were made
    recall: float = 1.0  # of the RECALL_K nearest other rows, in the mean over some rows
    queries: int = 0  # how many rows these were

    def fits(self, rows: int) -> bool:
        """Whether the lists, or none, still suit so many rows: they are made anew for twice as many, and for half."""
        if not self.lists or rows <= FLAT_ROWS:
            return not self.lists and rows <= FLAT_ROWS
        return self.trained_for / 2 < rows < self.trained_for * 2

    @staticmethod
    def of(rows: int) -> Kind:
        if rows <= FLAT_ROWS:
            return Kind("IDMap2,Flat")
        lists = 2 ** round(math.log2(LISTS_PER_ROOT * math.sqrt(rows)))
        return Kind(f"IVF{lists},Flat", lists, probes=1, trained_for=rows)

    def describe(self) -> str:
        if not self.lists:
            return f"{self.factory}: exact"
        of = f"measured on {self.queries} rows against exact search"
        return f"{self.factory}, {self.probes} probes: recall@{RECALL_K} {self.recall:.3f}, {of}"


@dataclass(frozen=True)
class NumberedRows:
    """Rows with their ids. Rows of images that are bad have none, and are not indexed."""

    parts: Sequence[Rows]  # (n_i, D) each, unit rows
    ids: Ids  # (n,), ascending
    bad: Ids  # positions, ascending

    @property
    def good(self) -> NDArray[np.bool_]:
        """Which rows are indexed, (n,)."""
        found = np.ones(len(self.ids), bool)
        found[self.bad] = False
        return found

    def take(self, positions: Ids) -> Rows:
        """Copies of some rows, at ascending positions."""
        found, done = np.empty((len(positions), self.parts[0].shape[1]), np.float32), 0
        for first, block in blocks_of(self.parts, BLOCK):
            low, high = np.searchsorted(positions, (first, first + len(block)))
            found[low:high] = block[positions[low:high] - first]
            done += high - low
        return found

    def blocks(self, chosen: NDArray[np.bool_]) -> Iterator[tuple[Rows, Ids]]:
        """The chosen rows and their positions, a block at a time."""
        for first, block in blocks_of(self.parts, BLOCK):
            inside = np.flatnonzero(chosen[first : first + len(block)])
            if len(inside):
                yield block[inside], first + inside

    def sample(self, count: int, *purpose: int) -> Ids:
        """Positions of some good rows, ascending."""
        places = np.flatnonzero(self.good)
        drawn = np.random.Generator(philox(Purpose.INDEX_SAMPLE, *purpose))
        return np.sort(drawn.choice(places, min(count, len(places)), replace=False))


def write(path: Path, rows: NumberedRows, kind: Kind, before: Path | None = None) -> None:
    """Writes an index of all rows.

    Memory: all rows where there are no lists; else those that the lists are made of, a block, and 4 bytes a row.

    Args:
        before: an index with lists, which are kept; rows that it has stay in theirs. None: new lists are made.
    """
    _set_threads()
    if kind.lists:
        _write_lists(path, rows, _trained(rows, kind) if before is None else read(before, mapped=True))
        return
    _write_through_memory(path, rows, _empty(rows, kind))


def _write_through_memory(path: Path, rows: NumberedRows, index: Index) -> None:
    import faiss

    for block, places in rows.blocks(rows.good):
        index.add_with_ids(block, rows.ids[places])
    faiss.write_index(index, str(path))


def _empty(rows: NumberedRows, kind: Kind) -> Index:
    import faiss

    return faiss.index_factory(rows.parts[0].shape[1], kind.factory, faiss.METRIC_INNER_PRODUCT)


def _trained(rows: NumberedRows, kind: Kind) -> Index:
    """New lists, without rows."""
    index = _empty(rows, kind)
    index.train(rows.take(rows.sample(TRAIN_PER_LIST * kind.lists, kind.lists)))
    return index


def _write_lists(path: Path, rows: NumberedRows, index: Index) -> None:
    """Writes an index with the lists of this one, which is emptied."""
    import faiss

    lists = _lists_held(index, rows)
    new = rows.good & (lists < 0)
    for block, places in rows.blocks(new):
        lists[places] = index.quantizer.assign(block, 1)[:, 0]
    empty: Any = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    empty.this.disown()
    index.replace_invlists(empty, True)  # the index removes it
    index.ntotal = len(rows.ids) - len(rows.bad)
    head = faiss.serialize_index(index).tobytes()
    if not row_bytes_of(head, index.nlist):
        index.ntotal = 0
        _write_through_memory(path, rows, index)
        return
    sizes = np.bincount(lists[lists >= 0], minlength=index.nlist)
    blocks = (ListedBlock(block, rows.ids[places], lists[places]) for block, places in rows.blocks(rows.good))
    write_lists(path, head, sizes, blocks)


def _lists_held(index: Index, rows: NumberedRows) -> NDArray[np.int32]:
    """The list of each row that the index has, (n,); -1: it has it not, or the row is bad."""
    import faiss

    found = np.full(len(rows.ids), -1, np.int32)
    held: Any = index.invlists
    for number in range(held.nlist):
        if size := held.list_size(number):
            ids = np.array(faiss.rev_swig_ptr(held.get_ids(number), size))
            places = np.minimum(np.searchsorted(rows.ids, ids), len(rows.ids) - 1)
            found[places[rows.ids[places] == ids]] = number
    found[rows.bad] = -1
    return found


def search(index: Index, queries: Rows, k: int, probes: int) -> tuple[NDArray[np.float32], Ids]:
    """Cosines and ids of the k nearest rows, (q, k) each, best first; of equal ones those of the smallest id first.

    A query whose lists hold fewer than k rows is searched for in all lists. There must be k rows.
    """
    import faiss

    _set_threads()
    parameters: Any = faiss.SearchParametersIVF
    # faiss.contrib.torch_utils replaces `search` for the whole process by one that takes no `params`
    found_in = getattr(index, "search_numpy", index.search)
    if not probes:
        cosines, ids = found_in(queries, k)
    else:
        cosines, ids = found_in(queries, k, params=parameters(nprobe=probes))
        if len(few := np.flatnonzero(ids[:, -1] < 0)):
            every = parameters(nprobe=index.nlist)
            cosines[few], ids[few] = found_in(queries[few], k, params=every)
    order = np.lexsort((ids, -cosines))
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(ids, order, 1)


def measured(index: Index, rows: NumberedRows, kind: Kind) -> Kind:
    """The kind with the fewest probes, by doubling, that reach RECALL, and the recall that they have.

    Some rows are searched for among all others, exactly and by the index. A row finds itself, which does not count.
    """
    if not kind.lists or index.ntotal < 2:
        return kind
    places = rows.sample(RECALL_QUERIES)
    queries, k = rows.take(places), min(RECALL_K + 1, index.ntotal)
    exact = nearest(queries, rows.parts, rows.bad.tolist(), k, torch.device("cpu"))
    expected = rows.ids[exact.rows.numpy()]
    probes = 1
    while True:
        _, found = search(index, queries, k, probes)
        recall = float(np.mean([_share(*lists) for lists in zip(expected, found, rows.ids[places], strict=True)]))
        if recall >= RECALL or probes >= kind.lists:
            return replace(kind, probes=probes, recall=recall, queries=len(places))
        probes = min(2 * probes, kind.lists)


def _share(expected: Ids, found: Ids, itself: np.int64) -> float:
    """Which share of a row's true neighbours was found, without the row itself."""
    neighbours = np.setdiff1d(expected, [itself])
    return np.isin(neighbours, found).mean()


def read(path: Path, *, mapped: bool = False) -> Index:
    """An index, in memory or, where faiss can, mapped from its file, which then may be removed.

    Raises:
        ValueError: faiss cannot read it.
    """
    import faiss

    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP if mapped else 0)
    except RuntimeError as error:
        raise ValueError(f"{path}: faiss cannot read it: {str(error).splitlines()[-1]:.200}") from None


def _set_threads() -> None:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())  # its own default is every core
