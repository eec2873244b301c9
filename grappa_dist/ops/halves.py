"""Which centroids may be the nearest, by products in bfloat16: on a processor that has them, and fused on a GPU.

Shapes: P rows, K centroids, D dimensions, t proposals per row at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.ops.exact import GRID, cached_rows
from grappa_dist.ops.proposals import Centroids, PreparedRows, Proposals, float_error, norm_of

_CACHED_TILE = 2**21  # of products in bfloat16: few enough to stay in a core's cache
_HALF = 2.0**-8  # rounding to bfloat16 errs by this share at most
_TWO_DIGITS = _HALF**2  # the same for a sum of two bfloat16
# oneDNN compiles a kernel for every new shape, which takes as long as the product: shapes are multiples of these
_ROW_STEP, _COLUMN_STEP = 128, 32
_LEAST_SCALE = 2.0**-5  # scores up to this size are rounded as this one
_EXTRA = 4  # columns beside the dimensions: two digits for each of two offsets


@dataclass(frozen=True)
class HalfProposer:
    """Distances from products in bfloat16 with float32 sums: twice as fast where the processor has such products.

    What rounding takes away is known as a vector, x - x', so by Cauchy-Schwarz no product errs by more than
    |x - x'||c| + |x'||c - c'|. The score x.c - |c|^2 / 2 - (|x|^2 - base) / 2 comes out of one matrix product, its
    offsets as two more columns each; it is (base - distance^2) / 2, small where it matters, and so is its own rounding.
    """

    rest: float  # at least the largest |x - x'| of all rows to come
    places: int = 6
    sums: float = 1.0  # errors of adding up products, in those of a processor that rounds each sum to the nearest

    @staticmethod
    def left_out(x: Tensor) -> float:
        """The largest norm of what rounding to bfloat16 takes from a row; 0 for no rows."""
        rests = (part - part.bfloat16().float() for part in x.split(cached_rows(x)) if len(part))
        largest = max((float(rest.square_().sum(1).max()) for rest in rests), default=0.0)
        return math.sqrt(largest) * (1 + (x.shape[1] + 4) * 2.0**-23)  # above what float32 may have lost

    def centroids(self, values: Tensor, squares: Tensor) -> Centroids:
        form = _form([values], squares / (-2 * GRID**2), 0)
        return Centroids(values, squares, norm_of(squares), self, form, self.left_out(values))

    def rows(self, pieces: Sequence[Tensor], squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        form = _form(pieces, (base - squares / GRID**2) / 2, 1, _ROW_STEP)
        return PreparedRows(form, base.float(), norm_of(squares), within_base, _ROW_STEP)

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Proposals:
        error, targets = self._error(rows, centroids), _spare_rows(centroids.form, _COLUMN_STEP)
        size = max(1, _CACHED_TILE // len(targets) // _ROW_STEP) * _ROW_STEP
        found = []
        for tile, base in zip(rows.form.split(size), rows.base.split(size), strict=True):
            products = (tile @ targets.T)[: len(base), : len(centroids.form)]
            found.append(_best_columns(products.float(), t, error, within_base=rows.within_base))
        scores, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
        scale = _score_scale(scores[:, 0], error, within_base=rows.within_base)
        # Scores below -scale round more coarsely than the error allows for: what is beyond it is added to them.
        scores = torch.where(scores < -scale, (1 - _HALF) * scores - _HALF * scale, scores)
        distances = rows.base[:, None] - 2 * scores
        rounding = 2.0**-22 * (float(rows.base.max()) + 2 * scale)  # of base and of the difference
        return Proposals(distances, labels, 2 * (error + _HALF * scale) + rounding)

    def _error(self, rows: PreparedRows, centroids: Centroids) -> float:
        """Of a score before its own rounding."""
        x, c = rows.norm + self.rest, centroids.norm + centroids.rest
        offsets = c**2 / 2 + (x**2 + float(rows.base.max())) / 2
        rounded = self.rest * c + x * centroids.rest + _TWO_DIGITS * offsets
        return rounded + self.sums * float_error(rows.form.shape[1], x * c + 2 * offsets)


@dataclass(frozen=True)
class FusedProposer(HalfProposer):
    """The same on a GPU, products and their largest by one kernel (ops/top_products.py).

    Its matrix units add several products at once and cut the sum off where a processor rounds each to the nearest: an
    error of about twice the size, by what Fasi, Higham, Mikaitis and Pranesh (2021) measured on three of them. Eight
    times is allowed for, which is still small beside what rounding to bfloat16 takes.
    """

    places: int = 3
    sums: float = 8.0

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Proposals:
        from grappa_dist.ops.top_products import top_products

        scores, labels = top_products(rows.form[: len(rows.base)], centroids.form)
        distances = rows.base[:, None] - 2 * scores[:, :t]
        error = self._error(rows, centroids)
        rounding = 2.0**-22 * (
            float(rows.base.max()) + 2 * float(scores[:, 0].abs().max()) + error
        )  # of the difference
        return Proposals(distances, labels[:, :t], 2 * error + rounding)


def _form(pieces: Sequence[Tensor], offset: Tensor, place: int, step: int = 1) -> Tensor:
    """(n, D + 4) in bfloat16: the values, which come in pieces; two digits of the offset, from column D + 2 place; and
    ones for the other's.

    So a product of two such forms with unlike places is that of the values plus both offsets. Rows of zeros make their
    number a multiple of `step`.
    """
    num, dim = len(offset), pieces[0].shape[1]
    form = torch.empty(num + -num % step, dim + _EXTRA, dtype=torch.bfloat16, device=offset.device)
    form[:num, dim:], form[num:] = 1, 0
    for values, place_of in zip(pieces, form[:num, :dim].split([len(p) for p in pieces]), strict=True):
        place_of.copy_(values)
    first = offset.bfloat16()
    column = dim + 2 * place
    form[:num, column], form[:num, column + 1] = first, offset - first.double()
    return form


def _spare_rows(form: Tensor, step: int) -> Tensor:
    """The form with rows of zeros that make their number a multiple of `step`."""
    spare = -len(form) % step
    return torch.cat([form, form.new_zeros(spare, form.shape[1])]) if spare else form


def _score_scale(scores: Tensor, error: float, *, within_base: bool) -> float:
    """The size of the largest first score that matters: where only centroids within the base do, those are above 0.

    Never so small that scores which are off by the gap of `_best_columns` could leave it.
    """
    return max(_LEAST_SCALE, 8 * error, float(scores.max()), 0.0 if within_base else -float(scores.min()))


def _best_columns(table: Tensor, t: int, error: float, *, within_base: bool) -> tuple[Tensor, Tensor]:
    """The largest entries per row, (P, t), descending, and their columns: as many as may matter. Uses the table up.

    Places of a row stay free, at -inf, once an entry lies so far below the first that no later one can be the largest
    true score; the second at the earliest, or, where only true scores of 0 or more matter, once entries lie so far
    below 0.

    Args:
        error: of an entry, beside the rounding to bfloat16.
    """
    values = torch.full((len(table), t), -math.inf, device=table.device)
    columns = torch.zeros((len(table), t), dtype=torch.int64, device=table.device)
    rows, cutoff = torch.arange(len(table), device=table.device), values[:, 0]
    for place in range(t):
        found = _argmax(table)[:, None]
        best = table.gather(1, found)
        values[:, place].index_copy_(0, rows, best[:, 0])
        columns[:, place].index_copy_(0, rows, found[:, 0])
        if place == t - 1:
            break
        if place == 0:
            gap = 2 * (error + _HALF * _score_scale(best, error, within_base=within_base)) * (1 + 2 * _HALF)
            cutoff = (best[:, 0] - gap).clamp(min=-gap) if within_base else best[:, 0] - gap
        near = (best[:, 0] >= cutoff[rows]).nonzero()[:, 0]
        if not len(near):
            break
        if len(near) < len(rows):
            rows, table, found = rows[near], table.index_select(0, near), found[near]
        table.scatter_(1, found, -math.inf)
    return values, columns


def _argmax(table: Tensor) -> Tensor:
    """Column of the largest entry per row; on a CPU numpy's is several times as fast as torch's."""
    return table.argmax(1) if table.is_cuda else torch.from_numpy(table.numpy().argmax(1))
