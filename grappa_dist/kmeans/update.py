"""The update of k-means: sums of the rows of each label, and new centroids from them. Integers add in any order.

Which centroid is nearest to a row is decided in search/rerank.py and kmeans/yinyang.py.

Shapes: P rows of one block, K centroids, D dimensions.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.kmeans.centroid_slices import CentroidSlice
from grappa_dist.search.candidates import Centroids
from grappa_dist.search.fixed_point import GRID, cached_rows, exact_square, to_grid

_SPLITS_AT_ONCE = 4096  # rows that slices of the centroids send each other
_LOW, _LOW_BITS = 24, 2**24 - 1  # a sum of squares is split into low bits and the rest


@dataclass(frozen=True)
class Stats:
    """Counts and sums of the rows of each label: they add up over rows, and rows may change from label to label."""

    counts: Tensor  # (K,) int64
    sums: Tensor  # (K, D) int64, in units of 2**-24: 2**37 unit rows fit
    squares: Tensor  # (2, K) int64, sum of |x|^2 in units of 2**-48: low 24 bits of the rows' values, and the rest

    @staticmethod
    def zeros(num_labels: int, dim: int, device: torch.device | str = "cpu") -> Stats:
        shapes = ((num_labels,), (num_labels, dim), (2, num_labels))
        return Stats(*(torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.counts, self.sums, self.squares

    def add_(self, x: Tensor, squares: Tensor, labels: Tensor, leaving: Tensor | None = None, *, sign: int = 1) -> None:
        """Adds grid rows with their exact squared norms, in place, and subtracts them from the labels they leave.

        Args:
            sign: -1: subtracts them from their labels.
        """
        squares = squares.long()
        signed = [(labels, sign)] if leaving is None else [(labels, sign), (leaving, -sign)]
        _add_rows_(self.sums, x, signed)
        ones = torch.ones_like(labels)  # not bincount: a GPU would wait for the largest label
        for their, sign in signed:
            self.counts.index_add_(0, their, ones, alpha=sign)
            self.squares[0].index_add_(0, their, squares & _LOW_BITS, alpha=sign)
            self.squares[1].index_add_(0, their, squares >> _LOW, alpha=sign)

    def add_changes_(self, change: Stats, allsum: Callable[[Tensor], Tensor]) -> None:
        """Adds, in place, the changes of all ranks, given those of this rank."""
        for kept, of_rank in zip(self.tensors, change.tensors, strict=True):
            kept.add_(allsum(of_rank))

    def spreads(self, centroids: Centroids) -> list[int]:
        """Per cluster the summed squared distances of its rows to its centroid, exact, in units of 2**-48.

        sum |x - c|^2 = sum |x|^2 - 2 c . sum x + n |c|^2: no row is read again.
        """
        low, rest = self.squares.tolist()
        own = centroids.squares.long().tolist()
        dots = _long_dots(centroids.values, self.sums)
        return [
            (b << _LOW) + a - 2 * dot + n * s
            for a, b, dot, n, s in zip(low, rest, dots, self.counts.tolist(), own, strict=True)
        ]


def _long_dots(c: Tensor, sums: Tensor) -> list[int]:
    """Exact dot products of grid rows (K, D) with int64 rows, in units of 2**-24.

    They may exceed 64 bits. So the int64 rows are cut into pieces of so few bits that products with 25 bits and their
    sums over D fit into int64, and the results of the pieces are added up as Python integers.
    """
    if not len(c):
        return []
    width = 62 - 25 - math.ceil(math.log2(c.shape[1] + 1))
    pieces = int(sums.abs().max()).bit_length() // width + 1
    dots = [0] * len(c)
    for piece in range(pieces):
        shift, last = width * piece, piece == pieces - 1
        parts = [
            ((some.double() * GRID).long() * (row >> shift if last else row >> shift & (2**width - 1))).sum(1)
            for some, row in zip(c.split(cached_rows(c)), sums.split(cached_rows(c)), strict=True)
        ]
        dots = [dot + (part << shift) for dot, part in zip(dots, torch.cat(parts).tolist(), strict=True)]
    return dots


def _add_rows_(sums: Tensor, x: Tensor, signed: Sequence[tuple[Tensor, int]]) -> None:
    """Adds grid rows to int64 sums by labels, or subtracts them, by sign.

    Float64 adds them many times as fast and, up to 2**29 rows, exactly too.
    """
    if len(x) < len(sums):  # too few rows to pay for a separate table
        values = (x * GRID).long()
        for labels, sign in signed:
            sums.index_add_(0, labels, values, alpha=sign)
        return
    block = torch.zeros(sums.shape, dtype=torch.float64, device=x.device)
    size = cached_rows(x)
    for some in (slice(start, start + size) for start in range(0, len(x), size)):
        values = x[some].double()
        for labels, sign in signed:
            block.index_add_(0, labels[some], values, alpha=sign)
    sums.add_(block.mul_(GRID).long())


def update_centroids(
    centroids: Tensor,
    stats: Stats,
    spreads: Sequence[int],
    step: int,
    *,
    spherical: bool = False,
    held: CentroidSlice | None = None,
) -> tuple[Tensor, int]:
    """Lloyd's update: c_k = (sum of the rows with label k) / (their number), rounded to the grid.

    With `spherical` the means are normalised to unit length. An empty cluster gets a part of a large one.

    Args:
        spreads: of `stats` around `centroids`.
        step: number of the update, from which the repair of empty clusters draws.
        held: the slice that this rank holds; None: all centroids.

    Returns:
        New grid centroids, (K, D), and how many empty clusters were repaired, in all slices.
    """
    counts = stats.counts.clamp(min=1)[:, None]
    means = torch.div(2 * stats.sums + counts, 2 * counts, rounding_mode="floor")  # nearest grid point, ties upwards
    new = torch.where(stats.counts[:, None] > 0, (means.double() / GRID).float(), centroids)  # nothing to round
    if spherical:
        new = _normalise(new)
    repaired = _split_largest(new, stats.counts.tolist(), spreads, step, held or CentroidSlice(len(new)))
    return (_normalise(new) if spherical and repaired else new), repaired


def _normalise(c: Tensor) -> Tensor:
    """Unit rows on the grid: the norm is a correctly rounded root of an exact integer, hence the same everywhere."""
    norms = exact_square(c).sqrt()[:, None] / GRID
    return torch.where(norms > 0, to_grid(c.double() / norms.clamp(min=1 / GRID)), c)


def _split_largest(new: Tensor, counts: Sequence[int], spreads: Sequence[int], step: int, held: CentroidSlice) -> int:
    """Moves each empty centroid, in place, next to that of the largest cluster that still has unequal rows.

    The large cluster keeps its mean, so inertia cannot rise. The offset points in a direction drawn from (step, label)
    and is small compared with the spread, so about half of the rows are nearer to the moved centroid; from then on the
    large cluster counts as half its size.
    """
    first = held.own.start
    empty = held.gathered([(first + label,) for label, n in enumerate(counts) if n == 0], 1)
    if not empty:
        return 0
    sizes = [(-n, first + label) for label, n in enumerate(counts) if n > 1 and spreads[label] > 0]
    largest = held.gathered(heapq.nsmallest(len(empty), sizes), 2)  # of any slice, no more can be split
    splits = _splits([label for (label,) in empty], [(size, label) for size, label in largest])
    for start in range(0, len(splits), _SPLITS_AT_ONCE):
        some = splits[start : start + _SPLITS_AT_ONCE]
        moved = torch.zeros(len(some), new.shape[1], dtype=torch.int32)  # as bits: a sum would lose the sign of -0.0
        for place, (label, source) in enumerate(some):
            if source in held.own:
                of = source - first
                root_mean_square = math.sqrt(spreads[of] / counts[of]) / GRID
                moved[place] = _moved(new[of], root_mean_square, f"{step}/{label}").cpu().view(torch.int32)
        rows = held.ranks.sum_(moved).view(torch.float32).to(new.device)
        for place, (label, _) in enumerate(some):
            if label in held.own:
                new[label - first] = rows[place]
    return len(splits)


def _splits(empty: Sequence[int], largest: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Empty labels, each with the label of the cluster that it is moved next to; `largest` has (-size, label)."""
    heapq.heapify(largest)
    splits = []
    for label in empty:
        if not largest:
            break
        size, source = largest[0]
        splits.append((label, source))
        if -size // 2 > 1:
            heapq.heapreplace(largest, (-(-size // 2), source))
        else:
            heapq.heappop(largest)
    return splits


def _moved(row: Tensor, root_mean_square: float, drawn_from: str) -> Tensor:
    """A grid row (D,) a little beside another one, in a drawn direction."""
    dim = len(row)
    length = max(1, round(root_mean_square * GRID / (4 * dim))) / GRID
    drawn = hashlib.shake_256(drawn_from.encode()).digest(dim // 8 + 1)
    bits = np.unpackbits(np.frombuffer(drawn, np.uint8))
    signs = torch.from_numpy(bits[:dim].astype(np.float64) * 2 - 1).to(row.device)
    return to_grid((row.double() + length * signs).clamp(-1, 1))
