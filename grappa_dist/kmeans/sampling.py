"""Rows drawn from those of all ranks by hashed keys, and the distributed top-k select that draws them.

A row's key is a hash of a purpose and the row's place among all rows, so the same rows are drawn on any number of ranks
and no random generator has a state. The rows with the lowest keys are selected without moving a row: the k-th lowest
key is found digit by digit, from counts that are summed over ranks (a radix select).

Shapes: n rows of this rank, m of them drawn, P of one piece, G groups, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grappa_dist.data.rng import draw
from grappa_dist.distributed.sharded_rows import PIECE, Rows, ShardedRows, join_rows, scratch

HASH_BITS = 52
RACE_BITS = 62
WEIGHT_BITS = 24  # of the largest weight: a waiting time is divided by it and must keep enough bits
_CELL_BITS, _FRACTION_BITS = 12, 26  # of a hash: cell of the table, place in the cell
_UNIT, _SHIFT = 56, 20  # waiting times are in units of 2**-_UNIT, the table's entries in 2**_SHIFT of these
_PLACE_BITS = 48
_TABLE_BITS = 20  # of the counts of all groups' digits, at most
_MAX_DIGIT, _MIN_DIGIT = 16, 4

Pieces = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Groups (P,) and values (P,) of some rows, piece by piece; called several times."""


def sample_rows(sharded: ShardedRows, num: int, *key: int) -> ShardedRows:
    """`num` drawn rows, each on the rank that holds it; all rows when there are no more.

    The rows are copied, so that passes over them read nothing else: 4 m D bytes in scratch files.
    """
    if num >= sharded.num_good:
        return sharded
    drawn = Draw.of(sharded, num, *key)
    return copy_rows(sharded, drawn.positions(), len(drawn))


def copy_rows(sharded: ShardedRows, positions: Iterable[Tensor], num: int) -> ShardedRows:
    """Copies of the `num` rows of this rank at ascending positions (P,), which come piece by piece."""
    rows = scratch((num, sharded.dim), torch.float32)
    first = 0
    for x in sharded.each(sharded.read, positions):
        rows[first : first + len(x)] = x.cpu()
        first += len(x)
    copy = Rows([rows.numpy()], [np.ones(num, dtype=bool)], ["the sample"])
    return join_rows(
        sharded.comm,
        copy,
        block_rows=sharded.block_rows,
        device=sharded.device,
        stop_requested=sharded.stop_requested,
        dense_bytes=sharded.dense.num_bytes if sharded.dense and sharded.device.type == "cpu" else None,
    )


@dataclass(frozen=True)
class Draw:
    """`num` drawn good rows of all ranks: those with the lowest keys, hashes of (purpose, place among all rows)."""

    sharded: ShardedRows
    groups: Tensor  # (n,) int32, 0 for rows that may be drawn, else -1
    keys: Tensor  # (n,) int64
    selection: Selection

    @staticmethod
    def of(sharded: ShardedRows, num: int, *key: int, weights: Tensor | None = None) -> Draw:
        """With equal probability, or without replacement by `weights` (n,) int64; rows of weight 0 are never drawn."""
        groups = scratch((len(sharded.rows),), torch.int32).fill_(-1)
        keys = scratch((len(sharded.rows),), torch.int64)
        shift = 0 if weights is None else _shift(sharded, weights)
        for positions in sharded.good_positions():
            hashes = row_hashes(positions + sharded.first, *key)
            if weights is None:
                groups[positions], keys[positions] = 0, hashes
            else:
                groups[positions] = torch.where(weights[positions] > 0, 0, -1).int()
                keys[positions] = race_keys(hashes, weights[positions], shift)
        bits = HASH_BITS if weights is None else RACE_BITS
        return Draw(sharded, groups, keys, distributed_topk(sharded, groups, keys, torch.tensor([num]), bits=bits))

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions (P,) of this rank's drawn rows, ascending, and grid rows (P, D) on the device."""
        return ((positions, self.sharded.read(positions)) for positions in self.positions())

    def positions(self) -> Iterator[Tensor]:
        """Positions of this rank's drawn rows, ascending, block by block; no row is read."""
        for positions in self.sharded.good_positions():
            taken = self.selection.takes(self.groups[positions], self.keys[positions], positions + self.sharded.first)
            yield from positions[taken].split(self.sharded.block_rows) if bool(taken.any()) else ()

    def __len__(self) -> int:
        return sum(map(len, self.positions()))


def _shift(sharded: ShardedRows, weights: Tensor) -> int:
    """How many bits the largest weight of all ranks has in excess of `WEIGHT_BITS`."""
    own = weights.max() if len(weights) else torch.tensor(0)
    largest = int(torch.cat(sharded.gather(own[None])).max())
    return max(0, largest.bit_length() - WEIGHT_BITS)


@dataclass(frozen=True)
class Selection:
    """Which rows of each group are selected: those with a lower key, and those with this key up to a place."""

    keys: Tensor  # (G,) int64, -1 where none is selected
    places: Tensor  # (G,) int64

    def takes(self, groups: Tensor, keys: Tensor, places: Tensor) -> Tensor:
        """Whether each row is selected, (P,) bool; rows of group -1 are not."""
        named = groups.clamp(min=0).long()
        limit = torch.where(groups >= 0, self.keys[named], -1)
        return (keys < limit) | ((keys == limit) & (places <= self.places[named]))


