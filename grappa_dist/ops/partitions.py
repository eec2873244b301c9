"""How two partitions of the same rows agree: is the finer one nested in the coarser one. Label -1 is no label.

Shapes: n rows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def nestedness(coarse: NDArray[np.integer[Any]], fine: NDArray[np.integer[Any]]) -> float:
    """The share of rows whose coarse label, (n,), is the majority coarse label of their fine cluster, (n,).

    That is sum_f max_c n_fc / n, also known as purity: 1 where every fine cluster lies within one coarse cluster.
    Rows without a label in either partition are left out; NaN when none is left.
    """
    coarse, fine = _labelled(coarse, fine)
    return _purity(coarse, fine)


def chance_nestedness(
    coarse: NDArray[np.integer[Any]], fine: NDArray[np.integer[Any]], draws: np.random.Generator, shuffles: int
) -> float:
    """The mean nestedness when the coarse labels are permuted over the labelled rows, by `shuffles` permutations.

    Far from 0 where fine clusters are small (a cluster of one row always agrees with itself) or one coarse cluster is
    large. The expectation of a maximum of hypergeometric counts has no short formula, hence permutations.
    """
    coarse, fine = _labelled(coarse, fine)
    return math.fsum(_purity(draws.permutation(coarse), fine) for _ in range(shuffles)) / shuffles


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
