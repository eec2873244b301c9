"""Brute-force searches by faiss alone, to measure the k-NN graph against. Nothing else may use them."""

from __future__ import annotations

import numpy as np


def brute_force_knn(rows: np.ndarray, k: int, threads: int) -> np.ndarray:
    """The k nearest rows of each row, itself among them, by faiss.knn: indices (P, k)."""
    import faiss

    faiss.omp_set_num_threads(threads)
    found: np.ndarray = faiss.knn(rows, rows, k, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return found


def flat_index_knn(rows: np.ndarray, k: int, threads: int) -> np.ndarray:
    """The same by an IndexFlatIP, which is filled within the call."""
    import faiss

    faiss.omp_set_num_threads(threads)
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    found: np.ndarray = index.search(rows, k)[1]
    return found
