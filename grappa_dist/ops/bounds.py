"""What is known of distances without computing them: bounds per row and group of centroids.

After Yinyang k-means (Ding et al., ICML 2015). A row keeps an upper bound of the distance to its own centroid and, per
group of centroids, a lower bound of the distance to every other centroid in it. By the triangle inequality a centroid
that moves by s shifts either bound by at most s. A group whose lower bound stays above the upper bound cannot hold the
row's nearest centroid and is not searched (kmeans/yinyang.py).

Shapes: P rows of one block, K centroids, G groups, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.search.candidates import SLACK, nearest_in_floats
from grappa_dist.search.fixed_point import GRID, exact_square

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
