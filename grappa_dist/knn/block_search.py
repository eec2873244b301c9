"""The k nearest rows by inner product between blocks of rows: candidates in floating point, exact integers decide.

The k best of a row are those with the highest exact scores, equal scores by ascending row id. Lists over disjoint
blocks of targets merge into the list over all of them, in any order, so blocks may travel.

Two searches give the same lists. `extend` takes the t best of a float search per query. `search_one_way`,
`search_both_ways` and `search_within` filter by a threshold: an estimate is a product in bfloat16 or float32 with an
error bound, and a row has a threshold below which no score can enter its list any more; pairs whose estimates lie below
the thresholds of both rows are dropped. The remaining pairs are scored exactly. A pair is one product for both of its
rows, so a search of all rows among themselves takes half of the products. How many pairs remain is a matter of speed,
never of the result.

Shapes: P query rows, m target rows of one block, D dimensions, k neighbours, t candidates per query, s remaining pairs.
Rows lie on the grid of search/fixed_point.py; scores are float64 integers in units of 2**-48; a free place of a list
has id -1 and score -inf.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.search.bf16 import Bf16Generator
from grappa_dist.search.candidates import Search, float_error, largest_float32, norm_of
from grappa_dist.search.fixed_point import GRID, exact_dot, exact_square
from grappa_dist.search.rerank import pair_dots

MOST_ROWS = 2**13  # of a block: |score| < 2**49, so score * 2**13 + column still fits into an int64
SPARE = 8  # candidates beyond k: near-ties at the end of a list mostly fit in
_TILE = 2**23  # elements of the largest float64 table made at once
_TABLE_ROWS, _TABLE_COLUMNS = 512, 2048  # of estimates: few enough to stay in a core's cache
_STEP = 64  # rows are filled up to multiples of it: oneDNN compiles a kernel for every new shape
_SAMPLE = 512  # targets from which the first thresholds are estimated
_MOST_REMAINING = 16  # a table of which more than a 16th remains is searched by `extend` instead of pair by pair
_LEAST = 2.0**-20  # lower thresholds keep all pairs: bits of negative numbers do not compare as the numbers do


@dataclass(frozen=True)
class Neighbours:
    """The k best targets of each query so far, best first."""

    scores: Tensor  # (P, k) float64
    ids: Tensor  # (P, k) int64

    @staticmethod
    def none(num_queries: int, k: int, device: torch.device | str = "cpu") -> Neighbours:
        scores = torch.full((num_queries, k), -math.inf, dtype=torch.float64, device=device)
        return Neighbours(scores, torch.full((num_queries, k), -1, dtype=torch.int64, device=device))


def merge(a: Neighbours, b: Neighbours) -> Neighbours:
    """The k-NN merge: the k best of two lists over disjoint targets, by score, then by id; k is that of `a`."""
    scores, ids = torch.cat([a.scores, b.scores], 1), torch.cat([a.ids, b.ids], 1)
    by_id = ids.argsort(dim=1, stable=True)  # ascending ids, then a stable sort by score: equal scores keep that order
    by_score = scores.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    best = by_id.gather(1, by_score)[:, : a.ids.shape[1]]
    return Neighbours(scores.gather(1, best), ids.gather(1, best))


@dataclass(frozen=True)
class Block:
    """Rows with their row ids, ids ascending: of two columns the lower has the lower id."""

    rows: Tensor  # (m, D) float32 on the grid
    ids: Tensor  # (m,) int64

    @staticmethod
    def of(rows: Tensor, ids: Tensor) -> Block:
        order = ids.argsort()
        return Block(rows[order], ids[order])


def extend(
    best: Neighbours,
    queries: Block,
    targets: Block,
    search: Search = largest_float32,
    *,
    least: Tensor | None = None,
) -> Neighbours:
    """The lists over all targets so far, this block included; a row is not its own neighbour.

    A target whose float score lies more than twice the error bound below the (k + 1)-th of the block, of which one may
    be the query itself, is none of the block's k best; one that lies more than the bound below the k-th exact score so
    far is none of the list's. All others are scored exactly. When the last candidate is among them, targets that are no
    candidates may be too, and the whole block is scored.

    Args:
        least: (P,) float64 exact scores below which targets need not be found; by default those of the k-th in `best`.
    """
    k, m = best.ids.shape[1], len(targets.ids)
    if not m or not len(queries.ids):
        return best
    t = min(m, k + 1 + SPARE)
    floats, candidates = search(queries.rows, targets.rows, t)
    norms = [norm_of(exact_square(rows)) for rows in (queries.rows, targets.rows)]
    error = float_error(queries.rows.shape[1], math.prod(norms))
    threshold = (best.scores[:, -1] if least is None else least) / GRID**2 - error  # (P,)
    if t > k:
        threshold = torch.maximum(threshold, floats[:, k].double() - 2 * error)
    possible = floats.double() >= threshold[:, None]  # (P, t), a prefix of each row
    unresolved = possible[:, -1] if t < m else torch.zeros_like(possible[:, -1])
    best = merge(best, _reranked(queries, targets, candidates, possible & ~unresolved[:, None]))
    rows = unresolved.nonzero()[:, 0]
    if len(rows):
        some = Neighbours(best.scores[rows], best.ids[rows])
        some = scored_in_full(some, Block(queries.rows[rows], queries.ids[rows]), targets)
        best.scores[rows], best.ids[rows] = some.scores, some.ids
    return best


def _reranked(queries: Block, targets: Block, candidates: Tensor, possible: Tensor) -> Neighbours:
    """The possible candidates with exact scores, (P, t), without the queries themselves."""
    possible = possible & (targets.ids[candidates] != queries.ids[:, None])
    found = Neighbours.none(len(candidates), candidates.shape[1], candidates.device)
    row, place = possible.nonzero().unbind(1)
    column = candidates[row, place]
    found.scores[row, place] = pair_dots(queries.rows, targets.rows, (row, column))
    found.ids[row, place] = targets.ids[column]
    return found


def scored_in_full(best: Neighbours, queries: Block, targets: Block) -> Neighbours:
    """The lists after exact scores with every target of the block.

    Score and column go into one integer key, the lower column higher: keys are unique, so topk has no ties to break.
    """
    parts = []
    for start in range(0, len(queries.ids), _TILE // MOST_ROWS):
        rows = slice(start, start + _TILE // MOST_ROWS)
        part = Neighbours(best.scores[rows], best.ids[rows])
        for first in range(0, len(targets.ids), MOST_ROWS):
            ids = targets.ids[first : first + MOST_ROWS]
            scores = exact_dot(queries.rows[rows], targets.rows[first : first + MOST_ROWS])  # (rows, columns)
            keys = scores.long() * MOST_ROWS + torch.arange(
                MOST_ROWS - 1, MOST_ROWS - 1 - len(ids), -1, device=ids.device
            )
            keys[ids == queries.ids[rows, None]] = torch.iinfo(torch.int64).min
            columns = keys.topk(min(part.ids.shape[1], len(ids)), dim=1).indices
            kept = scores.gather(1, columns)
            found = ids[columns]
            own = found == queries.ids[rows, None]  # only where there are fewer than k others
            part = merge(part, Neighbours(kept.masked_fill(own, -math.inf), found.masked_fill(own, -1)))
        parts.append(part)
    return Neighbours(torch.cat([p.scores for p in parts]), torch.cat([p.ids for p in parts]))


@dataclass(frozen=True)
class Side:
    """A block with what its estimates need."""

    block: Block
    form: Tensor  # (P or some more, D), float32 or bfloat16, as it is multiplied: rows of zeros at the end
    norm: float  # the largest |x|
    residual: float  # the largest norm of what the form leaves out

    @staticmethod
    def of(block: Block, *, bf16: bool, norm: float | None = None, residual: float | None = None) -> Side:
        """A block of at most `MOST_ROWS` rows; norm and residual are computed where they are not given."""
        norm = norm_of(exact_square(block.rows)) if norm is None else norm
        if residual is None:
            residual = Bf16Generator.residual_norm(block.rows) if bf16 else 0.0
        num, dim = block.rows.shape
        form = torch.empty(num + -num % _STEP, dim, dtype=torch.bfloat16 if bf16 else torch.float32)
        form[:num], form[num:] = block.rows, 0
        return Side(block, form, norm, residual)

    def __len__(self) -> int:
        return len(self.block.ids)

    def error(self, other: Side) -> float:
        """Error bound of an estimate before it is rounded to the form's type, by Cauchy-Schwarz."""
        a, b = self.norm + self.residual, other.norm + other.residual
        return self.residual * b + a * other.residual + float_error(self.form.shape[1], a * b)


