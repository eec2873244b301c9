"""A pass of Lloyd's iterations that searches only where the nearest centroid can have changed.

Bounds (kmeans/yinyang.py) only spare work: labels are those of `assign`, decided on exact integers, whatever the groups
are and whatever estimates said. With one group of centroids a pass is that of kmeans/yinyang.py. With several, a row is
in one of five cases:

1. No lower bound is below its upper bound: nothing of it is read, its label stays.
2. The exact distance to its own centroid, which is computed first, is below all lower bounds: its label stays too.
3. Nobody has looked yet, on the first pass: there is no own centroid (label -1, at an infinite distance), and all
   groups are open.
4. Of the own centroid and those that were proposed by open groups, estimates leave one: that is the nearest.
5. They leave several: sharper products, then integers decide between these. A group of which even the last proposal may
   be the nearest is a crowd: any of its centroids may be it, and all of them are compared exactly.

Shapes: P rows of one block, M of them open, K centroids, G groups, D dimensions, t proposals.

What is known of distances without computing them: bounds per row and group of centroids.

After Yinyang k-means (Ding et al., ICML 2015). A row keeps an upper bound of the distance to its own centroid and, per
group of centroids, a lower bound of the distance to every other centroid in it. By the triangle inequality a centroid
that moves by s shifts either bound by at most s. A group whose lower bound stays above the upper bound cannot hold the
row's nearest centroid and is not searched (kmeans/yinyang.py).

Shapes: P rows of one block, K centroids, G groups, D dimensions.

What a pass of Lloyd's iterations asks of the rows of one block, and what it answers.

Shapes: D dimensions.

A pass of Lloyd's iterations where the centroids are one group: rows are searched among all of them or not at all.

The only lower bound of a row is that to all other centroids, so its own one need not be looked at apart: it is found
among the others. With many groups there is more to keep apart (kmeans/yinyang.py).

Shapes: P rows of one block, M of them open, K centroids, D dimensions, t proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from grappa_dist.search.candidates import (
    SLACK,
    CandidateGenerator,
    Candidates,
    Centroids,
    PreparedRows,
    joined,
    nearest_float32,
)
from grappa_dist.search.fixed_point import GRID, exact_square
from grappa_dist.search.rerank import Competitors, best_of_all, decide_competitors, decide_pairs, pair_squares

_GROUP_STEPS = 5
_FEW_LABELS = 512  # so few are searched in one go
_GROUP_SIZE = 256  # centroids per bound, at least, on the average
_DIMENSIONS_PER_BOUND = 8  # of a row for each of its lower bounds, at least


def num_bounds(num_labels: int, dim: int) -> int:
    """Lower bounds G that are kept for each row of `dim` dimensions, one per group of centroids."""
    few = num_labels <= _FEW_LABELS
    return 1 if few else max(1, min(num_labels // _GROUP_SIZE, dim // _DIMENSIONS_PER_BOUND))


@dataclass(frozen=True)
class Groups:
    """A partition of the centroids into neighbourhoods; a matter of speed, not of the result."""

    of: Tensor  # (K,) int64
    members: tuple[Tensor, ...]  # per group its centroids, ascending

    @staticmethod
    def around(centroids: Tensor, num: int) -> Groups:
        """Up to `num` groups of centroids that lie near each other, by a few steps of k-means in floats."""
        num = max(1, min(num, len(centroids)))
        heads = centroids[torch.linspace(0, len(centroids) - 1, num).long()].clone()
        of = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
        for _ in range(_GROUP_STEPS if num > 1 else 0):
            of = nearest_float32(centroids, heads, 1)[1][:, 0]
            counts = torch.bincount(of, minlength=num)[:, None]
            sums = torch.zeros_like(heads).index_add_(0, of, centroids)
            heads = torch.where(counts > 0, sums / counts.clamp(min=1), heads)
        names, of = of.unique(return_inverse=True)
        return Groups(of, tuple((of == g).nonzero()[:, 0] for g in range(len(names))))

    def largest(self, values: Tensor) -> Tensor:
        """The largest of the centroids' values in each group, (G,)."""
        return torch.stack([values[m].max() for m in self.members])


