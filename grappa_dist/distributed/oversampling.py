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

from grappa_dist.distributed.row_weights import RowWeights, are_here, rows_at
from grappa_dist.distributed.sharded_rows import Share
from grappa_dist.kmeans.sampling import Draw, copied_share
from grappa_dist.kmeans.seeding import Candidates, OnRound, Seeded, check_places, draw_centroids, no_one, seed_centroids
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
    picked = resume or Seeded()
    candidates = picked.candidates
    if candidates is None:
        candidates = _candidates(share, num_labels, seed, picked, on_round)
        picked = Seeded(candidates=candidates)
        on_round(picked, num_labels)
    else:
        _check_picked(share, candidates, picked)
    seeded, centroids = _pick(share, candidates, num_labels, seed, picked, on_round)
    return centroids if len(centroids) == num_labels else seed_centroids(share, num_labels, seed, resume=seeded)


def _pick(
    share: Share, candidates: Candidates, num_labels: int, seed: int, picked: Seeded, on_round: OnRound
) -> tuple[Seeded, Tensor]:
    """k-means++ among the candidates, each of which counts as often as it says: where it ends, and centroids (k, D)."""
    here = are_here(share, candidates.places)
    own = candidates.places[here] - share.first
    sample = copied_share(share, own.split(share.block_rows) if len(own) else (), len(own))

    def among_all(seeded: Seeded) -> Seeded:
        return Seeded(candidates.places[seeded.places], seeded.drawn, candidates)

    before = Seeded(torch.searchsorted(candidates.places, picked.places), picked.drawn)
    weights = RowWeights.of(sample, times=candidates.times[here])
    seeded, centroids = draw_centroids(
        weights, num_labels, seed, before, lambda now, wanted: on_round(among_all(now), wanted)
    )
    return among_all(seeded), centroids


def _check_picked(share: Share, candidates: Candidates, picked: Seeded) -> None:
    """Raises on all ranks unless the candidates are different good rows, and those picked are among them."""
    check_places(RowWeights.of(share), Seeded(candidates.places, len(candidates.places)), share.num_good)
    if not bool(torch.isin(picked.places, candidates.places).all()):
        raise ValueError("resume has picked rows that are none of its candidates")


def _candidates(share: Share, num_labels: int, seed: int, seeded: Seeded, on_round: OnRound) -> Candidates:
    at_once = oversampled_at_once(num_labels)
    wanted = 1 + OVERSAMPLING_ROUNDS * at_once
    weights, found = RowWeights.of(share, nearest=True), seeded.places
    if len(found):
        check_places(weights, seeded, wanted)
        rows = rows_at(share, found)
        rounds = (rows[:1], *rows[1:].split(at_once))  # as they were drawn: of near ones the first round's counts
        weights.lower([some for some in rounds if len(some)])
    while len(found) < wanted and any(weights.totals()):
        num = at_once if len(found) else 1
        new = _places(share, Draw.of(share, num, seed, num_labels, _ROUND, len(found), weights=weights.squares))
        weights.lower([rows_at(share, new)], len(found))
        found = torch.cat([found, new])
        on_round(Seeded(found, len(found)), wanted)
    order = found.argsort()
    return Candidates(found[order], _times(weights, len(found))[order])


def _places(share: Share, draw: Draw) -> Tensor:
    """Of the drawn rows of all ranks, ascending, (m,)."""
    own = torch.cat([torch.zeros(0, dtype=torch.int64), *draw.positions()]) + share.first
    sizes = torch.cat(share.gather(torch.tensor([len(own)])))
    places, before = torch.zeros(int(sizes.sum()), dtype=torch.int64), int(sizes[: share.comm.rank].sum())
    places[before : before + len(own)] = own
    return share.total(places)


def _times(weights: RowWeights, num: int) -> Tensor:
    """How many rows of all ranks belong to each of so many candidates, (M,)."""
    assert weights.nearest is not None
    times = torch.zeros(num, dtype=torch.int64)
    for positions in weights.share.good_positions():
        times.index_add_(0, weights.nearest[positions], torch.ones_like(positions))
    return weights.share.total(times)
