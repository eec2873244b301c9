"""k-means over the ranks of one job: the same result on any number of ranks, for any split of the rows and block size.

Ranks hold the rows in rank order, so a row's place among all rows does not depend on the split. Every decision about a
row is exact (ops/kmeans.py) and every number that travels is an integer.

Shapes: P rows of one block, K centroids, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.dist.comm import Comm
from grappa_dist.dist.search import Rows, nearest, raise_together, row_problem, wire_device
from grappa_dist.ops.exact import to_grid
from grappa_dist.ops.kmeans import INERTIA_UNIT, Centroids, Stats, accept, assign, draw, finish, to_inertia

_CANDIDATES = 2048  # of one seeding round at most: their distances to each other are a square table
_FAR = 2**62  # above any squared distance


@dataclass(frozen=True)
class KMeansResult:
    """The same on every rank, except for `labels`, which are those of the rank's own rows."""

    centroids: np.ndarray  # (K, D) float32
    labels: list[np.ndarray]  # for each own shard (P,) int32, -1 for bad rows; nearest to `centroids`
    counts: np.ndarray  # (K,) int64, rows per label
    inertia: list[float]  # sum of squared distances before each update, then that of the returned labels
    empty_repaired: int  # empty clusters given a part of another, over all iterations
    empty_left: int  # labels without a row
    exact_share: (
        float  # of all assignments, those that floats alone could not decide; alone may differ in its last digits
    )


