"""The exact k-NN graph of rows spread over the ranks of one job: blocks of rows travel, lists of neighbours stay.

The result is that of brute force with exact scores, bit for bit, on any number of ranks and for any block size.

Shapes: P rows of this rank, m rows of a block, D dimensions, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm, raise_together, wire_device
from grappa_dist.distributed.device_rows import memory_for_rows
from grappa_dist.distributed.sharded_rows import as_tensor, on_grid, row_problem, side_by_side
from grappa_dist.knn.block_search import (
    MOST_ROWS,
    Block,
    Found,
    Neighbours,
    Side,
    search_both_ways,
    search_within,
    to_scores,
)
from grappa_dist.knn.dense_search import extend_dense
from grappa_dist.search.backends import bf16_products_are_faster
from grappa_dist.search.bf16 import Bf16Generator
from grappa_dist.search.candidates import norm_of, true_products
from grappa_dist.search.fixed_point import exact_square, rounded
from grappa_dist.search.in_flight import Work, in_flight, sent

DENSE_ROWS = 2**14  # of a block where blocks are copied
_BLOCKS = 8  # of a rank, at least, so that threads have about the same work
_LEAST_ROWS = 1024  # of a block that is made smaller only for that reason


def sharded_knn(
    comm: Comm,
    features: np.ndarray,
    ids: np.ndarray,
    k: int,
    *,
    block_rows: int | None = None,
    device: torch.device | str = "cpu",
    bf16: bool | None = None,
    copies: bool | None = None,
    kept_bytes: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other rows of each own row: row ids (P, k) int64 and inner products (P, k) float32, best first.

    Equal inner products are in the order of row ids; where fewer than k other rows exist, id -1 and score -inf fill up.

    Args:
        features: own unit rows (P, D) float32, possibly memory-mapped, possibly none; bad rows left out.
        ids: their row ids (P,) int64, ascending, different over all ranks.
        block_rows: rows that travel, and rows compared with them, at most; it changes memory, not the result.
            By default `MOST_ROWS`, and `DENSE_ROWS` where blocks are copied.
        bf16: estimates in bfloat16; by default where they are faster.
        copies: blocks are copied to every rank, and a pair of rows is compared on both ranks; by default on a GPU.
        kept_bytes: of own blocks that then stay on the device, while the others are read again for every block that
            they are compared with; by default a share of its free memory.
    """
    device = torch.device(device)
    copies = device.type == "cuda" if copies is None else copies
    if copies and kept_bytes is None:
        kept_bytes = memory_for_rows(device)
    elif not copies:
        kept_bytes = None
    if block_rows is None:
        block_rows = DENSE_ROWS if copies else MOST_ROWS
    own = join_blocks(comm, features, ids, k, block_rows=block_rows, device=device, bf16=bf16, kept_bytes=kept_bytes)
    best = [Neighbours.none(own.size(i), k, device) for i in range(len(own))]
    ring = _Ring(comm, own, best, k)
    with true_products():
        (ring.by_copies if copies else ring.by_pairs)()
    return as_arrays(best, k)


