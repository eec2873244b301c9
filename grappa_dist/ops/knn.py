"""Exact nearest neighbours by inner product, block by block: floats propose, integers decide.

The k best of a row are those with the highest exact scores, equal scores by ascending row id. Lists over disjoint
blocks of targets merge into the list over all of them, in any order, so blocks may travel.

Shapes: P query rows, m target rows of one block, D dimensions, t proposals per query. Rows lie on the grid of
search/fixed_point.py; scores are float64 integers in units of 2**-48; a free place of a list has id -1 and score -inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.search.candidates import Search, best_in_floats, float_error, norm_of
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square
from grappa_dist.search.rerank import pair_dots

_SLACK = 8  # proposals beyond k: near-ties at the end of a list mostly fit in
_TILE = 2**23  # elements of the largest float64 table made at once
_COLUMNS = 2**13  # |score| < 2**49, so score * 2**13 + column still fits into an int64


@dataclass(frozen=True)
class Neighbours:
    """The k best targets of each query so far, best first."""

    scores: Tensor  # (P, k) float64
    ids: Tensor  # (P, k) int64

    @staticmethod
    def none(num_queries: int, k: int, device: torch.device | str = "cpu") -> Neighbours:
        scores = torch.full((num_queries, k), -math.inf, dtype=torch.float64, device=device)
        return Neighbours(scores, torch.full((num_queries, k), -1, dtype=torch.int64, device=device))


def merge(a: Neighbours, b: Neighbours) -> Neighbours:
    """The best of two lists over disjoint targets, as long as the first of them."""
    scores, ids = torch.cat([a.scores, b.scores], 1), torch.cat([a.ids, b.ids], 1)
    by_id = ids.argsort(dim=1, stable=True)  # ascending ids, then a stable sort by score: equal scores keep that order
    by_score = scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    best = by_id.gather(1, by_score)[:, : a.ids.shape[1]]
    return Neighbours(scores.gather(1, best), ids.gather(1, best))


def largest_in_floats(x: Tensor, y: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t largest float32 inner products per row, (P, t), descending, and their indices: the search without faiss."""
    return best_in_floats(x, len(y), lambda rows: rows @ y.T, t)


@dataclass(frozen=True)
class Block:
    """Target rows with their row ids, ids ascending: then the lower of two columns is the lower of two ids."""

    rows: Tensor  # (m, D) float32 on the grid
    ids: Tensor  # (m,) int64

    @staticmethod
    def of(rows: Tensor, ids: Tensor) -> Block:
        order = ids.argsort()
        return Block(rows[order], ids[order])


def extend(
    best: Neighbours,
    queries: Block,
    targets: Block,
    search: Search = largest_in_floats,
    *,
    least: Tensor | None = None,
) -> Neighbours:
    """The list over all targets so far, this block included; a row is not its own neighbour.

    A target whose float score lies more than twice the error bound below the (k + 1)-th of the block, of which one may
    be the query itself, is none of the block's k best; one that lies more than the bound below the k-th exact score so
    far is none of the list's. All others are scored exactly. When the last proposal is among them, targets beyond the
    proposals may be too, and the whole block is scored.

    Args:
        least: (P,) float64 exact scores below which targets need not be found, where more is known than `best` tells.
    """
    k, m = best.ids.shape[1], len(targets.ids)
    if not m or not len(queries.ids):
        return best
    t = min(m, k + 1 + _SLACK)
    floats, proposed = search(queries.rows, targets.rows, t)
    norms = [norm_of(exact_square(rows)) for rows in (queries.rows, targets.rows)]
    error = float_error(queries.rows.shape[1], math.prod(norms))
    floor = (best.scores[:, -1] if least is None else least) / GRID**2 - error  # (P,)
    if t > k:
        floor = torch.maximum(floor, floats[:, k].double() - 2 * error)
    possible = floats.double() >= floor[:, None]  # (P, t), a prefix of each row
    cut = possible[:, -1] if t < m else torch.zeros_like(possible[:, -1])
    best = merge(best, _rescored(queries, targets, proposed, possible & ~cut[:, None]))
    rows = cut.nonzero()[:, 0]
    if len(rows):
        some = Neighbours(best.scores[rows], best.ids[rows])
        some = _scored_in_full(some, Block(queries.rows[rows], queries.ids[rows]), targets)
        best.scores[rows], best.ids[rows] = some.scores, some.ids
    return best


def _rescored(queries: Block, targets: Block, proposed: Tensor, possible: Tensor) -> Neighbours:
    """The possible ones among the proposals with exact scores, (P, t), without the queries themselves."""
    possible = possible & (targets.ids[proposed] != queries.ids[:, None])
    found = Neighbours.none(len(proposed), proposed.shape[1], proposed.device)
    row, place = possible.nonzero().unbind(1)
    column = proposed[row, place]
    found.scores[row, place] = pair_dots(queries.rows, targets.rows, (row, column))
    found.ids[row, place] = targets.ids[column]
    return found


def _scored_in_full(best: Neighbours, queries: Block, targets: Block) -> Neighbours:
    """The list after exact scores with every target of the block.

    Score and column go into one integer key, the lower column higher: keys are unique, so topk has no ties to break.
    """
    parts = []
    for start in range(0, len(queries.ids), _TILE // _COLUMNS):
        rows = slice(start, start + _TILE // _COLUMNS)
        part = Neighbours(best.scores[rows], best.ids[rows])
        for first in range(0, len(targets.ids), _COLUMNS):
            ids = targets.ids[first : first + _COLUMNS]
            scores = exact_dot(queries.rows[rows], targets.rows[first : first + _COLUMNS])  # (rows, columns)
            keys = scores.long() * _COLUMNS + torch.arange(_COLUMNS - 1, _COLUMNS - 1 - len(ids), -1, device=ids.device)
            keys[ids == queries.ids[rows, None]] = torch.iinfo(torch.int64).min
            columns = keys.topk(min(part.ids.shape[1], len(ids)), dim=1).indices
            kept = scores.gather(1, columns)
            found = ids[columns]
            own = found == queries.ids[rows, None]  # only where fewer than k others are in reach
            part = merge(part, Neighbours(kept.masked_fill(own, -math.inf), found.masked_fill(own, -1)))
        parts.append(part)
    return Neighbours(torch.cat([p.scores for p in parts]), torch.cat([p.ids for p in parts]))


def to_scores(best: Neighbours) -> Tensor:
    """Inner products as float32, (P, k), rounded once from the exact ones."""
    return (best.scores / GRID**2).float()


def are_duplicates(ids: NDArray[np.int64], scores: NDArray[np.float32], cosine: float) -> NDArray[np.bool_]:
    """Which neighbours of a list are near-duplicates of their query, (P, k): those above a cosine."""
    return (ids >= 0) & (scores > np.float32(cosine))


def without_duplicates(ids: NDArray[np.int64], scores: NDArray[np.float32], cosine: float, k: int) -> NDArray[np.int64]:
    """The k best neighbours of each longer list that are no near-duplicates, (P, k); id -1 where there are fewer."""
    kept = np.where(are_duplicates(ids, scores, cosine), -1, ids)
    order = np.argsort(kept < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(kept, order, axis=1)
