"""The k nearest others of every image, in one process: by all pairs, or through inverted lists with measured recall.

Groups of near-duplicates and outliers are read off this graph where comparing all pairs would take too long. The
searches are those of a run (knn/), on one rank; rows may lie in mapped files. Shapes: m images that can be read,
D channels, k neighbours, e edges.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.distributed.collectives import Comm
from grappa_dist.distributed.sharded_rows import scratch
from grappa_dist.extras import require
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Recall, approximate_knn
from grappa_dist.retrieval.nearest import Rows, blocks_of, nearest

Method = Literal["auto", "exact", "lists"]
EXACT_ROWS = 100_000  # up to which `auto` compares all pairs: about a minute on two cores at 384 channels
NEIGHBOURS = 10
RECALL_FLOOR = 0.9  # of the k nearest that lists must find; where they do not, all pairs are compared
SAMPLE = 2048  # images that are compared with all others, to see which near-duplicates lists miss
ROUNDING = 1e-6  # of a cosine in float32: equal images may have 0.9999999
_BLOCK = 8192
_PASSES = 8  # over the groups, at most
_STEPS = 32  # of images that are compared with all others, at most


@dataclass(frozen=True)
class Graph:
    """The nearest others of the images that can be read, by their places among these."""

    ids: NDArray[np.int64]  # (m,) row ids of the images, ascending
    rows: Rows  # (m, D)
    near: NDArray[np.int64]  # (m, k) places; -1: there are not so many
    cosines: NDArray[np.float32]  # (m, k), best first
    recall: Recall

    @property
    def is_exact(self) -> bool:
        return self.recall.searched == "exact"


def is_exact(method: Method, rows: int) -> bool:
    """Whether all pairs of so many images are compared."""
    return method == "exact" or (method == "auto" and rows <= EXACT_ROWS)


def graph_of(
    parts: Sequence[Rows],
    bad: Collection[int],
    method: Method,
    device: torch.device,
    *,
    k: int = NEIGHBOURS,
    log: Callable[[str], None] = lambda line: None,
) -> Graph:
    """The graph of unit rows, (n_i, D) each, one after the other, but those that are `bad`, by id.

    Args:
        log: gets a line where lists miss too many neighbours and all pairs are compared after all.

    Raises:
        ValueError: a row is no unit row, or lists are to be searched and faiss is not installed.
    """
    ids, rows = good_rows(parts, bad)
    if is_exact(method, len(ids)):
        near, cosines = sharded_knn(Comm(), rows, np.arange(len(ids)), k, device=device)
        return Graph(ids, rows, near, cosines, Recall.exact())
    require("faiss")
    found = approximate_knn(
        Comm(), rows, np.arange(len(ids)), k, recall_floor=RECALL_FLOOR, key=(0, 0), log=log, device=device
    )
    return Graph(ids, rows, found.ids, found.scores, found.recall)


def good_rows(parts: Sequence[Rows], bad: Collection[int]) -> tuple[NDArray[np.int64], Rows]:
    """Row ids and rows of the images that can be read; where they lie in several pieces, in a file of TMPDIR."""
    count = sum(len(part) for part in parts)
    good = np.ones(count, bool)
    good[list(bad)] = False
    ids = np.flatnonzero(good)
    if len(parts) == 1 and len(ids) == count:
        return ids, parts[0]
    rows = scratch((len(ids), parts[0].shape[1] if parts else 1), torch.float32).numpy()
    done = 0
    for first, block in blocks_of(parts, _BLOCK):
        some = block[good[first : first + len(block)]]
        rows[done : done + len(some)] = some
        done += len(some)
    return ids, rows


def group_by_graph(graph: Graph, threshold: float) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The place of the first image of each image's group, (m,), and their cosine, (m,), as `group_duplicates` has it.

    An image is compared with its neighbours in either direction and with the first images of their groups, so a group
    may have more images than a list of neighbours. That is repeated until nothing changes: an image may begin a group
    before the neighbours that lead to another one have theirs. Cosines are computed; only candidates are approximate.
    """
    least = threshold - ROUNDING
    start, columns = np.nonzero((graph.cosines >= least) & (graph.near >= 0))
    end = graph.near[start, columns]
    both = np.stack([np.concatenate([start, end]), np.concatenate([end, start])])  # (2, e)
    both = both[:, np.lexsort(both[::-1])]
    nodes, edges = np.unique(both[0], return_index=True)
    others = np.split(both[1], edges[1:]) if len(nodes) else []
    firsts = np.arange(len(graph.ids))
    for _ in range(_PASSES):
        found, cosines = np.arange(len(graph.ids)), np.ones(len(graph.ids), np.float32)
        for node, beside in zip(nodes.tolist(), others, strict=True):
            hints = np.append(firsts[beside], firsts[node])
            candidates = np.unique(found[np.concatenate([beside[beside < node], hints[hints < node]])])
            if len(candidates):
                scores = graph.rows[candidates] @ graph.rows[node]
                if scores.max() >= least:
                    found[node], cosines[node] = candidates[scores.argmax()], scores.max()
        if np.array_equal(found, firsts):
            break
        firsts = found
    return firsts, cosines


