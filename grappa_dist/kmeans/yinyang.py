"""Yinyang k-means (Ding et al., ICML 2015): bounds avoid the search where a row's nearest centroid cannot have changed.

A row keeps an upper bound of the distance to its own centroid and, per group of centroids, a lower bound of the
distance to every other centroid of the group. By the triangle inequality a centroid that moves by s shifts either bound
by at most s. A group whose lower bound stays above the upper bound cannot hold the row's nearest centroid and is not
searched.

Bounds only save work: labels are those of `assign`, decided in exact integers, for any groups and any estimates. With
a single group, a row is searched among all centroids or not at all (`reassign_single_group`), since the only lower
bound is that to all other centroids. With several groups, a row is in one of five cases:

1. No lower bound is below its upper bound: the row is not read, its label stays.
2. The exact distance to its own centroid, which is computed first, is below all lower bounds: its label stays too.
3. On the first pass there is no own centroid (label -1, at an infinite distance), and all groups are open.
4. Of the own centroid and the candidates of open groups, estimates leave one: that is the nearest.
5. They leave several: sharper products, then integers decide between these. A group whose last candidate may be the
   nearest is unresolved: any of its centroids may be it, and all of them are compared exactly.

Shapes: P rows of one block, M of them open, K centroids, G groups, D dimensions, t candidates.
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

_GROUP_STEPS = 5  # of the k-means that groups the centroids
_FEW_LABELS = 512  # up to this number, centroids are a single group
_GROUP_SIZE = 256  # centroids per bound, at least, on average
_DIMENSIONS_PER_BOUND = 8  # of a row for each of its lower bounds, at least
_MOST = 0.75  # of the rows: then all are searched, which is faster than selecting them
_CANDIDATES_PER_GROUP = 3

Take = Callable[[Tensor], Sequence[Tensor]]
"""Ascending places of a block -> its grid rows there, in pieces (p, D)."""

_Pairs = tuple[Tensor, Tensor]  # positions of rows, and labels


def num_bounds(num_labels: int, dim: int) -> int:
    """Lower bounds G that are kept for each row of `dim` dimensions, one per group of centroids."""
    few = num_labels <= _FEW_LABELS
    return 1 if few else max(1, min(num_labels // _GROUP_SIZE, dim // _DIMENSIONS_PER_BOUND))


@dataclass(frozen=True)
class Groups:
    """A partition of the centroids into groups of near centroids; a matter of speed, not of the result."""

    of: Tensor  # (K,) int64, the group of each centroid
    members: tuple[Tensor, ...]  # per group its centroids, ascending

    @staticmethod
    def around(centroids: Tensor, num: int) -> Groups:
        """Up to `num` groups, by a few steps of k-means of the centroids in floats."""
        num = max(1, min(num, len(centroids)))
        if not len(centroids):
            return Groups(torch.zeros(0, dtype=torch.int64, device=centroids.device), ())
        coarse = centroids[torch.linspace(0, len(centroids) - 1, num).long()].clone()
        of = torch.zeros(len(centroids), dtype=torch.int64, device=centroids.device)
        for _ in range(_GROUP_STEPS if num > 1 else 0):
            of = nearest_float32(centroids, coarse, 1)[1][:, 0]
            counts = torch.bincount(of, minlength=num)[:, None]
            sums = torch.zeros_like(coarse).index_add_(0, of, centroids)
            coarse = torch.where(counts > 0, sums / counts.clamp(min=1), coarse)
        names, of = of.unique(return_inverse=True)
        return Groups(of, tuple((of == g).nonzero()[:, 0] for g in range(len(names))))

    def largest(self, values: Tensor) -> Tensor:
        """The largest of the centroids' values in each group, (G,)."""
        return torch.stack([values[m].max() for m in self.members]) if self.members else values[:0]


@dataclass(frozen=True)
class Bounds:
    """Labels and bounds of some rows, changed in place. Distances are not squared."""

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
        """Copies the values of `other`, unless it is a view of the same memory."""
        if other.labels.data_ptr() != self.labels.data_ptr():
            self.labels.copy_(other.labels)
            self.upper.copy_(other.upper)
            self.lower.copy_(other.lower)

    def shift_(self, drift: Drift) -> None:
        """Adjusts the bounds after the centroids have moved."""
        self.upper.add_(drift.own[self.labels.long()])
        self.lower.sub_(drift.groups)


