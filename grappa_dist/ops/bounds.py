"""Lloyd's iterations that skip what cannot matter: distance bounds per row and group of centroids, exact decisions.

After Yinyang k-means (Ding et al., ICML 2015). A row keeps an upper bound of the distance to its own centroid and, per
group of centroids, a lower bound of the distance to every other centroid in it. By the triangle inequality a centroid
that moves by s shifts either bound by at most s. A group whose lower bound stays above the upper bound cannot hold the
row's nearest centroid and is not searched. Bounds only spare work: labels are those of `assign`, decided on exact
integers, whatever the groups are and whatever a search in floats returned.

Shapes: P rows of one block, M of them open, K centroids, G groups, D dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.ops.exact import GRID, cached_rows, exact_square
from grappa_dist.ops.kmeans import Centroids, Search, best_of_all, float_error, nearest_in_floats, pair_dots

_SLACK = 2.0**-20  # per update of a bound: more than its roundings, distances being at most about 2
_GROUP_STEPS = 5
_PROPOSALS = 2  # per group
_MOST = 0.75  # of the rows: then all are searched, which is faster than picking them out


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
            of = nearest_in_floats(centroids, heads, 1)[1][:, 0]
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
        own = (moved.sqrt() / GRID * (1 + _SLACK) + _SLACK).float()
        return Drift(own, groups.largest(own))


@dataclass(frozen=True)
class GroupedCentroids:
    """The centroids of one pass, each group in one piece."""

    whole: Centroids
    groups: Groups
    parts: tuple[Centroids, ...]
    norm: float  # the largest

    @staticmethod
    def of(values: Tensor, groups: Groups) -> GroupedCentroids:
        whole = Centroids.of(values)
        parts = tuple(Centroids(values[m], whole.squares[m]) for m in groups.members)
        return GroupedCentroids(whole, groups, parts, math.sqrt(float(whole.squares.max())) / GRID)


@dataclass(frozen=True)
class Moves:
    """Rows whose label changed, and how the labels were found."""

    rows: Tensor  # (m,) positions in the block
    before: Tensor  # (m,) int64, -1 on the first pass
    after: Tensor  # (m,) int64
    undecided: int  # rows that the floats left open
    searched: int  # distances computed in floats


def reassign(x: Tensor, centroids: GroupedCentroids, bounds: Bounds, search: Search = nearest_in_floats) -> Moves:
    """Sets the label of each grid row to its nearest centroid, a tie to the lowest index, and its bounds, in place."""
    none = torch.zeros(0, dtype=torch.int64, device=x.device)
    if not len(x):
        return Moves(none, none, none, 0, 0)
    block = _open_rows(x, centroids, bounds)
    if not len(block.rows):
        return Moves(none, none, none, 0, 0)
    proposals = _propose(block, centroids, bounds.lower[block.rows] <= bounds.upper[block.rows, None], search)
    nearest = _decide(block, centroids, proposals)
    _rebound(bounds, block, proposals, nearest, centroids.groups)
    changed = (nearest.labels != block.own).nonzero()[:, 0]
    moved = (block.rows[changed], block.own[changed], nearest.labels[changed])
    return Moves(*moved, nearest.undecided, proposals.searched)


@dataclass(frozen=True)
class _Block:
    """The rows of a block that may change their label."""

    rows: Tensor  # (M,) positions in the block
    x: Tensor  # (M, D)
    squares: Tensor  # (M,) float64, exact |x|^2
    own: Tensor  # (M,) int64, the label so far, -1 on the first pass
    own_distances: Tensor  # (M,) float32, squared, to that centroid; infinite where nobody has looked
    error: float  # of a squared distance in floats


def _open_rows(x: Tensor, centroids: GroupedCentroids, bounds: Bounds) -> _Block:
    """Rows with a group that may hold a nearer centroid, also after a look at how far their own one is now."""
    norm = math.sqrt(float(bounds.squares.max())) / GRID
    error = float_error(x.shape[1], (norm + centroids.norm) ** 2)
    rows = _most_or_these((bounds.lower <= bounds.upper[:, None]).any(1))
    some, own = _rows_of(x, rows), bounds.labels[rows].long()
    if not len(rows) or int(own.min()) < 0 or len(centroids.parts) == 1:  # the search of the only group finds the own
        unknown = torch.full((len(rows),), math.inf, device=x.device)
        return _Block(rows, some, bounds.squares[rows], own, unknown, error)
    distances = _distances(some, bounds.squares[rows], centroids.whole, own)
    bounds.upper[rows] = _root(distances.double() + error, 1 + _SLACK)
    still = _most_or_these((bounds.lower[rows] <= bounds.upper[rows, None]).any(1))
    rows = rows[still]
    return _Block(rows, _rows_of(some, still), bounds.squares[rows], own[still], distances[still], error)


def _most_or_these(wanted: Tensor) -> Tensor:
    """Positions of the rows wanted; of all rows where most are."""
    rows = wanted.nonzero()[:, 0]
    return torch.arange(len(wanted), device=wanted.device) if len(rows) > _MOST * len(wanted) else rows


def _distances(x: Tensor, squares: Tensor, centroids: Centroids, labels: Tensor) -> Tensor:
    """Squared distance of each row to one centroid, (M,), in floats."""
    size = cached_rows(x)
    dots = [(a * centroids.values[b]).sum(1) for a, b in zip(x.split(size), labels.split(size), strict=True)]
    return ((squares + centroids.squares[labels]) / GRID**2).float() - 2 * torch.cat(dots)


@dataclass(frozen=True)
class _Proposals:
    """The two float-nearest centroids of every open group of every open row; infinitely far where not searched."""

    open: Tensor  # (M, G) bool
    distances: Tensor  # (M, 2, G) float32, squared
    labels: Tensor  # (M, 2, G) int64
    searched: int


def _propose(block: _Block, centroids: GroupedCentroids, open_groups: Tensor, search: Search) -> _Proposals:
    shape = (len(block.x), _PROPOSALS, open_groups.shape[1])
    distances = torch.full(shape, math.inf, device=block.x.device)
    labels = torch.zeros(shape, dtype=torch.int64, device=block.x.device)
    searched = 0
    for g, (members, part) in enumerate(zip(centroids.groups.members, centroids.parts, strict=True)):
        rows = _most_or_these(open_groups[:, g])
        if not len(rows):
            continue
        open_groups[rows, g] = True
        t = min(_PROPOSALS, len(members))
        distances[rows, :t, g], places = search(_rows_of(block.x, rows), part.values, t)
        labels[rows, :t, g] = members[places]
        searched += len(rows) * len(members)
    return _Proposals(open_groups, distances, labels, searched)


@dataclass(frozen=True)
class _Nearest:
    labels: Tensor  # (M,) int64, exact
    above: Tensor  # (M,) float64, at least the squared distance
    undecided: int


def _decide(block: _Block, centroids: GroupedCentroids, proposals: _Proposals) -> _Nearest:
    """Floats decide where only one centroid can be the nearest, exact distances where more can."""
    known = block.own_distances.isfinite()
    is_own = (proposals.labels == block.own[:, None, None]) & known[:, None, None]
    rivals = torch.where(is_own, math.inf, proposals.distances)  # (M, 2, G)
    best, place = rivals.flatten(1).min(1)
    reach = torch.minimum(best, block.own_distances).double() + 2 * block.error  # farther ones cannot be nearest
    contenders = rivals.double() <= reach[:, None, None]
    own_contends = known & (block.own_distances <= reach)
    thirds = proposals.distances[:, 1].double() <= reach[:, None]  # (M, G): one more of the group may be as near
    labels = proposals.labels.flatten(1).gather(1, place[:, None])[:, 0]
    labels = torch.where(known & (block.own_distances <= best), block.own, labels)
    above = torch.minimum(best, block.own_distances).double() + block.error
    open_rows = ((contenders.sum((1, 2)) + own_contends > 1) | thirds.any(1)).nonzero()[:, 0]
    if len(open_rows):
        stay = open_rows[own_contends[open_rows]]
        pairs = [(stay, block.own[stay])]
        some = contenders[open_rows]
        pairs.append((open_rows[some.nonzero()[:, 0]], proposals.labels[open_rows][some]))
        pairs += _thirds(block, centroids, thirds)
        labels[open_rows], above[open_rows] = _exact_nearest(block, centroids.whole, open_rows, pairs)
    return _Nearest(labels, above, len(open_rows))


def _thirds(block: _Block, centroids: GroupedCentroids, thirds: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The exact nearest of a group, where more of it than were proposed may be nearest: rows and labels."""
    found = []
    for g in thirds.any(0).nonzero()[:, 0].tolist():
        members, rows = centroids.groups.members[g], thirds[:, g].nonzero()[:, 0]
        if len(members) > _PROPOSALS:
            found.append((rows, members[best_of_all(block.x[rows], centroids.parts[g])[0]]))
    return found


