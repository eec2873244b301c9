"""Which centroids may be the nearest: proposed by arithmetic that is fast and knows by how much it can be wrong.

A proposer estimates squared distances and states a bound of its error; whoever asked decides exactly among what the
bound leaves open (ops/nearest.py, ops/reassign.py). How a proposer computes is a matter of speed, never of the result.

Shapes: P rows, K centroids, D dimensions, t proposals per row at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from grappa_dist.ops.exact import GRID, exact_square

_TILE = 2**23  # elements of the largest float32 table made at once

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

    def rows(self, pieces: Sequence[Tensor], squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        """Prepares grid rows with their exact squared norms (P,) float64 in units of 2**-48.

        Args:
            pieces: the rows, (p, D) each, in order.
            base: (P,) float64 squared distances about as large as that of the nearest centroid: estimates near them are
                the sharpest.
            within_base: only centroids at most so far away matter.
        """

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Proposals: ...


def joined(pieces: Sequence[Tensor]) -> Tensor:
    """Rows in one piece, at least one piece given; a single one is not copied."""
    return torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]


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

    def rows(self, pieces: Sequence[Tensor], squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        return PreparedRows(joined(pieces), base.float(), norm_of(squares), within_base)

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Proposals:
        distances, labels = self.search(rows.form, centroids.form, t)
        return Proposals(distances, labels, float_error(rows.form.shape[1], (rows.norm + centroids.norm) ** 2))
