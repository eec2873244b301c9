"""Where the images of a query's class stand among all others, counted tile by tile: what R-Precision, MAP@R and recall
at 1 are made of.

The p-th best image of the query's class has rank p + I_p, where I_p is how many images of other classes are better, so
an image of another class only has to be placed among the R scores of the query's own class. These places are counted in
a histogram, and histograms add up: over tiles of the gallery, in any order, on any rank. Nothing is sorted or kept that
grows with the gallery. As soon as p + I_p exceeds R, the p-th best no longer counts, nor does what is below it: then
few of a tile's scores are looked at one by one.

A product in float32 places an image; where its error bound leaves the place open, exact scores decide, and equal ones
are in the order of the gallery. So tiles, blocks, threads and ranks do not change a bit.

Shapes: g gallery rows, b queries of a block, K the largest R among them, t rows of a tile, s pairs that are looked at
one by one, D dimensions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from grappa_dist.search.candidates import float_error, true_products
from grappa_dist.search.fixed_point import exact_dot, to_grid
from grappa_dist.search.in_flight import sent
from grappa_dist.search.rerank import pair_dots

UNIT = 2**40  # a query's metric in [0, 1] as an integer: they add in any order
_ENTRIES, _GPU_ENTRIES = 2**23, 2**26  # scores with the own class that are kept at a time: b * K of all blocks
_QUERIES, _GPU_QUERIES = 512, 4096  # of a block
_GROUP = 2**16  # queries that one pass over the gallery serves, at most
_READ = 2**14  # rows of the gallery read at once
_TABLE, _GPU_TABLE = 2**21, 2**28  # scores of a block with a tile: on a CPU they stay in the cache
_EXACT_TABLE = 2**20  # the same of exact ones
_SMALL_CLASS = 64  # images of classes whose products are made together, and of queries that are compared in pairs
_SAMPLE_SHARE, _LEAST_SAMPLE, _MOST_SAMPLE = 16, 32, 2**12  # of the gallery: one row in 16 gives the first bounds
_OPEN_DIMS = 32  # so many dimensions of a pair's exact product take as long as all that is exact of a table's score
_OPEN_AT_ONCE = 2**18  # places that are decided together
_MANY = 2  # times K of a table's scores by query: if more may count, the table's own best are found first
_ROUNDING = 2.0**-22  # above what float32 rounds away of a score plus or minus the error
_UNIT_NORM = 1 + 2.0**-12  # that rounding to the grid does not lift a unit row above


@dataclass(frozen=True)
class Tile:
    """Some rows of the gallery, on the device."""

    places: Tensor  # (t,)
    rows: Tensor  # (t, D)
    classes: Tensor  # (t,)

    def part(self, start: int, stop: int) -> Tile:
        return Tile(self.places[start:stop], self.rows[start:stop], self.classes[start:stop])

    def split(self, size: int) -> Iterator[Tile]:
        for start in range(0, len(self.rows), size):
            yield self.part(start, start + size)


@dataclass(frozen=True)
class Gallery:
    """Rows that are compared with each other; places among them, which order equal scores, are in host memory."""

    classes: Tensor  # (g,) int64 from 0, none left out, in host memory
    read: Callable[[Tensor], Tensor]  # rows at some places (m,) -> (m, D) float32 on the grid, in host memory
    device: torch.device
    held: Tensor | None = None  # (g, D) on the device, where all fit

    @staticmethod
    def of(
        classes: Tensor,
        read: Callable[[Tensor], Tensor],
        device: torch.device,
        *,
        dim: int,
        held_bytes: int,
    ) -> Gallery:
        """Reads all rows at once where they take no more than `held_bytes`."""
        if 4 * dim * len(classes) > held_bytes:
            return Gallery(classes, read, device)
        held = torch.empty(len(classes), dim, device=device)
        for start in range(0, len(classes), _READ):
            places = torch.arange(start, min(start + _READ, len(classes)))
            held[start : start + len(places)] = sent(read(places), device)
        return Gallery(classes, read, device, held)

    @cached_property
    def by_class(self) -> Tensor:
        """Places by class, ascending within one, (g,)."""
        return self.classes.argsort(stable=True)

    @cached_property
    def starts(self) -> Tensor:
        """Where each class begins in `by_class`, and the end."""
        return F.pad(torch.bincount(self.classes).cumsum(0), (1, 0))

    @cached_property
    def others(self) -> Tensor:
        """R of each row, (g,)."""
        return self.starts.diff()[self.classes] - 1

    @cached_property
    def queries(self) -> Tensor:
        """Places of the rows with an R of at least one, by R and class: blocks of them need about equal memory."""
        places = torch.from_numpy(np.lexsort([self.classes.numpy(), self.others.numpy()]))
        return places[self.others[places] > 0]

    def queries_of(self, rank: int, size: int) -> Tensor:
        """A rank's part of the queries."""
        num = len(self.queries)
        return self.queries[num * rank // size : num * (rank + 1) // size]

    def rows(self, places: Tensor) -> Tensor:
        """The rows at some places, (m, D), on the device."""
        if self.held is not None:
            return self.held.index_select(0, sent(places, self.device))
        return sent(self.read(places), self.device)

    def rows_of(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Rows, and where the one of each place (m,) on the device is among them, (m,)."""
        if self.held is not None:
            return self.held, places
        known, inverse = places.unique(return_inverse=True)
        return self.rows(known.cpu()), inverse

    def tile(self, places: Tensor) -> Tile:
        """The rows at some places."""
        return Tile(sent(places, self.device), self.rows(places), sent(self.classes[places], self.device))

    @cached_property
    def sample(self) -> Tensor | None:
        """Places spread over the gallery; None of a small one."""
        count = min(_MOST_SAMPLE, len(self.classes) // _SAMPLE_SHARE)
        return (torch.arange(count) * len(self.classes)) // count if count >= _LEAST_SAMPLE else None


def unit_on_grid(rows: Tensor) -> Tensor:
    """Rows of any length as unit rows on the grid, float32."""
    if not len(rows):
        return rows.float()
    return torch.cat([to_grid(F.normalize(some.double(), dim=1)) for some in rows.split(_READ)])


def score_queries(
    gallery: Gallery, queries: Tensor, found: Tensor, *, block_rows: int | None = None, tile_rows: int | None = None
) -> Generator[int, None, None]:
    """Writes R-Precision, MAP@R and recall at 1 of some queries, in units of 2**-40, into `found`, (q, 3) in host
    memory; yields now and then how many scores of a query with a row have been dealt with since.

    Args:
        queries: (q,) places, each once, of rows with an R of at least one; as `Gallery.queries` has them, or part.
        block_rows, tile_rows: queries and rows that are compared at once, for tests.
    """
    tile_rows = tile_rows or _READ
    with true_products():
        for group in _groups(gallery, queries, block_rows):
            first, places = group[0].start, queries[group[0].start : group[-1].stop]
            of_group = gallery.tile(places)
            blocks = [
                _Block(gallery, queries[some.start : some.stop], of_group.part(some.start - first, some.stop - first))
                for some in group
            ]
            others = torch.ones(len(gallery.classes), dtype=torch.bool)
            if blocks[-1].own.shape[1] <= _SMALL_CLASS:  # else a table as small as a block bounds itself badly
                yield from _meet_each_other(blocks, of_group)
                others[places] = False
            for some in torch.nonzero(others).flatten().split(tile_rows):
                tile = gallery.tile(some)
                for block in blocks:
                    block.meet(tile)
                yield len(places) * len(some)
            for part, block in zip(group, blocks, strict=True):
                found[part.start : part.stop] = block.units().cpu()


def _meet_each_other(blocks: Sequence[_Block], of_all: Tile) -> Iterator[int]:
    """Every block meets the rows of all blocks, which are consecutive in `of_all`. A product of two blocks is computed
    once and serves both; yields how many scores of a query with a row have been dealt with since."""
    stops = list(accumulate(len(block.x) for block in blocks))
    for i, (block, stop) in enumerate(zip(blocks, stops, strict=True)):
        mine = of_all.part(stop - len(block.x), stop)
        block.meet(mine)
        begin = i + 1
        while begin < len(blocks):
            end = max(begin + 1, bisect_right(stops, stops[begin - 1] + _columns(block.x)))
            others = of_all.part(stops[begin - 1], stops[end - 1])
            scores = block.x @ others.rows.T
            block.place(others, scores)
            parts = scores.split([len(other.x) for other in blocks[begin:end]], 1)
            for other, of_other in zip(blocks[begin:end], parts, strict=True):
                other.place(mine, of_other.T)
            begin = end
        yield len(block.x) * (len(block.x) + 2 * (stops[-1] - stop))


def _groups(gallery: Gallery, queries: Tensor, block_rows: int | None) -> Iterator[Sequence[range]]:
    """Blocks of queries that one pass over the gallery serves, as ranges of places in `queries`."""
    on_gpu = gallery.device.type == "cuda"
    entries, most = (_GPU_ENTRIES, _GPU_QUERIES) if on_gpu else (_ENTRIES, _QUERIES)
    sizes = gallery.others[queries].numpy()
    group, held, start = list[range](), 0, 0
    while start < len(sizes):
        stop = min(len(sizes), start + (block_rows or most))
        while stop > start + 1 and (stop - start) * int(sizes[start:stop].max()) > entries:
            stop = start + max(1, (stop - start) // 2)
        need = (stop - start) * int(sizes[start:stop].max())
        if group and (held + need > entries or stop - group[0].start > _GROUP):
            yield group
            group, held = [], 0
        group.append(range(start, stop))
        held, start = held + need, stop
    if group:
        yield group


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a query of a block and a row of a tile, which are of different classes."""

    queries: Tensor  # (s,)
    columns: Tensor  # (s,)
    scores: Tensor  # (s,) float32
    before: Tensor  # (s,) how many scores of the query's class are better for certain

    def pick(self, some: Tensor | slice) -> _Pairs:
        """Those at some places, which are no mask: a GPU would be waited for once for each of the four."""
        return _Pairs(self.queries[some], self.columns[some], self.scores[some], self.before[some])


class _Block:
    """Some queries, the scores with their own class, and where others have been placed among these."""

    def __init__(self, gallery: Gallery, places: Tensor, rows: Tile) -> None:
        self.gallery, self.device = gallery, gallery.device
        self.places = places  # (b,), in host memory
        self.x, self.classes = rows.rows, rows.classes  # (b, D), (b,)
        self.sizes = sent(gallery.others[places], self.device)  # (b,)
        self.error = 2 * float_error(self.x.shape[1], _UNIT_NORM**2) + _ROUNDING
        shape = (len(places), int(gallery.others[places].max()))
        self.own = torch.full(shape, -torch.inf, device=self.device)  # (b, K) scores with the own class, descending
        self.members = torch.zeros(shape, dtype=torch.int64, device=self.device)  # (b, K) of which places
        self._fill_own()
        self.counts = torch.zeros(shape, dtype=torch.int32, device=self.device)  # (b, K) others before the p-th best
        self.ranks = torch.arange(1, shape[1] + 1, device=self.device)
        self.active = self.sizes.clone()  # (b,) how many of the best may still count
        self._bound(self._in_sample())

    def _fill_own(self) -> None:
        sizes = self.gallery.others[self.places]
        for size in sizes.unique().tolist():
            mine = torch.nonzero(sizes == size).flatten()
            parts = self._of_small(mine, size + 1) if size < _SMALL_CLASS else self._of_large(mine, size + 1)
            for some, members, scores in parts:
                at = sent(some, self.device)
                columns = torch.arange(size, device=self.device)
                itself = (members < sent(self.places[some], self.device)[:, None]).sum(1, keepdim=True)
                others = columns + (columns >= itself)  # (n, size) all columns but the query's
                scores, order = scores.gather(1, others).sort(1, descending=True)
                self.own[at, :size] = scores
                self.members[at, :size] = members.gather(1, others.gather(1, order))

    def _of_small(self, mine: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of queries of small classes of one size: places of their classes (n, m), and scores with these."""
        gallery = self.gallery
        classes, inverse = gallery.classes[self.places[mine]].unique(return_inverse=True)
        members = gallery.by_class[gallery.starts[classes][:, None] + torch.arange(size)]  # (C, m)
        at = torch.nonzero(members[inverse] == self.places[mine][:, None])[:, 1]
        x = gallery.rows(members.flatten()).view(*members.shape, -1)
        products = torch.bmm(x, x.transpose(1, 2))  # (C, m, m)
        inverse, at = sent(inverse, self.device), sent(at, self.device)
        yield mine, sent(members, self.device)[inverse], products[inverse, at]

    def _of_large(self, mine: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same of large classes, one after the other."""
        gallery = self.gallery
        classes = gallery.classes[self.places[mine]]
        for one in classes.unique().tolist():
            some, start = mine[classes == one], int(gallery.starts[one])
            members = gallery.by_class[start : start + size]
            x = self.x[sent(some, self.device)]
            scores = torch.cat([x @ gallery.rows(part).T for part in members.split(_READ)], 1)
            yield some, sent(members, self.device).expand(len(some), -1), scores

    def _in_sample(self) -> Tensor:
        """How many rows of the gallery are better than the p-th best at least, (b, K), by a sample of it."""
        places = self.gallery.sample
        if places is None:
            return torch.zeros_like(self.own, dtype=torch.int64)
        scores = self.x @ self.gallery.rows(places).T
        scores.masked_fill_(self.classes[:, None] == sent(self.gallery.classes[places], self.device), -torch.inf)
        best = -scores.topk(min(len(places), self.own.shape[1]), 1).values  # ascending; more than K come before nobody
        return torch.searchsorted(best, -(self.own + self.error))

    def _bound(self, before: Tensor) -> None:
        """Leaves out those of the best that cannot count any more, where so many others (b, K) come before them."""
        counting = ((self.ranks + before <= self.sizes[:, None]) & (self.ranks <= self.active[:, None])).sum(1)
        self.active = counting
        last = self.own.gather(1, (counting - 1).clamp(min=0)[:, None])
        self.least = (last - self.error).masked_fill_((counting == 0)[:, None], torch.inf)  # (b, 1)

    def meet(self, tile: Tile) -> None:
        """Places the rows of a tile among the scores with the own class."""
        for part in tile.split(_columns(self.x)):
            self.place(part, self.x @ part.rows.T)

    def place(self, tile: Tile, scores: Tensor) -> None:
        """The same of a tile whose scores (b, t) with the block are known."""
        queries, columns = _places_of(self._may_count(scores))
        other = torch.nonzero(self.classes[queries] != tile.classes[columns]).flatten()
        queries, columns = queries[other], columns[other]
        found = scores[queries, columns]
        pairs = _Pairs(queries, columns, found, self._better(queries, found + self.error))
        self._place(tile, pairs.pick(torch.nonzero(pairs.before < self.active[queries]).flatten()))
        if len(queries) >= len(self.x):
            self._bound(self.counts.cumsum(1))

    def _may_count(self, scores: Tensor) -> Tensor:
        """Which scores of a table (b, t) may come before one of the best that counts.

        Where these are many, the table itself bounds them: whatever is behind K rows of it has a rank above R. A row
        that is left out is behind K by twice the error, so all that it comes before is behind them for certain.
        """
        found, num = scores >= self.least, self.own.shape[1]
        if _MANY * self.own.numel() < len(scores) * scores.shape[1] and _count_of(found) > _MANY * self.own.numel():
            nth = _nth_best(scores, num + 1)[:, None]  # one of them may be the query itself
            found = scores >= torch.maximum(self.least, nth - 2 * self.error)
        return found

    def _place(self, tile: Tile, pairs: _Pairs) -> None:
        """Counts pairs whose place is certain, and those that exact scores decide."""
        after = self.own[pairs.queries, pairs.before] >= pairs.scores - self.error
        left = torch.nonzero(after).flatten()
        if len(left):
            open_pairs = pairs.pick(left)
            width = self._better(open_pairs.queries, open_pairs.scores - self.error, equal=True) - open_pairs.before
            ends = width.cumsum(0)
            num = int(ends[-1])
            if self.x.shape[1] * num > _OPEN_DIMS * len(self.x) * len(tile.rows):
                for part in tile.split(max(1, _EXACT_TABLE // len(self.x))):
                    self._place_exactly(part)
                return
            for some, number in _at_once(ends.cpu()) if num > _OPEN_AT_ONCE else [(slice(0, None), num)]:
                pairs.before[left[some]] += self._decided(tile, open_pairs.pick(some), width[some], number)
        self._count(pairs.queries, pairs.before)

    def _better(self, queries: Tensor, scores: Tensor, *, equal: bool = False) -> Tensor:
        """How many scores of the own class are better (or equal) than one, for each pair, (s,)."""
        flat, num = self.own.flatten(), self.own.shape[1]
        first, found = queries * num - 1, torch.zeros_like(queries)
        for step in (2**power for power in reversed(range(num.bit_length()))):
            after = found + step
            value = flat[first + after.clamp(max=num)]
            better = (value >= scores if equal else value > scores) & (after <= num)
            found = torch.where(better, after, found)
        return found

    def _decided(self, tile: Tile, pairs: _Pairs, width: Tensor, num: int) -> Tensor:
        """How many of the next `width` scores of the own class, `num` of all pairs, come before each, exactly, (s,)."""
        of_pair = torch.repeat_interleave(torch.arange(len(width), device=self.device), width, output_size=num)
        firsts = (width.cumsum(0) - width)[of_pair]
        at = pairs.before[of_pair] + torch.arange(len(of_pair), device=self.device) - firsts
        members = self.members[pairs.queries[of_pair], at]
        rows, place = self.gallery.rows_of(members)
        own = pair_dots(self.x, rows, (pairs.queries[of_pair], place))
        other = pair_dots(self.x, tile.rows, (pairs.queries, pairs.columns))[of_pair]
        before = (own > other) | ((own == other) & (members < tile.places[pairs.columns][of_pair]))
        return torch.zeros_like(width).index_add_(0, of_pair, before.long())

    def _place_exactly(self, tile: Tile) -> None:
        """Places all rows of a tile by exact scores with all of them, as for features that have collapsed."""
        own, members = self._exact_own
        size = len(self.gallery.classes)
        scores = -exact_dot(self.x, tile.rows)  # (b, t); negative ones, as own, which ascend
        before = torch.searchsorted(own, scores)
        tied = own.gather(1, before.clamp(max=own.shape[1] - 1)) == scores
        # Where scores are equal, places decide: one key of where the equal ones begin, and place
        keys = torch.searchsorted(own, own) * size + members
        before = torch.where(tied, torch.searchsorted(keys, before * size + tile.places), before)
        counting = (before < self.active[:, None]) & (self.classes[:, None] != tile.classes)
        queries, columns = counting.nonzero().unbind(1)
        self._count(queries, before[queries, columns])

    @cached_property
    def _exact_own(self) -> tuple[Tensor, Tensor]:
        """The exact scores with the own class (b, K), negative, ascending, and their places; equal ones by place."""
        scores = torch.full(self.own.shape, torch.inf, dtype=torch.float64, device=self.device)
        members = torch.full_like(self.members, len(self.gallery.classes) - 1)
        for query, size in enumerate(self.sizes.tolist()):
            places = self.members[query, :size].sort().values
            parts = [exact_dot(self.x[query, None], self.gallery.rows(p))[0] for p in places.cpu().split(_READ)]
            scores[query, :size], order = (-torch.cat(parts)).sort(stable=True)
            members[query, :size] = places[order]
        return scores, members

    def _count(self, queries: Tensor, before: Tensor) -> None:
        """Adds the pairs whose place counts, without asking the device how many these are."""
        num = self.counts.shape[1]
        counting = (before < self.active[queries]).int()
        self.counts.view(-1).index_add_(0, queries * num + before.clamp(max=num - 1), counting)

    def units(self) -> Tensor:
        """R-Precision, MAP@R and recall at 1 of each query, (b, 3), once all tiles have been met."""
        before = self.counts.cumsum(1)
        self._bound(before)
        counting = self.ranks <= self.active[:, None]  # the p-th best is among the first R
        precisions = (self.ranks.double() * UNIT / (self.ranks + before)).round().long() * counting
        r_precision = (self.active.double() * UNIT / self.sizes).round().long()
        first = counting[:, 0] & (before[:, 0] == 0)
        return torch.stack([r_precision, precisions.sum(1) // self.sizes, first.long() * UNIT], 1)


def _columns(x: Tensor) -> int:
    """How many rows the rows of a block (b, D) are compared with at a time."""
    return max(1, (_GPU_TABLE if x.is_cuda else _TABLE) // len(x))


def _at_once(ends: Tensor) -> Iterator[tuple[slice, int]]:
    """Pairs whose places are decided together, and how many places; `ends` (s,), on the host, adds these up."""
    sizes = torch.bincount((ends - 1) // _OPEN_AT_ONCE)
    start = before = 0
    for size in sizes[sizes > 0].tolist():
        after = int(ends[start + size - 1])
        yield slice(start, start + size), after - before
        start, before = start + size, after


def _places_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns that are true, (s,) each; of a transposed table by columns, which spares a copy."""
    if not mask.is_contiguous() and mask.T.is_contiguous():
        columns, rows = _places_of(mask.T)
        return rows, columns
    if mask.device.type != "cpu":
        return mask.nonzero().unbind(1)  # type: ignore[return-value]
    places = torch.from_numpy(np.flatnonzero(mask.numpy()))  # seven times as fast where few are
    rows = places.div(mask.shape[1], rounding_mode="floor")
    return rows, places - rows * mask.shape[1]


def _count_of(mask: Tensor) -> int:
    return int(mask.sum()) if mask.device.type != "cpu" else int(np.count_nonzero(mask.numpy()))  # much faster


def _nth_best(scores: Tensor, n: int) -> Tensor:
    """The n-th best of each row, (b,)."""
    if scores.device.type != "cpu":
        return scores.topk(n, 1, sorted=False).values.amin(1)
    at = scores.shape[1] - n
    return torch.from_numpy(np.partition(scores.numpy(), at, 1)[:, at].copy())  # five times as fast
