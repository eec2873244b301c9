"""Which centroids may be the nearest: proposed by arithmetic that is fast and knows by how much it can be wrong.

A proposer estimates squared distances and states a bound of its error; whoever asked decides exactly among what the
bound leaves open (ops/nearest.py, ops/reassign.py). How a proposer computes is a matter of speed, never of the result.

Shapes: P rows, K centroids, D dimensions, t proposals per row at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from grappa_dist.ops.exact import GRID, cached_rows, exact_square

_TILE = 2**23  # elements of the largest float32 table made at once
_CACHED_TILE = 2**20  # of products in bfloat16: few enough to stay in a core's cache
_HALF = 2.0**-8  # rounding to bfloat16 errs by this share at most
_TWO_DIGITS = _HALF**2  # the same for a sum of two bfloat16
# oneDNN compiles a kernel for every new shape, which takes as long as the product: shapes are multiples of these
_ROW_STEP, _COLUMN_STEP = 128, 32
_LEAST_SCALE = 2.0**-5  # scores up to this size are rounded as this one
_EXTRA = 4  # columns beside the dimensions: two digits for each of two offsets

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


@contextmanager
def true_products() -> Iterator[None]:
    """Products of float32 are what they say: shortcuts by TF32 and bfloat16, which keep no error bound, are off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def best_in_floats(x: Tensor, num_targets: int, table: Callable[[Tensor], Tensor], t: int) -> tuple[Tensor, Tensor]:
    """The t largest entries per row of a float32 table, (P, t), descending, and their columns, made tile by tile.

    Args:
        table: (rows, num_targets) from some rows of x.
    """
    with true_products():
        parts = [table(rows).topk(t, dim=1) for rows in torch.split(x, max(1, _TILE // max(1, num_targets)))]
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
    norm: float  # the largest |c|
    proposer: Proposer
    form: Tensor  # (K, E), as the proposer multiplies them
    rest: float = 0.0  # the largest norm of what the form leaves out

    @staticmethod
    def of(values: Tensor, proposer: Proposer | None = None) -> Centroids:
        squares = torch.cat([exact_square(v) for v in values.split(max(1, _TILE // values.shape[1]))])
        return (proposer or FloatProposer()).centroids(values, squares)

    def pick(self, labels: Tensor) -> Centroids:
        """Some of them."""
        values, squares, form = (t.index_select(0, labels) for t in (self.values, self.squares, self.form))
        return replace(self, values=values, squares=squares, form=form)


@dataclass(frozen=True)
class PreparedRows:
    """Rows of a block as the proposer multiplies them."""

    form: Tensor  # (P or some more, E): spare rows at the end make the number of rows a multiple of `step`
    base: Tensor  # (P,) float32, the squared distance from which the form makes others be counted
    norm: float  # the largest |x|
    within_base: bool  # only centroids within the base matter
    step: int = 1

    def pick(self, rows: Tensor) -> PreparedRows:
        """Some of them, by ascending positions."""
        num = len(self.base)
        if len(rows) == num:
            return self
        spare = rows.new_zeros(-len(rows) % self.step)
        form = self.form.index_select(0, torch.cat([rows, spare]))
        return replace(self, form=form, base=self.base.index_select(0, rows))


@dataclass(frozen=True)
class Proposals:
    """The nearest centroids of each row by estimates; infinitely far in places left free."""

    distances: Tensor  # (P, t) float32, squared, ascending
    labels: Tensor  # (P, t) int64
    error: float
    """The nearest estimate is off by no more than this (where only centroids within the base matter: if it is of one of
    these). No other one, nor the last one as an estimate of those that were not proposed, lies further above the true
    squared distance. Where places are free, those that were not proposed are not the nearest; and where only centroids
    within the base matter and the second place is free, there are none."""


class Proposer(Protocol):
    """One way to estimate distances."""

    @property
    def places(self) -> int:
        """How many proposals are worth asking for."""

    def centroids(self, values: Tensor, squares: Tensor) -> Centroids: ...

    def rows(self, x: Tensor, squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        """Prepares grid rows with their exact squared norms (P,) float64 in units of 2**-48.

        Args:
            base: (P,) float64 squared distances about as large as that of the nearest centroid: estimates near them are
                the sharpest.
            within_base: only centroids at most so far away matter.
        """

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Proposals: ...


def norm_of(squares: Tensor) -> float:
    """The largest norm, from squares in units of 2**-48; 0 for no rows."""
    return math.sqrt(float(squares.max())) / GRID if len(squares) else 0.0


@dataclass(frozen=True)
class FloatProposer:
    """Distances in float32, by a search that finds the t nearest."""

    search: Search = nearest_in_floats
    places: int = 3

    def centroids(self, values: Tensor, squares: Tensor) -> Centroids:
        return Centroids(values, squares, norm_of(squares), self, values)

    def rows(self, x: Tensor, squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        return PreparedRows(x, base.float(), norm_of(squares), within_base)

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Proposals:
        distances, labels = self.search(rows.form, centroids.form, t)
        return Proposals(distances, labels, float_error(rows.form.shape[1], (rows.norm + centroids.norm) ** 2))


@dataclass(frozen=True)
class HalfProposer:
    """Distances from products in bfloat16 with float32 sums: twice as fast where the processor has such products.

    What rounding takes away is known as a vector, x - x', so by Cauchy-Schwarz no product errs by more than
    |x - x'||c| + |x'||c - c'|. The score x.c - |c|^2 / 2 - (|x|^2 - base) / 2 comes out of one matrix product, its
    offsets as two more columns each; it is (base - distance^2) / 2, small where it matters, and so is its own rounding.
    """

    rest: float  # at least the largest |x - x'| of all rows to come
    places: int = 6

    @staticmethod
    def left_out(x: Tensor) -> float:
        """The largest norm of what rounding to bfloat16 takes from a row; 0 for no rows."""
        rests = (part - part.bfloat16().float() for part in x.split(cached_rows(x)) if len(part))
        largest = max((float(rest.square_().sum(1).max()) for rest in rests), default=0.0)
        return math.sqrt(largest) * (1 + (x.shape[1] + 4) * 2.0**-23)  # above what float32 may have lost

    def centroids(self, values: Tensor, squares: Tensor) -> Centroids:
        form = _form(values, squares / (-2 * GRID**2), 0)
        return Centroids(values, squares, norm_of(squares), self, form, self.left_out(values))

    def rows(self, x: Tensor, squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        form = _form(x, (base - squares / GRID**2) / 2, 1, _ROW_STEP)
        return PreparedRows(form, base.float(), norm_of(squares), within_base, _ROW_STEP)

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Proposals:
        error, targets = self._error(rows, centroids), _spare_rows(centroids.form, _COLUMN_STEP)
        size = max(1, _CACHED_TILE // len(targets) // _ROW_STEP) * _ROW_STEP
        found = []
        for tile, base in zip(rows.form.split(size), rows.base.split(size), strict=True):
            products = (tile @ targets.T)[: len(base), : len(centroids.form)]
            found.append(_best_columns(products.float(), t, error, within_base=rows.within_base))
        scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        scale = _score_scale(scores[:, 0], error, within_base=rows.within_base)
        # Scores below -scale round more coarsely than the error allows for: what is beyond it is added to them.
        scores = torch.where(scores < -scale, (1 - _HALF) * scores - _HALF * scale, scores)
        distances = rows.base[:, None] - 2 * scores
        rounding = 2.0**-22 * (float(rows.base.max()) + 2 * scale)  # of base and of the difference
        return Proposals(distances, labels, 2 * (error + _HALF * scale) + rounding)

    def _error(self, rows: PreparedRows, centroids: Centroids) -> float:
        """Of a score before its own rounding."""
        x, c = rows.norm + self.rest, centroids.norm + centroids.rest
        offsets = c**2 / 2 + (x**2 + float(rows.base.max())) / 2
        rounded = self.rest * c + x * centroids.rest + _TWO_DIGITS * offsets
        return rounded + float_error(rows.form.shape[1], x * c + 2 * offsets)


def _form(values: Tensor, offset: Tensor, place: int, step: int = 1) -> Tensor:
    """(n, D + 4) in bfloat16: the values; two digits of the offset, from column D + 2 place; and ones for the other's.

    So a product of two such forms with unlike places is that of the values plus both offsets. Rows of zeros make their
    number a multiple of `step`.
    """
    num, dim = values.shape
    form = torch.empty(num + -num % step, dim + _EXTRA, dtype=torch.bfloat16, device=values.device)
    form[:num, :dim], form[:num, dim:], form[num:] = values, 1, 0
    first = offset.bfloat16()
    column = dim + 2 * place
    form[:num, column], form[:num, column + 1] = first, offset - first.double()
    return form


def _spare_rows(form: Tensor, step: int) -> Tensor:
    """The form with rows of zeros that make their number a multiple of `step`."""
    spare = -len(form) % step
    return torch.cat([form, form.new_zeros(spare, form.shape[1])]) if spare else form


def _score_scale(scores: Tensor, error: float, *, within_base: bool) -> float:
    """The size of the largest first score that matters: where only centroids within the base do, those are above 0.

    Never so small that scores which are off by the gap of `_best_columns` could leave it.
    """
    return max(_LEAST_SCALE, 8 * error, float(scores.max()), 0.0 if within_base else -float(scores.min()))


def _best_columns(table: Tensor, t: int, error: float, *, within_base: bool) -> tuple[Tensor, Tensor]:
    """The largest entries per row, (P, t), descending, and their columns: as many as may matter. Uses the table up.

    Places of a row stay free, at -inf, once an entry lies so far below the first that no later one can be the largest
    true score; the second at the earliest, or, where only true scores of 0 or more matter, once entries lie so far
    below 0.

    Args:
        error: of an entry, beside the rounding to bfloat16.
    """
    values = torch.full((len(table), t), -math.inf, device=table.device)
    columns = torch.zeros((len(table), t), dtype=torch.int64, device=table.device)
    rows, cutoff = torch.arange(len(table), device=table.device), values[:, 0]
    for place in range(t):
        found = _argmax(table)[:, None]
        best = table.gather(1, found)
        values[:, place].index_copy_(0, rows, best[:, 0])
        columns[:, place].index_copy_(0, rows, found[:, 0])
        if place == t - 1:
            break
        if place == 0:
            gap = 2 * (error + _HALF * _score_scale(best, error, within_base=within_base)) * (1 + 2 * _HALF)
            cutoff = (best[:, 0] - gap).clamp(min=-gap) if within_base else best[:, 0] - gap
        near = (best[:, 0] >= cutoff[rows]).nonzero()[:, 0]
        if not len(near):
            break
        if len(near) < len(rows):
            rows, table, found = rows[near], table.index_select(0, near), found[near]
        table.scatter_(1, found, -math.inf)
    return values, columns


def _argmax(table: Tensor) -> Tensor:
    """Column of the largest entry per row; on a CPU numpy's is several times as fast as torch's."""
    return table.argmax(1) if table.is_cuda else torch.from_numpy(table.numpy().argmax(1))
