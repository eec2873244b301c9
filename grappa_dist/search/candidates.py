"""Candidates for the nearest centroid, generated in floating point with an error bound.

A generator estimates squared distances and states a bound of its error; callers decide exactly, in integers, among the
candidates that the bound leaves (search/rerank.py, kmeans/yinyang.py). How a generator computes is a matter of speed,
never of the result.

Shapes: P rows, K centroids, D dimensions, t candidates per row at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from grappa_dist.search.fixed_point import GRID, exact_square

SLACK = 2.0**-20
"""A fraction above what a few operations in float32 round away of an estimate or of a bound."""

_TILE = 2**23  # elements of the largest float32 table made at once

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(rows, targets, t) -> float32 values (P, t), best first, and target indices (P, t)."""


def float_error(dim: int, size: float) -> float:
    """How far a float32 dot product or squared distance over `dim` dimensions may lie from the true one.

    In any order, n float32 operations err by at most n u / (1 - n u) times the sum of their terms' absolute values,
    u = 2**-24. `size` bounds that sum: |x||c| for a dot product, (|x| + |c|)^2 for a squared distance, summed directly
    or as |x|^2 + |c|^2 - 2 x.c. No term goes through more than dim + 4 operations.
    """
    steps = (dim + 4) * 2.0**-24
    if steps >= 0.5:
        raise ValueError(f"rows of {dim} dimensions leave float32 without an error bound, fewer than 2**23 are needed")
    return steps / (1 - steps) * size


class SharedSetting:
    """A setting of torch for all threads, with a count of those that need one value of it."""

    def __init__(self, get: Callable[[], Any], put: Callable[[Any], None], needed: Any) -> None:
        self.get, self.put, self.needed = get, put, needed
        self.lock, self.users, self.before = Lock(), 0, None

    @contextmanager
    def held(self) -> Iterator[None]:
        """The needed value. Several threads may be inside; that from before returns when the last one leaves."""
        with self.lock:
            if not self.users:
                self.before = self.get()
                self.put(self.needed)
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if not self.users:
                    self.put(self.before)


_products = SharedSetting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")


def true_products() -> AbstractContextManager[None]:
    """Products of float32 without the shortcuts by TF32 and bfloat16, which violate the error bound.

    Several threads may be inside; the setting from before returns when the last one leaves.
    """
    return _products.held()


