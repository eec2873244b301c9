"""Near-duplicates: groups of images whose cosine with the first image of their group reaches a threshold; leaks.

Images are taken in order. Each joins, of the groups before it, the one whose first image is nearest, if that cosine
reaches the threshold; else it is the first of a group itself. So who keeps the first image of every group loses no
image without one that is as near as the threshold says, and no two that are kept are that near to each other. Groups
by connected components would chain: in a dense collection, images that have nothing in common end up together.

All pairs are compared, a block of rows with a block of first images at a time: exact, in bounded memory. Beyond
EXACT_ROWS images candidates come from a k-NN graph (neighbours.py). Shapes: n rows, b rows of a block, f first images
of a chunk, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Collection as Members
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.console import Console, pluralize
from grappa_dist.retrieval.collection import Collection
from grappa_dist.retrieval.nearest import Rows, blocks_of
from grappa_dist.retrieval.neighbours import (
    ROUNDING,
    Graph,
    Method,
    duplicate_recall,
    graph_of,
    group_by_graph,
    is_exact,
)

BLOCK, CHUNK = 1024, 4096


class _Groups:
    """The first images of the groups so far: a copy of their rows, in chunks."""

    def __init__(self) -> None:
        self._chunks: list[tuple[Tensor, Tensor]] = []  # rows (f, D) and their ids (f,)
        self._used = CHUNK  # of the last chunk

    def add(self, rows: Tensor, ids: Tensor) -> None:
        while len(ids):
            if self._used == CHUNK:
                self._chunks.append((rows.new_empty(CHUNK, rows.shape[1]), ids.new_empty(CHUNK)))
                self._used = 0
            place = slice(self._used, min(CHUNK, self._used + len(ids)))
            count = place.stop - place.start
            self._chunks[-1][0][place], self._chunks[-1][1][place] = rows[:count], ids[:count]
            self._used, rows, ids = place.stop, rows[count:], ids[count:]

    def _filled(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (rows, ids) in enumerate(self._chunks, start=1):
            used = self._used if number == len(self._chunks) else CHUNK
            yield rows[:used], ids[:used]

    def nearest(self, block: Tensor, least: float) -> tuple[Tensor, Tensor]:
        """The largest cosine of each row of a block with a first image, (b,), and which that is, (b,).

        Both are right where the cosine is at least `least`; elsewhere there is none.
        """
        best = block.new_full((len(block),), -torch.inf)
        whose = torch.full((len(block),), -1, device=block.device)
        for rows, ids in self._filled():
            scores = block @ rows.T
            near = torch.nonzero(scores.amax(1) >= least).flatten()  # few: the place of a maximum takes far longer
            cosines, places = scores[near].max(1)
            better = cosines > best[near]
            best[near[better]], whose[near[better]] = cosines[better], ids[places[better]]
        return best, whose


def check_threshold(threshold: float) -> None:
    """Raises ValueError for what is no least cosine."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}: it is the least cosine of near-duplicates")


