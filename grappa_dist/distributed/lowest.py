"""The rows with the lowest keys of each group, over all ranks, without moving a row: a threshold found digit by digit.

Shapes: n rows of this rank, P of one piece, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.distributed.sharded_rows import PIECE, Share

_PLACE_BITS = 48
_TABLE_BITS = 20  # of the counts of all groups' digits, at most
_MAX_DIGIT, _MIN_DIGIT = 16, 4

Pieces = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Groups (P,) and values (P,) of some rows, piece by piece, as often as asked."""


@dataclass(frozen=True)
class Cut:
    """Which rows of each group are taken: those with a lower key, and those with that very key up to a place."""

    keys: Tensor  # (G,) int64, -1 where none is taken
    places: Tensor  # (G,) int64

    def takes(self, groups: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        """(P,) bool; never a row of no group."""
        named = groups.clamp(min=0).long()
        limit = torch.where(groups >= 0, self.keys[named], -1)
        return (keys < limit) | ((keys == limit) & (places <= self.places[named]))


def lowest(share: Share, groups: Tensor, keys: Tensor, wanted: Tensor, *, bits: int) -> Cut:
    """The `wanted` rows (G,) with the lowest keys of each group, all of a group that has fewer; ties by place.

    Args:
        groups: (n,) of this rank's rows, by position; -1: the row takes no part.
        keys: (n,) int64 in [0, 2**bits).
    """

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for g, k, _ in _pieces(share, groups, keys):
            yield g, k

    limits, left, tied = _select(share, pieces, wanted, bits)
    places = torch.full_like(limits, 2**_PLACE_BITS)
    short = (left < tied) & (limits >= 0)
    if bool(short.any()):

        def tied_places() -> Iterator[tuple[Tensor, Tensor]]:
            for g, k, place in _pieces(share, groups, keys):
                some = short[g] & (k == limits[g])
                yield g[some], place[some]

        found, _, _ = _select(share, tied_places, torch.where(short, left, 0), _PLACE_BITS)
        places[short] = found[short]
    return Cut(limits, places)


def _pieces(share: Share, groups: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(groups), PIECE):
        rows = (groups[start : start + PIECE] >= 0).nonzero()[:, 0] + start
        yield groups[rows].long(), keys[rows], rows + share.first


def _select(share: Share, pieces: Pieces, wanted: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each group the wanted-th lowest value, (G,), how many of that very value are wanted, and how many there are.

    -1 where no row is wanted or there is none. Collectives are as many on every rank.
    """
    num = len(wanted)
    sizes = torch.zeros(num, dtype=torch.int64)
    for g, _ in pieces():
        sizes += torch.bincount(g, minlength=num)
    left = torch.minimum(wanted, share.total(sizes))
    none, prefix, tied = left <= 0, torch.zeros_like(left), torch.zeros_like(left)
    room = min(_TABLE_BITS, share.num_good.bit_length() + 2)
    step = min(_MAX_DIGIT, max(_MIN_DIGIT, room - num.bit_length()))
    while bits:
        width = min(step, bits)
        bits -= width
        table = torch.zeros(num << width, dtype=torch.int64)
        for g, values in pieces():
            same = (values >> (bits + width)) == prefix[g]
            cells = (g[same] << width) + ((values[same] >> bits) & ((1 << width) - 1))
            table.index_add_(0, cells, torch.ones_like(cells))
        table = share.total(table).view(num, 1 << width)
        ends = table.cumsum(1)
        digit = (ends < left[:, None]).sum(1, keepdim=True)  # left is at most the row's total, so there is one
        tied = table.gather(1, digit)[:, 0]
        left = left - (ends.gather(1, digit)[:, 0] - tied)
        prefix = (prefix << width) + digit[:, 0]
    return torch.where(none, -1, prefix), left, tied
