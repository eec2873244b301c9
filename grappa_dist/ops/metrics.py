"""Retrieval metrics, leave one out by cosine: R-Precision, MAP@R (Musgrave et al. 2020) and recall at 1.

Every image is a query against all others. R is the number of other images of its class; a class of one is gallery,
never query; a row with a negative label is neither. Equal scores are ordered by row id. Scores are exact and sums are
integers, so block size, threads and the division of queries among workers do not change a bit.

Shapes: n rows, g gallery rows (those with a label), b queries of a block, k the largest R among them, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.ops.exact import exact_dot, to_grid

_UNIT = 2**40  # a query's metric in [0, 1] as an integer: they add in any order, and 2**23 of them fit in int64


@dataclass(frozen=True)
class RetrievalSums:
    """What some queries say about the metrics; adds up over queries. All but `queries` in units of 2**-40."""

    queries: int = 0
    r_precision: int = 0
    map_at_r: int = 0
    recall_at_1: int = 0

    def __add__(self, other: RetrievalSums) -> RetrievalSums:
        return RetrievalSums(
            self.queries + other.queries,
            self.r_precision + other.r_precision,
            self.map_at_r + other.map_at_r,
            self.recall_at_1 + other.recall_at_1,
        )

    def finish(self) -> dict[str, float]:
        """Means over queries, in [0, 1], and `queries`, their number; without queries all are 0."""
        whole = _UNIT * max(self.queries, 1)
        return {
            "r_precision": self.r_precision / whole,
            "map_at_r": self.map_at_r / whole,
            "recall_at_1": self.recall_at_1 / whole,
            "queries": self.queries,
        }


def retrieval_scores(z: Tensor, labels: Tensor, *, block_rows: int = 256) -> dict[str, float]:
    """`r_precision`, `map_at_r`, `recall_at_1` and `queries` of features (n, D) with integer labels (n,)."""
    return retrieval_sums(z, labels, range(len(z)), block_rows=block_rows).finish()


def retrieval_sums(z: Tensor, labels: Tensor, query_rows: range, *, block_rows: int = 256) -> RetrievalSums:
    """The sums over those of `query_rows` that are queries; ranges that cover all rows once add up to the whole.

    Args:
        z: (n, D), all rows, of any length but finite; labels (n,) integers, negative where there is none.
        block_rows: queries scored at once; a block holds block_rows * n float64 scores.
    """
    _check(z, labels, query_rows, block_rows)
    rows = torch.nonzero(labels >= 0).flatten()  # (g,) in order, so a place in the gallery orders as a row id does
    classes = torch.unique(labels[rows], return_inverse=True)[1]  # (g,)
    others = torch.bincount(classes)[classes] - 1 if len(rows) else classes  # (g,) R of each
    chosen = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    chosen[query_rows.start : query_rows.stop : query_rows.step] = True
    queries = torch.nonzero(chosen[rows] & (others > 0)).flatten()
    grid = to_grid(F.normalize(z[rows].double(), dim=1)).double()  # (g, D)
    sums = RetrievalSums()
    for start in range(0, len(queries), block_rows):
        block = queries[start : start + block_rows]
        nearest = _nearest(exact_dot(grid[block], grid), block, int(others[block].max()))
        sums += _block_sums(classes[nearest] == classes[block, None], others[block])
    return sums


def _nearest(scores: Tensor, queries: Tensor, k: int) -> Tensor:
    """The k best columns of each row, best first, a tie to the lower column, without the query itself: (b, k).

    Overwrites the queries' scores of themselves.
    """
    scores[torch.arange(len(queries), device=scores.device), queries] = -torch.inf
    last = scores.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)  # its columns are any of equal ones: unused
    keep = scores >= last
    if int(keep.count_nonzero()) > len(keep) * k:  # some rows have more scores equal to the last than there is room for
        tied = scores == last
        room = k - (keep & ~tied).sum(1, keepdim=True)
        keep &= ~tied | (tied.cumsum(1) <= room)
    columns = keep.nonzero()[:, 1].view(-1, k)  # k in every row, ascending
    order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)


def _block_sums(relevant: Tensor, others: Tensor) -> RetrievalSums:
    """Sums over a block from what is relevant among the nearest (b, k), of which the first R (b,) count."""
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    relevant = relevant & (ranks <= others[:, None])
    hits = relevant.cumsum(1)
    precisions = (hits.double() * _UNIT / ranks).round().long() * relevant  # (b, k) integers: their sum has no order
    return RetrievalSums(
        queries=len(others),
        r_precision=int((hits[:, -1].double() * _UNIT / others).round().long().sum()),
        map_at_r=int((precisions.sum(1) // others).sum()),
        recall_at_1=int(relevant[:, 0].sum()) * _UNIT,
    )


def _check(z: Tensor, labels: Tensor, query_rows: range, block_rows: int) -> None:
    if z.ndim != 2 or labels.shape != z.shape[:1] or labels.is_floating_point() or labels.device != z.device:
        raise ValueError(
            f"retrieval: z must be (n, D) and labels n integers beside it, "
            f"got {tuple(z.shape)} on {z.device} and {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )
    if query_rows.step < 1 or query_rows.start < 0 or query_rows.stop > len(z):
        raise ValueError(f"retrieval: query_rows must rise within [0, {len(z)}), got {query_rows}")
    if block_rows < 1:
        raise ValueError(f"retrieval: block_rows must be at least 1, got {block_rows}")