def group_duplicates(
    parts: Sequence[Rows],
    bad: Members[int],
    threshold: float,
    device: torch.device,
    done: Callable[[int], object] = lambda rows: None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The first image of each image's group, (n,), itself where it is the first, and their cosine, (n,).

    Args:
        parts: unit rows, (n_i, D) each, one after the other; rows that are `bad`, by id, are in no group: -1.
        threshold: the least cosine, in (0, 1].
        done: called with the number of rows that are behind, after each block.

    Raises:
        ValueError: the threshold is none.
    """
    check_threshold(threshold)
    count = sum(len(part) for part in parts)
    firsts, cosines = np.full(count, -1, np.int64), np.zeros(count, np.float32)
    groups, least, left_out = _Groups(), threshold - ROUNDING, frozenset(bad)
    for first, block in blocks_of(parts, BLOCK):
        ids = torch.tensor([row for row in range(first, first + len(block)) if row not in left_out], dtype=torch.int64)
        if len(ids):
            rows = torch.from_numpy(block)[ids - first].to(device)
            whose, how_near = _joined(rows, ids.to(device), groups, least)
            firsts[ids.numpy()], cosines[ids.numpy()] = whose.cpu().numpy(), how_near.cpu().numpy()
            is_first = whose == ids.to(device)
            groups.add(rows[is_first], ids.to(device)[is_first])
        done(first + len(block))
    return firsts, cosines


def _joined(rows: Tensor, ids: Tensor, groups: _Groups, least: float) -> tuple[Tensor, Tensor]:
    """The first image of the group of each row of a block, (b,), and the cosine with it, (b,)."""
    cosines, whose = groups.nearest(rows, least)
    among = (rows @ rows.T).tril(-1)
    unsettled = torch.nonzero((among >= least).any(1)).flatten().tolist()  # near to an image of the block before them
    is_first = cosines < least
    for place in unsettled:  # in order, as whether an earlier one is the first of a group decides
        before = torch.where(is_first[:place], among[place, :place], -torch.inf)
        best = int(before.argmax())
        if before[best] >= least and before[best] > cosines[place]:
            cosines[place], whose[place], is_first[place] = before[best], ids[best], False
    return torch.where(is_first, ids, whose), torch.where(is_first, torch.ones_like(cosines), cosines)


@dataclass(frozen=True)
class Group:
    """Images that are nearly the same: row ids, names, and cosines with the first, whose cosine is 1."""

    rows: tuple[int, ...]
    names: tuple[str, ...]
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class Groups:
    """The groups of two images or more, in the order of their first images, and how they were found."""

    groups: list[Group]
    graph: Graph | None = None  # where candidates came from one
    recall: str = ""  # of that, as a sentence


def find_groups(
    collection: Collection, threshold: float, device: torch.device, console: Console, *, method: Method = "auto"
) -> Groups:
    """The groups of two images or more, by all pairs or through a graph.

    Raises:
        ValueError: the threshold is none.
    """
    check_threshold(threshold)
    compared = len(collection) - len(collection.bad)
    with console.stage("compare", pluralize(len(collection), "image")):
        if is_exact(method, compared):
            counter, began = console.counter("compare", [len(collection)]), time.monotonic()

            def done(rows: int) -> None:
                counter.running([{"done": rows, "seconds": time.monotonic() - began}])

            firsts, cosines = group_duplicates(collection.rows, collection.bad, threshold, device, done)
            return Groups(_groups_of(collection, np.arange(len(collection)), firsts, cosines))
        graph = graph_of(collection.rows, collection.bad, method, device, log=console.log)
        firsts, cosines = group_by_graph(graph, threshold)
        measured = "" if graph.is_exact else f"{duplicate_recall(graph, threshold, device)}; {graph.recall.reached}"
        return Groups(_groups_of(collection, graph.ids, firsts, cosines), graph, measured)


def _groups_of(
    collection: Collection, ids: NDArray[np.int64], firsts: NDArray[np.int64], cosines: NDArray[np.float32]
) -> list[Group]:
    """Groups of two or more.

    Args:
        ids: the row id of each place.
        firsts: the place of the first image of the group of each place; -1: none.
    """
    order = np.argsort(firsts, kind="stable")  # members of a group in a row, its first one first
    edges = np.flatnonzero(np.diff(firsts[order], prepend=-2))
    members = [part for part in np.split(order, edges[1:]) if len(part) > 1 and firsts[part[0]] >= 0]
    groups = []
    for part in members:
        rows = ids[part].tolist()
        groups.append(Group(tuple(rows), tuple(map(collection.name, rows)), tuple(cosines[part].tolist())))
    return groups


@dataclass(frozen=True)
class Leak:
    """An image that trains and nearly is one that tests: row ids in their collections, names, cosine."""

    row: int
    name: str
    test_row: int
    test_name: str
    cosine: float


def find_leaks(
    train: Collection, test: Collection, threshold: float, device: torch.device, console: Console
) -> list[Leak]:
    """Of each image that trains the nearest one that tests, where the cosine reaches the threshold; nearest first.

    All pairs are compared: n x m x D products.

    Raises:
        ValueError: the threshold is none, or the collections have embeddings of other lengths.
    """
    check_threshold(threshold)
    dims = sorted({rows.shape[1] for collection in (train, test) for rows in collection.rows if len(rows)})
    if len(dims) > 1:
        raise ValueError(f"embeddings have {' and '.join(map(str, dims))} channels; expected those of one model")
    tested, leaks = _Groups(), list[Leak]()
    for rows, ids in _good_blocks(test, device):
        tested.add(rows, ids)
    what = f"{pluralize(len(train), 'image')} with {pluralize(len(test), 'test image')}"
    with console.stage("leaks", what):
        counter, began, done = console.counter("leaks", [len(train)]), time.monotonic(), 0
        for rows, ids in _good_blocks(train, device):
            cosines, whose = tested.nearest(rows, threshold - ROUNDING)
            for place in torch.nonzero(cosines >= threshold - ROUNDING).flatten().tolist():
                row, other = int(ids[place]), int(whose[place])
                leaks.append(Leak(row, train.name(row), other, test.name(other), float(cosines[place])))
            done += len(rows)
            counter.running([{"done": done, "seconds": time.monotonic() - began}])
    return sorted(leaks, key=lambda leak: (-leak.cosine, leak.row))


def _good_blocks(collection: Collection, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (b, D) that are embeddings, with their ids (b,)."""
    bad = frozenset(collection.bad)
    for first, block in blocks_of(collection.rows, BLOCK):
        ids = torch.tensor([row for row in range(first, first + len(block)) if row not in bad], dtype=torch.int64)
        if len(ids):
            yield torch.from_numpy(np.array(block))[ids - first].to(device), ids.to(device)
