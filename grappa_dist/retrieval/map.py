"""The embeddings of some images in two dimensions, one map for each model, laid out so that the maps can be compared.

UMAP (McInnes et al., 2018), which gets the exact nearest neighbours: half of its own time goes into approximate ones.
Every map begins at the same places, the first two principal components of the first model's embeddings, and is then
turned and mirrored onto the first map. So an image that lies elsewhere on the second map has other neighbours there, up
to the chance of UMAP. PaCMAP, as an alternative, is faster, but its package brings faiss-cpu, which must not be
installed beside faiss-gpu.

Shapes: n images, D channels of a model, k neighbours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.console import Console, pluralize
from grappa_dist.distributed.collectives import Comm
from grappa_dist.extras import require
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.retrieval.nearest import Rows

NEIGHBOURS = 15  # of an image, itself among them: UMAP's own default
EPOCHS = 200  # UMAP's own default for more than 10,000 images
FEWEST = 10  # images of a map
START = 10.0  # the largest coordinate at the beginning, as UMAP scales its own
_WORD = 2**32


@dataclass(frozen=True)
class Layout:
    """Where one model puts the images."""

    model: str
    points: NDArray[np.float32] = field(repr=False)  # (n, 2)
    kept: float  # the share of the k - 1 nearest other images that are among the k - 1 nearest on the map, in the mean


def lay_out_images(
    embeddings: Mapping[str, Rows], console: Console, *, device: torch.device, seed: int = 0
) -> list[Layout]:
    """A layout for each model, in their order.

    Equal on one machine for equal embeddings and seed; another processor rounds differently, and UMAP is sensitive to
    that.

    Args:
        embeddings: unit rows (n, D) of the same images by each model; D may differ.
        device: where neighbours are searched.

    Raises:
        ValueError: there are too few images.
        MissingPackage: UMAP is not installed.
    """
    require("umap", what="map")
    counts = {len(rows) for rows in embeddings.values()}
    assert len(counts) == 1, "of the same images"
    count = counts.pop()
    if count < FEWEST:
        raise ValueError(f"a map needs at least {FEWEST} images that can be read, got {count}")
    start = principal_components(next(iter(embeddings.values())))
    layouts: list[Layout] = []
    for model, rows in embeddings.items():
        with console.stage("map", f"{pluralize(count, 'image')} by {model}"):
            near, cosines = sharded_knn(Comm(), rows, np.arange(count), min(NEIGHBOURS, count) - 1, device=device)
            points = _umap(rows, near, cosines, start, seed)
            points = aligned(points, layouts[0].points) if layouts else points
            layouts.append(Layout(model, points, kept_neighbours(points, near)))
    return layouts


def principal_components(rows: Rows) -> NDArray[np.float32]:
    """The first two principal components of rows, (n, 2), at most START; the sign is that of the largest weight."""
    mean = rows.mean(0, dtype=np.float64)
    covariance = rows.T @ rows / np.float32(len(rows)) - np.outer(mean, mean)
    axes = np.linalg.eigh(covariance.astype(np.float64))[1][:, :-3:-1]  # (D, 2), the largest first
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), [0, 1]])
    found = (rows - mean.astype(np.float32)) @ axes.astype(np.float32)
    return found * np.float32(START / max(float(np.abs(found).max()), 1e-12))


def _umap(
    rows: Rows, near: NDArray[np.int64], cosines: NDArray[np.float32], start: NDArray[np.float32], seed: int
) -> NDArray[np.float32]:
    """The layout, (n, 2), of rows whose nearest others, (n, k - 1), and cosines with them are known."""
    import umap

    count = len(rows)
    own = np.arange(count, dtype=near.dtype)[:, None]
    distances = np.sqrt(np.maximum(0, 2 - 2 * cosines)).astype(np.float32)  # of unit rows
    neighbours = np.hstack([own, near]), np.hstack([np.zeros((count, 1), np.float32), distances])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that new images cannot be added, and what else is meant here
        found: NDArray[np.float32] = umap.UMAP(
            n_neighbors=near.shape[1] + 1,
            n_epochs=EPOCHS,
            init=start,
            precomputed_knn=neighbours,
            force_approximation_algorithm=True,  # or the neighbours would be ignored of few rows
            random_state=seed % _WORD,
            n_jobs=1,  # with threads no two maps would be equal
        ).fit_transform(rows)
    return found.astype(np.float32)


def aligned(points: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float32]:
    """Points (n, 2) moved, turned and perhaps mirrored to where they lie nearest to a reference.

    That is orthogonal Procrustes; their scale stays.
    """
    centred, onto = points - points.mean(0), reference - reference.mean(0)
    left, _, right = np.linalg.svd(centred.T.astype(np.float64) @ onto)
    found: NDArray[np.float32] = (centred @ (left @ right) + reference.mean(0)).astype(np.float32)
    return found


def kept_neighbours(points: NDArray[np.float32], near: NDArray[np.int64]) -> float:
    """The share of each image's nearest others, (n, k - 1), that are among its nearest on the map, in the mean."""
    from scipy.spatial import cKDTree

    own = np.arange(len(points))[:, None]
    found = cKDTree(points).query(points, near.shape[1] + 1)[1]
    found = np.where(found == own, -1, found)  # itself; of many at one place perhaps not the first
    return float((near[:, :, None] == found[:, None, :]).any(2).mean())
