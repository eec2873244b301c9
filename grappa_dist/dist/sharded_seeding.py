"""k-means++ over the rows of all ranks, in rounds: the same centroids on any number of ranks.

Shapes: K centroids, D dimensions, k of them found so far, m candidates of one round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.dist.row_weights import RowWeights, are_here, rows_at
from grappa_dist.dist.share import Share
from grappa_dist.ops.nearest import FAR
from grappa_dist.ops.seeding import accept, candidates_of, draw


@dataclass(frozen=True)
class Seeded:
    """Where an initialisation stands after a round: enough to go on from, as everything else follows from the rows."""

    places: tuple[int, ...] = ()  # (k,) of the rows found among all rows, in the order in which they were drawn
    drawn: int = 0  # rows so far, those dropped again among them


OnRound = Callable[[Seeded, int], None]
"""Is told after each round where the initialisation stands, and how many rows its present part looks for."""


def no_one(seeded: Seeded, wanted: int) -> None:
    """Nobody is told."""


def seed_centroids(
    share: Share, num_labels: int, seed: int, *, resume: Seeded | None = None, on_round: OnRound = no_one
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
    weights, seeded, parts = RowWeights.of(share), Seeded(), list[Tensor]()
    if resume is not None:
        check_places(weights, resume, num_labels)
        seeded, parts = resume, [rows_at(share, torch.tensor(resume.places))]
        weights.fill(FAR)
        weights.lower(parts[0])
    seeded, drawn = draw_centroids(weights, num_labels, seed, seeded, on_round)
    parts.append(drawn)
    missing = num_labels - len(seeded.places)
    if missing:
        parts.append(rows_at(share, _lowest_left(share, seeded, missing)))
    return torch.cat(parts)


def draw_centroids(
    weights: RowWeights, num_labels: int, seed: int, seeded: Seeded, on_round: OnRound = no_one
) -> tuple[Seeded, Tensor]:
    """Rounds until there are K centroids or no row is left at a distance; where that leads, and the new (k', D)."""
    parts = [torch.zeros(0, weights.share.dim, device=weights.share.device)]
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
    if not before.places:
        weights.fill(FAR)
    weights.lower(candidates[kept])
    return Seeded((*before.places, *places[kept].tolist()), numbers.stop), candidates[kept]


def check_places(weights: RowWeights, resume: Seeded, at_most: int) -> None:
    """Raises on all ranks unless the places are of different good rows, and no more than can have been drawn."""
    share, places = weights.share, torch.tensor(resume.places, dtype=torch.int64)
    own = places[are_here(share, places)] - share.first
    good, differ = int(share.total((weights.squares[own] > 0).sum()[None])), len(set(resume.places))
    if not (good == differ == len(places) and 1 <= differ <= min(at_most, resume.drawn)):
        raise ValueError(
            f"resume has {len(places)} rows drawn from {resume.drawn} candidates, of which {differ} differ and "
            f"{good} are good rows; expected as many good rows, all different, 1 to {at_most} of them"
        )


def _lowest_left(share: Share, seeded: Seeded, num: int) -> Tensor:
    """Places of the lowest good rows of all ranks that were not chosen, (num,)."""
    chosen = torch.tensor(seeded.places)
    own = chosen[are_here(share, chosen)] - share.first
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