def distributed_topk(sharded: ShardedRows, groups: Tensor, keys: Tensor, wanted: Tensor, *, bits: int) -> Selection:
    """Distributed top-k select: the `wanted` (G,) rows of lowest key of each group over all ranks, ties by place.

    All rows of a group are selected where it has fewer.

    Args:
        groups: (n,) of this rank's rows, by position; -1: the row takes no part.
        keys: (n,) int64 in [0, 2**bits).
    """

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for g, k, _ in _pieces(sharded, groups, keys):
            yield g, k

    limits, left, tied = _select(sharded, pieces, wanted, bits)
    places = torch.full_like(limits, 2**_PLACE_BITS)
    short = (left < tied) & (limits >= 0)
    if bool(short.any()):

        def tied_places() -> Iterator[tuple[Tensor, Tensor]]:
            for g, k, place in _pieces(sharded, groups, keys):
                some = short[g] & (k == limits[g])
                yield g[some], place[some]

        found, _, _ = _select(sharded, tied_places, torch.where(short, left, 0), _PLACE_BITS)
        places[short] = found[short]
    return Selection(limits, places)


def _pieces(sharded: ShardedRows, groups: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start in range(0, len(groups), PIECE):
        rows = (groups[start : start + PIECE] >= 0).nonzero()[:, 0] + start
        yield groups[rows].long(), keys[rows], rows + sharded.first


def _select(sharded: ShardedRows, pieces: Pieces, wanted: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each group the wanted-th lowest value, (G,), how many rows of this value are wanted, and how many there are.

    -1 where no row is wanted or there is none. The number of collectives is the same on every rank.
    """
    num = len(wanted)
    sizes = torch.zeros(num, dtype=torch.int64)
    for g, _ in pieces():
        sizes += torch.bincount(g, minlength=num)
    left = torch.minimum(wanted, sharded.total(sizes))
    none, prefix, tied = left <= 0, torch.zeros_like(left), torch.zeros_like(left)
    table_bits = min(_TABLE_BITS, sharded.num_good.bit_length() + 2)
    step = min(_MAX_DIGIT, max(_MIN_DIGIT, table_bits - num.bit_length()))
    while bits:
        width = min(step, bits)
        bits -= width
        table = torch.zeros(num << width, dtype=torch.int64)
        for g, values in pieces():
            same = (values >> (bits + width)) == prefix[g]
            cells = (g[same] << width) + ((values[same] >> bits) & ((1 << width) - 1))
            table.index_add_(0, cells, torch.ones_like(cells))
        table = sharded.total(table).view(num, 1 << width)
        ends = table.cumsum(1)
        digit = (ends < left[:, None]).sum(1, keepdim=True)  # left is at most the row's total, so there is one
        tied = table.gather(1, digit)[:, 0]
        left = left - (ends.gather(1, digit)[:, 0] - tied)
        prefix = (prefix << width) + digit[:, 0]
    return torch.where(none, -1, prefix), left, tied


def row_hashes(places: Tensor, *key: int) -> Tensor:
    """(P,) int64 in [0, 2**HASH_BITS), practically independent for different places and for different keys.

    Computed on the device of `places` (P,) int64.
    """
    return _shifted(_mix(_mix(places) ^ _signed(draw(2**64, *key))), 64 - HASH_BITS)


def race_keys(hashes: Tensor, weights: Tensor, shift: int = 14) -> Tensor:
    """(P,) int64 in [0, 2**RACE_BITS): the rows with the lowest keys are drawn in proportion to their weights.

    Each row gets an exponential waiting time with its weight as the rate; the rows with the shortest times are drawn
    like successive draws without replacement (Efraimidis and Spirakis, 2006). The logarithm is a table with linear
    interpolation: the key is an integer function of integers.

    Args:
        hashes: of `row_hashes`.
        weights: (P,) int64, at least 1.
        shift: low bits of the weights that are dropped, the same in all calls of a race; rows without higher bits count
            as equal. By default the weights of `kmeans.seeding.to_weights` keep 16 bits.
    """
    cells = hashes >> (HASH_BITS - _CELL_BITS)
    fraction = (hashes >> (HASH_BITS - _CELL_BITS - _FRACTION_BITS)) & (2**_FRACTION_BITS - 1)
    steps = (_WAITS[cells + 1] - _WAITS[cells]) * fraction
    times = (_WAITS[cells] << _SHIFT) + (steps >> (_FRACTION_BITS - _SHIFT))
    return times // (weights >> shift).clamp(min=1)


def _waiting_times() -> Tensor:
    """-log(1 - v) at the cells' edges, (cells + 1,); the last one, infinite, is replaced by the one before plus 1."""
    cells = 2**_CELL_BITS
    times = [-math.log1p(-i / cells) for i in range(cells)]
    return torch.tensor([round(t * 2 ** (_UNIT - _SHIFT)) for t in (*times, times[-1] + 1)])


_WAITS = _waiting_times()


def _mix(z: Tensor) -> Tensor:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014), which maps 64 bits one to one; products wrap."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _signed(bits: int) -> int:
    """The int64 of 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left, where torch repeats the sign."""
    return (z >> by) & (2 ** (64 - by) - 1)