def best_float32(x: Tensor, num_targets: int, table: Callable[[Tensor], Tensor], t: int) -> tuple[Tensor, Tensor]:
    """The t largest entries per row of a float32 table, (P, t), descending, and their columns, made tile by tile.

    Args:
        table: (rows, num_targets) from some rows of x.
    """
    with true_products():
        parts = [table(rows).topk(t, dim=1) for rows in torch.split(x, max(1, _TILE // max(1, num_targets)))]
    if not parts:
        return x.new_empty((0, t)), torch.empty((0, t), dtype=torch.int64, device=x.device)
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])


def nearest_float32(x: Tensor, c: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t smallest squared distances in float32, (P, t), ascending, and their indices: the search without faiss."""
    squares = c.square().sum(1)

    def closeness(rows: Tensor) -> Tensor:
        return -(rows.square().sum(1, keepdim=True) + squares - 2 * (rows @ c.T))  # (rows, K)

    values, indices = best_float32(x, len(c), closeness, t)
    return -values, indices


def largest_float32(x: Tensor, y: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t largest float32 inner products per row, (P, t), descending, and their indices: the search without faiss."""
    return best_float32(x, len(y), lambda rows: rows @ y.T, t)


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Rows in one piece, at least one piece given; a single one is not copied."""
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]


def norm_of(squares: Tensor) -> float:
    """The largest norm, from squares in units of 2**-48; 0 for no rows."""
    return math.sqrt(float(squares.max())) / GRID if len(squares) else 0.0


@dataclass(frozen=True)
class Centroids:
    """Grid centroids with what every block needs of them."""

    values: Tensor  # (K, D) float32 on the grid
    squares: Tensor  # (K,) float64, exact |c|^2 in units of 2**-48
    norm: float  # the largest |c|
    generator: CandidateGenerator
    form: Tensor  # (K, E), as the generator multiplies them
    residual: float = 0.0  # the largest norm of what the form leaves out
    is_part: bool = False  # some of others; then too few rows are searched to pay for a table of all pairs

    @staticmethod
    def of(values: Tensor, generator: CandidateGenerator | None = None) -> Centroids:
        squares = torch.cat([exact_square(v) for v in values.split(max(1, _TILE // values.shape[1]))])
        return (generator or Float32Generator()).centroids(values, squares)

    @cached_property
    def pair_distances(self) -> tuple[Tensor, Tensor]:
        """At least the distances between any two, and between what the form leaves out of them, (K, K) float32."""
        left_out = self.values - self.form[:, : self.values.shape[1]].float()  # rounds nothing, and lies on the grid
        return _distances(self.values, self.squares), _distances(left_out, exact_square(left_out))

    def pick(self, labels: Tensor) -> Centroids:
        """Some of them."""
        values, squares, form = (t.index_select(0, labels) for t in (self.values, self.squares, self.form))
        return replace(self, values=values, squares=squares, form=form, is_part=True)


def _distances(x: Tensor, squares: Tensor) -> Tensor:
    """At least the distances between any two of some grid rows, (K, K) float32, by products in float32."""
    with true_products():
        dots = x @ x.T
    error = float_error(x.shape[1], norm_of(squares) ** 2)
    both = (squares[:, None] + squares) / GRID**2
    return ((both - 2 * (dots.double() - error)).clamp(min=0).sqrt() * (1 + SLACK)).float()


@dataclass(frozen=True)
class PreparedRows:
    """Rows of a block as the generator multiplies them."""

    form: Tensor  # (P or some more, E): spare rows at the end make the number of rows a multiple of `step`
    base: Tensor  # (P,) float32, the squared distance relative to which the form counts others
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
class Candidates:
    """The nearest centroids of each row by estimates; free places are infinitely far.

    With e the error, d_p and D_p the estimated and the true squared distance of the centroid in place p of a row, and D
    the least true one of the centroids that are no candidates:

        (1) |d_0 - D_0| <= e;
        (2) d_p - e <= D_p for every place p that is not free;
        (3) d_p - e <= D for the last of these places;
        (4) D > min_p D_p where a place is free: the nearest is a candidate.

    Where only centroids within the base matter, (1) and (4) hold for rows that have one within it, and rows with a free
    second place have none. Places whose d_p is far above d_0 may break (2) and (3) by less than SLACK d_p, which is the
    rounding of d_p itself: a bound that is computed from them must allow for it.
    """

    distances: Tensor  # (P, t) float32, squared, ascending: d
    labels: Tensor  # (P, t) int64
    error: float
    remaining: Tensor | None = None  # (P, t) bool, which may be the nearest, where more is known than (1) to (3)

    @property
    def possible(self) -> Tensor:
        """Which may be the nearest, (P, t) bool; in the last place: whether that or one that is no candidate may be."""
        if self.remaining is not None:
            return self.remaining
        return self.distances <= within_reach(self.distances[:, 0].double() + self.error, self.error)[:, None]


def within_reach(nearest: Tensor, error: float) -> Tensor:
    """(P,) float32: larger estimates do not belong to centroids at most as far as `nearest` (P,) float64."""
    return ((nearest + error) * (1 + SLACK)).float()


class CandidateGenerator(Protocol):
    """One way to estimate distances and to choose candidates by them."""

    @property
    def num_candidates(self) -> int:
        """How many candidates per row are worth their cost."""

    def centroids(self, values: Tensor, squares: Tensor) -> Centroids: ...

    def rows(self, pieces: Sequence[Tensor], squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        """Prepares grid rows with their exact squared norms (P,) float64 in units of 2**-48.

        Args:
            pieces: the rows, (p, D) each, in order.
            base: (P,) float64 squared distances about as large as that of the nearest centroid: estimates near them are
                the sharpest.
            within_base: only centroids within these distances matter.
        """

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Candidates: ...


@dataclass(frozen=True)
class Float32Generator:
    """Distances in float32, by a search that finds the t nearest."""

    search: Search = nearest_float32
    num_candidates: int = 3

    def centroids(self, values: Tensor, squares: Tensor) -> Centroids:
        return Centroids(values, squares, norm_of(squares), self, values)

    def rows(self, pieces: Sequence[Tensor], squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        return PreparedRows(joined(pieces), base.float(), norm_of(squares), within_base)

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Candidates:
        distances, labels = self.search(rows.form, centroids.form, t)
        return Candidates(distances, labels, float_error(rows.form.shape[1], (rows.norm + centroids.norm) ** 2))
