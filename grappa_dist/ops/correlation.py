"""The correlation matrix C of Barlow Twins, whole or by blocks of rows: its part of Eq. (4), and what a step costs.

Shapes: B pairs of the global batch, D projected dimensions, R ranks; a block has m rows of C, all D columns of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_CHUNK_ROWS = 256  # of C at a time, where its squares are added up
_PASSES = 4  # over C: adding up what ranks have, the squares (two operations), the gradient in place of the matrix


def block_of(dim: int, rank: int, size: int) -> slice:
    """The rows of C that one of `size` ranks holds; perhaps none."""
    return slice(dim * rank // size, dim * (rank + 1) // size)


def judge_(c: Tensor, first: int, beta: float) -> Tensor:
    """The share in Eq. (4) of rows [first, first + m) of C, a scalar; `c` (m, D) becomes its gradient, in place."""
    diagonal = c[:, first : first + len(c)].diagonal()  # a view, (m,)
    missing = diagonal - 1
    diagonal.zero_()
    off = sum((rows.square().sum() for rows in c.split(_CHUNK_ROWS)), c.new_zeros(()))
    c.mul_(2 * beta)
    diagonal.copy_(2 * missing)
    return missing.square().sum() + beta * off


@dataclass(frozen=True)
class Cost:
    """What C takes of each rank in a step, forward and backward, at even shares."""

    sent: float  # numbers, as many of which are received
    held: float  # numbers at the peak, own pairs left aside
    operations: float


def whole(batch: int, dim: int, ranks: int) -> Cost:
    """Every rank holds C, the sum of all ranks' products by a ring; its gradient needs no sum, all ranks have it."""
    sent = 2 * (ranks - 1) / ranks * dim**2
    return Cost(sent, dim**2, _products(batch, dim, ranks) + _PASSES * dim**2)


def by_rows(batch: int, dim: int, ranks: int) -> Cost:
    """Every rank holds a block of rows of C: all second views and its columns of the first ones come, gradients go."""
    rows, pairs = dim / ranks, batch * dim
    sent = 2 * (ranks - 1) / ranks * (pairs + pairs / ranks)
    held = rows * dim + 4 * (pairs + pairs / ranks)  # pairs; their gradients as computed, as sent and as they came
    return Cost(sent, held, _products(batch, dim, ranks) + _PASSES * rows * dim + pairs)


def _products(batch: int, dim: int, ranks: int) -> float:
    """C and the gradients of both views: as many products of a rank in either way."""
    return 3 * 2 * batch * dim**2 / ranks


def rows_are_cheaper(batch: int, dim: int, ranks: int) -> bool:
    """Whether C by rows sends less than C whole and computes no more; a batch of about the width is where they meet."""
    ours, theirs = by_rows(batch, dim, ranks), whole(batch, dim, ranks)
    return ours.sent < theirs.sent and ours.operations <= theirs.operations