@dataclass(frozen=True)
class Drift:
    """How far centroids have moved at most, float32, with a margin for the rounding of the bounds it is added to."""

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


@dataclass(frozen=True)
class Reassignments:
    """Rows whose label changed, and how the labels were found."""

    rows: Tensor  # (m,) positions in the block
    before: Tensor  # (m,) int64, -1 on the first pass
    after: Tensor  # (m,) int64
    by_integers: int  # rows decided in integers
    searched: int  # distances estimated

    @staticmethod
    def none(device: torch.device) -> Reassignments:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return Reassignments(nothing, nothing, nothing, 0, 0)


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
        take: the block's grid rows; called only for rows that may change their label.
    """
    if len(centroids.parts) == 1:
        return reassign_single_group(take, centroids.whole, bounds)
    open_rows = _open_rows(take, centroids, bounds)
    rows, own = open_rows.rows, open_rows.own
    if not len(rows):
        return Reassignments.none(rows.device)
    open_groups = (bounds.lower[rows] <= bounds.upper[rows, None]).T.contiguous()
    candidates = _generate_candidates(open_rows, centroids, open_groups)
    nearest = _find_nearest(open_rows, centroids, _remaining_candidates(open_rows, candidates))
    _rebound(bounds, open_rows, candidates, nearest, centroids.groups)
    changed = (nearest.labels != own).nonzero()[:, 0]
    labels = (rows[changed], own[changed], nearest.labels[changed])
    return Reassignments(*labels, nearest.by_integers, candidates.searched)


@dataclass(frozen=True)
class _OpenRows:
    """The rows of a block that may change their label."""

    rows: Tensor  # (M,) positions in the block
    at: Callable[[Tensor], Tensor]  # ascending positions among these -> grid rows (m, D)
    squares: Tensor  # (M,) float64, exact |x|^2
    own: Tensor  # (M,) int64, the label so far, -1 on the first pass
    own_distances: Tensor  # (M,) float64, squared and exact, to that centroid; infinite on the first pass
    prepared: PreparedRows


def _open_rows(take: Take, centroids: GroupedCentroids, bounds: Bounds) -> _OpenRows:
    """Rows with a group that may hold a nearer centroid, also given the exact distance to their own centroid."""
    generator = centroids.whole.generator
    rows = _most_or_these((bounds.lower <= bounds.upper[:, None]).any(1))
    pieces, own, squares = take(rows), bounds.labels[rows].long(), bounds.squares[rows]
    if bool((own < 0).any()):
        infinite = torch.full_like(squares, math.inf)
        prepared = generator.rows(pieces, squares, squares / GRID**2, within_base=False)
        return _OpenRows(rows, lambda some: joined(take(rows[some])), squares, own, infinite, prepared)
    some = joined(pieces)
    in_order = torch.arange(len(rows), device=rows.device)
    distances = pair_squares(some, squares, centroids.whole, (in_order, own)) / GRID**2
    bounds.upper[rows] = rooted(distances, 1 + SLACK)
    still = _most_or_these((bounds.lower[rows] <= bounds.upper[rows, None]).any(1))
    some, squares, distances = _pick(some, still), squares[still], distances[still]
    prepared = generator.rows([some], squares, distances, within_base=True)
    return _OpenRows(rows[still], partial(some.index_select, 0), squares, own[still], distances, prepared)


@dataclass(frozen=True)
class _GroupCandidates:
    """The estimates of every open group of every open row."""

    open: Tensor  # (G, M) bool
    distances: Tensor  # (2, G, M) float32, squared, of the nearest two centroids; infinite where there is none
    labels: Tensor  # (2, G, M) int64, theirs
    # Further centroids that may be as near as the first of their group: rows, labels, distances.
    others: list[tuple[Tensor, Tensor, Tensor]]
    # Groups with such centroids that may be no candidates: group, rows, distances of the last candidates.
    unresolved: list[tuple[int, Tensor, Tensor]]
    error: float  # as Candidates.error
    searched: int


def _generate_candidates(open_rows: _OpenRows, centroids: GroupedCentroids, open_groups: Tensor) -> _GroupCandidates:
    shape = (2, *open_groups.shape)
    distances = torch.full(shape, math.inf, device=open_rows.rows.device)
    labels = torch.zeros(shape, dtype=torch.int64, device=open_rows.rows.device)
    others, unresolved, error, searched = [], [], 0.0, 0
    for g, (members, part) in enumerate(zip(centroids.groups.members, centroids.parts, strict=True)):
        rows = _most_or_these(open_groups[g])
        if not len(rows):
            continue
        open_groups[g, rows] = True
        found = part.generator.nearest(open_rows.prepared.pick(rows), part, min(_CANDIDATES_PER_GROUP, len(members)))
        for place in range(min(2, len(members))):
            distances[place, g].index_copy_(0, rows, found.distances[:, place])
            labels[place, g].index_copy_(0, rows, members[found.labels[:, place]])
        near = found.distances <= _reach(found.distances[:, 0], open_rows.own_distances[rows], found.error)[:, None]
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
    """The remaining candidates: which centroids may be the nearest."""

    # (M,) int64: the own centroid where it may be the nearest, else the nearest by estimates; -1 where none is as near
    # as an own centroid in another slice
    first: Tensor
    above: Tensor  # (M,) float64, at least the squared distance of the nearest
    undecided: Tensor  # (m,) the rows with several candidates
    pairs: list[_Pairs]  # these rows with their candidates, except for unresolved groups
    unresolved: list[tuple[int, Tensor]]  # unresolved groups, and their rows


def _remaining_candidates(open_rows: _OpenRows, candidates: _GroupCandidates) -> _Remaining:
    """Separates cases 4 and 5, by estimates and the exact distance to the own centroid."""
    is_own = (candidates.labels == open_rows.own) & open_rows.own_distances.isfinite()
    competitors = candidates.distances.masked_fill(is_own, math.inf).flatten(0, 1)  # (2 G, M)
    labels = candidates.labels.flatten(0, 1)
    best, place = competitors.min(0)
    above = torch.minimum(best.double() + candidates.error, open_rows.own_distances)  # the nearest is no farther
    reach = _reach(best, open_rows.own_distances, candidates.error)
    near, stay = competitors <= reach, (open_rows.own_distances <= above) & (open_rows.own >= 0)
    further = [(rows[some], of[some]) for rows, of, d in candidates.others if len(some := _within(d, reach, rows))]
    unresolved = [(g, rows[some]) for g, rows, d in candidates.unresolved if len(some := _within(d, reach, rows))]
    num = near.sum(0) + stay
    for rows in (*(rows for rows, _ in further), *(rows for _, rows in unresolved)):
        num[rows] += 2
    first = torch.where(stay, open_rows.own, labels.gather(0, place[None])[0].masked_fill_(best > reach, -1))
    undecided = (num > 1).nonzero()[:, 0]
    staying = undecided[stay[undecided]]
    places, some = near[:, undecided].nonzero().unbind(1)
    rows = undecided[some]
    pairs = [(staying, open_rows.own[staying]), (rows, labels[places, rows]), *further]
    return _Remaining(first, above, undecided, pairs, unresolved)


@dataclass(frozen=True)
class _Nearest:
    """The nearest centroids of the open rows."""

    labels: Tensor  # (M,) int64, exact; -1 where none is as near as an own centroid in another slice
    above: Tensor  # (M,) float64, at least the squared distance
    by_integers: int


def _find_nearest(open_rows: _OpenRows, centroids: GroupedCentroids, remaining: _Remaining) -> _Nearest:
    """Decides case 5, exactly."""
    labels, above, undecided = remaining.first, remaining.above, remaining.undecided
    if not len(undecided):
        return _Nearest(labels, above, 0)
    pairs = [*remaining.pairs, *_nearest_of_unresolved(open_rows, centroids, remaining.unresolved)]
    rows, of_rows = (torch.cat(column) for column in zip(*pairs, strict=True))
    x, squares = open_rows.at(undecided), open_rows.squares[undecided]
    found = decide_pairs(x, squares, centroids.whole, (torch.searchsorted(undecided, rows), of_rows))
    labels[undecided] = found.labels
    above[undecided] = torch.minimum(above[undecided], found.above)
    by_integers = found.by_integers
    for _, rows in remaining.unresolved:
        by_integers[torch.searchsorted(undecided, rows)] = True
    return _Nearest(labels, above, int(by_integers.sum()))


def _nearest_of_unresolved(
    open_rows: _OpenRows, centroids: GroupedCentroids, unresolved: list[tuple[int, Tensor]]
) -> Iterator[_Pairs]:
    """The exact nearest of each unresolved group."""
    for g, rows in unresolved:
        yield rows, centroids.groups.members[g][best_of_all(open_rows.at(rows), centroids.parts[g])[0]]


def _within(distances: Tensor, reach: Tensor, rows: Tensor) -> Tensor:
    return (distances <= reach[rows]).nonzero()[:, 0]


def _rebound(
    bounds: Bounds, open_rows: _OpenRows, candidates: _GroupCandidates, nearest: _Nearest, groups: Groups
) -> None:
    """Writes the new labels and bounds of the open rows."""
    _write_lower(bounds, open_rows, candidates, nearest.labels, groups)
    bounds.labels[open_rows.rows] = nearest.labels.int()
    bounds.upper[open_rows.rows] = rooted(nearest.above, 1 + SLACK)


def _write_lower(
    bounds: Bounds, open_rows: _OpenRows, candidates: _GroupCandidates, own: Tensor, groups: Groups
) -> None:
    """Writes the lower bounds of the open rows, whose centroids are now `own` (M,).

    By (1) to (3) of `Candidates` no other centroid of an open group is nearer than d - error, d being the estimate of
    its nearest other one; SLACK covers what far distances have been rounded by.
    """
    others = torch.where(candidates.labels[0] == own, candidates.distances[1], candidates.distances[0])
    least = rooted(others.double() - candidates.error, 1 - SLACK).T
    lower = torch.where(candidates.open.T, least, bounds.lower[open_rows.rows])
    left = ((own != open_rows.own) & open_rows.own_distances.isfinite() & (open_rows.own >= 0)).nonzero()[:, 0]
    old = groups.of[open_rows.own[left]]  # the old centroid is now one of the others
    gone = rooted(open_rows.own_distances[left], 1 - SLACK)
    lower[left, old] = torch.minimum(lower[left, old], gone)
    bounds.lower[open_rows.rows] = lower


@dataclass(frozen=True)
class Standing:
    """The nearest centroids of the rows of a block so far, in any slice."""

    squares: Tensor  # (P,) int64, exact squared distance; `FAR` on the first pass
    labels: Tensor  # (P,) int32 among all centroids, -1 on the first pass
    first: int  # the label of the first centroid of this slice


@dataclass(frozen=True)
class NearerCentroids:
    """Rows with a nearer centroid in a slice, or with one as near and a lower label, and how they were found."""

    rows: Tensor  # (m,) positions in the block
    labels: Tensor  # (m,) int64 among all centroids: the nearest of the slice
    squares: Tensor  # (m,) int64, exact squared distance
    by_integers: int  # rows decided in integers
    searched: int  # distances estimated


def nearer_in_slice(
    take: Take, centroids: GroupedCentroids, bounds: Bounds, standing: Standing
) -> NearerCentroids | None:
    """As `reassign` for the centroids of one slice, which are not those of all labels; None where no row is open.

    Sets the lower bounds, in place, as if every row moved to the centroid that is returned.

    Args:
        bounds: with labels among the slice, -1 for an own centroid in another one; the upper ones are exact.
    """
    rows = (bounds.lower <= bounds.upper[:, None]).any(1).nonzero()[:, 0]
    if not len(rows):
        return None
    theirs, own, squares = standing.squares[rows], bounds.labels[rows].long(), bounds.squares[rows]
    first_pass = bool((standing.labels[rows] < 0).any())
    distances = torch.full_like(squares, math.inf) if first_pass else theirs.double() / GRID**2
    base = squares / GRID**2 if first_pass else distances
    x = joined(take(rows))
    prepared = centroids.whole.generator.rows([x], squares, base, within_base=not first_pass)
    open_rows = _OpenRows(rows, partial(x.index_select, 0), squares, own, distances, prepared)
    open_groups = (bounds.lower[rows] <= bounds.upper[rows, None]).T.contiguous()
    candidates = _generate_candidates(open_rows, centroids, open_groups)
    nearest = _find_nearest(open_rows, centroids, _remaining_candidates(open_rows, candidates))
    other = ((nearest.labels != own) & (nearest.labels >= 0)).nonzero()[:, 0]
    labels = nearest.labels[other]
    found = pair_squares(x, squares, centroids.whole, (other, labels)).long()
    lowest = labels + standing.first < standing.labels[rows[other]]
    nearer = (found < theirs[other]) | ((found == theirs[other]) & lowest)
    other, labels, found = other[nearer], labels[nearer], found[nearer]
    _write_lower(bounds, open_rows, candidates, own.scatter(0, other, labels), centroids.groups)
    return NearerCentroids(rows[other], labels + standing.first, found, nearest.by_integers, candidates.searched)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] for ascending rows; x itself where these are all."""
    return x if len(rows) == len(x) else x.index_select(0, rows)