@dataclass(frozen=True)
class Found:
    """Neighbours found for some rows of a block."""

    rows: Tensor  # (t,) positions
    best: Neighbours  # (t, k)

    def merge_into(self, best: Neighbours) -> None:
        """Merges them into the lists of the whole block, in place."""
        whole = merge(Neighbours(best.scores[self.rows], best.ids[self.rows]), self.best)
        best.scores[self.rows], best.ids[self.rows] = whole.scores, whole.ids


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a row and a column, with their estimates."""

    rows: NDArray[np.int64]  # (s,)
    columns: NDArray[np.int64]  # (s,)
    estimates: NDArray[np.float32]  # (s,)

    @staticmethod
    def all_of(parts: list[_Pairs]) -> _Pairs:
        fields = ("rows", "columns", "estimates")
        return _Pairs(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))

    def pick(self, some: NDArray[np.bool_]) -> _Pairs:
        return _Pairs(self.rows[some], self.columns[some], self.estimates[some])

    def transposed(self) -> _Pairs:
        return _Pairs(self.columns, self.rows, self.estimates)


def search_one_way(a: Side, b: Side, best: Neighbours) -> list[Found]:
    """Neighbours of the queries a among the targets b; a row is not its own neighbour."""
    return _ThresholdSearch(a, b, best, None).run()[0] if len(a) and len(b) else []


def search_both_ways(a: Side, b: Side, best: tuple[Neighbours, Neighbours]) -> tuple[list[Found], list[Found]]:
    """Neighbours of the rows of either block in the other; the blocks have no row in common."""
    return _ThresholdSearch(a, b, *best).run() if len(a) and len(b) else ([], [])


def search_within(a: Side, best: Neighbours) -> list[Found]:
    """Neighbours of the rows of a block within the block."""
    return _ThresholdSearch(a, a, best, best).run()[0] if len(a) else []


@dataclass(frozen=True)
class _ThresholdSearch:
    """One block of rows against one of targets; with `back`, for the lists of the targets as well."""

    a: Side
    b: Side
    best: Neighbours
    back: Neighbours | None

    @property
    def k(self) -> int:
        return self.best.ids.shape[1]

    @property
    def within(self) -> bool:
        return self.a is self.b

    def run(self) -> tuple[list[Found], list[Found]]:
        thresholds = [self._thresholds(self.a, self.b, self.best)]
        if self.back is not None:
            thresholds += thresholds if self.within else [self._thresholds(self.b, self.a, self.back)]
        found: tuple[list[Found], list[Found]] = ([], [])
        parts = []
        for rows, columns in self._tables():
            part = self._remaining_pairs(rows, columns, thresholds)
            if part is None:
                self._search_table(rows, columns, found)
            else:
                parts.append(part)
        remaining = _Pairs.all_of(parts) if parts else None
        if remaining is not None and len(remaining.rows):
            self._decide(remaining, thresholds, found)
        return found

    def _tables(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the tables of estimates; within one block those on and above the diagonal."""
        for row in range(0, len(self.a), _TABLE_ROWS):
            for column in range(row if self.within else 0, len(self.b), _TABLE_COLUMNS):
                rows, columns = row + _TABLE_ROWS, column + _TABLE_COLUMNS
                yield slice(row, min(rows, len(self.a))), slice(column, min(columns, len(self.b)))

    def _thresholds(self, a: Side, b: Side, best: Neighbours) -> Tensor:
        """(P,) float64: pairs whose estimates, before rounding, lie below it cannot enter the row's list.

        From the k-th exact score so far; where there is none, from the (k + 1)-th estimate among a sample of the
        targets, of which one may be the row itself.
        """
        error = a.error(b)
        thresholds = best.scores[:, -1] / GRID**2 - error
        unknown = torch.isinf(thresholds).nonzero()[:, 0]
        sample = b.form[: len(b)][:: max(1, len(b) // max(_SAMPLE, 8 * (self.k + 1)))]
        if len(unknown) and len(sample) > self.k:
            for rows in unknown.split(_TABLE_ROWS):
                table = (a.form[rows] @ sample.T).float()
                least = table.topk(self.k + 1, dim=1).values[:, -1].double()
                thresholds[rows] = least - 2 * error - _rounding(a.form)
        return thresholds

    def _remaining_pairs(self, rows: slice, columns: slice, thresholds: list[Tensor]) -> _Pairs | None:
        """The pairs of one table whose estimates reach a threshold; None where they are too many."""
        table = self.a.form[_filled(rows)] @ self.b.form[_filled(columns)].T
        least = _threshold_bits(thresholds[0][rows], table.dtype)[:, None]
        if len(thresholds) > 1:
            least = np.minimum(least, _threshold_bits(thresholds[1][columns], table.dtype)[None])
        mask = _bits(table)[: rows.stop - rows.start, : columns.stop - columns.start] >= least
        places = np.flatnonzero(mask)
        if len(places) > max(mask.size // _MOST_REMAINING, 4 * (self.k + 1) * len(mask)):
            return None
        row, column = np.divmod(places, mask.shape[1])
        estimates = table[torch.from_numpy(row), torch.from_numpy(column)].float().numpy()
        row, column = row + rows.start, column + columns.start
        remaining = _Pairs(row, column, estimates)
        if self.within:
            return remaining.pick(column > row)
        ids = self.a.block.ids.numpy(), self.b.block.ids.numpy()
        return remaining.pick(ids[0][row] != ids[1][column])

    def _search_table(self, rows: slice, columns: slice, found: tuple[list[Found], list[Found]]) -> None:
        """A table with too many remaining pairs: by candidates per row, as `extend`."""
        self._extend(found[0], (self.a, rows, self.best), (self.b, columns))
        if self.within:  # rows of the table that are columns as well have been searched
            columns = slice(max(columns.start, rows.stop), columns.stop)
            self._extend(found[0], (self.a, columns, self.best), (self.a, rows))
        elif self.back is not None:
            self._extend(found[1], (self.b, columns, self.back), (self.a, rows))

    def _extend(self, found: list[Found], queries: tuple[Side, slice, Neighbours], targets: tuple[Side, slice]) -> None:
        (a, rows, best), (b, columns) = queries, targets
        if rows.start < rows.stop:
            none = Neighbours.none(rows.stop - rows.start, self.k)
            some = extend(none, _part(a, rows), _part(b, columns), least=best.scores[rows, -1])
            found.append(Found(torch.arange(rows.start, rows.stop), some))

    def _decide(self, remaining: _Pairs, thresholds: list[Tensor], found: tuple[list[Found], list[Found]]) -> None:
        """Exact scores and lists of the remaining pairs, except those that certainly come after k others."""
        views = [remaining] if len(thresholds) == 1 else [remaining, remaining.transposed()]
        if self.within:
            views = [_Pairs.all_of(views)]
        margin = 2 * self.a.error(self.b)
        kept = [
            self._may_be_listed(view, threshold, margin) for view, threshold in zip(views, thresholds, strict=False)
        ]
        places = np.flatnonzero(np.logical_or.reduce(np.concatenate(kept).reshape(-1, len(remaining.rows))))
        pairs = torch.from_numpy(remaining.rows[places]), torch.from_numpy(remaining.columns[places])
        scores = np.zeros(len(remaining.rows))
        scores[places] = pair_dots(self.a.block.rows, self.b.block.rows, pairs).numpy()
        for view, mask, target, out in zip(views, kept, (self.b, self.a), found, strict=False):
            all_scores = np.concatenate([scores, scores]) if self.within else scores
            if mask.any():
                out.append(_listed(view.rows[mask], view.columns[mask], all_scores[mask], target.block.ids, self.k))

    def _may_be_listed(self, view: _Pairs, threshold: Tensor, margin: float) -> NDArray[np.bool_]:
        """Which pairs, (s,), reach their row's threshold and do not certainly come after k others of the row."""
        least = threshold.to(self.a.form.dtype).float().numpy()[view.rows]
        order, place, first = _by_row(view.rows, -view.estimates)
        values = view.estimates[order]
        kth = np.full(len(values), -np.inf, np.float32)
        is_kth = place == self.k - 1
        kth[first[is_kth]] = values[is_kth]  # at the first of each row
        mask = np.empty(len(values), dtype=bool)
        mask[order] = values >= kth[first] - np.float32(margin + 2 * _rounding(self.a.form) + 2.0**-22)
        return mask & (view.estimates >= least)


def _by_row(
    rows: NDArray[np.int64], keys: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The order by (row, key), the place of each pair within its row, and where its row begins, all (s,)."""
    order = np.argsort(keys)
    order = order[np.argsort(rows[order].astype(np.int16), kind="stable")]  # a radix sort
    sorted_rows = rows[order]
    begins = np.ones(len(rows), dtype=bool)
    begins[1:] = sorted_rows[1:] != sorted_rows[:-1]
    starts = np.flatnonzero(begins)
    first = np.repeat(starts, np.diff(np.append(starts, len(rows))))
    return order, np.arange(len(rows)) - first, first


def _listed(
    rows: NDArray[np.int64], columns: NDArray[np.int64], scores: NDArray[np.float64], ids: Tensor, k: int
) -> Found:
    """The k best exact scores of each row that has any, ties by column and so by id."""
    keys = -((scores.astype(np.int64) * MOST_ROWS) + (MOST_ROWS - 1 - columns))
    order, place, _ = _by_row(rows, keys)
    order, place = order[place < k], place[place < k]
    touched, at = np.unique(rows[order], return_inverse=True)
    width = int(place.max()) + 1
    best = Neighbours.none(len(touched), width)
    best.scores[at, place] = torch.from_numpy(scores[order])
    best.ids[at, place] = ids[torch.from_numpy(columns[order])]
    return Found(torch.from_numpy(touched), best)


def _part(side: Side, rows: slice) -> Block:
    return Block(side.block.rows[rows], side.block.ids[rows])


def _filled(some: slice) -> slice:
    return slice(some.start, some.stop + -some.stop % _STEP)


def _rounding(form: Tensor) -> float:
    """How far rounding to the form's type may change a score: half a step of its numbers between 1 and 2."""
    return 2.0**-8 if form.dtype == torch.bfloat16 else 0.0


def _bits(table: Tensor) -> NDArray[Any]:
    """Numbers that compare fast: of two bfloat16, one of them positive, the larger has the larger bits as an int."""
    return table.view(torch.int16).numpy() if table.dtype == torch.bfloat16 else table.numpy()


def _threshold_bits(thresholds: Tensor, dtype: torch.dtype) -> NDArray[Any]:
    """Rounded like the estimates, which keeps their order; those below `_LEAST` become the lowest integer."""
    bits = _bits(thresholds.to(dtype))
    if dtype == torch.bfloat16:
        bits[(thresholds < _LEAST).numpy()] = np.iinfo(np.int16).min
    return bits


def to_scores(best: Neighbours) -> Tensor:
    """Inner products as float32, (P, k), rounded once from the exact ones."""
    return (best.scores / GRID**2).float()


def are_duplicates(ids: NDArray[np.int64], scores: NDArray[np.float32], cosine: float) -> NDArray[np.bool_]:
    """Which neighbours of a list are near-duplicates of their query, (P, k): those above a cosine."""
    return (ids >= 0) & (scores > np.float32(cosine))


def without_duplicates(ids: NDArray[np.int64], scores: NDArray[np.float32], cosine: float, k: int) -> NDArray[np.int64]:
    """The k best neighbours of each longer list that are no near-duplicates, (P, k); id -1 where there are fewer."""
    kept = np.where(are_duplicates(ids, scores, cosine), -1, ids)
    order = np.argsort(kept < 0, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(kept, order, axis=1)