@dataclass(frozen=True)
class Bounds:
    """What is known of some rows; tensors are changed in place. Distances are true ones, not squared."""

    labels: Tensor  # (P,) int32, -1 before the first search
    upper: Tensor  # (P,) float32, at least the distance to the own centroid
    lower: Tensor  # (P, G) float32, at most the distance to any other centroid of the group
    squares: Tensor  # (P,) float64, exact |x|^2 in units of 2**-48

    def part(self, rows: slice) -> Bounds:
        return Bounds(self.labels[rows], self.upper[rows], self.lower[rows], self.squares[rows])

    def to(self, device: torch.device) -> Bounds:
        tensors = (self.labels, self.upper, self.lower, self.squares)
        return Bounds(*(t.to(device) for t in tensors))

    def copy_(self, other: Bounds) -> None:
        """Takes the values of `other`, unless it is made of the same memory."""
        if other.labels.data_ptr() != self.labels.data_ptr():
            self.labels.copy_(other.labels)
            self.upper.copy_(other.upper)
            self.lower.copy_(other.lower)

    def shift_(self, drift: Drift) -> None:
        """Keeps the bounds true after the centroids have moved."""
        self.upper.add_(drift.own[self.labels.long()])
        self.lower.sub_(drift.groups)


def rooted(squares: Tensor, slack: float) -> Tensor:
    """Distances from squared ones, float32, on the safe side of all roundings by a slack near 1."""
    return (squares.clamp(min=0).sqrt() * slack).float()


@dataclass(frozen=True)
class Drift:
    """How far centroids have moved at most, float32, with room for the rounding of what it is added to."""

    own: Tensor  # (K,)
    groups: Tensor  # (G,)

    @staticmethod
    def between(old: Tensor, new: Tensor, groups: Groups) -> Drift:
        moved = torch.cat(
            [exact_square(b.double() - a.double()) for a, b in zip(old.split(4096), new.split(4096), strict=True)]
        )
        # Per update: more than the roundings of a bound, distances being at most about 2.
        own = (moved.sqrt() / GRID * (1 + SLACK) + SLACK).float()
        return Drift(own, groups.largest(own))


_MOST = 0.75  # of the rows: then all are searched, which is faster than picking them out

Take = Callable[[Tensor], Sequence[Tensor]]
"""Ascending places of a block -> its grid rows there, in pieces (p, D)."""


@dataclass(frozen=True)
class Reassignments:
    """Rows whose label changed, and how the labels were found."""

    rows: Tensor  # (m,) positions in the block
    before: Tensor  # (m,) int64, -1 on the first pass
    after: Tensor  # (m,) int64
    by_integers: int  # rows that no float could settle
    searched: int  # distances estimated

    @staticmethod
    def none(device: torch.device) -> Reassignments:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return Reassignments(nothing, nothing, nothing, 0, 0)


def _most_or_these(wanted: Tensor) -> Tensor:
    """Positions of the rows wanted; of all rows where most are."""
    rows = wanted.nonzero()[:, 0]
    return torch.arange(len(wanted), device=wanted.device) if len(rows) > _MOST * len(wanted) else rows


