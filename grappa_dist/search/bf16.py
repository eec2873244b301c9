"""Nearest centroids from products in bfloat16, by matrix products on a processor or by a fused kernel on a GPU.

A score s_j of a row x estimates S_j, which is -|x - c_j|^2 / 2 plus the same for all j, from forms x' and c'_j that are
rounded to bfloat16. With d_j = c_j - c'_j,

    S_j - s_j = (x - x').c_j + x'.d_j + a_j + r_j,

where a_j, |a_j| <= a, is the error of adding up and of the offsets, and r_j that of rounding s_j itself to bfloat16,
|r_j| <= 2**-8 |s_j|. Of two centroids the large parts of these errors are alike. If c_j is the nearest, S_j >= S_i for
the best score s_i too, so by Cauchy-Schwarz

    s_i - s_j <= (S_j - s_j) - (S_i - s_i) <= p_ij + 2**-8 (|s_i| + |s_j|),
    p_ij = residual |c_i - c_j| + |x'||d_i - d_j| + 2 a,    residual >= |x - x'|.

As |s_j| <= |s_i| + (s_i - s_j), this gives s_i - s_j <= (p_ij + 2**-7 |s_i|) / (1 - 2**-8), the score margin. A
centroid below it is not the nearest. Without regard to the pair, p_ij is at most twice the largest error of all scores
before r_j.

Shapes: P rows, K centroids, D dimensions, t candidates per row at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grappa_dist.search.candidates import SLACK, Candidates, Centroids, PreparedRows, float_error, norm_of
from grappa_dist.search.fixed_point import GRID, cached_rows

BF16_ROUNDOFF = 2.0**-8
"""Rounding to bfloat16 errs by at most this fraction of the result."""

_CACHED_TILE = 2**21  # products in bfloat16 that stay in a core's cache
_MOST_PAIRED = 512  # centroids for which a table of all pairs is made
# oneDNN compiles a kernel for every new shape, which takes as long as the product: shapes are multiples of these
_ROW_STEP, _COLUMN_STEP = 128, 32
_LEAST_SCALE = 2.0**-5  # scores up to this size are rounded like this one
_EXTRA = 4  # columns after the dimensions: two bfloat16 numbers for each of two offsets
_KERNEL_COLUMNS = 64  # of a tile of the kernel, which copies forms of another width
_PLACES_ROUNDOFF = 2.0**-15 * (1 + 2.0**-6)  # twice triton_topk's ROUNDING, and a little for the offset's own rounding


@dataclass(frozen=True)
class Bf16Generator:
    """Distances from products in bfloat16 with float32 sums: twice as fast where the processor has such products.

    What rounding takes away is a known vector, x - x', so by Cauchy-Schwarz no product errs by more than
    |x - x'||c| + |x'||c - c'|. The score x.c - |c|^2 / 2 - (|x|^2 - base) / 2 comes out of one matrix product, its
    offsets as two more columns each; it is (base - distance^2) / 2, small where it matters, and so is its own rounding.
    """

    residual: float  # at least the largest |x - x'| of all rows to come
    num_candidates: int = 6
    sums: float = 1.0  # error of adding up products, as a multiple of that of sums rounded to the nearest float32

    @staticmethod
    def residual_norm(x: Tensor) -> float:
        """The largest norm of what rounding to bfloat16 takes from a row; 0 for no rows."""
        residuals = (part - part.bfloat16().float() for part in x.split(cached_rows(x)) if len(part))
        largest = max((float(residual.square_().sum(1).max()) for residual in residuals), default=0.0)
        return math.sqrt(largest) * (1 + (x.shape[1] + 4) * 2.0**-23)  # above what float32 may have lost

    def centroids(self, values: Tensor, squares: Tensor) -> Centroids:
        form = _form([values], squares / (-2 * GRID**2), 0)
        return Centroids(values, squares, norm_of(squares), self, form, self.residual_norm(values))

    def rows(self, pieces: Sequence[Tensor], squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        form = _form(pieces, (base - squares / GRID**2) / 2, 1, _ROW_STEP)
        return PreparedRows(form, base.float(), norm_of(squares), within_base, _ROW_STEP)

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Candidates:
        bounds, targets = self._pair_bounds(rows, centroids), _padded(centroids.form, _COLUMN_STEP)
        size = max(1, _CACHED_TILE // len(targets) // _ROW_STEP) * _ROW_STEP
        found = []
        for tile, base in zip(rows.form.split(size), rows.base.split(size), strict=True):
            table = _Table.of((tile @ targets.T)[: len(base)], len(centroids.form))
            found.append(_best_columns(table, t, bounds, within_base=rows.within_base))
        scores, labels, remaining = (torch.cat(parts, 1) for parts in zip(*found, strict=True))  # (t, P)
        scale = _score_scale(scores[0], bounds.error, within_base=rows.within_base)
        # Scores below -scale round more coarsely than the error allows for: what is beyond it is added to them.
        scores = torch.where(scores < -scale, (1 - BF16_ROUNDOFF) * scores - BF16_ROUNDOFF * scale, scores)
        distances = rows.base - 2 * scores
        rounding = 2.0**-22 * (float(rows.base.max()) + 2 * scale)  # of base and of the difference, up to scale
        return Candidates(distances.T, labels.T, 2 * (bounds.error + BF16_ROUNDOFF * scale) + rounding, remaining.T)

    def _pair_bounds(self, rows: PreparedRows, centroids: Centroids) -> PairBounds:
        """Pair by pair where a table of all pairs is small compared with the products."""
        error = self._error(rows, centroids)
        if centroids.is_part or len(centroids.form) > min(_MOST_PAIRED, len(rows.base)):
            return PairBounds(error)
        values, residuals = centroids.pair_distances
        pairs = self.residual * values + (rows.norm + self.residual) * residuals + 2 * self._sum_error(rows, centroids)
        return PairBounds(error, pairs * (1 + SLACK))

    def _error(self, rows: PreparedRows, centroids: Centroids) -> float:
        """Error bound of a score before its own rounding."""
        x, c = rows.norm + self.residual, centroids.norm + centroids.residual
        return self.residual * c + x * centroids.residual + self._sum_error(rows, centroids)

    def _sum_error(self, rows: PreparedRows, centroids: Centroids) -> float:
        """The part of it that comes from offsets and from adding up: a."""
        x, c = rows.norm + self.residual, centroids.norm + centroids.residual
        offsets = c**2 / 2 + (x**2 + float(rows.base.max())) / 2
        return BF16_ROUNDOFF**2 * offsets + self.sums * float_error(rows.form.shape[1], x * c + 2 * offsets)


@dataclass(frozen=True)
class TritonGenerator(Bf16Generator):
    """The same on a GPU: one kernel makes the products and keeps the largest (search/triton_topk.py).

    It adds the offset of a centroid, -|c|^2 / 2, in float32, so that forms have no more columns than the dimensions, up
    to whole tiles. Scores stay in float32 and their places take 2^-15 of them, as bfloat16 takes 2^-8 elsewhere; the
    base makes nothing sharper and is that of the row alone, |x|^2.

    Its matrix units add several products at once and truncate the sum where a processor rounds each to the nearest: an
    error of about twice the size, by what Fasi, Higham, Mikaitis and Pranesh (2021) measured on three of them. Eight
    times is allowed for, which is still small compared with what rounding to bfloat16 takes.
    """

    num_candidates: int = 3
    sums: float = 8.0

    def centroids(self, values: Tensor, squares: Tensor) -> Centroids:
        return Centroids(values, squares, norm_of(squares), self, _whole_tiles([values]), self.residual_norm(values))

    def row_form(self, x: Tensor) -> Tensor:
        """Grid rows (P, D) as the kernel multiplies them, the same for all centroids: see `top`."""
        return _whole_tiles([x])

    def top(self, form: Tensor, centroids: Centroids) -> tuple[Tensor, Tensor]:
        """The largest scores x.c - |c|^2 / 2 of rows in the form of `row_form`, (P, t), descending, and labels."""
        from grappa_dist.search.triton_topk import top_scores

        return top_scores(form, centroids.form, centroids.squares / (-2 * GRID**2))

    def score_error(self, centroids: Centroids, norm: float) -> float:
        """Error bound of the scores of `top`, for rows of at most this norm; one not found exceeds the last by less."""
        return self._error(PreparedRows(centroids.form[:0], centroids.squares[:0].float(), norm, False), centroids)

    def rows(self, pieces: Sequence[Tensor], squares: Tensor, base: Tensor, *, within_base: bool) -> PreparedRows:
        return PreparedRows(_whole_tiles(pieces), (squares / GRID**2).float(), norm_of(squares), within_base)

    def nearest(self, rows: PreparedRows, centroids: Centroids, t: int) -> Candidates:
        from grappa_dist.search.triton_topk import top_scores

        scores, labels = top_scores(rows.form, centroids.form, centroids.squares / (-2 * GRID**2))
        distances = rows.base[:, None] - 2 * scores[:, :t]
        rounding = 2.0**-22 * (rows.norm**2 + 2 * self._largest(rows, centroids))  # of the base and of the difference
        return Candidates(distances, labels[:, :t], 2 * self._error(rows, centroids) + rounding)

    def _sum_error(self, rows: PreparedRows, centroids: Centroids) -> float:
        """The part of the error that comes from adding up, from offsets, and from places written into scores."""
        largest = self._largest(rows, centroids)
        return _PLACES_ROUNDOFF * largest + self.sums * float_error(rows.form.shape[1], largest)

    def _largest(self, rows: PreparedRows, centroids: Centroids) -> float:
        """At least the size of any score."""
        x, c = rows.norm + self.residual, centroids.norm + centroids.residual
        return x * c + c**2 / 2


@dataclass(frozen=True)
class PairBounds:
    """Score margins: how far the score of the nearest centroid can lie below the best score of a row."""

    error: float  # of any score before its own rounding
    pairs: Tensor | None = None  # (K, K) float32, at least p_ij; by default 2 error for any two

    def margin_to_any(self, scores: Tensor, columns: Tensor) -> Tensor:
        """Between the best scores (P,), in some columns (P,), and any other, (P,)."""
        return _with_rounding(scores, 2 * self.error if self.pairs is None else self._widest[columns])

    def margin_to(self, others: Tensor, scores: Tensor, columns: Tensor) -> Tensor:
        """Between the best scores (P,), in some columns (P,), and those in `others` (P,), (P,)."""
        if self.pairs is None:
            return _with_rounding(scores, 2 * self.error)
        return _with_rounding(scores, self.pairs.flatten()[columns * len(self.pairs) + others])

    @cached_property
    def _widest(self) -> Tensor:
        assert self.pairs is not None
        return self.pairs.amax(1)


def _with_rounding(scores: Tensor, pairs: Tensor | float) -> Tensor:
    """Margins p_ij with the scores' own rounding.

    1 + 2**-7 exceeds 1 / (1 - 2**-8) by more than 2**-9, which is more than what float32 takes from the margin and from
    its difference to the score: the margin is at least 2**-7 of that.
    """
    return (scores.abs() * (2 * BF16_ROUNDOFF) + pairs) * (1 + 2 * BF16_ROUNDOFF)


def _form(pieces: Sequence[Tensor], offset: Tensor, place: int, step: int = 1) -> Tensor:
    """One side of a matrix product in bfloat16 that also adds an offset for each row of either side, (n, D + 4).

    The first D columns are the values. Two of the others, from D + 2 `place` on, are the row's offset as a sum of two
    bfloat16 numbers; the remaining two are ones, which meet the offset of the other side: that has the other place,
    0 or 1. Rows of zeros at the end make their number a multiple of `step`.

    Args:
        pieces: the values (p, D), which come in pieces.
        offset: (n,).
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


