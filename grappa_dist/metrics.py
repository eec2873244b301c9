"""Retrieval metrics, leave one out by cosine: R-Precision, MAP@R (Musgrave et al. 2020) and recall at 1; the same and
others of lists that are found elsewhere (retrieval/ranking.py); and how nested two partitions of the same rows are.

Every image is a query against all others. R is the number of other images of its class; the image of a class of one is
never a query, but in the gallery; a row with a negative label is neither. Equal scores are ordered by row id. A product
in float32 finds the nearest; where its error bound leaves open whether a relevant image comes before an irrelevant one,
exact scores decide. Sums are integers, so block size, threads and the division of queries among workers do not change
a bit.

Shapes: n rows, g gallery rows (those with a label), b queries of a block, k the largest R among them, t >= k
candidates, D dimensions. In partitions, label -1 is no label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.search.candidates import float_error, norm_of, true_products
from grappa_dist.search.fixed_point import exact_dot, exact_square, to_grid
from grappa_dist.search.rerank import pair_dots

_TABLE, _GPU_TABLE = 2**24, 2**28  # scores of a block
_SPARE = 8  # candidates beyond k in the first search
_MANY = 16  # more than this times k, and more than 1 / 16 of the gallery, are too many candidates
METRICS = ("r_precision", "map_at_r", "recall_at_1")
DEPTHS = (1, 5, 10)  # k of the metrics of the k nearest
_UNIT = 2**40  # a query's metric in [0, 1] as an integer: they add in any order
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
        block_rows: queries scored at once; a block holds block_rows * g float32 scores. Without it, 64 MiB of them, and
            1 GiB on a GPU.
        device: where they are scored; by default where z is. Rows are normalised where z is, so that figures of rows on
            a CPU do not depend on the device.

    Raises:
        ValueError: the arguments do not fit each other.
    """
    device = z.device if device is None else device
    query_rows = range(len(z)) if query_rows is None else query_rows
    _check(z, labels, query_rows, block_rows)
    rows = torch.nonzero(labels >= 0).flatten()  # (g,) in order, so a place in the gallery orders as a row id does
    classes = torch.unique(labels[rows], return_inverse=True)[1]  # (g,)
    others = torch.bincount(classes)[classes] - 1 if len(rows) else classes  # (g,) R of each
    chosen = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    chosen[query_rows.start : query_rows.stop : query_rows.step] = True
    queries = torch.nonzero(chosen[rows] & (others > 0)).flatten()  # (q,)
    by_size = others[queries].argsort()  # by R, so that the queries of a block need about as many neighbours
    gallery = _Gallery.of(to_grid(F.normalize(z[rows].double(), dim=1)).to(device), classes.to(device))
    found = torch.zeros(len(queries), 3, dtype=torch.int64, device=device)
    size = block_rows or max(1, (_GPU_TABLE if found.is_cuda else _TABLE) // max(1, len(rows)))
    sizes = others[queries[by_size]]  # ascending
    most = sizes[size - 1 :: size].tolist() + sizes[-1:].tolist()  # of each block; the last one twice where it is whole
    blocks = (t.to(device).split(size) for t in (by_size, queries[by_size], sizes))
    for places, block, relevant, k in zip(*blocks, most, strict=False):  # without queries there is no k
        found[places] = _block_scores(_relevance(gallery, block, k), relevant)
    return QueryScores(rows[queries].cpu().numpy(), found.cpu().numpy())


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
        whole = _UNIT * max(self.queries, 1)
        return {
            "r_precision": self.r_precision / whole,
            "map_at_r": self.map_at_r / whole,
            "recall_at_1": self.recall_at_1 / whole,
            "queries": self.queries,
        }


@dataclass(frozen=True)
class _Gallery:
    """The rows that queries are compared with, including the queries."""

    rows: Tensor  # (g, D) float32 on the grid
    classes: Tensor  # (g,)
    error: float  # of a float32 score

    @staticmethod
    def of(rows: Tensor, classes: Tensor) -> _Gallery:
        return _Gallery(rows, classes, float_error(rows.shape[1], norm_of(exact_square(rows)) ** 2))


def _relevance(gallery: _Gallery, queries: Tensor, k: int) -> Tensor:
    """Which of a query's t nearest are of its class, best first: (b, t), in certain order for the first k."""
    candidates = _candidates(gallery, queries, k)
    if candidates is None:
        return gallery.classes[_nearest_exactly(gallery, queries, k)] == gallery.classes[queries, None]
    scores, columns = candidates
    relevant = gallery.classes[columns] == gallery.classes[queries, None]
    # Scores that follow each other within the error form a chain. Between chains the order is certain, and within one
    # it matters only where relevant and irrelevant ones mix.
    chain = F.pad((scores[:, :-1] - scores[:, 1:] > 2 * gallery.error).cumsum(1), (1, 0))
    of_chain = torch.zeros_like(chain)
    hits = of_chain.scatter_add(1, chain, relevant.long())
    mixed = (hits > 0) & (hits < of_chain.scatter_add(1, chain, torch.ones_like(chain)))
    places = mixed.gather(1, chain).nonzero().unbind(1)
    if len(places[0]):
        found = columns[places]
        exact = pair_dots(gallery.rows, gallery.rows, (queries[places[0]], found))
        order = _lexsort(found, -exact, places[0] * chain.shape[1] + chain[places])
        relevant[places] = relevant[places][order]
    return relevant


def _candidates(gallery: _Gallery, queries: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """All that may be among the k nearest of each query: float32 scores (b, t), best first, and columns (b, t).

    None where these are many, as for collapsed features: then exact scores of all take less time.
    """
    with true_products():
        scores = gallery.rows[queries] @ gallery.rows.T
    scores[torch.arange(len(queries), device=scores.device), queries] = -torch.inf
    most = len(gallery.rows) - 1
    found = scores.topk(min(k + _SPARE, most), dim=1)
    threshold = found.values[:, k - 1 : k] - 2 * gallery.error
    if found.values.shape[1] < most and bool((found.values[:, -1:] >= threshold).any()):
        count = int((scores >= threshold).sum(1).max())
        if count > max(_MANY * k, len(scores[0]) // _MANY):
            return None
        found = scores.topk(min(count, most), dim=1)
    return found.values, found.indices


def _nearest_exactly(gallery: _Gallery, queries: Tensor, k: int) -> Tensor:
    """The k best columns by exact scores with all, best first, a tie to the lower column, without the query: (b, k)."""
    scores = exact_dot(gallery.rows[queries], gallery.rows)
    scores[torch.arange(len(queries), device=scores.device), queries] = -torch.inf
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def _lexsort(*keys: Tensor) -> Tensor:
    """The order by the last key; where it is equal, by the one before it, and so on."""
    order = torch.arange(len(keys[0]), device=keys[0].device)
    for key in keys:
        order = order[key[order].argsort(stable=True)]
    return order


def _block_scores(relevant: Tensor, others: Tensor) -> Tensor:
    """R-Precision, MAP@R and recall@1 in units of 2**-40, (b, 3), from the relevance of the nearest (b, t).

    The first R (b,) of these count.
    """
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    relevant = relevant & (ranks <= others[:, None])
    hits = relevant.cumsum(1)
    precisions = (hits.double() * _UNIT / ranks).round().long() * relevant  # (b, t) integers: their sum has no order
    r_precision = (hits[:, -1].double() * _UNIT / others).round().long()
    return torch.stack([r_precision, precisions.sum(1) // others, relevant[:, 0].long() * _UNIT], 1)


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
    at_r = _block_scores(relevant, sizes)[:, :2]
    ranks = torch.arange(1, relevant.shape[1] + 1, device=relevant.device)
    hits = relevant.cumsum(1)
    summed = ((hits.double() * _UNIT / ranks).round().long() * relevant).cumsum(1)  # (b, t) integers
    first = [hits[:, k - 1] for k in depths]
    recall = [(found > 0).long() * _UNIT for found in first]
    precision = [(found.double() * _UNIT / k).round().long() for found, k in zip(first, depths, strict=True)]
    average = [summed[:, k - 1] // sizes for k in depths]
    return torch.cat([at_r, torch.stack([*recall, *precision, *average], 1)], 1)


def mean_of(units: NDArray[np.int64]) -> float:
    """The mean of a metric (q,) in units of 2**-40, as `RetrievalSums.finish` has it; 0 without queries."""
    parts = (units[start : start + _MOST] for start in range(0, len(units), _MOST))
    return sum(int(part.sum()) for part in parts) / (_UNIT * max(len(units), 1))


def as_fractions(units: NDArray[np.int64]) -> NDArray[np.float64]:
    """Metrics in units of 2**-40 as fractions."""
    values: NDArray[np.float64] = units / _UNIT
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