def sharded_kmeans(
    comm: Comm,
    rows: Rows,
    num_labels: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    spherical: bool = False,
    tolerance: float = 0.0,
    block_rows: int = 16384,
    on_iteration: Callable[[int, float], None] = lambda iteration, inertia: None,
    initial: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> KMeansResult:
    """k-means of the good rows of all ranks: k-means++, then Lloyd. All ranks call it with the same settings.

    Args:
        iterations: updates of the centroids at most; fewer when they no longer move.
        spherical: centroids are normalised after every update.
        tolerance: stop when an iteration lowers inertia by less than this share of it; 0 never does.
        block_rows: rows worked on at once; memory, not the result, depends on it.
        on_iteration: told the number of updates so far and the inertia they led to.
        initial: centroids (K, D) to start from instead of k-means++.
        device: where rows are compared with centroids.
    """
    share = join_rows(comm, rows, block_rows=block_rows, device=torch.device(device))
    if not 1 <= num_labels <= share.num_good:
        raise ValueError(f"num_labels must be from 1 to the number of good rows, {share.num_good}, got {num_labels}")
    if initial is None:
        centroids = seed_centroids(share, num_labels, seed)
    else:
        centroids = _checked_initial(initial, (num_labels, share.dim)).to(share.device)
    return _lloyd(share, centroids, iterations, spherical=spherical, tolerance=tolerance, on_iteration=on_iteration)


def _lloyd(
    share: Share,
    centroids: Tensor,
    iterations: int,
    *,
    spherical: bool,
    tolerance: float,
    on_iteration: Callable[[int, float], None],
) -> KMeansResult:
    labels = torch.full((len(share.rows),), -1, dtype=torch.int32)
    inertia: list[int] = []
    repaired = undecided = 0
    for step in range(iterations + 1):
        stats, open_rows = lloyd_pass(share, centroids, labels)
        undecided += open_rows
        inertia.append(stats.inertia)
        on_iteration(step, stats.inertia * INERTIA_UNIT)
        if step == iterations or (step and inertia[-2] - inertia[-1] < tolerance * inertia[-2]):
            break
        updated, splits = finish(centroids, stats, step, spherical=spherical)
        if torch.equal(updated, centroids):
            break  # every further step would be this one
        centroids, repaired = updated, repaired + splits
    return KMeansResult(
        centroids=centroids.cpu().numpy(),
        labels=[part.numpy() for part in torch.split(labels, [len(shard) for shard in share.rows.shards])],
        counts=stats.counts.cpu().numpy(),
        inertia=[i * INERTIA_UNIT for i in inertia],
        empty_repaired=repaired,
        empty_left=int((stats.counts == 0).sum()),
        exact_share=undecided / (share.num_good * len(inertia)),
    )


def _checked_initial(initial: np.ndarray, shape: tuple[int, int]) -> Tensor:
    if initial.shape != shape:
        raise ValueError(f"initial centroids must be {shape}, found {initial.shape}")
    if found := row_problem(initial, np.ones(len(initial), dtype=bool)):
        raise ValueError(f"initial centroids: row {found[0]} {found[1]}")
    return to_grid(torch.from_numpy(initial.astype(np.float32)))


@dataclass(frozen=True)
class Share:
    """The rows of this rank, and what all ranks know about the rows of all."""

    comm: Comm
    rows: Rows
    dim: int
    first: int  # place of this rank's first row among all
    num_good: int  # over all ranks
    block_rows: int
    device: torch.device

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions (P,) among the rank's rows, in host memory, and grid rows (P, D) on the device."""
        return ((positions, x.to(self.device)) for positions, x in self.rows.blocks(self.block_rows))

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, any integer type; `tensor` may serve as room for it."""
        return self.comm.sum_(tensor.to(wire_device(self.comm))).to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [part.to(tensor.device) for part in self.comm.gather(tensor.to(wire_device(self.comm)))]


def join_rows(comm: Comm, rows: Rows, *, block_rows: int, device: torch.device) -> Share:
    """This rank's share, once every rank's rows are fit for it."""
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    raise_together(comm, rows.problem(block_rows))
    dim = rows.shards[0].shape[1] if rows.shards else 0
    facts = torch.tensor([[len(rows), rows.num_good, dim]], device=wire_device(comm))
    table = torch.cat(comm.gather(facts)).cpu()  # (ranks, 3)
    dims = sorted({int(d) for d in table[:, 2]} - {0})
    if len(dims) > 1:
        raise ValueError(f"rows must have the same dimension on every rank, found {dims}")
    first, num_good = int(table[: comm.rank, 0].sum()), int(table[:, 1].sum())
    return Share(comm, rows, dims[0] if dims else 0, first, num_good, block_rows, device)


def lloyd_pass(share: Share, centroids: Tensor, labels: Tensor) -> tuple[Stats, int]:
    """Stats of all ranks, and how many rows floats alone could not decide; own labels are written into `labels`."""
    prepared = Centroids.of(centroids)
    stats = Stats.zeros(len(centroids), centroids.shape[1], share.device)
    undecided = 0
    for positions, x in share.blocks():
        assignment = assign(x, prepared, nearest)
        stats.add_(x, assignment)
        labels[positions] = assignment.labels.int().cpu()
        undecided += assignment.undecided
    stats = Stats(share.total(stats.counts), share.total(stats.sums), share.total(stats.spreads))
    return stats, int(share.total(torch.tensor(undecided)))


def seed_centroids(share: Share, num_labels: int, seed: int) -> Tensor:
    """k-means++ centroids, (K, D): each a row drawn in proportion to its squared distance from those before it.

    A round draws up to half as many candidates as there are centroids and thins them out so that their law is that of
    one draw at a time (`accept`). So the rows are read some 3 log(K) times instead of K times, by matrix products.
    Draws are integers below an integer total, located in the order of all rows. When no row is left at a distance, the
    lowest rows not chosen fill up.
    """
    weights = torch.zeros(len(share.rows), dtype=torch.int64)
    for positions, _ in share.blocks():
        weights[positions] = 1  # the first centroid is any good row
    places: list[int] = []
    parts: list[Tensor] = []
    drawn = 0
    while len(places) < num_labels:
        totals = [int(t) for t in share.gather(weights.sum()[None])]
        if not sum(totals):
            parts.append(_lowest_rows_left(share, places, num_labels - len(places)))
            break
        num = max(1, min(len(places) // 2, num_labels - len(places), _CANDIDATES))
        targets = [draw(sum(totals), seed, num_labels, j) for j in range(drawn, drawn + num)]
        found, candidates = _rows_at(share, weights, [t - sum(totals[: share.comm.rank]) for t in targets])
        tests = [draw(w, seed, num_labels, j, 1) for j, (_, w) in enumerate(found, start=drawn)]
        kept = accept(candidates, [w for _, w in found], tests, num_labels - len(places))
        if not places:
            weights[weights > 0] = _FAR
        drawn += num
        places += [found[i][0] for i in kept]
        parts.append(candidates[kept])
        _lower(share, weights, parts[-1])
    return torch.cat(parts)


def _rows_at(share: Share, weights: Tensor, targets: list[int]) -> tuple[list[tuple[int, int]], Tensor]:
    """(place among all rows, weight) and grid row (m, D) of each target, counted from the start of this rank's weights.

    A target falls on the row at which the running sum of weights passes it; the rank that has it tells the others.
    """
    ends = weights.cumsum(0)
    own = [i for i, t in enumerate(targets) if len(ends) and 0 <= t < int(ends[-1])]
    found = torch.zeros(len(targets), 2, dtype=torch.int64)
    rows = torch.zeros(len(targets), share.dim)
    if own:
        positions = torch.searchsorted(ends, torch.tensor([targets[i] for i in own]), right=True)
        found[own] = torch.stack([positions + share.first, weights[positions]], 1)
        rows[own] = share.rows.take(positions)
    table = share.total(found)
    return [(int(place), int(w)) for place, w in table.tolist()], share.total(rows).to(share.device)


def _lower(share: Share, weights: Tensor, centroids: Tensor) -> None:
    """Lowers the rows' weights, in place, to their squared distance from the nearest of the new centroids."""
    prepared = Centroids.of(centroids)
    for positions, x in share.blocks():
        squares = to_inertia(assign(x, prepared, nearest).squares).cpu()
        weights[positions] = torch.minimum(weights[positions], squares)


def _lowest_rows_left(share: Share, places: list[int], num: int) -> Tensor:
    """The lowest good rows of all ranks that were not chosen, (num, D)."""
    left = torch.zeros(len(share.rows), dtype=torch.bool)
    for positions, _ in share.blocks():
        left[positions] = True
    last = share.first + len(left)
    left[[p - share.first for p in places if share.first <= p < last]] = False
    before = sum(int(n) for n in share.gather(left.sum()[None])[: share.comm.rank])  # left on lower ranks
    positions = left.nonzero()[: max(0, num - before), 0]
    rows = torch.zeros(num, share.dim)
    if len(positions):
        rows[before : before + len(positions)] = share.rows.take(positions)
    return share.total(rows).to(share.device)