def as_arrays(best: Sequence[Neighbours], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (P, k) int64 and inner products (P, k) float32 of the lists of all blocks."""
    if not best:
        return np.zeros((0, k), dtype=np.int64), np.zeros((0, k), dtype=np.float32)
    return torch.cat([b.ids for b in best]).cpu().numpy(), torch.cat([to_scores(b) for b in best]).cpu().numpy()


@dataclass(frozen=True)
class _Facts:
    """Facts about a block that need not be computed again when it is read again."""

    plain: bool  # it lies on the grid as stored
    norm: float  # the largest |x|
    residual: float  # the largest norm of what bfloat16 leaves out


@dataclass(frozen=True)
class Blocks:
    """The rows of one rank, cut into blocks of about the same size.

    A block is read and rounded to the grid on every access; the first ones may be kept on the device instead.
    """

    features: np.ndarray  # (P, D) float32
    ids: np.ndarray  # (P,) int64, ascending
    dim: int
    step: int  # rows of a block
    device: torch.device
    bf16: bool
    facts: tuple[_Facts, ...] = ()
    kept: tuple[Block, ...] = ()  # the first ones

    @staticmethod
    def of(
        features: np.ndarray,
        ids: np.ndarray,
        dim: int,
        block_rows: int,
        *,
        device: torch.device,
        bf16: bool | None,
        kept_bytes: int | None,
    ) -> Blocks:
        """Blocks with their facts or, with `kept_bytes`, with as many blocks on the device as these allow."""
        if kept_bytes is not None:
            blocks = Blocks(features, ids, dim, block_rows, device, bf16=False)
            most = kept_bytes // (4 * block_rows * dim)
            return replace(blocks, kept=tuple(blocks.block(i) for i in range(min(len(blocks), most))))
        step = min(block_rows, MOST_ROWS, max(_LEAST_ROWS, -(-len(ids) // _BLOCKS)))
        bf16 = bf16_products_are_faster(device) if bf16 is None else bf16
        blocks = Blocks(features, ids, dim, step, device, bf16)
        facts = side_by_side(blocks._measure, range(len(blocks)), torch.get_num_threads())
        return replace(blocks, facts=tuple(facts))

    def __len__(self) -> int:
        return -(-len(self.ids) // self.step)

    def size(self, number: int) -> int:
        return len(self.ids[self._places(number)])

    def block(self, number: int) -> Block:
        """One block on the device; an empty one beyond the last."""
        if number < len(self.kept):
            return self.kept[number]
        some = self._places(number)
        plain = number < len(self.facts) and self.facts[number].plain
        x, ids = as_tensor(self.features[some]).reshape(-1, self.dim), torch.from_numpy(np.array(self.ids[some]))
        x = sent(x, self.device)
        return Block(x if plain else rounded(x), sent(ids, self.device))

    def side(self, number: int) -> Side:
        """One block as its estimates need it, on a CPU."""
        facts = self.facts[number]
        return Side.of(self.block(number), bf16=self.bf16, norm=facts.norm, residual=facts.residual)

    def rows_at(self, places: Tensor) -> Block:
        """Some rows in host memory, by ascending positions."""
        some = places.numpy()
        rows = torch.from_numpy(self.features[some]).reshape(-1, self.dim)
        plain = all(facts.plain for facts in self.facts)
        return Block(rows if plain else rounded(rows), torch.from_numpy(self.ids[some]))

    @property
    def largest(self) -> tuple[float, float]:
        """The largest norm of own rows, and the largest norm of what bfloat16 leaves out of them; 0 for no rows."""
        return max((f.norm for f in self.facts), default=0.0), max((f.residual for f in self.facts), default=0.0)

    def _places(self, number: int) -> slice:
        return slice(number * self.step, (number + 1) * self.step)

    def _measure(self, number: int) -> _Facts:
        rows = self.block(number).rows
        plain = on_grid(self.features[self._places(number)])
        return _Facts(plain, norm_of(exact_square(rows)), Bf16Generator.residual_norm(rows) if self.bf16 else 0.0)


def join_blocks(
    comm: Comm,
    features: np.ndarray,
    ids: np.ndarray,
    k: int,
    *,
    block_rows: int,
    device: torch.device,
    bf16: bool | None = None,
    kept_bytes: int | None = None,
) -> Blocks:
    """This rank's rows by blocks; raises ValueError on all ranks where the rows of one are not valid."""
    if k < 1 or block_rows < 1:
        raise ValueError(f"k and block_rows must be at least 1, got {k} and {block_rows}")
    raise_together(comm, _problem(features, ids, block_rows))
    dim = _dimension(comm, features)
    return Blocks.of(features, ids, dim, block_rows, device=device, bf16=bf16, kept_bytes=kept_bytes)


def _dimension(comm: Comm, features: np.ndarray) -> int:
    """D, also on a rank without rows."""
    own = torch.tensor([features.shape[1] if len(features) else 0], device=wire_device(comm))
    dims = sorted({int(d) for d in comm.gather(own)} - {0})
    if len(dims) > 1:
        raise ValueError(f"features must have the same dimension on every rank, found {dims}")
    return dims[0] if dims else 1


def _problem(features: np.ndarray, ids: np.ndarray, block_rows: int) -> str:
    """What is wrong with this rank's rows, naming the row id; "" when nothing is."""
    if features.ndim != 2 or features.dtype != np.float32:
        return f"features must be (rows, dimensions) float32, found {features.shape} {features.dtype}"
    if ids.shape != (len(features),) or ids.dtype != np.int64:
        return f"ids must be ({len(features)},) int64, found {ids.shape} {ids.dtype}"
    if (falls := np.flatnonzero(ids[1:] <= ids[:-1])).size:
        return f"ids must be ascending, found {ids[falls[0] + 1]} after {ids[falls[0]]}"
    for start in range(0, len(ids), block_rows):
        block = features[start : start + block_rows]
        if found := row_problem(block, np.ones(len(block), dtype=bool)):
            return f"features: row {ids[start + found[0]]} {found[1]}"
    return ""


@dataclass(frozen=True)
class _Ring:
    """The search on one of the ranks."""

    comm: Comm
    own: Blocks
    best: list[Neighbours]  # of each own block
    k: int

    def by_copies(self) -> None:
        """Every block visits all ranks; each searches it for the neighbours of its own rows."""
        for number in range(self._most_blocks()):
            travelling = self.own.block(number)  # an empty block where this rank has no more
            for hop in range(self.comm.size):
                if hop:
                    travelling = Block(self._moved(travelling.rows, 1), self._moved(travelling.ids, 1))
                for _ in in_flight(self._extend(i, travelling) for i in range(len(self.best))):
                    pass

    def _extend(self, number: int, targets: Block) -> Work[None]:
        self.best[number] = yield from extend_dense(self.best[number], self.own.block(number), targets)

    def by_pairs(self) -> None:
        """Every pair of blocks is compared once, on the rank of one of them, which returns the other's new neighbours.

        So only half of the products of all rows with all rows are computed. A block goes to the ranks of the first half
        of the ring ahead; of two ranks that are opposite to each other, each takes every other pair of their blocks.
        """
        own, blocks = self.own, range(len(self.own))
        self._each(lambda i, a: [search_within(own.side(i), a)], [(i,) for i in blocks], self.best)
        self._each(
            lambda i, j, a, b: search_both_ways(own.side(i), own.side(j), (a, b)),
            [(i, j) for j in blocks for i in range(j)],
            self.best,
        )
        for number in range(self._most_blocks() if self.comm.size > 1 else 0):
            for hop in range(1, self.comm.size // 2 + 1):
                self._compare(number, hop)

    def _compare(self, number: int, hop: int) -> None:
        """Own blocks against one block of the rank `hop` before ours."""
        mine = self.own.block(number)
        least = self.best[number].scores[:, -1] if len(mine.ids) else torch.zeros(0, dtype=torch.float64)
        rows, ids, least = (self._moved(t, hop) for t in (mine.rows, mine.ids, least))
        theirs, home = Side.of(Block(rows, ids), bf16=self.own.bf16), Neighbours.none(len(ids), self.k)
        known = Neighbours(least[:, None].expand(-1, self.k), home.ids)
        turn = 2 * hop != self.comm.size
        first = self.comm.rank < hop  # of two opposite ranks
        tasks = [(i, len(self.best)) for i in range(len(self.best)) if turn or ((i + number) % 2 == 0) == first]
        lists = [*self.best, home]
        self._each(lambda i, _, a, __: search_both_ways(self.own.side(i), theirs, (a, known)), tasks, lists)
        back = Neighbours(self._moved(home.scores, -hop), self._moved(home.ids, -hop))
        if len(mine.ids):
            Found(torch.arange(len(mine.ids)), back).merge_into(self.best[number])

    def _each(
        self,
        work: Callable[..., Sequence[Sequence[Found]]],
        tasks: Sequence[tuple[int, ...]],
        lists: list[Neighbours],
    ) -> None:
        """Works on tuples of blocks in parallel, and merges the neighbours found into the list of each of them.

        A task sees the lists as of its start; older lists cost time but do not change the result.
        """
        items = ((*task, *(_copy(lists[i]) for i in task)) for task in tasks)
        done = side_by_side(lambda item: work(*item), items, torch.get_num_threads())
        for task, found in zip(tasks, done, strict=True):
            for i, parts in zip(task, found, strict=True):
                for part in parts:
                    part.merge_into(lists[i])

    def _most_blocks(self) -> int:
        number = torch.tensor([len(self.own)], device=wire_device(self.comm))
        return int(torch.cat(self.comm.gather(number)).max())

    def _moved(self, tensor: Tensor, by: int) -> Tensor:
        return self.comm.shift(tensor.to(wire_device(self.comm)), by).to(tensor.device)


def _copy(best: Neighbours) -> Neighbours:
    return Neighbours(best.scores.clone(), best.ids)
