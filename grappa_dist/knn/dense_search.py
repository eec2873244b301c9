"""The k-NN search of a device: all products of a block, the best few of each row, exact scores of those that count.

As `extend` of knn/block_search.py, whose lists these are, bit for bit, but every shape depends on the sizes of the
blocks and on two counts, which are read while another block is under way (search/in_flight.py).

Shapes: P query rows, m target rows, D dimensions, k neighbours, t candidates per query.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grappa_dist.knn.block_search import SPARE, Block, Neighbours, merge, scored_in_full
from grappa_dist.search.candidates import float_error, true_products
from grappa_dist.search.dense import table_rows
from grappa_dist.search.fixed_point import GRID, NORM_LIMIT
from grappa_dist.search.in_flight import Work, compact
from grappa_dist.search.rerank import pair_dots


def extend_dense(best: Neighbours, queries: Block, targets: Block, *, least: Tensor | None = None) -> Work[Neighbours]:
    """The lists over all targets so far, this block included; a row is not its own neighbour.

    Args:
        least: (P,) float64 exact scores below which targets need not be found; by default those of the k-th in `best`.
    """
    (num, k), m = best.ids.shape, len(targets.ids)
    if not m or not num:
        return best
    t, dim = min(m, k + 1 + SPARE), queries.rows.shape[1]
    floats, columns = _largest(queries.rows, targets.rows, t)
    error = float_error(dim, (NORM_LIMIT + math.sqrt(dim) / GRID) ** 2)
    threshold = (best.scores[:, -1] if least is None else least) / GRID**2 - error
    if t > k:
        threshold = torch.maximum(threshold, floats[:, k].double() - 2 * error)
    possible = floats.double() >= threshold[:, None]  # (P, t), a prefix of each row
    unresolved = possible[:, -1] & (t < m)  # targets that are no candidates may be possible too
    counted = possible & ~unresolved[:, None] & (targets.ids[columns] != queries.ids[:, None])
    places, num_pairs = compact(counted.flatten())
    rows, num_rows = compact(unresolved)
    pairs, left = yield torch.cat([num_pairs, num_rows])
    if pairs:
        some = places[:pairs]
        row, column = some // t, columns.flatten()[some]
        found = Neighbours.none(num, t, best.ids.device)
        found.scores.view(-1).index_copy_(0, some, pair_dots(queries.rows, targets.rows, (row, column)))
        found.ids.view(-1).index_copy_(0, some, targets.ids[column])
        best = merge(best, found)
    if left:
        rows = rows[:left]
        whole = Neighbours(best.scores.clone(), best.ids.clone())
        lists = Neighbours(best.scores[rows], best.ids[rows])
        lists = scored_in_full(lists, Block(queries.rows[rows], queries.ids[rows]), targets)
        whole.scores[rows], whole.ids[rows] = lists.scores, lists.ids
        return whole
    return best


def _largest(x: Tensor, y: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The t largest float32 products of each row with the targets, (P, t), descending, and their columns."""
    step = max(t, table_rows(x, 4 * len(x)))
    values = columns = None
    with true_products():
        for start in range(0, len(y), step):
            found = (x @ y[start : start + step].T).topk(min(t, len(y) - start), dim=1)
            some, at = found.values, found.indices + start
            if values is None or columns is None:
                values, columns = some, at
                continue
            both = torch.cat([values, some], 1).topk(t, dim=1)
            values, columns = both.values, torch.cat([columns, at], 1).gather(1, both.indices)
    assert values is not None
    assert columns is not None
    return values, columns
