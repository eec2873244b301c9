"""The nearest images of queries, exactly, among rows that come block by block; and what a ranking is worth.

Scores are integers (search/fixed_point.py), and equal ones are ordered by row id, so neither block size nor threads
change a bit, and the metrics of a leave-one-out search are those of metrics.py to the bit. A query holds the nearest of
what it has been shown, no more, so the rows that are searched need not fit into memory.

Shapes: q queries, n rows of a block, b queries at a time, K neighbours that are kept, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.metrics import DEPTHS, list_units
from grappa_dist.search.fixed_point import GRID, exact_dot, to_grid
from grappa_dist.search.in_flight import sent

NO_CLASS = -1  # of rows that are never relevant: distractors
_QUERIES, _BLOCK = 512, 16_384  # scored at once: 64 MiB of float64
_GPU_QUERIES = 4096  # on a GPU: 512 MiB
_COLUMNS = 2**13  # |score| < 2**49, so score * 2**13 + column still fits into an int64
Rows = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """The nearest rows of some queries, best first, and the metrics of these lists."""

    units: Ids  # (q, m) the metrics of `metrics_of(depths)`, in units of 2**-40
    ids: Ids  # (q, s) the first row ids; -1 where there are no more
    cosines: NDArray[np.float64]  # (q, s)


@dataclass
class _Part:
    """Some queries, with as many neighbours as the one of them that needs most."""

    places: Tensor  # (b,) among all queries
    rows: Tensor  # (b, D) on the grid
    scores: Tensor  # (b, K) float64 integers, descending; -inf where there are no more
    ids: Tensor  # (b, K)


class Ranker:
    """Keeps the nearest rows of every query.

    Args:
        queries: (q, D) rows of any length.
        sizes: (q,) R of each, the relevant rows that it will be shown: the first R are kept, or more.
        depths: of the metrics.
        shown: neighbours of each query that are wanted in the end.
        groups: (q,) where only rows of the query's own group, and those of no group, are shown to it.
        device: that computes. Rows are normalised on the CPU, so that rankings do not depend on it.
        waits: whether what a block leaves to be sorted may be looked at on the host; by default not on a GPU, which
            would wait for it.
    """

    def __init__(
        self,
        queries: Rows,
        sizes: Ids,
        *,
        depths: Sequence[int] = DEPTHS,
        shown: int = 10,
        groups: Ids | None = None,
        device: torch.device | None = None,
        waits: bool | None = None,
    ) -> None:
        self.depths, self.shown, self.device = depths, shown, device or torch.device("cpu")
        on_gpu = self.device.type == "cuda"
        self._fold = _fold if (not on_gpu if waits is None else waits) else _fold_fixed
        self.sizes = torch.from_numpy(sizes).to(self.device)
        self.groups = None if groups is None else torch.from_numpy(groups).to(self.device)
        order = torch.from_numpy(np.argsort(sizes, kind="stable")).to(self.device)  # alike ones need alike lists
        z = on_grid(torch.from_numpy(queries)).to(self.device)
        size = _GPU_QUERIES if on_gpu else _QUERIES
        self._parts = [self._part(places, z) for places in order.split(size) if len(places)]
        self._place = torch.full((len(queries), 2), -1, dtype=torch.int64)  # of each query: its part, and where in it
        for number, part in enumerate(self._parts):
            self._place[part.places.cpu(), 0] = number
            self._place[part.places.cpu(), 1] = torch.arange(len(part.places))

    def _part(self, places: Tensor, z: Tensor) -> _Part:
        kept = max(int(self.sizes[places].max()), *self.depths, self.shown)
        scores = torch.full((len(places), kept), -torch.inf, dtype=torch.float64, device=self.device)
        return _Part(places, z[places], scores, torch.full_like(scores, -1, dtype=torch.int64))

    def add(self, rows: Rows, first: int, *, groups: Ids | None = None, hidden: tuple[Ids, Ids] | None = None) -> None:
        """Shows rows to the queries; every call has higher ids than the one before.

        Args:
            rows: (n, D); zeros are no images.
            first: the id of the first.
            groups: (n,) of the rows, -1 for none; None: of none.
            hidden: pairs of a query and a row id that are not to meet, as a query and itself.
        """
        for start in range(0, len(rows), _BLOCK):
            block = torch.from_numpy(rows[start : start + _BLOCK])
            of_rows = None if groups is None else sent(torch.from_numpy(groups[start : start + _BLOCK]), self.device)
            none = ~block.any(1)
            z, blank = sent(on_grid(block), self.device).double(), None
            if bool(none.any()):
                blank = sent(none, self.device)
            inside = self._inside(hidden, first + start, len(block))
            for number, part in enumerate(self._parts):
                scores = exact_dot(part.rows, z)
                if blank is not None:
                    scores.masked_fill_(blank, -torch.inf)
                if self.groups is not None and of_rows is not None:
                    own = self.groups[part.places]
                    scores.masked_fill_((own[:, None] != of_rows) & (of_rows >= 0), -torch.inf)
                if inside is not None:
                    of_part, of_block = inside[1][inside[0] == number].unbind(1)
                    nothing = torch.full((), -torch.inf, dtype=torch.float64, device=self.device)
                    scores.index_put_((sent(of_part, self.device), sent(of_block, self.device)), nothing)
                self._fold(part, scores, first + start)

    def _inside(self, hidden: tuple[Ids, Ids] | None, first: int, count: int) -> tuple[Tensor, Tensor] | None:
        """Of the hidden pairs with a row of a block: the part of the query, and (pairs, 2) places in part and block."""
        if hidden is None:
            return None
        queries, rows = (torch.from_numpy(ids) for ids in hidden)
        kept = (rows >= first) & (rows < first + count)
        places = self._place[queries[kept]]
        return places[:, 0], torch.stack([places[:, 1], rows[kept] - first], 1)

    def finish(self, classes: Ids, of_rows: Ids) -> Ranking:
        """The metrics of what was found.

        Args:
            classes: (q,) of the queries.
            of_rows: (g,) of the rows by their ids; rows of higher ids are never relevant.
        """
        wanted, known = torch.from_numpy(classes).to(self.device), torch.from_numpy(of_rows).to(self.device)
        units = torch.zeros(len(classes), 2 + 3 * len(self.depths), dtype=torch.int64)
        ids = torch.full((len(classes), self.shown), -1, dtype=torch.int64)
        cosines = torch.zeros(len(classes), self.shown, dtype=torch.float64)
        for part in self._parts:
            labelled = (part.ids >= 0) & (part.ids < len(known))
            found = torch.where(labelled, known[part.ids.where(labelled, 0)], NO_CLASS) if len(known) else part.ids
            relevant = labelled & (found == wanted[part.places, None])
            places = part.places.cpu()
            units[places] = list_units(relevant, self.sizes[part.places], self.depths).cpu()
            ids[places] = part.ids[:, : self.shown].cpu()
            near = part.scores[:, : self.shown].cpu()
            cosines[places] = near.where(near.isfinite(), 0) / GRID**2
        return Ranking(units.numpy(), ids.numpy(), cosines.numpy())


def on_grid(rows: Tensor) -> Tensor:
    """Unit rows on the grid, as metrics.py compares them; zero rows stay zero."""
    return to_grid(F.normalize(rows.double(), dim=1))


def _fold(part: _Part, scores: Tensor, first: int) -> None:
    """Takes what is nearer than the last that is kept: an equal score of a later row comes after it."""
    kept = part.scores.shape[1]
    better = scores > part.scores[:, -1:]
    count = int(better.sum(1).max()) if scores.shape[1] else 0
    if not count:
        return
    scores = scores.masked_fill(~better, -torch.inf)
    values, places = scores.topk(min(count, kept), dim=1)
    tied = torch.nonzero((scores >= values[:, -1:]).sum(1) > values.shape[1]).flatten()
    tied = tied[values[tied, -1].isfinite()]  # the last that is taken has equals that are not: lower ids come first
    for rows in tied.split(64):
        places[rows] = scores[rows].argsort(dim=1, descending=True, stable=True)[:, : places.shape[1]]
        values[rows] = scores[rows].gather(1, places[rows])
    _merge(part, values, places + first)


def _fold_fixed(part: _Part, scores: Tensor, first: int) -> None:
    """The same in steps whose shapes do not depend on the scores.

    Score and column go into one integer key, the lower column higher: keys are unique, so topk has no ties to break.
    """
    kept = part.scores.shape[1]
    for start in range(0, scores.shape[1], _COLUMNS):
        some = scores[:, start : start + _COLUMNS]
        columns = torch.arange(_COLUMNS - 1, _COLUMNS - 1 - some.shape[1], -1, device=some.device)
        found = some.isfinite()
        keys = some.masked_fill(~found, 0).long() * _COLUMNS + columns
        places = keys.masked_fill_(~found, torch.iinfo(torch.int64).min).topk(min(kept, some.shape[1]), dim=1).indices
        _merge(part, some.gather(1, places), places + first + start)


def _merge(part: _Part, values: Tensor, ids: Tensor) -> None:
    """Merges later rows into the lists; those of score -inf are none."""
    kept = part.scores.shape[1]
    ids = ids.masked_fill(values == -torch.inf, -1)
    both, all_ids = torch.cat([part.scores, values], 1), torch.cat([part.ids, ids], 1)
    by_id = all_ids.argsort(dim=1)
    order = by_id.gather(1, both.gather(1, by_id).argsort(dim=1, descending=True, stable=True))[:, :kept]
    part.scores, part.ids = both.gather(1, order), all_ids.gather(1, order)


def relevant_counts(classes: Ids, of_rows: Ids, hidden: tuple[Ids, Ids]) -> Ids:
    """R of each query, (q,): rows of its class (g,), without the hidden ones.

    Args:
        hidden: pairs of a query and a row, each once.
    """
    counts = np.bincount(of_rows[of_rows >= 0], minlength=int(classes.max(initial=-1)) + 1)
    sizes = counts[classes].astype(np.int64)
    queries, rows = hidden
    same = queries[classes[queries] == of_rows[rows]]
    sizes -= np.bincount(same, minlength=len(classes))
    return sizes


def equal_pairs(queries: NDArray[np.uint64], rows: NDArray[np.uint64]) -> tuple[Ids, Ids]:
    """Which queries and rows have equal hashes, as pairs of their places; 0 is no hash."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts, ends = (np.searchsorted(ordered, queries, side=side) for side in ("left", "right"))
    ends = np.where(queries == 0, starts, ends)
    of_query = np.repeat(np.arange(len(queries)), ends - starts)
    places = np.arange(len(of_query)) - np.repeat(np.cumsum(ends - starts) - (ends - starts), ends - starts)
    return of_query.astype(np.int64), order[places + np.repeat(starts, ends - starts)].astype(np.int64)