def _exact_nearest(
    block: _Block, centroids: Centroids, open_rows: Tensor, pairs: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Of each open row the nearest of the centroids it is paired with, the lowest of equal ones, and its distance."""
    rows, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    scores = 2 * pair_dots(block.x[rows], centroids.values, labels) - centroids.squares[labels]
    distances = (block.squares[rows] - scores) / GRID**2  # exact: a power of two
    best = torch.full_like(block.squares, math.inf).scatter_reduce_(0, rows, distances, "amin")
    tied = distances == best[rows]
    most = torch.iinfo(torch.int64).max
    nearest = torch.full_like(block.own, most).scatter_reduce_(0, rows[tied], labels[tied], "amin")
    return nearest[open_rows], best[open_rows]


def _rebound(bounds: Bounds, block: _Block, proposals: _Proposals, nearest: _Nearest, groups: Groups) -> None:
    """Writes the new labels and bounds of the open rows."""
    first_is_own = proposals.labels[:, 0] == nearest.labels[:, None]
    others = torch.where(first_is_own, proposals.distances[:, 1], proposals.distances[:, 0]).double()
    lower = torch.where(proposals.open, _root(others - block.error, 1 - _SLACK), bounds.lower[block.rows])
    left = ((nearest.labels != block.own) & block.own_distances.isfinite()).nonzero()[:, 0]
    old = groups.of[block.own[left]]  # the old centroid is now one of the others
    gone = _root(block.own_distances[left].double() - block.error, 1 - _SLACK)
    lower[left, old] = torch.minimum(lower[left, old], gone)
    bounds.lower[block.rows] = lower
    bounds.labels[block.rows] = nearest.labels.int()
    bounds.upper[block.rows] = _root(nearest.above, 1 + _SLACK)


def _root(squares: Tensor, slack: float) -> Tensor:
    """Distances, float32, on the safe side of the rounding."""
    return (squares.clamp(min=0).sqrt() * slack).float()


def _rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], without a copy where the rows are all of them in order."""
    if len(rows) == len(x) and (not len(x) or bool((rows[1:] > rows[:-1]).all())):
        return x
    return x[rows]
