"""Assignment to the nearest centroid of a few lists: an inverted file over the centroids, decided on integers.

Centroids are kept in lists of near ones, each with a head. A row looks into the lists of its `probes` nearest heads and
gets the nearest centroid in them. Both steps are exact, ties going to the lowest index, so the label is a fact about
the row, the lists and the number of probes: floats, blocks and threads have no say in it. faiss's own inverted file
scans a row's lists one pair at a time and returns what its floats say; here the rows of a block that look into the same
list are searched together, by a matrix product.

Shapes: P rows of one block, K centroids, L lists, D dimensions, p probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.ops.exact import exact_dot, exact_square
from grappa_dist.ops.kmeans import Assignment, Centroids, Search, assign, nearest_in_floats

_COLUMN_BITS = 12  # squared distances lie below 2**51, so distance * 2**12 + column fits into an int64
_TILE = 2**21  # elements of the largest table made at once
_FAR = 2**62


def nearest_exactly(x: Tensor, centroids: Centroids, t: int) -> tuple[Tensor, Tensor]:
    """The t nearest centroids of each grid row, (P, t), nearest first, ties by index, and exact squared distances."""
    size = 2**_COLUMN_BITS
    rows = max(1, _TILE // min(size, len(centroids.values)))
    parts = [_nearest_of(part, centroids, t) for part in torch.split(x, rows)]
    if not parts:
        none = torch.zeros((0, t), dtype=torch.int64, device=x.device)
        return none, none
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _nearest_of(x: Tensor, centroids: Centroids, t: int) -> tuple[Tensor, Tensor]:
    own, size = exact_square(x)[:, None], 2**_COLUMN_BITS
    labels = torch.zeros((len(x), 0), dtype=torch.int64, device=x.device)
    squares = torch.zeros_like(labels)
    for start in range(0, len(centroids.values), size):
        some = slice(start, start + size)
        table = (own + centroids.squares[some] - 2 * exact_dot(x, centroids.values[some])).long()  # (P, columns)
        table.mul_(size).add_(torch.arange(table.shape[1], device=x.device))  # no two of a row are equal any more
        best = table.topk(min(t, table.shape[1]), dim=1, largest=False).values
        labels = torch.cat([labels, best % size + start], 1)
        squares = torch.cat([squares, best // size], 1)
        if start:  # stable: earlier columns have lower indices
            order = squares.argsort(dim=1, stable=True)[:, :t]
            labels, squares = labels.gather(1, order), squares.gather(1, order)
    return labels, squares


@dataclass(frozen=True)
class Lists:
    """Centroids in lists of near ones; every list has some."""

    heads: Centroids  # L of them
    members: tuple[Tensor, ...]  # per list its centroids, ascending
    parts: tuple[Centroids, ...]

    @staticmethod
    def of(centroids: Centroids, heads: Tensor, owners: Tensor) -> Lists:
        """The lists of some heads (L, D), given the head (K,) of each centroid; heads of none are left out."""
        order = owners.argsort(stable=True)
        found = torch.split(order, torch.bincount(owners, minlength=len(heads)).tolist())
        kept = [i for i, members in enumerate(found) if len(members)]
        members = tuple(found[i] for i in kept)
        parts = tuple(Centroids(centroids.values[m], centroids.squares[m]) for m in members)
        return Lists(Centroids.of(heads[kept]), members, parts)


@dataclass(frozen=True)
class Probed:
    """An assignment, and how many distances it took."""

    found: Assignment
    searched: int


def assign_probed(x: Tensor, lists: Lists, probes: int, search: Search = nearest_in_floats) -> Probed:
    """The nearest centroid in each grid row's lists, exactly; a tie goes to the lowest index."""
    probes = min(probes, len(lists.members))
    probed, _ = nearest_exactly(x, lists.heads, probes)  # (P, p)
    labels = torch.full((len(x),), -1, dtype=torch.int64, device=x.device)
    squares = torch.full_like(labels, _FAR)
    undecided, searched = 0, len(x) * len(lists.members)
    wanted, order = probed.flatten().sort(stable=True)
    names, sizes = wanted.unique_consecutive(return_counts=True)
    for name, places in zip(names.tolist(), torch.split(order, sizes.tolist()), strict=True):
        rows = places // probes
        found = assign(x[rows], lists.parts[name], search)
        new, before = lists.members[name][found.labels], labels[rows]
        closer = (found.squares < squares[rows]) | ((found.squares == squares[rows]) & (new < before))
        labels[rows[closer]], squares[rows[closer]] = new[closer], found.squares[closer]
        undecided += found.undecided
        searched += len(rows) * len(lists.members[name])
    return Probed(Assignment(labels, squares, undecided), searched)
