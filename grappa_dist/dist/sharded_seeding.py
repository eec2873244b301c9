"""k-means++ over the rows of all ranks, in rounds: the same centroids on any number of ranks.

Shapes: P rows of one block, K centroids, D dimensions, m candidates of one round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grappa_dist.dist.scratch import scratch
from grappa_dist.dist.share import RowBlock, Share
from grappa_dist.ops.nearest import FAR, assign
from grappa_dist.ops.proposals import Centroids
from grappa_dist.ops.seeding import accept, draw, from_weights, to_weights

_CANDIDATES = 2048  # of one round at most: their distances to each other are a square table


def seed_centroids(share: Share, num_labels: int, seed: int) -> Tensor:
    """k-means++ centroids, (K, D): each a row drawn in proportion to its squared distance from those before it.

    A round draws up to half as many candidates as there are centroids and thins them out so that their law is that of
    one draw at a time (`accept`). So the rows are read some 3 log K + K / 2048 times instead of K times, by matrix
    products. Draws are integers below an integer total, located in the order of all rows. When no row is left at a
    distance, the lowest rows not chosen fill up.
    """
    weights = scratch((len(share.rows),), torch.int64)
    for positions in share.good_positions():
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
            weights[weights > 0] = FAR
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
    prepared = Centroids.of(centroids, share.proposer)

    def work(block: RowBlock) -> tuple[Tensor, Tensor]:
        x = block.x
        known = weights[block.positions].to(x.device)
        found = assign(x, prepared, squares=block.squares, within=from_weights(known))
        near = (found.labels >= 0).nonzero()[:, 0]
        lower = torch.minimum(known[near], to_weights(found.squares[near]))
        return block.positions[near.cpu()], lower.cpu()

    for positions, lower in share.each(work, share.row_blocks()):
        weights[positions] = lower


def _lowest_rows_left(share: Share, places: list[int], num: int) -> Tensor:
    """The lowest good rows of all ranks that were not chosen, (num, D)."""
    left = torch.zeros(len(share.rows), dtype=torch.bool)
    for positions in share.good_positions():
        left[positions] = True
    last = share.first + len(left)
    left[[p - share.first for p in places if share.first <= p < last]] = False
    before = sum(int(n) for n in share.gather(left.sum()[None])[: share.comm.rank])  # left on lower ranks
    positions = left.nonzero()[: max(0, num - before), 0]
    rows = torch.zeros(num, share.dim)
    if len(positions):
        rows[before : before + len(positions)] = share.rows.take(positions)
    return share.total(rows).to(share.device)
