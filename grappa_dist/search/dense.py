"""The nearest centroid of every row on a device: all products at once, exact integers for rows that these leave open.

A device multiplies faster than it can decide what need not be multiplied, so nothing is spared: every row meets every
centroid in one product of low precision, of which the few best scores are kept. A score s_j estimates
S_j = x.c_j - |c_j|^2 / 2, the larger the nearer, with |s_j - S_j| <= e for all j. Then

    - a centroid whose score lies more than 2 e below the best is not the nearest;
    - a centroid that was not kept has S_j <= s_last + e, the last one kept being the worst. If the exact S of the best
      kept one is above that, the nearest has been kept.

So rows with a single candidate are done. The candidates of the others are compared in integers, and the rows of which a
centroid that was not kept may be the nearest are compared with all centroids, in integers. Ties go to the lowest index:
labels are those of search/rerank.py, bit for bit, on any device. The shapes of all steps depend on two counts, which
are read while another block is under way (search/in_flight.py).

Shapes: P rows of one block, M of them open, K centroids, D dimensions, t scores kept per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.search.bf16 import TritonGenerator
from grappa_dist.search.candidates import Centroids, float_error, true_products
from grappa_dist.search.fixed_point import GRID, NORM_LIMIT, exact_dot
from grappa_dist.search.in_flight import Work, compact
from grappa_dist.search.rerank import FAR

_FLOAT_PLACES = 4  # scores kept where products are in float32
_TABLE_BYTES = 2**29  # of the largest table on a device: of scores, or of rows in float64
_CPU_TABLE_BYTES = 2**24


def table_rows(x: Tensor, row_bytes: int) -> int:
    """How many rows of so many bytes a table may have where `x` is: sized by the device, not by a core's cache."""
    return max(1, (_TABLE_BYTES if x.is_cuda else _CPU_TABLE_BYTES) // max(1, row_bytes))


@dataclass(frozen=True)
class DenseRows:
    """Grid rows of one block with what all passes need of them."""

    x: Tensor  # (P, D) float32
    squares: Tensor  # (P,) float64, exact |x|^2 in units of 2**-48
    form: Tensor | None = None  # (P, E), as the kernel multiplies them; None: the rows themselves, in float32


@dataclass(frozen=True)
class DenseCentroids:
    """Centroids of one pass; `whole.generator` decides how they are multiplied."""

    whole: Centroids
    bias: Tensor  # (K,) float32, -|c|^2 / 2; the kernel makes its own
    error: float  # e

    @staticmethod
    def of(whole: Centroids) -> DenseCentroids:
        dim = whole.values.shape[1]
        norm = NORM_LIMIT + math.sqrt(dim) / GRID  # of a row, after it was rounded to the grid
        bias = (whole.squares / (-2 * GRID**2)).float()
        if isinstance(whole.generator, TritonGenerator):
            return DenseCentroids(whole, bias, whole.generator.score_error(whole, norm))
        return DenseCentroids(whole, bias, float_error(dim, norm * whole.norm + whole.norm**2 / 2))

    def __len__(self) -> int:
        return len(self.whole.values)

    def pick(self, labels: Tensor) -> DenseCentroids:
        """Some of them, with the error of all: nothing is measured anew, so the host need not wait."""
        return DenseCentroids(self.whole.pick(labels), self.bias.index_select(0, labels), self.error)

    def top(self, rows: DenseRows) -> tuple[Tensor, Tensor]:
        """The largest scores of each row, (P, t) float32, descending, and their centroids, (P, t) int64.

        Places beyond K, if there are any, have a score of -inf.
        """
        if rows.form is not None:
            assert isinstance(self.whole.generator, TritonGenerator)
            return self.whole.generator.top(rows.form, self.whole)
        values = self.whole.values
        parts = []
        with true_products():
            for x in rows.x.split(table_rows(rows.x, 4 * len(values))):
                parts.append(torch.addmm(self.bias, x, values.T).topk(min(_FLOAT_PLACES, len(values)), dim=1))
        return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


@dataclass(frozen=True)
class DenseNearest:
    """Nearest centroids of the rows of a block."""

    labels: Tensor  # (P,) int64; -1 where none is within the limit
    squares: Tensor | None  # (P,) int64, exact squared distances in units of 2**-48, `FAR` for label -1
    by_integers: int  # rows that were compared in integers, since floats left them open


def nearest_dense(
    rows: DenseRows, centroids: DenseCentroids, *, distances: bool = False, within: Tensor | None = None
) -> Work[DenseNearest]:
    """The nearest centroid of each row, at least one row, exactly.

    Args:
        distances: exact distances as well, so that all rows are compared in integers with their candidates.
        within: with `distances`, (P,) float64 squared distances; centroids farther than that need not be found.
    """
    scores, columns = centroids.top(rows)
    first, by_integers, num = scores[:, 0].double(), 0, len(rows.x)
    if distances and within is None:
        open_rows = torch.arange(num, device=first.device)
    else:
        if within is not None:
            wanted = _may_be_within(rows, first + centroids.error, within)
        else:
            second = scores[:, 1:2].double().sum(1)  # 0 where there is one centroid: then none is left open
            wanted = (first - second <= 2 * centroids.error) & (len(centroids) > 1)
        open_rows, count = compact(wanted)
        (num,) = yield count
        open_rows = open_rows[:num]
    labels = columns[:, 0].clone() if within is None else torch.full_like(columns[:, 0], -1)
    squares = torch.full_like(columns[:, 0], FAR) if distances else None
    if num:
        best, found = _best_kept(rows, centroids, columns, open_rows)
        by_integers = yield from _search_all(rows, centroids, (open_rows, scores, within), (best, found))
        labels[open_rows] = found
        if squares is not None:
            squares[open_rows] = (rows.squares[open_rows] - best).long()
    return DenseNearest(labels, squares, by_integers if distances else num)


def _may_be_within(rows: DenseRows, most: Tensor, within: Tensor) -> Tensor:
    """Whether a centroid whose S is at most `most` may be within a squared distance, (P,) bool."""
    return rows.squares / GRID**2 - 2 * most <= within


def _search_all(
    rows: DenseRows,
    centroids: DenseCentroids,
    seen: tuple[Tensor, Tensor, Tensor | None],
    found: tuple[Tensor, Tensor],
) -> Work[int]:
    """Compares rows with all centroids where one that was not kept may be the nearest; `found` is changed in place.

    Args:
        seen: places of the open rows (M,), the scores kept of all rows (P, t), and `within`.
        found: exact scores (M,) and labels (M,) of the best kept ones.

    Returns:
        How many rows these are.
    """
    (places, scores, within), (best, labels) = seen, found
    if scores.shape[1] >= len(centroids):
        return 0
    last = scores[places, -1].double() + centroids.error
    wanted = best / (2 * GRID**2) <= last
    if within is not None:
        some = DenseRows(rows.x, rows.squares[places])
        wanted &= _may_be_within(some, last, within[places])
    left, count = compact(wanted)
    (num,) = yield count
    if num:
        left = left[:num]
        best[left], labels[left] = _best_of_all(rows.x.index_select(0, places[left]), centroids)
    return num


def _best_kept(rows: DenseRows, centroids: DenseCentroids, columns: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of the candidates of some rows the nearest, by exact scores: 2 x.c - |c|^2, (M,) float64 in units of 2**-48, and
    labels (M,)."""
    parts = [
        _best_of_few(rows.x.index_select(0, some).double(), centroids.whole, columns.index_select(0, some))
        for some in places.split(table_rows(rows.x, 16 * rows.x.shape[1]))
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _best_of_few(x: Tensor, whole: Centroids, columns: Tensor) -> tuple[Tensor, Tensor]:
    best = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for label in columns.unbind(1):
        products = (x * whole.values.index_select(0, label)).sum(1)
        score = products.mul_(2 * GRID**2).sub_(whole.squares.index_select(0, label))
        better = (score > best) | ((score == best) & (label < labels))
        best, labels = torch.where(better, score, best), torch.where(better, label, labels)
    return best, labels


def _best_of_all(x: Tensor, centroids: DenseCentroids) -> tuple[Tensor, Tensor]:
    """The nearest of all centroids, as `_best_kept`."""
    best, labels = [], []
    for some in x.split(table_rows(x, 8 * min(len(centroids), _columns(x)))):
        score = torch.full((len(some),), -math.inf, dtype=torch.float64, device=x.device)
        label = torch.zeros(len(some), dtype=torch.int64, device=x.device)
        for start, table in _exact_tables(some, centroids.whole):
            place = table.argmax(1)  # the first of equal ones
            value = table.gather(1, place[:, None])[:, 0]
            better = value > score  # strictly: a tie stays with the earlier columns
            score, label = torch.where(better, value, score), torch.where(better, place + start, label)
        best.append(score)
        labels.append(label)
    return torch.cat(best), torch.cat(labels)


def _columns(x: Tensor) -> int:
    return table_rows(x, 8 * x.shape[1])


def _exact_tables(x: Tensor, whole: Centroids) -> Iterator[tuple[int, Tensor]]:
    """Exact scores with all centroids, some columns at a time, and the first column."""
    step = _columns(x)
    for start in range(0, len(whole.values), step):
        some = slice(start, start + step)
        yield start, 2 * exact_dot(x, whole.values[some]) - whole.squares[some]
