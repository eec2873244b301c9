"""Exact re-ranking: the nearest centroid among candidates, decided in integers.

Rows and centroids lie on the grid of search/fixed_point.py, so squared distances are integers and the nearest centroid
does not depend on rounding. Ties go to the lowest index.

Shapes: P rows of one block, K centroids, D dimensions, t candidates per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grappa_dist.search.candidates import Centroids, float_error, norm_of
from grappa_dist.search.fixed_point import GRID, cached_rows, exact_dot, exact_square

FAR = 2**62
"""Above any squared distance."""

_FARTHEST = 4.125  # no two rows of norm at most 1 + 2**-7 are at a larger squared distance
_TILE = 2**23  # elements of the largest float64 table made at once


@dataclass(frozen=True)
class Assignment:
    """Nearest centroids of some rows; label -1 and distance `FAR` where none is within the limit."""

    labels: Tensor  # (P,) int64
    squares: Tensor  # (P,) int64, exact squared distance, in units of 2**-48
    undecided: int = 0  # rows with more than one remaining candidate


def assign(
    x: Tensor, centroids: Centroids, *, squares: Tensor | None = None, within: Tensor | None = None
) -> Assignment:
    """Nearest centroid of each grid row, exactly.

    Where the last candidate may be the nearest, centroids that are no candidates may be too, and all are compared.

    Args:
        squares: (P,) float64, exact |x|^2, where they are known.
        within: (P,) float64 squared distances; centroids farther than that need not be found.
    """
    if not len(x):
        none = torch.zeros(0, dtype=torch.int64, device=x.device)
        return Assignment(none, none)
    squares = exact_square(x) if squares is None else squares
    limit = torch.full_like(squares, math.inf) if within is None else within
    base = squares / GRID**2 if within is None else within.clamp(max=_FARTHEST)
    prepared = centroids.generator.rows([x], squares, base, within_base=within is not None)
    found = centroids.generator.nearest(
        prepared, centroids, min(centroids.generator.num_candidates, len(centroids.values))
    )
    limit = torch.minimum(limit, found.distances[:, 0].double() + found.error)
    possible = found.distances.double() - found.error <= limit[:, None]  # (P, t)
    unresolved = possible[:, -1] & (found.labels.shape[1] < len(centroids.values))
    rows, places = (possible & ~unresolved[:, None]).nonzero().unbind(1)
    nearest = nearest_of_pairs(x, squares, centroids, (rows, found.labels[rows, places]))
    rows = unresolved.nonzero()[:, 0]
    if len(rows):
        nearest.labels[rows], scores = best_of_all(x[rows], centroids)
        nearest.squares[rows] = (squares[rows] - scores).long()
    return replace(nearest, undecided=int((possible.sum(1) > 1).sum()))


def nearest_of_pairs(x: Tensor, squares: Tensor, centroids: Centroids, pairs: tuple[Tensor, Tensor]) -> Assignment:
    """The exactly nearest of the centroids that a row is paired with, for each row.

    Args:
        squares: (P,) float64, exact |x|^2.
        pairs: rows and labels, in any order; a row may be in several or in none.
    """
    rows, labels = pairs
    distances = pair_squares(x, squares, centroids, pairs)
    best = torch.full_like(squares, math.inf).scatter_reduce_(0, rows, distances, "amin")
    tied = distances == best[rows]
    most = torch.iinfo(torch.int64).max
    nearest = torch.full((len(x),), most, device=x.device).scatter_reduce_(0, rows[tied], labels[tied], "amin")
    return Assignment(nearest.masked_fill_(nearest == most, -1), best.clamp_(max=FAR).long())


@dataclass(frozen=True)
class Decided:
    """Nearest centroids of some rows, with a bound of their distances."""

    labels: Tensor  # (P,) int64, exact
    above: Tensor  # (P,) float64, at least the squared distance
    by_integers: Tensor  # (P,) bool, rows that float32 could not decide


def decide_pairs(x: Tensor, squares: Tensor, centroids: Centroids, pairs: tuple[Tensor, Tensor]) -> Decided:
    """As `nearest_of_pairs`, for rows that are all in some pair, at a third of the cost.

    Products in float32 decide nearly all rows: those with a single centroid within the error of the nearest. Exact
    products decide the others.
    """
    rows, labels = pairs
    products = _dots(x, centroids.values, pairs, torch.float32).double()
    distances = (squares[rows] + centroids.squares[labels]) / GRID**2 - 2 * products
    error = 2 * float_error(x.shape[1], norm_of(squares) * centroids.norm) + 2.0**-48
    best = torch.full_like(squares, math.inf).scatter_reduce_(0, rows, distances, "amin")
    possible = (distances <= best[rows] + 2 * error).nonzero()[:, 0]
    rows, labels = rows[possible], labels[possible]
    nearest = torch.zeros_like(squares, dtype=torch.int64).scatter_(0, rows, labels)
    several = torch.bincount(rows, minlength=len(x)) > 1
    some = several[rows].nonzero()[:, 0]
    exact = nearest_of_pairs(x, squares, centroids, (rows[some], labels[some]))
    return Decided(torch.where(several, exact.labels, nearest), best + error, several)


@dataclass(frozen=True)
class Competitors:
    """For each row a centroid that is probably the nearest, and others that may be nearer."""

    first: Tensor  # (P,) int64
    rows: Tensor  # (pairs,) int64, in any order; faster where rows are consecutive
    labels: Tensor  # (pairs,) int64, never the row's first


def decide_competitors(
    x: Tensor, squares: Tensor, centroids: Centroids, competitors: Competitors
) -> tuple[Tensor, Tensor]:
    """The exactly nearest of each row's first centroid and its competitors, (P,), and the rows float32 did not decide.

    |x - c_j|^2 - |x - c_i|^2 = |c_j|^2 - |c_i|^2 + 2 x.(c_i - c_j): one product for two centroids, in which their
    common part cancels before anything is rounded.

    Args:
        squares: (P,) float64, exact |x|^2.
    """
    first, rows, labels = competitors.first, competitors.rows, competitors.labels
    products = _differences(x, centroids, competitors)
    further = (centroids.squares[labels] - centroids.squares[first[rows]]) / GRID**2 + 2 * products
    # The rounding of c_i - c_j counts as one more operation, which float_error allows for.
    error = 2 * float_error(x.shape[1], norm_of(squares) * 2 * centroids.norm) + 2.0**-48
    least = torch.zeros_like(squares).scatter_reduce_(0, rows, further, "amin")  # the first one's is 0, exactly
    first_near, near = least >= -2 * error, further <= least[rows] + 2 * error
    undecided = first_near.long().scatter_add_(0, rows, near.long()) > 1
    nearest = torch.where(first_near, first, first.scatter(0, rows[near], labels[near]))
    own, some = (undecided & first_near).nonzero()[:, 0], (near & undecided[rows]).nonzero()[:, 0]
    pairs = (torch.cat([own, rows[some]]), torch.cat([first[own], labels[some]]))
    exact = nearest_of_pairs(x, squares, centroids, pairs)
    return torch.where(undecided, exact.labels, nearest), undecided


def _differences(x: Tensor, centroids: Centroids, competitors: Competitors) -> Tensor:
    """x.(c_i - c_j) of each row with its first centroid i and a competitor j, (pairs,) float64 of float32 sums."""
    size, c = cached_rows(x), centroids.values
    parts = []
    for rows, labels in zip(competitors.rows.split(size), competitors.labels.split(size), strict=True):
        difference = c.index_select(0, competitors.first[rows]).sub_(c.index_select(0, labels))
        parts.append(difference.mul_(_select(x, rows)).sum(1))
    return torch.cat(parts).double()


def _select(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], at least one row; a view where they are consecutive."""
    first, num = int(rows[0]), len(rows)
    if int(rows[-1]) - first == num - 1 and bool((rows.diff() == 1).all()):
        return x[first : first + num]
    return x.index_select(0, rows)


def pair_squares(x: Tensor, squares: Tensor, centroids: Centroids, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Exact squared distances between rows and centroids, (pairs,) float64 integers, in units of 2**-48."""
    rows, labels = pairs
    return squares[rows] + centroids.squares[labels] - 2 * pair_dots(x, centroids.values, pairs)


def pair_dots(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Exact dot products of grid rows x[i] and y[j], (pairs,) float64 integers, in units of 2**-48."""
    return _dots(x, y, pairs, torch.float64).mul_(GRID**2)


def _dots(x: Tensor, y: Tensor, pairs: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    size = cached_rows(x)
    parts = [
        (x.index_select(0, i).to(dtype) * y.index_select(0, j)).sum(1)
        for i, j in zip(*(places.split(size) for places in pairs), strict=True)
    ]
    return torch.cat(parts)


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
            better = best > scores[rows]  # strictly, so that a tie stays with the earlier columns
            labels[rows[better]], scores[rows[better]] = index[better] + start, best[better]
    return labels, scores