def _whole_tiles(pieces: Sequence[Tensor]) -> Tensor:
    """The values (p, D), which come in pieces, in bfloat16 with columns of zeros up to whole tiles of the kernel."""
    num, dim = sum(map(len, pieces)), pieces[0].shape[1]
    form = torch.empty(num, dim + -dim % _KERNEL_COLUMNS, dtype=torch.bfloat16, device=pieces[0].device)
    form[:, dim:] = 0
    for values, place_of in zip(pieces, form[:, :dim].split([len(p) for p in pieces]), strict=True):
        place_of.copy_(values)
    return form


def _padded(form: Tensor, step: int) -> Tensor:
    """The form with rows of zeros that make their number a multiple of `step`."""
    spare = -len(form) % step
    return torch.cat([form, form.new_zeros(spare, form.shape[1])]) if spare else form


def _score_scale(scores: Tensor, error: float, *, within_base: bool) -> float:
    """The size of the largest first score that matters: where only centroids within the base do, those are above 0.

    Never so small that scores which are off by the margin of `_best_columns` could leave it.
    """
    return max(_LEAST_SCALE, 8 * error, float(scores.max()), 0.0 if within_base else -float(scores.min()))


@dataclass(frozen=True)
class _Table:
    """Scores that were rounded to bfloat16, and where they were.

    A float32 has 16 bits more than a bfloat16. An entry's column is written there, which changes no order but that of
    equal scores: so the largest entry contains its column, and a plain maximum is three times as fast as an argmax.
    """

    entries: Tensor  # (P, columns) float32
    has_columns: bool  # whether entries contain their column: 16 bits are enough for it

    @staticmethod
    def of(products: Tensor, num: int) -> _Table:
        """Of products in bfloat16, of which the first `num` columns count; the others are padding."""
        entries, width = products.float(), products.shape[1]
        if width <= 2**16:
            columns = torch.arange(width, dtype=torch.int32, device=entries.device)
            entries.view(torch.int32).bitwise_or_(columns)
        entries[:, num:] = -math.inf
        return _Table(entries, width <= 2**16)

    def take_largest(self) -> tuple[Tensor, Tensor]:
        """The largest score of each row and its column, (P,), which are left out from now on."""
        if self.has_columns:
            largest = self.entries.amax(1).view(torch.int32)
            scores, columns = (largest & -(2**16)).view(torch.float32), (largest & 2**16 - 1).long()
        else:
            scores, columns = self.entries.max(1)
        self.entries.scatter_(1, columns[:, None], -math.inf)
        return scores, columns

    def pick(self, rows: Tensor) -> _Table:
        return _Table(self.entries.index_select(0, rows), self.has_columns)