def reassign_single_group(take: Take, centroids: Centroids, bounds: Bounds) -> Reassignments:
    """As `reassign` for a single group."""
    rows = _most_or_these(bounds.lower[:, 0] <= bounds.upper)
    if not len(rows):
        return Reassignments.none(rows.device)
    own, squares, num = bounds.labels[rows].long(), bounds.squares[rows], len(centroids.values)
    first_pass = bool((own < 0).any())
    # The own centroid is within the upper bound, so no further one matters.
    base = squares / GRID**2 if first_pass else bounds.upper[rows].double().square()
    prepared = centroids.generator.rows(take(rows), squares, base, within_base=not first_pass)
    found = centroids.generator.nearest(prepared, centroids, min(centroids.generator.num_candidates, num))
    labels, by_integers = found.labels[:, 0].clone(), 0
    several = found.possible[:, 1:].any(1).nonzero()[:, 0]
    if len(several):
        x = joined(take(rows[several]))
        labels[several], undecided = _decide(x, squares[several], centroids, _select_rows(found, several))
        by_integers = int(undecided.sum())
    _rebound_single(bounds, rows, found, labels)
    changed = (labels != own).nonzero()[:, 0]
    return Reassignments(rows[changed], own[changed], labels[changed], by_integers, len(rows) * num)