def reassign_single_group(take: Take, centroids: Centroids, bounds: Bounds) -> Reassignments:
    """As `reassign` for one group."""
    rows = _most_or_these(bounds.lower[:, 0] <= bounds.upper)
    if not len(rows):
        return Reassignments.none(rows.device)
    own, squares, num = bounds.labels[rows].long(), bounds.squares[rows], len(centroids.values)
    looked = not bool((own < 0).any())
    # The own centroid is within the upper bound, so no further one matters.
    base = bounds.upper[rows].double().square() if looked else squares / GRID**2
    prepared = centroids.generator.rows(take(rows), squares, base, within_base=looked)
    found = centroids.generator.nearest(prepared, centroids, min(centroids.generator.num_candidates, num))
    labels, by_integers = found.labels[:, 0].clone(), 0
    several = found.possible[:, 1:].any(1).nonzero()[:, 0]
    if len(several):
        x = joined(take(rows[several]))
        labels[several], unsure = _decide(x, squares[several], centroids, _picked(found, several))
        by_integers = int(unsure.sum())
    _rebound_single(bounds, rows, found, labels)
    changed = (labels != own).nonzero()[:, 0]
    return Reassignments(rows[changed], own[changed], labels[changed], by_integers, len(rows) * num)


def _picked(found: Candidates, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Labels and whether they are possible, (t, M) each, of some rows."""
    return found.labels.T.index_select(1, rows), found.possible.T.index_select(1, rows)


def _decide(x: Tensor, squares: Tensor, centroids: Centroids, proposed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The nearest of several centroids that may be it, (M,), and which rows floats left open, (M,) bool."""
    labels, possible = proposed
    places, rows = possible[1:].nonzero().unbind(1)
    nearest, unsure = decide_competitors(x, squares, centroids, Competitors(labels[0], rows, labels[places + 1, rows]))
    if len(possible) < len(centroids.values):  # where the last place may be the nearest, those not proposed may be too
        unresolved = possible[-1].nonzero()[:, 0]
        nearest[unresolved] = best_of_all(x[unresolved], centroids)[0]
        unsure[unresolved] = True
    return nearest, unsure


def _rebound_single(bounds: Bounds, rows: Tensor, found: Candidates, labels: Tensor) -> None:
    """Writes the labels and bounds of the open rows, by (1) to (4) of `Candidates`.

    The nearest is no further than D_0 <= d_0 + e. The others are no nearer than d_0 - e, and, where the first is the
    nearest, than d_1 - e; SLACK covers what far distances have been rounded by.
    """
    first = found.distances[:, 0].double()
    second = found.distances[:, 1].double() if found.distances.shape[1] > 1 else torch.full_like(first, math.inf)
    others = torch.where(labels == found.labels[:, 0], second, first)
    bounds.lower[rows, 0] = rooted(others - found.error, 1 - SLACK)
    bounds.upper[rows] = rooted(first + found.error, 1 + SLACK)
    bounds.labels[rows] = labels.int()


_PLACES = 3  # proposals of each group
_Pairs = tuple[Tensor, Tensor]  # positions of rows, and labels


@dataclass(frozen=True)
class GroupedCentroids:
    """The centroids of one pass, each group in one piece."""

    whole: Centroids
    groups: Groups
    parts: tuple[Centroids, ...]

    @staticmethod
    def of(values: Tensor, groups: Groups, generator: CandidateGenerator | None = None) -> GroupedCentroids:
        whole = Centroids.of(values, generator)
        return GroupedCentroids(whole, groups, tuple(whole.pick(m) for m in groups.members))


def reassign(take: Take, centroids: GroupedCentroids, bounds: Bounds) -> Reassignments:
    """Sets the label of each grid row to its nearest centroid, a tie to the lowest index, and its bounds, in place.

    Args:
        take: the block's grid rows; asked for those alone that may change their label.
    """
    if len(centroids.parts) == 1:
        return reassign_single_group(take, centroids.whole, bounds)
    block = _open_rows(take, centroids, bounds)
    if not len(block.rows):
        return Reassignments.none(block.rows.device)
    proposals = _propose(block, centroids, (bounds.lower[block.rows] <= bounds.upper[block.rows, None]).T.contiguous())
    nearest = _find_nearest(block, centroids, _remaining_candidates(block, proposals))
    _rebound(bounds, block, proposals, nearest, centroids.groups)
    changed = (nearest.labels != block.own).nonzero()[:, 0]
    moved = (block.rows[changed], block.own[changed], nearest.labels[changed])
    return Reassignments(*moved, nearest.by_integers, proposals.searched)


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
    generator = centroids.whole.generator
    rows = _most_or_these((bounds.lower <= bounds.upper[:, None]).any(1))
    pieces, own, squares = take(rows), bounds.labels[rows].long(), bounds.squares[rows]
    if bool((own < 0).any()):
        nowhere = torch.full_like(squares, math.inf)
        prepared = generator.rows(pieces, squares, squares / GRID**2, within_base=False)
        return _Block(rows, lambda some: joined(take(rows[some])), squares, own, nowhere, prepared)
    some = joined(pieces)
    in_order = torch.arange(len(rows), device=rows.device)
    distances = pair_squares(some, squares, centroids.whole, (in_order, own)) / GRID**2
    bounds.upper[rows] = rooted(distances, 1 + SLACK)
    still = _most_or_these((bounds.lower[rows] <= bounds.upper[rows, None]).any(1))
    some, squares, distances = _pick(some, still), squares[still], distances[still]
    prepared = generator.rows([some], squares, distances, within_base=True)
    return _Block(rows[still], partial(some.index_select, 0), squares, own[still], distances, prepared)


@dataclass(frozen=True)
class _GroupCandidates:
    """What estimates say of every open group of every open row."""

    open: Tensor  # (G, M) bool
    distances: Tensor  # (2, G, M) float32, squared, of the nearest two centroids; infinite where there is none
    labels: Tensor  # (2, G, M) int64, theirs
    others: list[tuple[Tensor, Tensor, Tensor]]  # further centroids that may be as near as their group's first: rows,
    # labels, distances
    unresolved: list[
        tuple[int, Tensor, Tensor]
    ]  # groups that may hold such centroids which were not proposed: rows, and
    # distances that those exceed
    error: float  # as Proposals.error
    searched: int


def _propose(block: _Block, centroids: GroupedCentroids, open_groups: Tensor) -> _GroupCandidates:
    shape = (2, *open_groups.shape)
    distances = torch.full(shape, math.inf, device=block.rows.device)
    labels = torch.zeros(shape, dtype=torch.int64, device=block.rows.device)
    others, unresolved, error, searched = [], [], 0.0, 0
    for g, (members, part) in enumerate(zip(centroids.groups.members, centroids.parts, strict=True)):
        rows = _most_or_these(open_groups[g])
        if not len(rows):
            continue
        open_groups[g, rows] = True
        found = part.generator.nearest(block.prepared.pick(rows), part, min(_PLACES, len(members)))
        for place in range(min(2, len(members))):
            distances[place, g].index_copy_(0, rows, found.distances[:, place])
            labels[place, g].index_copy_(0, rows, members[found.labels[:, place]])
        near = found.distances <= _reach(found.distances[:, 0], block.own_distances[rows], found.error)[:, None]
        of_rows, places = near[:, 2:].nonzero().unbind(1)
        places += 2
        others.append((rows[of_rows], members[found.labels[of_rows, places]], found.distances[of_rows, places]))
        if near.shape[1] < len(members) and len(full := near[:, -1].nonzero()[:, 0]):
            unresolved.append((g, rows[full], found.distances[full, -1]))
        error, searched = max(error, found.error), searched + len(rows) * len(members)
    return _GroupCandidates(open_groups, distances, labels, others, unresolved, error, searched)


def _reach(nearest: Tensor, own: Tensor, error: float) -> Tensor:
    """Estimates above this are not those of a nearest centroid, (M,) float32."""
    return ((torch.minimum(nearest.double() + error, own) + error) * (1 + SLACK)).float()


@dataclass(frozen=True)
class _Remaining:
    """Which centroids may be the nearest."""

    first: Tensor  # (M,) int64, the own one where it may be it, else the nearest by estimates
    above: Tensor  # (M,) float64, at least the squared distance of the nearest
    undecided: Tensor  # (m,) the rows for which there are others
    pairs: list[_Pairs]  # theirs, all but the unresolved_groups
    unresolved_groups: list[tuple[int, Tensor]]  # groups, and their rows


def _remaining_candidates(block: _Block, proposals: _GroupCandidates) -> _Remaining:
    """Cases 4 and 5 told apart, by estimates and the exact distance to the own centroid."""
    is_own = (proposals.labels == block.own) & block.own_distances.isfinite()
    competitors = proposals.distances.masked_fill(is_own, math.inf).flatten(0, 1)  # (2 G, M)
    labels = proposals.labels.flatten(0, 1)
    best, place = competitors.min(0)
    above = torch.minimum(best.double() + proposals.error, block.own_distances)  # the nearest is no farther
    reach = _reach(best, block.own_distances, proposals.error)
    near, stay = competitors <= reach, block.own_distances <= above
    further = [(rows[some], of[some]) for rows, of, d in proposals.others if len(some := _within(d, reach, rows))]
    unresolved_groups = [(g, rows[some]) for g, rows, d in proposals.unresolved if len(some := _within(d, reach, rows))]
    num = near.sum(0) + stay
    for rows in (*(rows for rows, _ in further), *(rows for _, rows in unresolved_groups)):
        num[rows] += 2
    first = torch.where(stay, block.own, labels.gather(0, place[None])[0])
    undecided = (num > 1).nonzero()[:, 0]
    staying = undecided[stay[undecided]]
    places, some = near[:, undecided].nonzero().unbind(1)
    rows = undecided[some]
    pairs = [(staying, block.own[staying]), (rows, labels[places, rows]), *further]
    return _Remaining(first, above, undecided, pairs, unresolved_groups)


@dataclass(frozen=True)
class _Nearest:
    labels: Tensor  # (M,) int64, exact
    above: Tensor  # (M,) float64, at least the squared distance
    by_integers: int


def _find_nearest(block: _Block, centroids: GroupedCentroids, remaining: _Remaining) -> _Nearest:
    """Decides case 5, exactly."""
    labels, above, undecided = remaining.first, remaining.above, remaining.undecided
    if not len(undecided):
        return _Nearest(labels, above, 0)
    pairs = [*remaining.pairs, *_nearest_of_unresolved(block, centroids, remaining.unresolved_groups)]
    rows, of_rows = (torch.cat(column) for column in zip(*pairs, strict=True))
    x, squares = block.at(undecided), block.squares[undecided]
    found = decide_pairs(x, squares, centroids.whole, (torch.searchsorted(undecided, rows), of_rows))
    labels[undecided] = found.labels
    above[undecided] = torch.minimum(above[undecided], found.above)
    by_integers = found.by_integers
    for _, rows in remaining.unresolved_groups:
        by_integers[torch.searchsorted(undecided, rows)] = True
    return _Nearest(labels, above, int(by_integers.sum()))


def _nearest_of_unresolved(
    block: _Block, centroids: GroupedCentroids, unresolved: list[tuple[int, Tensor]]
) -> Iterator[_Pairs]:
    """The exact nearest of a group, where more of it than were proposed may be nearest."""
    for g, rows in unresolved:
        yield rows, centroids.groups.members[g][best_of_all(block.at(rows), centroids.parts[g])[0]]


def _within(distances: Tensor, reach: Tensor, rows: Tensor) -> Tensor:
    return (distances <= reach[rows]).nonzero()[:, 0]


def _rebound(bounds: Bounds, block: _Block, proposals: _GroupCandidates, nearest: _Nearest, groups: Groups) -> None:
    """Writes the new labels and bounds of the open rows.

    By (1) to (3) of `Candidates` no other centroid of an open group is nearer than d - error, d being the estimate of
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
