"""The rows a rank holds, as they lie in their shards, and what is asked of them before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from grappa_dist.kmeans.update import NORM_LIMIT
from grappa_dist.search.fixed_point import GRID, LARGEST, to_grid

_RUN = 32  # rows of a run of neighbours, on the average: fewer are copied together rather than viewed one by one
_GRID_ROWS = 128  # looked at in a core's cache


@dataclass(frozen=True)
class Scanned:
    """What a look at some rows of a shard found."""

    shard: int
    problem: str  # the first row at fault, "" for none
    plain: bool  # they can be used as they lie there: all are on the grid, good or not


@dataclass(frozen=True)
class Rows:
    """The rows of one rank: unit rows in (memory-mapped) shards, in the order of the job's list of shards."""

    shards: Sequence[np.ndarray]  # each (P, D) float32
    good: Sequence[np.ndarray]  # each (P,) bool; the others keep their place but take no part
    names: Sequence[str] = ()  # of the shards, for errors; by default their position

    def __len__(self) -> int:
        return sum(len(shard) for shard in self.shards)

    @property
    def num_good(self) -> int:
        return sum(int(good.sum()) for good in self.good)

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of the first row of every shard and, last, the number of rows."""
        return np.cumsum([0, *(len(shard) for shard in self.shards)])

    def positions(self, block_rows: int, threads: int = 1) -> Iterator[Tensor]:
        """Positions of the good rows among the rank's rows, ascending, (P,) int64 by blocks; no row is read.

        Blocks are of about the same size, span shards, and are as many as share out evenly over the threads.
        """
        step = _even_step(self.num_good, block_rows, threads)
        left = np.zeros(0, dtype=np.int64)
        for first, good in zip(self.starts.tolist(), self.good, strict=False):
            for start in range(0, len(good), step):
                found = np.flatnonzero(good[start : start + step]) + (first + start)
                left = np.concatenate([left, found])
                if len(left) >= step:
                    yield torch.from_numpy(left[:step])
                    left = left[step:]
        if len(left):
            yield torch.from_numpy(left)

    def pieces(self, positions: Tensor, plain: Sequence[bool] = ()) -> list[Tensor]:
        """Grid rows at some ascending positions, at least one: pieces (p, D), in order.

        Rows that lie side by side in one plain shard are a view: a memory map is read where somebody looks at it, and
        only there. A bad row now and then only makes more views; rows of which few lie side by side are copied, once,
        into one piece.

        Args:
            plain: of each shard whether it lies on the grid as it is; by default all rows are put there.
        """
        wanted = positions.numpy()
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        if len(breaks) * _RUN > len(wanted):
            return [self._copied(wanted, plain)]
        cuts = np.unique(np.concatenate([self._edges(wanted)[1], breaks]))
        shards = np.searchsorted(self.starts, wanted[cuts[:-1]], side="right") - 1
        parts = []
        for i, a, b in zip(shards.tolist(), cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
            start = int(wanted[a] - self.starts[i])
            rows = as_tensor(self.shards[i][start : start + b - a])
            parts.append(rows if plain and plain[i] else to_grid(rows))
        return parts

    def take(self, positions: Tensor) -> Tensor:
        """Grid rows at some positions in any order, at least one, (m, D): a copy."""
        wanted, places = np.unique(positions.cpu().numpy(), return_inverse=True)
        rows = self._copied(wanted, ())[torch.from_numpy(places)]
        return rows + 0.0  # no -0.0: it would not survive a sum over ranks

    def _edges(self, wanted: np.ndarray) -> tuple[int, np.ndarray]:
        """The first shard that ascending positions lie in, and where those of it, and of each shard after, begin."""
        first, last = (np.searchsorted(self.starts, wanted[[0, -1]], side="right") - 1).tolist()
        return first, np.searchsorted(wanted, self.starts[first : last + 2])

    def _copied(self, wanted: np.ndarray, plain: Sequence[bool]) -> Tensor:
        """Grid rows (P, D) at ascending positions, in one piece."""
        first, edges = self._edges(wanted)
        found = np.empty((len(wanted), self.shards[first].shape[1]), dtype=np.float32)
        for i, (a, b) in enumerate(pairwise(edges.tolist()), start=first):
            if b > a:
                some = wanted[a:b] - self.starts[i]
                np.take(self.shards[i], some, axis=0, out=found[a:b], mode="clip")  # another mode would copy twice
                if not (plain and plain[i]):
                    found[a:b] = to_grid(torch.from_numpy(found[a:b])).numpy()
        return torch.from_numpy(found)

    def problem(self) -> str:
        """What is wrong with the shapes of a shard, naming it; "" when nothing is. No row is read."""
        if len(self.good) != len(self.shards):
            return f"there must be a mask of good rows for each of the {len(self.shards)} shards, got {len(self.good)}"
        for i, (shard, good) in enumerate(zip(self.shards, self.good, strict=True)):
            name = self._name(i)
            if shard.ndim != 2 or shard.dtype != np.float32:
                return f"{name}: rows must be (rows, dimensions) float32, found {shard.shape} {shard.dtype}"
            if not shard.shape[1]:
                return f"{name}: rows must have at least one dimension, found {shard.shape}"
            if shard.shape[1] != self.shards[0].shape[1]:
                return (
                    f"{name}: rows have {shard.shape[1]} dimensions, those of the first shard {self.shards[0].shape[1]}"
                )
            if good.shape != (len(shard),) or good.dtype != np.bool_:
                return f"{name}: good must be ({len(shard)},) bool, found {good.shape} {good.dtype}"
        return ""

    def parts(self, block_rows: int) -> Iterator[tuple[int, slice]]:
        """Shards and some of their rows, good or not, in order."""
        for i, shard in enumerate(self.shards):
            for start in range(0, len(shard), block_rows):
                yield i, slice(start, min(len(shard), start + block_rows))

    def scan(self, part: tuple[int, slice]) -> Scanned:
        """Looks at every row of one of `parts`."""
        i, some = part
        rows = self.shards[i][some]
        found = row_problem(rows, self.good[i][some])
        problem = f"{self._name(i)}: row {some.start + found[0]} {found[1]}" if found else ""
        return Scanned(i, problem, plain=not problem and on_grid(rows))

    def _name(self, shard: int) -> str:
        return self.names[shard] if self.names else f"shard {shard}"


def as_tensor(rows: np.ndarray) -> Tensor:
    """The same memory; a copy where it is read-only, which torch does not take."""
    return torch.from_numpy(rows if rows.flags.writeable else np.array(rows))


def _even_step(num: int, most: int, threads: int) -> int:
    """Rows of a block, so that the blocks are about a multiple of the threads where there are several."""
    blocks = -(-num // most)
    return -(-num // (-(-blocks // threads) * threads)) if blocks > 1 else most


def on_grid(rows: np.ndarray) -> bool:
    """Whether rows (P, D) float32 need no rounding to the grid."""
    return all(_few_on_grid(rows[i : i + _GRID_ROWS]) for i in range(0, len(rows), _GRID_ROWS))


def _few_on_grid(rows: np.ndarray) -> bool:
    scaled = rows * np.float32(GRID)  # exact, a power of two
    return bool((np.rint(scaled) == scaled).all() and np.abs(scaled).max(initial=0) <= GRID)


def row_problem(rows: np.ndarray, good: np.ndarray) -> tuple[int, str] | None:
    """Position and fault of the first row that is not finite or not of about unit norm at most."""
    squares = np.einsum("ij,ij->i", rows, rows)  # NaN and infinity survive
    doubtful = np.flatnonzero(good & ~(squares <= 1 + 2**-12))  # no value of another row is above LARGEST
    exact = rows[doubtful].astype(np.float64)
    norms = np.linalg.norm(exact, axis=1)
    bad = np.flatnonzero(~((norms <= NORM_LIMIT) & (np.abs(exact).max(axis=1, initial=0) <= LARGEST)))
    if not len(bad):
        return None
    first, norm = int(doubtful[bad[0]]), norms[bad[0]]
    if not np.isfinite(norm):
        return first, "has a NaN or infinite value, features must be finite"
    return first, f"has norm {norm:.6g}, features must be unit rows"
