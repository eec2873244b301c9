"""k-means whose result is the same on any number of workers: floats propose, integers decide.

Rows and centroids lie on the grid of ops/exact.py, so squared distances are integers and a nearest centroid is a fact,
not an outcome of rounding. A float32 search proposes a few centroids per row; where its error bound leaves more than
one of them possible, exact scores decide, and ties go to the lowest index. Sums over rows are int64, so they may be
added in any order.

Shapes: P rows of one block, K centroids, D dimensions, t proposals per row.
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

from grappa_dist.ops.exact import GRID, cached_rows, exact_dot, exact_square, to_grid

NORM_LIMIT = 1 + 2**-7
"""Rows are unit rows, give or take this much: the integers below are sized for it."""

_LOW, _LOW_BITS = 24, 2**24 - 1  # where a sum of squares is cut in two
_LIMB = 20  # bits of a sum that fit beside a 24-bit factor and 2**19 dimensions
_PROPOSALS = 4
_TILE = 2**23  # elements of the largest float64 table made at once

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(rows, targets, t) -> float32 values (P, t), best first, and target indices (P, t)."""


def float_error(dim: int, size: float) -> float:
    """How far a float32 dot product or squared distance over `dim` dimensions may lie from the true one.

    In any order, n float32 operations err by at most n u / (1 - n u) times the sum of their terms' absolute values,
    u = 2**-24. That is `size`: |x||c| for a dot product, (|x| + |c|)^2 for a squared distance, be it summed directly or
    as |x|^2 + |c|^2 - 2 x.c; no term goes through more than dim + 4 operations.
    """
    steps = (dim + 4) * 2.0**-24
    if steps >= 0.5:
        raise ValueError(f"rows of {dim} dimensions leave float32 without an error bound, fewer than 2**23 are needed")
    return steps / (1 - steps) * size


def best_in_floats(x: Tensor, num_targets: int, table: Callable[[Tensor], Tensor], t: int) -> tuple[Tensor, Tensor]:
    """The t largest entries per row of a float32 table, (P, t), descending, and their columns, made tile by tile.

    Only true float32 products keep the error bound, so TF32 and bf16 shortcuts are off inside.

    Args:
        table: (rows, num_targets) from some rows of x.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        parts = [table(rows).topk(t, dim=1) for rows in torch.split(x, max(1, _TILE // max(1, num_targets)))]
    finally:
        torch.set_float32_matmul_precision(precision)
    if not parts:
        return x.new_empty((0, t)), torch.empty((0, t), dtype=torch.int64, device=x.device)
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def nearest_in_floats(x: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t smallest squared distances in float32, (P, t), ascending, and their indices: a search without faiss."""
    squares = c.square().sum(1)

    def closeness(rows: Tensor) -> Tensor:
        return -(rows.square().sum(1, keepdim=True) + squares - 2 * (rows @ c.T))  # (rows, K)

    values, indices = best_in_floats(x, len(c), closeness, t)
    return -values, indices


