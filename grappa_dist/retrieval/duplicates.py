"""Near-duplicates: groups of images whose cosine with the first image of their group reaches a threshold.

Images are taken in order. Each joins, of the groups before it, the one whose first image is nearest, if that cosine
reaches the threshold; else it is the first of a group itself. So who keeps the first image of every group loses no
image without one that is as near as the threshold says, and no two that are kept are that near to each other. Groups
by connected components would chain: in a dense collection, images that have nothing in common end up together.

All pairs are compared, a block of rows with a block of first images at a time: exact, in bounded memory. Shapes: n
rows, b rows of a block, f first images of a chunk, D channels.
"""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Collection as Members
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.console import Console, pluralize
from grappa_dist.files import write_utf8
from grappa_dist.retrieval.collection import Collection
from grappa_dist.retrieval.nearest import Rows, blocks_of

BLOCK, CHUNK = 1024, 4096
ROUNDING = 1e-6  # of a cosine in float32: equal images may have 0.9999999


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
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}: it is the least cosine of near-duplicates")
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
    """Images that are nearly the same: names and cosines with the first, whose cosine is 1."""

    names: tuple[str, ...]
    cosines: tuple[float, ...]


def find_groups(collection: Collection, threshold: float, device: torch.device, console: Console) -> list[Group]:
    """The groups of two images or more, in the order of their first images."""
    with console.stage("compare", pluralize(len(collection), "image")):
        counter, began = console.counter("compare", [len(collection)]), time.monotonic()

        def done(rows: int) -> None:
            counter.running([{"done": rows, "seconds": time.monotonic() - began}])

        firsts, cosines = group_duplicates(collection.rows, collection.bad, threshold, device, done)
    order = np.argsort(firsts, kind="stable")  # members of a group in a row, its first one first
    edges = np.flatnonzero(np.diff(firsts[order], prepend=-2))
    members = [part for part in np.split(order, edges[1:]) if len(part) > 1 and firsts[part[0]] >= 0]
    return [
        Group(tuple(collection.name(row) for row in rows.tolist()), tuple(cosines[rows].tolist())) for rows in members
    ]


def describe_groups(groups: Sequence[Group], collection: Collection, threshold: float) -> str:
    """How many images could go, for a terminal."""
    compared = len(collection) - len(collection.bad)
    if not groups:
        return f"no near-duplicates among {pluralize(compared, 'image')}: no two have a cosine of {threshold:g} or more"
    more = sum(len(group.names) - 1 for group in groups)
    return (
        f"{pluralize(len(groups), 'group')} of near-duplicates among {pluralize(compared, 'image')}; without them, "
        f"{pluralize(compared - more, 'image')} are left (cosine {threshold:g} or more)"
    )


def write_groups(path: Path, groups: Sequence[Group]) -> None:
    """A CSV with a line for each image: the number of its group from 1, its name, its cosine with the first."""
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(["group", "name", "cosine"])
    for number, group in enumerate(groups, start=1):
        lines.writerows(
            (number, name, f"{cosine:.6f}") for name, cosine in zip(group.names, group.cosines, strict=True)
        )
    write_utf8(path, text.getvalue())
