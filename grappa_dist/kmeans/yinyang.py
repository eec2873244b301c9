"""A pass of Lloyd's iterations that searches only where the nearest centroid can have changed.

Bounds (ops/bounds.py) only spare work: labels are those of `assign`, decided on exact integers, whatever the groups are
and whatever estimates said. With one group of centroids a pass is that of ops/one_group.py. With several, a row is in
one of five cases:

1. No lower bound is below its upper bound: nothing of it is read, its label stays.
2. The exact distance to its own centroid, which is computed first, is below all lower bounds: its label stays too.
3. Nobody has looked yet, on the first pass: there is no own centroid (label -1, at an infinite distance), and all
   groups are open.
4. Of the own centroid and those that were proposed by open groups, estimates leave one: that is the nearest.
5. They leave several: sharper products, then integers decide between these. A group of which even the last proposal may
   be the nearest is a crowd: any of its centroids may be it, and all of them are compared exactly.

Shapes: P rows of one block, M of them open, K centroids, G groups, D dimensions, t proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grappa_dist.ops.bounds import Bounds, Groups, rooted
from grappa_dist.ops.moves import Moves, Take, most_or_these
from grappa_dist.ops.one_group import reassign_among_all
from grappa_dist.search.candidates import SLACK, Centroids, PreparedRows, Proposer, joined
from grappa_dist.search.fixed_point import GRID
from grappa_dist.search.rerank import best_of_all, decide_pairs, pair_squares

_PLACES = 3  # proposals of each group
_Pairs = tuple[Tensor, Tensor]  # positions of rows, and labels


@dataclass(frozen=True)
class GroupedCentroids:
    """The centroids of one pass, each group in one piece."""

    whole: Centroids
    groups: Groups
    parts: tuple[Centroids, ...]

    @staticmethod
    def of(values: Tensor, groups: Groups, proposer: Proposer | None = None) -> GroupedCentroids:
        whole = Centroids.of(values, proposer)
        return GroupedCentroids(whole, groups, tuple(whole.pick(m) for m in groups.members))


def reassign(take: Take, centroids: GroupedCentroids, bounds: Bounds) -> Moves:
    """Sets the label of each grid row to its nearest centroid, a tie to the lowest index, and its bounds, in place.

    Args:
        take: the block's grid rows; asked for those alone that may change their label.
    """
    if len(centroids.parts) == 1:
        return reassign_among_all(take, centroids.whole, bounds)
    block = _open_rows(take, centroids, bounds)
    if not len(block.rows):
        return Moves.none(block.rows.device)
    proposals = _propose(block, centroids, (bounds.lower[block.rows] <= bounds.upper[block.rows, None]).T.contiguous())
    nearest = _who_wins(block, centroids, _who_may_win(block, proposals))
    _rebound(bounds, block, proposals, nearest, centroids.groups)
    changed = (nearest.labels != block.own).nonzero()[:, 0]
    moved = (block.rows[changed], block.own[changed], nearest.labels[changed])
    return Moves(*moved, nearest.by_integers, proposals.searched)


@dataclass(frozen=True)
class _Block:
    """The rows of a block that may change their label."""

    rows: Tensor  # (M,) positions in the block
    at: Callable[[Tensor], Tensor]  # some ascending ones of these -> grid rows (m, D)
    squares: Tensor  # (M,) float64, exact |x|^2
    own: Tensor  # (M,) int64, the label so far, -1 on the first pass
    own_distances: Tensor  # (M,) float64, squared and exact, to that centroid; infinite where nobody has looked
    prepared: PreparedRows


def _open_rows(take: Take, centroids: GroupedCentroids, bounds: Bounds) -> _Block:
    """Rows with a group that may hold a nearer centroid, also after a look at how far their own one is now."""
    proposer = centroids.whole.proposer
    rows = most_or_these((bounds.lower <= bounds.upper[:, None]).any(1))
    pieces, own, squares = take(rows), bounds.labels[rows].long(), bounds.squares[rows]
    if bool((own < 0).any()):
        nowhere = torch.full_like(squares, math.inf)
        prepared = proposer.rows(pieces, squares, squares / GRID**2, within_base=False)
        return _Block(rows, lambda some: joined(take(rows[some])), squares, own, nowhere, prepared)
    some = joined(pieces)
    in_order = torch.arange(len(rows), device=rows.device)
    distances = pair_squares(some, squares, centroids.whole, (in_order, own)) / GRID**2
    bounds.upper[rows] = rooted(distances, 1 + SLACK)
    still = most_or_these((bounds.lower[rows] <= bounds.upper[rows, None]).any(1))
    some, squares, distances = _pick(some, still), squares[still], distances[still]
    prepared = proposer.rows([some], squares, distances, within_base=True)
    return _Block(rows[still], partial(some.index_select, 0), squares, own[still], distances, prepared)


@dataclass(frozen=True)
class _Proposals:
    """What estimates say of every open group of every open row."""

    open: Tensor  # (G, M) bool
    distances: Tensor  # (2, G, M) float32, squared, of the nearest two centroids; infinite where there is none
    labels: Tensor  # (2, G, M) int64, theirs
    others: list[tuple[Tensor, Tensor, Tensor]]  # further centroids that may be as near as their group's first: rows,
    # labels, distances
    crowded: list[tuple[int, Tensor, Tensor]]  # groups that may hold such centroids which were not proposed: rows, and
    # distances that those exceed
    error: float  # as Proposals.error
    searched: int


def _propose(block: _Block, centroids: GroupedCentroids, open_groups: Tensor) -> _Proposals:
    shape = (2, *open_groups.shape)
    distances = torch.full(shape, math.inf, device=block.rows.device)
    labels = torch.zeros(shape, dtype=torch.int64, device=block.rows.device)
    others, crowded, error, searched = [], [], 0.0, 0
    for g, (members, part) in enumerate(zip(centroids.groups.members, centroids.parts, strict=True)):
        rows = most_or_these(open_groups[g])
        if not len(rows):
            continue
        open_groups[g, rows] = True
        found = part.proposer.nearest(block.prepared.pick(rows), part, min(_PLACES, len(members)))
        for place in range(min(2, len(members))):
            distances[place, g].index_copy_(0, rows, found.distances[:, place])
            labels[place, g].index_copy_(0, rows, members[found.labels[:, place]])
        near = found.distances <= _reach(found.distances[:, 0], block.own_distances[rows], found.error)[:, None]
        of_rows, places = near[:, 2:].nonzero().unbind(1)
        places += 2
        others.append((rows[of_rows], members[found.labels[of_rows, places]], found.distances[of_rows, places]))
        if near.shape[1] < len(members) and len(full := near[:, -1].nonzero()[:, 0]):
            crowded.append((g, rows[full], found.distances[full, -1]))
        error, searched = max(error, found.error), searched + len(rows) * len(members)
    return _Proposals(open_groups, distances, labels, others, crowded, error, searched)


def _reach(nearest: Tensor, own: Tensor, error: float) -> Tensor:
    """Estimates above this are not those of a nearest centroid, (M,) float32."""
    return ((torch.minimum(nearest.double() + error, own) + error) * (1 + SLACK)).float()


@dataclass(frozen=True)
class _Contenders:
    """Which centroids may be the nearest."""

    first: Tensor  # (M,) int64, the own one where it may be it, else the nearest by estimates
    above: Tensor  # (M,) float64, at least the squared distance of the nearest
    undecided: Tensor  # (m,) the rows for which there are others
    pairs: list[_Pairs]  # theirs, all but the crowds
    crowds: list[tuple[int, Tensor]]  # groups, and their rows


def _who_may_win(block: _Block, proposals: _Proposals) -> _Contenders:
    """Cases 4 and 5 told apart, by estimates and the exact distance to the own centroid."""
    is_own = (proposals.labels == block.own) & block.own_distances.isfinite()
    rivals = proposals.distances.masked_fill(is_own, math.inf).flatten(0, 1)  # (2 G, M)
    labels = proposals.labels.flatten(0, 1)
    best, place = rivals.min(0)
    above = torch.minimum(best.double() + proposals.error, block.own_distances)  # the nearest is no farther
    reach = _reach(best, block.own_distances, proposals.error)
    near, stay = rivals <= reach, block.own_distances <= above
    further = [(rows[some], of[some]) for rows, of, d in proposals.others if len(some := _within(d, reach, rows))]
    crowds = [(g, rows[some]) for g, rows, d in proposals.crowded if len(some := _within(d, reach, rows))]
    num = near.sum(0) + stay
    for rows in (*(rows for rows, _ in further), *(rows for _, rows in crowds)):
        num[rows] += 2
    first = torch.where(stay, block.own, labels.gather(0, place[None])[0])
    undecided = (num > 1).nonzero()[:, 0]
    staying = undecided[stay[undecided]]
    places, some = near[:, undecided].nonzero().unbind(1)
    rows = undecided[some]
    pairs = [(staying, block.own[staying]), (rows, labels[places, rows]), *further]
    return _Contenders(first, above, undecided, pairs, crowds)


@dataclass(frozen=True)
class _Nearest:
    labels: Tensor  # (M,) int64, exact
    above: Tensor  # (M,) float64, at least the squared distance
    by_integers: int


def _who_wins(block: _Block, centroids: GroupedCentroids, contenders: _Contenders) -> _Nearest:
    """Decides case 5, exactly."""
    labels, above, undecided = contenders.first, contenders.above, contenders.undecided
    if not len(undecided):
        return _Nearest(labels, above, 0)
    pairs = [*contenders.pairs, *_nearest_of_crowds(block, centroids, contenders.crowds)]
    rows, of_rows = (torch.cat(column) for column in zip(*pairs, strict=True))
    x, squares = block.at(undecided), block.squares[undecided]
    found = decide_pairs(x, squares, centroids.whole, (torch.searchsorted(undecided, rows), of_rows))
    labels[undecided] = found.labels
    above[undecided] = torch.minimum(above[undecided], found.above)
    by_integers = found.by_integers
    for _, rows in contenders.crowds:
        by_integers[torch.searchsorted(undecided, rows)] = True
    return _Nearest(labels, above, int(by_integers.sum()))


def _nearest_of_crowds(
    block: _Block, centroids: GroupedCentroids, crowded: list[tuple[int, Tensor]]
) -> Iterator[_Pairs]:
    """The exact nearest of a group, where more of it than were proposed may be nearest."""
    for g, rows in crowded:
        yield rows, centroids.groups.members[g][best_of_all(block.at(rows), centroids.parts[g])[0]]


def _within(distances: Tensor, reach: Tensor, rows: Tensor) -> Tensor:
    return (distances <= reach[rows]).nonzero()[:, 0]


def _rebound(bounds: Bounds, block: _Block, proposals: _Proposals, nearest: _Nearest, groups: Groups) -> None:
    """Writes the new labels and bounds of the open rows.

    By (1) to (3) of `Proposals` no other centroid of an open group is nearer than d - error, d being the estimate of
    its nearest other one; SLACK covers what far distances have been rounded by.
    """
    others = torch.where(proposals.labels[0] == nearest.labels, proposals.distances[1], proposals.distances[0])
    least = rooted(others.double() - proposals.error, 1 - SLACK).T
    lower = torch.where(proposals.open.T, least, bounds.lower[block.rows])
    left = ((nearest.labels != block.own) & block.own_distances.isfinite()).nonzero()[:, 0]
    old = groups.of[block.own[left]]  # the old centroid is now one of the others
    gone = rooted(block.own_distances[left], 1 - SLACK)
    lower[left, old] = torch.minimum(lower[left, old], gone)
    bounds.lower[block.rows] = lower
    bounds.labels[block.rows] = nearest.labels.int()
    bounds.upper[block.rows] = rooted(nearest.above, 1 + SLACK)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows]; all of x itself where the rows, which ascend, are all."""
    return x if len(rows) == len(x) else x.index_select(0, rows)