def _select_rows(found: Candidates, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The candidates of some rows and whether each may be the nearest, (t, M) int64 and (t, M) bool."""
    return found.labels.T.index_select(1, rows), found.possible.T.index_select(1, rows)


def _decide(
    x: Tensor, squares: Tensor, centroids: Centroids, candidates: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The nearest of the possible candidates, (M,), and which rows floats left undecided, (M,) bool.

    Args:
        candidates: of `_select_rows`.
    """
    labels, possible = candidates
    places, rows = possible[1:].nonzero().unbind(1)
    nearest, undecided = decide_competitors(
        x, squares, centroids, Competitors(labels[0], rows, labels[places + 1, rows])
    )
    if len(possible) < len(centroids.values):  # where the last candidate may be the nearest, others may be too
        unresolved = possible[-1].nonzero()[:, 0]
        nearest[unresolved] = best_of_all(x[unresolved], centroids)[0]
        undecided[unresolved] = True
    return nearest, undecided


def _rebound_single(bounds: Bounds, rows: Tensor, found: Candidates, labels: Tensor) -> None:
    """Writes the labels and bounds of the open rows, by (1) to (4) of `Candidates`.

    The nearest is no farther than D_0 <= d_0 + e. The others are no nearer than d_0 - e, and, where the first is the
    nearest, than d_1 - e; SLACK covers what far distances have been rounded by.
    """
    first = found.distances[:, 0].double()
    second = found.distances[:, 1].double() if found.distances.shape[1] > 1 else torch.full_like(first, math.inf)
    others = torch.where(labels == found.labels[:, 0], second, first)
    bounds.lower[rows, 0] = rooted(others - found.error, 1 - SLACK)
    bounds.upper[rows] = rooted(first + found.error, 1 + SLACK)
    bounds.labels[rows] = labels.int()


def _most_or_these(wanted: Tensor) -> Tensor:
    """Positions of the rows wanted, (M,); of all rows where most are wanted."""
    rows = wanted.nonzero()[:, 0]
    return torch.arange(len(wanted), device=wanted.device) if len(rows) > _MOST * len(wanted) else rows


def rooted(squares: Tensor, slack: float) -> Tensor:
    """Distances from squared ones, float32, times a factor near 1 that keeps them on the safe side of rounding."""
    return (squares.clamp(min=0).sqrt() * slack).float()
