"""k-means|| over the rows of all ranks (Bahmani et al., Scalable K-Means++, 2012): a few readings, whatever K is.

Rounds draw many rows at once by their squared distances from those drawn before, more rows in all than there are
centroids to be. Each counts as often as it is a row's nearest, and k-means++ picks the centroids among them.

The paper draws each row by itself, so that a round has about l rows. Here a round has l rows exactly: those that come
first when each waits for an exponential time with its squared distance as the rate (`ops.hashing.race_keys`).

Shapes: n rows of this rank, K centroids, M candidates of all ranks, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grappa_dist.dist.row_weights import RowWeights, are_here, rows_at
from grappa_dist.dist.sampling import Draw, copied_share
from grappa_dist.dist.sharded_seeding import OnRound, Seeded, check_places, draw_centroids, no_one, seed_centroids
from grappa_dist.dist.share import Share
from grappa_dist.ops.nearest import FAR
from grappa_dist.ops.seeding import OVERSAMPLING_ROUNDS, oversampled_at_once

_ROUND = 6  # names the hashes


def oversampled_centroids(
    share: Share, num_labels: int, seed: int, *, resume: Seeded | None = None, on_round: OnRound = no_one
) -> Tensor:
    """k-means|| centroids, (K, D), all of them rows.

    Where fewer than K of the candidates differ, k-means++ goes on among all rows.

    Args:
        resume: what `on_round` was told last, of the same rows, K and seed.

    Raises:
        ValueError: the places in `resume` are not of good rows.
        Stopped: on all ranks, when any was asked to stop.
    """
    places, times = _candidates(share, num_labels, seed, resume or Seeded(), on_round)
    here = are_here(share, places)
    own = places[here] - share.first
    sample = copied_share(share, (share.read(some) for some in own.split(share.block_rows)), len(own))
    seeded, centroids = draw_centroids(RowWeights.of(sample, times=times[here]), num_labels, seed, Seeded())
    if len(centroids) == num_labels:
        return centroids
    found = Seeded(tuple(places[list(seeded.places)].tolist()), seeded.drawn)
    return seed_centroids(share, num_labels, seed, resume=found)


def _candidates(share: Share, num_labels: int, seed: int, seeded: Seeded, on_round: OnRound) -> tuple[Tensor, Tensor]:
    """Places of the candidates among all rows, ascending, (M,), and how many rows each of them is nearest to, (M,)."""
    at_once = oversampled_at_once(num_labels)
    wanted = 1 + OVERSAMPLING_ROUNDS * at_once
    weights, found = RowWeights.of(share, nearest=True), torch.tensor(seeded.places, dtype=torch.int64)
    if len(found):
        check_places(weights, seeded, wanted)
        _add(weights, found[:1], 0)
        for first in range(1, len(found), at_once):  # as they were added, which decides between equally near ones
            _add(weights, found[first : first + at_once], first)
    while len(found) < wanted and any(weights.totals()):
        num = at_once if len(found) else 1
        new = _places(share, Draw.of(share, num, seed, num_labels, _ROUND, len(found), weights=weights.squares))
        _add(weights, new, len(found))
        found = torch.cat([found, new])
        on_round(Seeded(tuple(found.tolist()), len(found)), wanted)
    order = found.argsort()
    return found[order], _nearest_rows(weights, len(found))[order]


def _add(weights: RowWeights, places: Tensor, first: int) -> None:
    """Lowers the weights by the rows at some places, before which `first` others were added."""
    if not first:
        weights.fill(FAR)
    weights.lower(rows_at(weights.share, places), first)


def _places(share: Share, draw: Draw) -> Tensor:
    """Of the drawn rows of all ranks, ascending, (m,)."""
    own = torch.cat(list(draw.positions())) + share.first if share.rows.num_good else torch.zeros(0, dtype=torch.int64)
    sizes = torch.cat(share.gather(torch.tensor([len(own)])))
    places, before = torch.zeros(int(sizes.sum()), dtype=torch.int64), int(sizes[: share.comm.rank].sum())
    places[before : before + len(own)] = own
    return share.total(places)


def _nearest_rows(weights: RowWeights, num: int) -> Tensor:
    """How many rows of all ranks belong to each of so many candidates, (M,)."""
    assert weights.nearest is not None
    counts = torch.zeros(num, dtype=torch.int64)
    for positions in weights.share.good_positions():
        counts += torch.bincount(weights.nearest[positions].long(), minlength=num)
    return weights.share.total(counts)