@dataclass(frozen=True)
class Centroids:
    """Grid centroids with what every block needs of them."""

    values: Tensor  # (K, D) float32 on the grid
    squares: Tensor  # (K,) float64, exact |c|^2 in units of 2**-48

    @staticmethod
    def of(values: Tensor) -> Centroids:
        squares = torch.cat([exact_square(v) for v in torch.split(values, max(1, _TILE // values.shape[1]))])
        return Centroids(values, squares)


@dataclass(frozen=True)
class Assignment:
    labels: Tensor  # (P,) int64
    squares: Tensor  # (P,) int64, exact squared distance to the own centroid, in units of 2**-48
    undecided: int  # rows the floats left open


def assign(x: Tensor, centroids: Centroids, search: Search = nearest_in_floats) -> Assignment:
    """Nearest centroid of each grid row, exactly; a tie goes to the lowest index.

    A centroid whose float distance exceeds the best one by more than twice the error bound cannot be the nearest. When
    the last proposal is still within that gap, centroids beyond the proposals may be too, and all of them are tried.
    """
    t = min(_PROPOSALS, len(centroids.values))
    if not len(x):
        empty = torch.zeros(0, dtype=torch.int64, device=x.device)
        return Assignment(empty, empty, 0)
    distances, proposed = search(x, centroids.values, t)
    squares = exact_square(x)  # (P,)
    norms = [math.sqrt(float(s.max())) / GRID for s in (squares, centroids.squares)]
    gap = 2 * float_error(x.shape[1], sum(norms) ** 2)
    possible = distances.double() <= distances[:, :1].double() + gap  # (P, t), a prefix of each row
    cut = possible[:, -1] if t < len(centroids.values) else torch.zeros_like(possible[:, -1])
    labels = proposed[:, 0].clone()
    scores = _scores(x, centroids, labels)  # (P,) float64: 2 x.c - |c|^2
    for column in range(1, t):
        rows = (possible[:, column] & ~cut).nonzero()[:, 0]
        if len(rows):
            rivals = proposed[rows, column]
            rival_scores = _scores(x[rows], centroids, rivals)
            tied = (rival_scores == scores[rows]) & (rivals < labels[rows])
            won = (rival_scores > scores[rows]) | tied
            labels[rows[won]], scores[rows[won]] = rivals[won], rival_scores[won]
    rows = cut.nonzero()[:, 0]
    if len(rows):
        labels[rows], scores[rows] = best_of_all(x[rows], centroids)
    undecided = int(possible[:, 1].sum()) if t > 1 else 0
    return Assignment(labels, (squares - scores).long(), undecided)


def _scores(x: Tensor, centroids: Centroids, labels: Tensor) -> Tensor:
    """Exact 2 x.c - |c|^2 of each row with one centroid, (P,) float64, in units of 2**-48."""
    return 2 * pair_dots(x, centroids.values, labels) - centroids.squares[labels]


def pair_dots(x: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    """Exact dot products of each grid row x[i] with y[columns[i]], (P,) float64 integers, in units of 2**-48."""
    size = cached_rows(x)
    parts = [
        (rows.double() * y[some]).sum(1)
        for rows, some in zip(torch.split(x, size), torch.split(columns, size), strict=True)
    ]
    return torch.cat(parts).mul_(GRID**2)


def best_of_all(x: Tensor, centroids: Centroids) -> tuple[Tensor, Tensor]:
    """Best centroid per row by exact scores with all of them, (P,), and the scores, (P,) float64."""
    columns = max(1, min(len(centroids.values), _TILE // x.shape[1]))
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    scores = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    for start in range(0, len(centroids.values), columns):
        some = slice(start, start + columns)
        for rows in torch.split(torch.arange(len(x), device=x.device), max(1, _TILE // columns)):
            table = 2 * exact_dot(x[rows], centroids.values[some]) - centroids.squares[some]
            best, index = table.max(1).values, table.argmax(1)  # argmax: the first of equal ones
            won = best > scores[rows]  # strictly, so that a tie stays with the earlier columns
            labels[rows[won]], scores[rows[won]] = index[won] + start, best[won]
    return labels, scores


@dataclass(frozen=True)
class Stats:
    """What some rows say about the centroids; adds up over rows, and rows may be taken away again."""

    counts: Tensor  # (K,) int64
    sums: Tensor  # (K, D) int64, in units of 2**-24: 2**38 unit rows fit
    squares: Tensor  # (2, K) int64, sum of |x|^2 in units of 2**-48: low 24 bits of the rows' values, and the rest

    @staticmethod
    def zeros(num_labels: int, dim: int, device: torch.device | str = "cpu") -> Stats:
        shapes = ((num_labels,), (num_labels, dim), (2, num_labels))
        return Stats(*(torch.zeros(shape, dtype=torch.int64, device=device) for shape in shapes))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.counts, self.sums, self.squares

    def add_(self, x: Tensor, squares: Tensor, labels: Tensor, sign: int = 1) -> None:
        """Adds grid rows with their exact squared norms in place, or takes them away with sign -1."""
        squares = squares.long()
        self.counts.add_(torch.bincount(labels, minlength=len(self.counts)), alpha=sign)
        self.sums.index_add_(0, labels, (x * GRID).long(), alpha=sign)
        self.squares[0].index_add_(0, labels, squares & _LOW_BITS, alpha=sign)
        self.squares[1].index_add_(0, labels, squares >> _LOW, alpha=sign)

    def spreads(self, centroids: Centroids) -> list[int]:
        """Per cluster the summed squared distances of its rows to its centroid, exact, in units of 2**-48.

        sum |x - c|^2 = sum |x|^2 - 2 c . sum x + n |c|^2: no row is read again. The products exceed 64 bits, so the
        sums are taken apart into three limbs and put together as Python integers.
        """
        dots = [[0] * len(self.counts) for _ in range(3)]
        for rows in torch.split(torch.arange(len(self.counts)), max(1, _TILE // self.sums.shape[1])):
            c, sums = (centroids.values[rows].double() * GRID).long(), self.sums[rows]
            for limb in range(3):
                part = sums >> (_LIMB * limb) if limb == 2 else sums >> (_LIMB * limb) & (2**_LIMB - 1)
                dots[limb][int(rows[0]) : int(rows[-1]) + 1] = (c * part).sum(1).tolist()
        low, rest = self.squares.tolist()
        own = centroids.squares.long().tolist()
        return [
            (b << _LOW) + a - 2 * (d0 + (d1 << _LIMB) + (d2 << 2 * _LIMB)) + n * s
            for a, b, d0, d1, d2, n, s in zip(low, rest, *dots, self.counts.tolist(), own, strict=True)
        ]


def finish(
    centroids: Tensor, stats: Stats, spreads: Sequence[int], step: int, *, spherical: bool = False
) -> tuple[Tensor, int]:
    """New grid centroids, (K, D), and how many empty clusters were given a part of another one.

    Args:
        spreads: of `stats` around `centroids`.
        step: number of the update, from which the repair of empty clusters draws.
    """
    counts = stats.counts.clamp(min=1)[:, None]
    means = torch.div(2 * stats.sums + counts, 2 * counts, rounding_mode="floor")  # nearest grid point, halves upwards
    new = torch.where(stats.counts[:, None] > 0, to_grid(means.double() / GRID), centroids)
    if spherical:
        new = _normalise(new)
    repaired = _split_largest(new, stats.counts.tolist(), spreads, step)
    return (_normalise(new) if spherical and repaired else new), repaired


def _normalise(c: Tensor) -> Tensor:
    """Unit rows on the grid: the norm is a correctly rounded root of an exact integer, hence the same everywhere."""
    norms = exact_square(c).sqrt()[:, None] / GRID
    return torch.where(norms > 0, to_grid(c.double() / norms.clamp(min=1 / GRID)), c)


def _split_largest(new: Tensor, counts: Sequence[int], spreads: Sequence[int], step: int) -> int:
    """Moves each empty centroid, in place, next to that of the largest cluster that still has unequal rows.

    The large cluster keeps its mean, so inertia cannot rise. The offset points in a direction drawn from (step, label)
    and is small against the spread, so about half of the rows prefer the moved centroid; the largest counts as half
    from then on.
    """
    largest = [(-n, label) for label, n in enumerate(counts) if n > 1 and spreads[label] > 0]
    heapq.heapify(largest)
    repaired, dim = 0, new.shape[1]
    for empty in (label for label, n in enumerate(counts) if n == 0):
        if not largest:
            break
        size, source = largest[0]
        root_mean_square = math.sqrt(spreads[source] / counts[source]) / GRID
        length = max(1, round(root_mean_square * GRID / (4 * dim))) / GRID
        bits = np.unpackbits(
            np.frombuffer(hashlib.shake_256(f"{step}/{empty}".encode()).digest(dim // 8 + 1), np.uint8)
        )
        signs = torch.from_numpy(bits[:dim].astype(np.float64) * 2 - 1).to(new.device)
        new[empty] = to_grid(new[source].double() + length * signs)
        repaired += 1
        if -size // 2 > 1:
            heapq.heapreplace(largest, (-(-size // 2), source))
        else:
            heapq.heappop(largest)
    return repaired
