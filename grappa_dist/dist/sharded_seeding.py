"""k-means++ over the rows of all ranks, in rounds: the same centroids on any number of ranks.

Shapes: P rows of one block, K centroids, D dimensions, k of them found so far, m candidates of one round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.dist.scratch import scratch
from grappa_dist.dist.share import RowBlock, Share
from grappa_dist.ops.nearest import FAR, assign
from grappa_dist.ops.proposals import Centroids
from grappa_dist.ops.seeding import accept, candidates_of, draw, from_weights, to_weights

_RESUMED_AT_ONCE = 2**14  # centroids of before, compared with all rows; as many as a round of a million finds


@dataclass(frozen=True)
class Seeded:
    """Where k-means++ stands after a round: enough to go on from, as everything else follows from the rows."""

    places: tuple[int, ...] = ()  # (k,) of the centroids among all rows, in the order in which they were drawn
    drawn: int = 0  # candidates so far


def seed_centroids(
    share: Share,
    num_labels: int,
    seed: int,
    *,
    resume: Seeded | None = None,
    on_round: Callable[[Seeded], None] = lambda seeded: None,
) -> Tensor:
    """k-means++ centroids, (K, D): each a row drawn in proportion to its squared distance from those before it.

    A round draws up to half as many candidates as there are centroids and thins them out so that their law is that of
    one draw at a time (`accept`). So the rows are read by matrix products, once a round, instead of K times. Draws are
    integers below an integer total, located in the order of all rows. When no row is left at a distance, the lowest
    rows not chosen fill up.

    Args:
        resume: what `on_round` was told last, of the same rows, K and seed.

    Raises:
        ValueError: the places in `resume` are not of good rows.
        Stopped: on all ranks, when any was asked to stop.
    """
    weights = _Weights(share, scratch((len(share.rows),), torch.int64))
    weights.fill(1)  # the first centroid may be any good row; from then on weights are squared distances
    seeded, parts = Seeded(), list[Tensor]()
    if resume is not None:
        weights.check_places(resume, num_labels)
        seeded, parts = resume, [_rows_at(share, torch.tensor(resume.places))]
        weights.fill(FAR)
        for part in parts[0].split(_RESUMED_AT_ONCE):
            weights.lower(part)
    while len(seeded.places) < num_labels:
        totals = weights.totals()
        if not sum(totals):
            parts.append(_rows_at(share, _lowest_left(share, seeded, num_labels - len(seeded.places))))
            break
        seeded, rows = _round(weights, totals, seeded, num_labels=num_labels, seed=seed)
        parts.append(rows)
        on_round(seeded)
    return torch.cat(parts)


def _round(
    weights: _Weights, totals: list[int], before: Seeded, *, num_labels: int, seed: int
) -> tuple[Seeded, Tensor]:
    """Draws candidates, thins them out and lowers the weights; where that leads, and the new centroids (k', D)."""
    missing = num_labels - len(before.places)
    numbers = range(before.drawn, before.drawn + candidates_of(len(before.places), missing))
    targets = [draw(sum(totals), seed, num_labels, j) for j in numbers]
    places, found = weights.located(targets, totals)
    candidates = _rows_at(weights.share, places)
    tests = [draw(weight, seed, num_labels, j, 1) for j, weight in zip(numbers, found, strict=True)]
    kept = accept(candidates, found, tests, missing)
    if not before.places:
        weights.fill(FAR)
    weights.lower(candidates[kept])
    return Seeded((*before.places, *places[kept].tolist()), numbers.stop), candidates[kept]


@dataclass(frozen=True)
class _Weights:
    """In proportion to which rows are drawn: squared distances from the nearest centroid so far, 0 for bad rows."""

    share: Share
    of_rows: Tensor  # (n,) int64, of this rank's rows

    def fill(self, value: int) -> None:
        """Gives all good rows the same weight."""
        for positions in self.share.good_positions():
            self.of_rows[positions] = value

    def totals(self) -> list[int]:
        """Sums of each rank's."""
        return [int(total) for total in self.share.gather(self.of_rows.sum()[None])]

    def located(self, targets: list[int], totals: list[int]) -> tuple[Tensor, list[int]]:
        """Places among all rows, (m,), and weights of the rows on which targets fall.

        A target falls on the row at which the running sum of weights passes it; the rank that has it tells the others.
        """
        lower_ranks = sum(totals[: self.share.comm.rank])
        ends = self.of_rows.cumsum(0)
        own = [i for i, t in enumerate(targets) if 0 <= t - lower_ranks < totals[self.share.comm.rank]]
        found = torch.zeros(len(targets), 2, dtype=torch.int64)
        if own:
            positions = torch.searchsorted(ends, torch.tensor([targets[i] - lower_ranks for i in own]), right=True)
            found[own] = torch.stack([positions + self.share.first, self.of_rows[positions]], 1)
        places, weights = self.share.total(found).unbind(1)
        return places, weights.tolist()

    def lower(self, centroids: Tensor) -> None:
        """Lowers the weights to those by the nearest of some new centroids."""
        prepared = Centroids.of(centroids, self.share.proposer)

        def work(block: RowBlock) -> tuple[Tensor, Tensor]:
            x = block.x
            known = self.of_rows[block.positions].to(x.device)
            found = assign(x, prepared, squares=block.squares, within=from_weights(known))
            near = (found.labels >= 0).nonzero()[:, 0]
            lower = torch.minimum(known[near], to_weights(found.squares[near]))
            return block.positions[near.cpu()], lower.cpu()

        for positions, lower in self.share.each(work, self.share.row_blocks()):
            self.of_rows[positions] = lower

    def check_places(self, resume: Seeded, num_labels: int) -> None:
        """Raises on all ranks unless the places are of different good rows, and no more than can have been drawn."""
        places = torch.tensor(resume.places, dtype=torch.int64)
        own = places[_here(self.share, places)] - self.share.first
        good, differ = int(self.share.total((self.of_rows[own] > 0).sum()[None])), len(set(resume.places))
        if not (good == differ == len(places) and 1 <= differ <= min(num_labels, resume.drawn)):
            raise ValueError(
                f"resume has {len(places)} rows drawn from {resume.drawn} candidates, of which {differ} differ and "
                f"{good} are good rows; expected as many good rows, all different, 1 to {num_labels} of them"
            )


def _rows_at(share: Share, places: Tensor) -> Tensor:
    """Grid rows (m, D) at some places among all rows, on all ranks."""
    own = _here(share, places)
    rows = torch.zeros(len(places), share.dim)
    if bool(own.any()):
        rows[own] = share.rows.take(places[own] - share.first)
    return share.total(rows).to(share.device)


def _here(share: Share, places: Tensor) -> Tensor:
    """Which places among all rows are of this rank's rows, (m,) bool."""
    return (places >= share.first) & (places < share.first + len(share.rows))


def _lowest_left(share: Share, seeded: Seeded, num: int) -> Tensor:
    """Places of the lowest good rows of all ranks that were not chosen, (num,)."""
    chosen = torch.tensor(seeded.places)
    own = chosen[_here(share, chosen)] - share.first
    left = share.rows.num_good - len(own)
    slot = sum(int(n) for n in share.gather(torch.tensor([left]))[: share.comm.rank])  # left on lower ranks
    places = torch.zeros(num, dtype=torch.int64)
    for positions in share.good_positions():
        free = positions[~torch.isin(positions, own)][: max(0, num - slot)]
        places[slot : slot + len(free)] = free + share.first
        slot += len(free)
        if slot >= num:
            break
    return share.total(places)
