"""k-means++ over the rows of all ranks, in rounds: the same centroids on any number of ranks.

Shapes: K centroids, D dimensions, k of them found so far, m candidates of one round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from grappa_dist.distributed.row_weights import RowWeights, are_here, rows_at
from grappa_dist.distributed.sharded_rows import Share
from grappa_dist.ops.seeding import accept, candidates_of, draw


@dataclass(frozen=True, eq=False)
class Candidates:
    """Rows of all ranks of which some become centroids."""

    places: Tensor  # (M,) int64 among all rows, ascending
    times: Tensor  # (M,) int64, rows that each of them is the nearest to


@dataclass(frozen=True, eq=False)
class Seeded:
    """Where an initialisation stands after a round: enough to go on from, as everything else follows from the rows."""

    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (k,) among all rows, by round
    drawn: int = 0  # rows so far, those dropped again among them
    candidates: Candidates | None = None  # that places are drawn from, where not from all rows


OnRound = Callable[[Seeded, int], None]
"""Is told after each round where the initialisation stands, and how many rows its present part looks for."""


def no_one(seeded: Seeded, wanted: int) -> None:
    """Nobody is told."""


def seed_centroids(
    share: Share, num_labels: int, seed: int, *, resume: Seeded | None = None, on_round: OnRound = no_one
) -> Tensor:
    """k-means++ centroids, (K, D), by `draw_centroids`; rows that are not chosen, the lowest first, fill up.

    Args:
        resume: what `on_round` was told last, of the same rows, K and seed.

    Raises:
        ValueError: the places in `resume` are not of good rows.
        Stopped: on all ranks, when any was asked to stop.
    """
    seeded, rows = draw_centroids(RowWeights.of(share), num_labels, seed, resume or Seeded(), on_round)
    missing = num_labels - len(rows)
    return torch.cat([rows, rows_at(share, _lowest_left(share, seeded, missing))]) if missing else rows


def draw_centroids(
    weights: RowWeights, num_labels: int, seed: int, resume: Seeded, on_round: OnRound = no_one
) -> tuple[Seeded, Tensor]:
    """k-means++: each centroid a row drawn in proportion to its squared distance from those before it.

    A round draws up to half as many candidates as there are centroids and thins them out so that their law is that of
    one draw at a time (`accept`). So the rows are read by matrix products, once a round, instead of K times. Draws are
    integers below an integer total, located in the order of all rows.

    Returns:
        Where it ends, and the centroids (k, D): K of them, or fewer when no row is left at a distance.
    """
    share, seeded = weights.share, resume
    parts = [torch.zeros(0, share.dim, device=share.device)]
    if len(resume.places):
        check_places(weights, resume, num_labels)
        parts = [rows_at(share, resume.places)]
        weights.lower(parts)
    while len(seeded.places) < num_labels and any(totals := weights.totals()):
        seeded, rows = _round(weights, totals, seeded, num_labels=num_labels, seed=seed)
        parts.append(rows)
        on_round(seeded, num_labels)
    return seeded, torch.cat(parts)


def _round(
    weights: RowWeights, totals: list[int], before: Seeded, *, num_labels: int, seed: int
) -> tuple[Seeded, Tensor]:
    """Draws candidates, thins them out and lowers the weights; where that leads, and the new centroids (k', D)."""
    missing = num_labels - len(before.places)
    numbers = range(before.drawn, before.drawn + candidates_of(len(before.places), missing))
    targets = [draw(sum(totals), seed, num_labels, j) for j in numbers]
    places, found = weights.located(targets, totals)
    candidates = rows_at(weights.share, places)
    tests = [draw(weight, seed, num_labels, j, 1) for j, weight in zip(numbers, found, strict=True)]
    kept = accept(candidates, found, tests, missing)
    weights.lower([candidates[kept]], len(before.places))
    return Seeded(torch.cat([before.places, places[kept]]), numbers.stop), candidates[kept]


def check_places(weights: RowWeights, resume: Seeded, at_most: int) -> None:
    """Raises on all ranks unless the places are of different good rows, and no more than can have been drawn."""
    share, places = weights.share, resume.places
    own = places[are_here(share, places)] - share.first
    good, differ = int(share.total((weights.squares[own] > 0).sum()[None])), len(places.unique())
    if not (good == differ == len(places) <= min(at_most, resume.drawn)):
        raise ValueError(
            f"resume has {len(places)} rows drawn from {resume.drawn} candidates, of which {differ} differ and "
            f"{good} are good rows; expected as many good rows, all different, up to {at_most} of them"
        )


def _lowest_left(share: Share, seeded: Seeded, num: int) -> Tensor:
    """Places of the lowest good rows of all ranks that were not chosen, (num,)."""
    own = seeded.places[are_here(share, seeded.places)] - share.first
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
