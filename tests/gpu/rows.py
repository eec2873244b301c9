"""k-means, the k-NN graph, exact search and retrieval scores on the pretend GPU: what they ask for, and whether their
bits are the CPU's.

Triton's kernel cannot run here: torch computes what it would.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist import class_ranks
from grappa_dist.class_ranks import Gallery, score_queries, unit_on_grid
from grappa_dist.config import ClusteringConfig
from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import Rows, join_rows
from grappa_dist.kmeans.lloyd import KMeansState, KMeansTask, kmeans
from grappa_dist.kmeans.methods import Clustering, ClusteringCallbacks, ClusteringTask, choose, cluster
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import approximate_knn
from grappa_dist.retrieval.nearest import nearest
from grappa_dist.search import backends, triton_topk
from grappa_dist.search.fixed_point import to_grid
from tests.gpu.counting import Counts, counting
from tests.gpu.pretend import CUDA

METHODS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "oversampled": {"method": "exact", "init": "k-means||"},
    "sampled": {"method": "sampled", "sample_rows_per_cluster": 8},
    "hierarchical": {"method": "hierarchical", "assignment": "approximate"},
    "approximate": {"method": "approximate"},
    "balanced": {"method": "exact", "balance": 1.2},
}
NEAR = 5


def drawn(num: int, dim: int, groups: int) -> NDArray[np.float32]:
    """Unit rows in groups, on the grid of exact arithmetic."""
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(groups, dim, generator=rng)
    rows = centres[torch.randint(groups, (num,), generator=rng)] + 0.7 * torch.randn(num, dim, generator=rng)
    found: NDArray[np.float32] = to_grid(F.normalize(rows, dim=1)).numpy()
    return found


def by_torch(x: Tensor, y: Tensor, offsets: Tensor | None = None, **how: Any) -> tuple[Tensor, Tensor]:
    """What the kernel finds: the three largest scores of each row, (P, 3), and their targets."""
    scores = x.float() @ y.float().T + (0 if offsets is None else offsets.float())
    best = scores.topk(min(3, len(y)), dim=1)
    spare = 3 - best.values.shape[1]
    return F.pad(best.values, (0, spare), value=-torch.inf), F.pad(best.indices, (0, spare))


@contextmanager
def kernel_by_torch(*, used: bool = True) -> Iterator[None]:
    name = "top_scores" if hasattr(triton_topk, "top_scores") else "top_products"
    with patch.object(triton_topk, name, by_torch), patch.object(backends, "triton_is_faster", lambda device: used):
        yield


def kmeans_counts(
    comm: Comm,
    num: int = 1024,
    clusters: int = 300,
    dim: int = 32,
    block_rows: int = 512,
    kernel: bool = True,
    held_bytes: int | None = None,
) -> dict[str, Any]:
    """A pass over all rows and its update: the third. Rows of `held_bytes` stay on the device; None: all that fit."""
    x = drawn(num, dim, max(2, clusters // 2))
    own = x[num * comm.rank // comm.size : num * (comm.rank + 1) // comm.size]
    start = x[np.random.default_rng(0).choice(num, clusters, replace=False)]
    passes = []
    with kernel_by_torch(used=kernel):
        rows = Rows([own], [np.ones(len(own), dtype=bool)])
        sharded = join_rows(comm, rows, block_rows=block_rows, device=CUDA, dense_bytes=held_bytes)
        with counting() as meter:

            def take(state: KMeansState) -> None:
                passes.append(meter.take())

            config = ClusteringConfig(num_labels=(clusters,), iterations=3, tolerance=0.0)
            kmeans(sharded, clusters, KMeansTask(config, initial=start, on_update=take))
    return {"pass": passes[2].as_json(), "report": passes[2].report(40)}


def part_counts(
    comm: Comm, name: str, part: str, num: int = 1024, clusters: int = 64, dim: int = 32, block_rows: int = 512
) -> dict[str, Any]:
    """An iteration of one part of a method of clustering: the last, so that the first labels are there."""
    x = drawn(num, dim, clusters)
    own = x[num * comm.rank // comm.size : num * (comm.rank + 1) // comm.size]
    config = ClusteringConfig(num_labels=(clusters,), iterations=3, tolerance=0.0, **METHODS[name])
    with kernel_by_torch(), counting() as meter:
        rows = Rows([own], [np.ones(len(own), dtype=bool)])
        sharded, last = join_rows(comm, rows, block_rows=block_rows, device=CUDA), dict[str, Counts]()

        def take(of: str, iteration: int, inertia: float) -> None:
            last[of.strip()] = meter.take()

        callbacks = ClusteringCallbacks(on_iteration=take)
        task = ClusteringTask(clusters, config, choose(config, clusters, num), callbacks=callbacks)
        cluster(sharded, task)
        last["end"] = meter.take()
    return {"part": last[part].as_json(), "report": last[part].report(40)}


def knn_counts(comm: Comm, num: int = 1024, dim: int = 32, block_rows: int = 512) -> dict[str, Any]:
    """The exact graph of all rows, in blocks."""
    x = drawn(num, dim, 50)
    first = num * comm.rank // comm.size
    own = x[first : num * (comm.rank + 1) // comm.size]
    with counting() as meter:
        sharded_knn(comm, own, np.arange(len(own)) + first, NEAR, block_rows=block_rows, device=CUDA)
    return {"graph": meter.counts.as_json(), "report": meter.counts.report(40)}


def bits_of(found: Clustering) -> list[Any]:
    result = found.result
    return [result.centroids.tobytes(), result.inertia, result.counts.tolist(), found.updates, found.agreement]


def differing_methods(comm: Comm, names: list[str], kernel: bool, held_rows: int | None = None) -> list[str]:
    """The methods of clustering whose result on the device, over all ranks, is not that of one CPU, to the bit.

    So many of a rank's rows stay on the device, and the others come from pinned memory; None: all that fit.
    """
    x = drawn(900, 16, 40)
    edges = [0, 400, 900] if comm.size == 2 else [0, 900]
    own = slice(edges[comm.rank], edges[comm.rank + 1])
    held_bytes = None if held_rows is None else held_rows * 4 * x.shape[1]

    def clustering(comm: Comm, rows: NDArray[np.float32], name: str, device: torch.device) -> Clustering:
        config = ClusteringConfig(num_labels=(20,), iterations=3, **METHODS[name])
        given = Rows([rows], [np.ones(len(rows), dtype=bool)])
        held = held_bytes if device == CUDA else None
        sharded = join_rows(comm, given, block_rows=128, device=device, dense_bytes=held)
        return cluster(sharded, ClusteringTask(20, config, choose(config, 20, len(x)), seed=3))

    wrong = []
    for name in names:
        alone = clustering(Comm(), x, name, torch.device("cpu"))
        with kernel_by_torch(used=kernel):
            found = clustering(comm, x[own], name, CUDA)
        labels = np.concatenate(found.result.labels), np.concatenate(alone.result.labels)[own]
        wrong += [name] * (bits_of(found) != bits_of(alone) or not np.array_equal(*labels))
    return wrong


def differing_graphs(comm: Comm) -> list[str]:
    """The searches that find other neighbours, or other scores, on the device than on one CPU."""
    x, wrong = drawn(900, 16, 40), []
    edges = [0, 400, 900] if comm.size == 2 else [0, 900]
    own, ids = slice(edges[comm.rank], edges[comm.rank + 1]), np.arange(900) * 3
    alone = sharded_knn(Comm(), x, ids, NEAR, block_rows=100)
    for name, kept_bytes in (("exact", None), ("exact, no blocks kept", 0)):
        found = sharded_knn(comm, x[own], ids[own], NEAR, block_rows=100, device=CUDA, kept_bytes=kept_bytes)
        wrong += [name] * any(not np.array_equal(a, b[own]) for a, b in zip(found, alone, strict=True))
    how: dict[str, Any] = {"recall_floor": 0.5, "key": (0, 0)}
    where = {"device": CUDA} if "device" in inspect.signature(approximate_knn).parameters else {}
    graph, one = (
        approximate_knn(comm, x[own], ids[own], NEAR, **how, **where),
        approximate_knn(Comm(), x, ids, NEAR, **how),
    )
    same = np.array_equal(graph.ids, one.ids[own]) and np.array_equal(graph.scores, one.scores[own])
    wrong += ["lists"] * (not same or graph.recall != one.recall or one.recall.searched != "lists")
    if comm.size == 1:
        here, there = (nearest(x[:50], [x[:400], x[400:]], {7}, NEAR, torch.device(name)) for name in ("cuda", "cpu"))
        wrong += ["search"] * (not np.array_equal(here[0], there[0]) or not np.array_equal(here[1], there[1]))
    return wrong


def labelled_rows(kind: str, num: int, dim: int, most: int = 60) -> tuple[Tensor, Tensor]:
    """Rows on the grid (num, dim), in groups, with many equal ones or nearly all alike, and their classes (num,), which
    are uneven and so many at most."""
    draws = torch.Generator().manual_seed(1)
    x = torch.from_numpy(drawn(num, dim, 40))
    if kind == "equal":
        x = x[torch.randint(num // 4, (num,), generator=draws)]
    elif kind == "alike":
        x = unit_on_grid(torch.ones(num, dim) + 2.0**-22 * x)
    classes = (most * torch.rand(num, generator=draws) ** 2).long()
    return x, classes.unique(return_inverse=True)[1]


def scores_counts(
    comm: Comm,
    num: int = 1024,
    dim: int = 32,
    classes: int = 60,
    block_rows: int | None = 512,
    tile_rows: int | None = 256,
) -> dict[str, Any]:
    """All rows of a task as queries, in blocks, and what comes second: a tile of the gallery that all blocks meet, or
    with small classes the second block and itself."""
    x, labels = labelled_rows("groups", num, dim, classes)
    with counting() as whole, counting() as meter:
        gallery = Gallery.of(labels, x.__getitem__, CUDA, dim=dim, held_bytes=x.nbytes)
        places, tiles = gallery.queries_of(comm.rank, comm.size), list[Counts]()
        units = torch.zeros(len(places), 3, dtype=torch.int64)
        for _ in score_queries(gallery, places, units, block_rows=block_rows, tile_rows=tile_rows):
            tiles.append(meter.take())
    found = {"second": tiles[1].as_json(), "whole": whole.counts.as_json()}
    return {**found, "report": whole.counts.report(40), "second_report": tiles[1].report(40)}


def scored(comm: Comm, x: Tensor, classes: Tensor, device: torch.device, *, held: bool) -> list[list[int]]:
    """The place and the metrics of each query of a rank, in units, by tiles and blocks."""
    gallery = Gallery.of(classes, x.__getitem__, device, dim=x.shape[1], held_bytes=x.nbytes if held else 0)
    places = gallery.queries_of(comm.rank, comm.size)
    units = torch.zeros(len(places), 3, dtype=torch.int64)
    for _ in score_queries(gallery, places, units, block_rows=120, tile_rows=130):
        pass
    return torch.cat([places[:, None], units], 1).tolist()


def differing_scores(comm: Comm) -> list[str]:
    """The rows, and the ways to score them, that have other metrics on the device than on a CPU."""
    wrong = []
    for kind in ("groups", "equal", "alike"):
        x, classes = labelled_rows(kind, 220, 16)
        expected = scored(comm, x, classes, torch.device("cpu"), held=True)
        ways = {"held": 64, "read": 64, "one class after the other": 1}  # and the least size of such classes
        for name, size in ways.items():
            with patch.object(class_ranks, "_SMALL_CLASS", size):
                found = scored(comm, x, classes, CUDA, held=name != "read")
            wrong += [f"{kind}, {name}"] * (found != expected)
    return wrong
