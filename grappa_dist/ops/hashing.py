"""Numbers drawn for rows: a function of a key and the row's place among all, of no generator's state.

Shapes: P rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grappa_dist.ops.seeding import draw

HASH_BITS = 52
RACE_BITS = 62
WEIGHT_BITS = 24  # of the largest weight, so that enough is left of a waiting time that is divided by it
_CELL_BITS, _FRACTION_BITS = 12, 26  # of a hash: cell of the table, place in the cell
_UNIT, _SHIFT = 56, 20  # waiting times count in 2**-_UNIT; the table's entries are multiples of 2**_SHIFT of it


def row_hashes(places: Tensor, *key: int) -> Tensor:
    """(P,) int64 in [0, 2**HASH_BITS), as good as independent for different places and for different keys.

    Computed on the device of `places` (P,) int64.
    """
    return _shifted(_mix(_mix(places) ^ _signed(draw(2**64, *key))), 64 - HASH_BITS)


def race_keys(hashes: Tensor, weights: Tensor, shift: int = 14) -> Tensor:
    """(P,) int64 in [0, 2**RACE_BITS): the rows with the lowest keys are drawn in proportion to their weights.

    Each row waits for an exponential time with its weight as the rate, so the first to come are those that draws
    without replacement would take (Efraimidis and Spirakis, 2006). The logarithm is a table with straight lines in
    between: the key is an integer function of integers.

    Args:
        hashes: of `row_hashes`.
        weights: (P,) int64, at least 1.
        shift: bits at the low end of weights that do not count, the same in all calls of a race; rows that have nothing
            else wait alike. By default those of `ops.seeding.to_weights` have 16 bits left.
    """
    cells = hashes >> (HASH_BITS - _CELL_BITS)
    fraction = (hashes >> (HASH_BITS - _CELL_BITS - _FRACTION_BITS)) & (2**_FRACTION_BITS - 1)
    steps = (_WAITS[cells + 1] - _WAITS[cells]) * fraction
    times = (_WAITS[cells] << _SHIFT) + (steps >> (_FRACTION_BITS - _SHIFT))
    return times // (weights >> shift).clamp(min=1)


def _waiting_times() -> Tensor:
    """-log(1 - v) at the cells' edges, (cells + 1,); the last cell, which is infinitely long, ends one further."""
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
