"""Retrieval metrics, leave one out by cosine: R-Precision, MAP@R (Musgrave et al. 2020) and recall at 1; the same and
others of lists that are found elsewhere (retrieval/ranking.py); and how nested two partitions of the same rows are.

Every image is a query against all others. R is the number of other images of its class; the image of a class of one is
never a query, but in the gallery; a row with a negative label is neither. Equal scores are ordered by row id. Exact
scores decide wherever float32 may not (class_ranks.py), and sums are integers, so block size, threads and the division
of queries among workers do not change a bit.

Shapes: n rows, q queries, D dimensions; of lists, b of them and t >= the largest R places. In partitions, label -1 is
no label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.class_ranks import UNIT, Gallery, score_queries, unit_on_grid

METRICS = ("r_precision", "map_at_r", "recall_at_1")
DEPTHS = (1, 5, 10)  # k of the metrics of the k nearest
_MOST = 2**22  # whose sum fits in int64


def retrieval_scores(z: Tensor, labels: Tensor, *, block_rows: int | None = None) -> dict[str, float]:
    """`r_precision`, `map_at_r`, `recall_at_1` and `queries` of features (n, D) with integer labels (n,)."""
    return retrieval_sums(z, labels, range(len(z)), block_rows=block_rows).finish()


def retrieval_sums(z: Tensor, labels: Tensor, query_rows: range, *, block_rows: int | None = None) -> RetrievalSums:
    """The sums over those of `query_rows` that are queries; ranges that cover all rows once add up to the whole.

    Arguments as of `query_scores`.
    """
    return query_scores(z, labels, query_rows, block_rows=block_rows).sums()


def query_scores(
    z: Tensor,
    labels: Tensor,
    query_rows: range | None = None,
    *,
    block_rows: int | None = None,
    device: torch.device | None = None,
) -> QueryScores:
    """The metrics of each query; their sums are `retrieval_sums`, to the bit.

    Args:
        z: (n, D), all rows, of any length but finite; labels (n,) integers, negative where there is none.
        query_rows: the rows that may be queries; None: all.
        block_rows: queries scored at once; by default as many as fit the cache, or the memory of a GPU.
        device: where they are scored; by default where z is. Rows are normalised where z is, so that figures of rows on
            a CPU do not depend on the device.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    device = z.device if device is None else device
    query_rows = range(len(z)) if query_rows is None else query_rows
    _check(z, labels, query_rows, block_rows)
    rows = torch.nonzero(labels >= 0).flatten()  # (g,) in order, so a place in the gallery orders as a row id does
    classes = torch.unique(labels[rows], return_inverse=True)[1].cpu()
    held = unit_on_grid(z[rows]).to(device)
    gallery = Gallery(classes, lambda places: held[places.to(device)].cpu(), device, held)
    chosen = torch.zeros(len(z), dtype=torch.bool)
    chosen[query_rows.start : query_rows.stop : query_rows.step] = True
    rows = rows.cpu()
    queries = gallery.queries[chosen[rows[gallery.queries]]]
    units = torch.zeros(len(queries), 3, dtype=torch.int64)
    for _ in score_queries(gallery, queries, units, block_rows=block_rows):
        pass
    order = queries.argsort()
    return QueryScores(rows[queries[order]].numpy(), units[order].numpy())


@dataclass(frozen=True)
class QueryScores:
    """The metrics of q queries, in ascending order of their rows."""

    rows: NDArray[np.int64]  # (q,) row ids
    units: NDArray[np.int64]  # (q, 3) R-Precision, MAP@R and recall@1 in units of 2**-40

    def sums(self) -> RetrievalSums:
        parts = (self.units[start : start + _MOST] for start in range(0, len(self.units), _MOST))
        found = (RetrievalSums(len(part), *part.sum(0).tolist()) for part in parts)
        return sum(found, RetrievalSums())

    def values(self, metric: str = "r_precision") -> NDArray[np.float64]:
        """One of METRICS for each query, (q,), in [0, 1]."""
        return as_fractions(self.units[:, METRICS.index(metric)])


@dataclass(frozen=True)
class RetrievalSums:
    """Sums of the metrics over queries, which add up. All but `queries` in units of 2**-40."""

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
        whole = UNIT * max(self.queries, 1)
        return {
            "r_precision": self.r_precision / whole,
            "map_at_r": self.map_at_r / whole,
            "recall_at_1": self.recall_at_1 / whole,
            "queries": self.queries,
        }


def metrics_of(depths: Sequence[int] = DEPTHS) -> tuple[str, ...]:
    """The names of what `list_units` computes: r_precision, map_at_r, then recall, precision and map_at k."""
    return ("r_precision", "map_at_r", *(f"{name}_at_{k}" for name in ("recall", "precision", "map") for k in depths))


