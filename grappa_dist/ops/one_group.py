"""A pass of Lloyd's iterations where the centroids are one group: rows are searched among all of them or not at all.

The only lower bound of a row is that to all other centroids, so its own one need not be looked at apart: it is found
among the others. With many groups there is more to keep apart (kmeans/yinyang.py).

Shapes: P rows of one block, M of them open, K centroids, D dimensions, t proposals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grappa_dist.ops.bounds import Bounds, rooted
from grappa_dist.ops.moves import Moves, Take, most_or_these
from grappa_dist.search.candidates import SLACK, Centroids, Proposals, joined
from grappa_dist.search.fixed_point import GRID
from grappa_dist.search.rerank import Rivals, best_of_all, decide_rivals


def reassign_among_all(take: Take, centroids: Centroids, bounds: Bounds) -> Moves:
    """As `reassign` for one group."""
    rows = most_or_these(bounds.lower[:, 0] <= bounds.upper)
    if not len(rows):
        return Moves.none(rows.device)
    own, squares, num = bounds.labels[rows].long(), bounds.squares[rows], len(centroids.values)
    looked = not bool((own < 0).any())
    # The own centroid is within the upper bound, so no further one matters.
    base = bounds.upper[rows].double().square() if looked else squares / GRID**2
    prepared = centroids.proposer.rows(take(rows), squares, base, within_base=looked)
    found = centroids.proposer.nearest(prepared, centroids, min(centroids.proposer.places, num))
    labels, by_integers = found.labels[:, 0].clone(), 0
    several = found.possible[:, 1:].any(1).nonzero()[:, 0]
    if len(several):
        x = joined(take(rows[several]))
        labels[several], unsure = _decide(x, squares[several], centroids, _picked(found, several))
        by_integers = int(unsure.sum())
    _rebound_single(bounds, rows, found, labels)
    changed = (labels != own).nonzero()[:, 0]
    return Moves(rows[changed], own[changed], labels[changed], by_integers, len(rows) * num)


def _picked(found: Proposals, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and whether they are possible, (t, M) each, of some rows."""
    return found.labels.T.index_select(1, rows), found.possible.T.index_select(1, rows)


def _decide(x: Tensor, squares: Tensor, centroids: Centroids, proposed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The nearest of several centroids that may be it, (M,), and which rows floats left open, (M,) bool."""
    labels, possible = proposed
    places, rows = possible[1:].nonzero().unbind(1)
    nearest, unsure = decide_rivals(x, squares, centroids, Rivals(labels[0], rows, labels[places + 1, rows]))
    if len(possible) < len(centroids.values):  # where the last place may be the nearest, those not proposed may be too
        crowded = possible[-1].nonzero()[:, 0]
        nearest[crowded] = best_of_all(x[crowded], centroids)[0]
        unsure[crowded] = True
    return nearest, unsure


def _rebound_single(bounds: Bounds, rows: Tensor, found: Proposals, labels: Tensor) -> None:
    """Writes the labels and bounds of the open rows, by (1) to (4) of `Proposals`.

    The nearest is no further than D_0 <= d_0 + e. The others are no nearer than d_0 - e, and, where the first is the
    nearest, than d_1 - e; SLACK covers what far distances have been rounded by.
    """
    first = found.distances[:, 0].double()
    second = found.distances[:, 1].double() if found.distances.shape[1] > 1 else torch.full_like(first, math.inf)
    others = torch.where(labels == found.labels[:, 0], second, first)
    bounds.lower[rows, 0] = rooted(others - found.error, 1 - SLACK)
    bounds.upper[rows] = rooted(first + found.error, 1 + SLACK)
    bounds.labels[rows] = labels.int()