def _best_columns(table: _Table, t: int, bounds: PairBounds, *, within_base: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The largest scores per row, (t, P), descending, their columns, and which of them may be the nearest's.

    Overwrites the table. Places of a row stay free, at -inf, once a score lies so far below the first that no later one
    can be the nearest's; the second at the earliest, or, where only true scores of 0 or more matter, once scores lie so
    far below 0. The last place represents later scores too.
    """
    best, first = table.take_largest()
    rows, values = torch.arange(len(best), device=best.device), best.new_full((t, len(best)), -math.inf)
    columns, remaining = first.new_zeros(values.shape), torch.zeros_like(values, dtype=torch.bool)
    values[0], columns[0], remaining[0] = best, first, True
    cutoff = best - bounds.margin_to_any(best, first)
    if within_base:
        most = _score_scale(best, bounds.error, within_base=True)
        cutoff = cutoff.clamp(min=-2 * (bounds.error + BF16_ROUNDOFF * most) * (1 + 2 * BF16_ROUNDOFF))
    near = (best >= cutoff).nonzero()[:, 0] if within_base else rows
    for place in range(1, t):
        if not len(near):
            break
        if len(near) < len(rows):
            table = table.pick(near)
            rows, first, best, cutoff = (x.index_select(0, near) for x in (rows, first, best, cutoff))
        scores, found = table.take_largest()
        values[place].index_copy_(0, rows, scores)
        columns[place].index_copy_(0, rows, found)
        near = (scores >= cutoff).nonzero()[:, 0]
        if place == t - 1:
            remaining[place, rows[near]] = True
        else:
            of_near = (x.index_select(0, near) for x in (found, best, first))
            margin = bounds.margin_to(*of_near)
            remaining[place, rows[near]] = scores.index_select(0, near) >= best.index_select(0, near) - margin
    return values, columns, remaining