def list_units(relevant: Tensor, sizes: Tensor, depths: Sequence[int] = DEPTHS) -> Tensor:
    """The metrics of lists of neighbours, in units of 2**-40: (b, m) integers, in the order of `metrics_of`.

    With R relevant images in the gallery, and P(i) the share of relevant ones among the first i:
    R-Precision is P(R), and MAP@R the sum of P(i) over relevant places i <= R, divided by R. At a depth k, recall is 1
    where any of the first k is relevant, else 0 (as in metric learning; in text retrieval that is the hit rate, and
    recall the share of the R that is found); precision is P(k), also where the gallery has fewer than k; mAP@k is the
    sum of P(i) over relevant places i <= k, divided by R, as trec_eval and pytorch-metric-learning have it, so it stays
    below 1 where R > k.

    Args:
        relevant: (b, t) whether the i-th nearest is of the query's class; t is at least the largest R and depth, and
            places beyond the gallery are False.
        sizes: (b,) R of each query, at least 1.
    """
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    hits = relevant.cumsum(1)
    summed = ((hits.double() * UNIT / ranks).round().long() * relevant).cumsum(1)  # (b, t) integers
    last = sizes[:, None] - 1
    r_precision = (hits.gather(1, last)[:, 0].double() * UNIT / sizes).round().long()
    at_r = torch.stack([r_precision, summed.gather(1, last)[:, 0] // sizes], 1)
    first = [hits[:, k - 1] for k in depths]
    recall = [(found > 0).long() * UNIT for found in first]
    precision = [(found.double() * UNIT / k).round().long() for found, k in zip(first, depths, strict=True)]
    average = [summed[:, k - 1] // sizes for k in depths]
    return torch.cat([at_r, torch.stack([*recall, *precision, *average], 1)], 1)


def mean_of(units: NDArray[np.int64]) -> float:
    """The mean of a metric (q,) in units of 2**-40, as `RetrievalSums.finish` has it; 0 without queries."""
    parts = (units[start : start + _MOST] for start in range(0, len(units), _MOST))
    return sum(int(part.sum()) for part in parts) / (UNIT * max(len(units), 1))


def as_fractions(units: NDArray[np.int64]) -> NDArray[np.float64]:
    """Metrics in units of 2**-40 as fractions."""
    values: NDArray[np.float64] = units / UNIT
    return values


def _check(z: Tensor, labels: Tensor, query_rows: range, block_rows: int | None) -> None:
    if z.ndim != 2 or labels.shape != z.shape[:1] or labels.is_floating_point() or labels.device != z.device:
        raise ValueError(
            f"retrieval: z must be (n, D) and labels n integers on the same device, "
            f"got {tuple(z.shape)} on {z.device} and {labels.dtype} {tuple(labels.shape)} on {labels.device}"
        )
    if query_rows.step < 1 or query_rows.start < 0 or query_rows.stop > len(z):
        raise ValueError(f"retrieval: query_rows must rise within [0, {len(z)}), got {query_rows}")
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"retrieval: block_rows must be at least 1, got {block_rows}")


def nestedness(coarse: NDArray[np.integer[Any]], fine: NDArray[np.integer[Any]]) -> float:
    """The share of rows whose coarse label, (n,), is the majority coarse label of their fine cluster, (n,).

    That is sum_f max_c n_fc / n, also known as purity: 1 where every fine cluster lies within one coarse cluster.
    Rows without a label in either partition are left out; NaN when none is left.
    """
    coarse, fine = _labelled(coarse, fine)
    return _purity(coarse, fine)


def chance_nestedness(
    coarse: NDArray[np.integer[Any]], fine: NDArray[np.integer[Any]], rng: np.random.Generator, shuffles: int
) -> float:
    """The mean nestedness when the coarse labels are permuted over the labelled rows, by `shuffles` permutations.

    Far from 0 where fine clusters are small (a cluster of one row always agrees with itself) or one coarse cluster is
    large. The expectation of a maximum of hypergeometric counts has no short formula, hence permutations.
    """
    coarse, fine = _labelled(coarse, fine)
    return math.fsum(_purity(rng.permutation(coarse), fine) for _ in range(shuffles)) / shuffles


def _labelled(
    coarse: NDArray[np.integer[Any]], fine: NDArray[np.integer[Any]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    assert coarse.shape == fine.shape, f"{coarse.shape} coarse and {fine.shape} fine labels"
    both = (coarse >= 0) & (fine >= 0)
    return coarse[both].astype(np.int64), fine[both].astype(np.int64)


def _purity(coarse: NDArray[np.int64], fine: NDArray[np.int64]) -> float:
    if not len(fine):
        return math.nan
    width = int(coarse.max()) + 1
    pairs, counts = np.unique(fine * width + coarse, return_counts=True)  # sorted, so a fine cluster's pairs are a run
    firsts = np.flatnonzero(np.diff(pairs // width, prepend=-1))
    return float(np.maximum.reduceat(counts, firsts).sum() / len(fine))
