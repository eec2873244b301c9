"""Baselines of faiss: its k-means from given first centroids to labels, and its exact nearest-neighbour searches.

`faiss.Kmeans(use_super_kmeans=True)` is not a baseline: faiss 1.15 accepts the field and runs plain k-means (only
inverted files read it). The class that prunes is `faiss.SuperKmeans`. It takes no initial centroids and always starts
from rows that it draws itself, so all sides start from these rows.

Shapes: P rows, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

PLAIN, SUPER = "faiss.Kmeans", "faiss.SuperKmeans"
SUPER_MIN_DIM = 32  # its first products take 16 dimensions, which must be at most half of them


@dataclass(frozen=True)
class FaissKMeans:
    """Result of a k-means of faiss."""

    centroids: np.ndarray  # (K, D) float32, after the last update
    labels: np.ndarray  # (P,) int64, nearest to `centroids`
    objectives: list[float]  # one per iteration: before its update, summed by faiss in float32


KMeansBaseline = Callable[[np.ndarray, np.ndarray, int, int], FaissKMeans]
"""(rows (P, D), initial centroids (K, D), iterations, seed) -> FaissKMeans."""


def kmeans_baselines() -> dict[str, KMeansBaseline]:
    """The k-means classes of the installed faiss, by name."""
    return {PLAIN: _plain, **({SUPER: _super} if hasattr(_faiss(), "SuperKmeans") else {})}


def set_threads(threads: int) -> None:
    _faiss().omp_set_num_threads(threads)


def faiss_version() -> str:
    faiss = _faiss()
    found = []
    for name in ("faiss-cpu", "faiss-gpu"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{found[0] if found else f'faiss {faiss.__version__}'} ({faiss.get_compile_options().strip()})"


def starting_rows(num_rows: int, num_labels: int, seed: int) -> np.ndarray:
    """Positions (K,) of the distinct rows that faiss draws as its first centroids at a seed."""
    faiss = _faiss()
    order = np.empty(num_rows, dtype=np.int32)
    faiss.rand_perm(faiss.swig_ptr(order), num_rows, seed + 1)
    return order[:num_labels].astype(np.int64)


def seed_by_faiss(rows: np.ndarray, num_labels: int, seed: int) -> np.ndarray:
    """faiss's k-means++ centroids, (K, D). Each draw reads all rows, so the time grows with P K D."""
    faiss = _faiss()
    drawing = faiss.ClusteringInitialization(rows.shape[1], num_labels)
    drawing.method, drawing.seed = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS, seed
    centroids = np.empty((num_labels, rows.shape[1]), dtype=np.float32)
    drawing.init_centroids(len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(centroids))
    return centroids


def nearest_labels(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Labels (P,) by float32 search."""
    return _faiss().knn(rows, centroids, 1)[1][:, 0]


def brute_force_knn(rows: np.ndarray, k: int, threads: int) -> np.ndarray:
    """The k nearest rows of each row, itself among them, by faiss.knn: indices (P, k)."""
    set_threads(threads)
    found: np.ndarray = _faiss().knn(rows, rows, k, metric=_faiss().METRIC_INNER_PRODUCT)[1]
    return found


def flat_index_knn(rows: np.ndarray, k: int, threads: int) -> np.ndarray:
    """The same by an IndexFlatIP; the call includes filling it."""
    set_threads(threads)
    index = _faiss().IndexFlatIP(rows.shape[1])
    index.add(rows)
    found: np.ndarray = index.search(rows, k)[1]
    return found


def _plain(rows: np.ndarray, initial: np.ndarray, iterations: int, seed: int) -> FaissKMeans:
    faiss = _faiss()
    kmeans = faiss.Kmeans(
        rows.shape[1], len(initial), niter=iterations, nredo=1, spherical=False, **_all_rows(rows, seed)
    )
    kmeans.train(rows, init_centroids=initial)
    _, labels = kmeans.index.search(rows, 1)  # training leaves the last centroids in the index, but no labels for them
    return FaissKMeans(kmeans.centroids, labels[:, 0], kmeans.obj.tolist())


def _super(rows: np.ndarray, initial: np.ndarray, iterations: int, seed: int) -> FaissKMeans:
    faiss = _faiss()
    if not np.array_equal(initial, rows[starting_rows(len(rows), len(initial), seed)]):
        raise ValueError(f"{SUPER} starts from the rows that starting_rows gives, found other initial centroids")
    kmeans = faiss.SuperKmeans(rows.shape[1], len(initial), niter=iterations, **_all_rows(rows, seed))
    kmeans.train(rows)
    _, labels = kmeans.assign(rows)
    return FaissKMeans(kmeans.centroids, labels, kmeans.obj.tolist())


def _all_rows(rows: np.ndarray, seed: int) -> dict[str, Any]:
    """No subsampling: faiss would train on 256 rows per centroid."""
    return {"max_points_per_centroid": len(rows), "min_points_per_centroid": 1, "seed": seed}


def _faiss() -> Any:
    """Untyped: its type stubs lack half of the names used here."""
    import faiss

    return faiss