@dataclass(frozen=True)
class DuplicateRecall:
    """How many sampled images have a near-duplicate by comparison with all others, and of how many the graph has it."""

    sampled: int
    have: int
    found: int

    def __str__(self) -> str:
        if not self.have:
            return f"none of {self.sampled:,} sampled images has a near-duplicate by comparison with all others"
        return (
            f"of {self.sampled:,} sampled images, {self.have:,} have a near-duplicate by comparison with all others, "
            f"and the nearest was found for {self.found:,} of them (recall {self.found / self.have:.3f})"
        )


def duplicate_recall(graph: Graph, threshold: float, device: torch.device) -> DuplicateRecall:
    """Measures, on images drawn at random, whether the graph has the nearest near-duplicate of each that has any."""
    count = min(SAMPLE, len(graph.ids))
    places = np.sort(np.random.default_rng(0).choice(len(graph.ids), count, replace=False))
    queries = torch.from_numpy(graph.rows[places]).to(device)
    best = torch.full((count,), -torch.inf, device=device)
    for first, block in blocks_of([graph.rows], _BLOCK):
        scores = queries @ torch.from_numpy(np.array(block)).to(device).T
        own = np.flatnonzero((places >= first) & (places < first + len(block)))
        scores[own, places[own] - first] = -torch.inf
        best = torch.maximum(best, scores.amax(1))
    exact = best.cpu().numpy()
    have = exact >= threshold - ROUNDING
    found = have & (graph.cosines[places, 0] >= exact - ROUNDING)
    return DuplicateRecall(count, int(have.sum()), int(found.sum()))


@dataclass(frozen=True)
class Outliers:
    """The images farthest from others, farthest first, by their places in a graph."""

    places: NDArray[np.int64]
    scores: NDArray[np.float32]  # 1 - the mean cosine with the k nearest others
    nearest: NDArray[np.int64]  # the place of the nearest other
    cosines: NDArray[np.float32]  # with that
    are_certain: bool  # whether no other image can have a larger score


def outliers_of(graph: Graph, most: int, device: torch.device) -> Outliers:
    """The images of the largest mean distance to their k nearest others, at most so many.

    The score of a unit row is 1 - the mean cosine with its k nearest others, half of the mean squared distance to them:
    the average k-NN distance of Angiulli and Pizzuti (2002). A graph through lists may lack neighbours, so its scores
    are upper bounds; candidates are scored by all pairs, from the largest bound on, until no bound is left above the
    last score that is listed.
    """
    bounds = _scores(np.where(graph.near >= 0, graph.cosines, np.nan))
    order = np.argsort(-bounds, kind="stable")
    most, done = min(most, int((graph.near[:, 0] >= 0).sum())), 0
    if graph.is_exact:
        places = order[:most]
        return Outliers(places, bounds[places], graph.near[places, 0], graph.cosines[places, 0], True)
    scores = np.full(len(order), -np.inf, np.float32)
    near, cosines = np.zeros(len(order), np.int64), np.zeros(len(order), np.float32)
    step = max(most, 256)  # compared with all others at once
    while most > 0 and done < min(_STEPS * step, len(order)) and not _certain(scores, bounds, order, (most, done)):
        some = order[done : done + step]
        found = nearest(graph.rows[some], [graph.rows], (), graph.near.shape[1] + 1, device)
        others = found.rows.numpy() != some[:, None]
        others[others.all(1), -1] = False  # equal to so many that it is not among its own nearest
        own = found.cosines.numpy()[others].reshape(len(some), -1)
        scores[some], cosines[some] = _scores(own), own[:, 0]
        near[some] = found.rows.numpy()[others].reshape(len(some), -1)[:, 0]
        done += len(some)
    best = np.argsort(-scores, kind="stable")[:most]
    return Outliers(best, scores[best], near[best], cosines[best], _certain(scores, bounds, order, (most, done)))


def _certain(
    scores: NDArray[np.float32], bounds: NDArray[np.float32], order: NDArray[np.int64], reached: tuple[int, int]
) -> bool:
    """Whether no image that was not compared with all others can have a score among the largest.

    Args:
        reached: how many are wanted, and how many of the order were compared.
    """
    most, done = reached
    if done == len(order) or not most:
        return True
    return done >= most and bool(np.sort(scores)[-most] >= bounds[order[done]])


def _scores(cosines: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 - the mean of each row, (m,), without NaN; -inf where there is nothing else."""
    known = ~np.isnan(cosines)
    sums, counts = np.nansum(cosines, 1), known.sum(1)
    return np.where(counts > 0, 1 - sums / np.maximum(counts, 1), -np.inf).astype(np.float32)
