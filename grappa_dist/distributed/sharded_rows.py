"""The rows of one rank in their shards, their place among the rows of all ranks, and passes and sums over all ranks.

Ranks hold the rows in rank order, so a row's place among all rows does not depend on the split. Every number that
travels is an integer. Before anything is computed, every row is checked.

Shapes: P rows of one block, D dimensions.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm, Grid, raise_together, wire_device
from grappa_dist.distributed.device_rows import DeviceBlock, DeviceRows, Placement, memory_for_rows
from grappa_dist.distributed.worker import until_all_ranks_finish
from grappa_dist.prefetch import prefetch
from grappa_dist.search.backends import bf16_generator, bf16_is_faster, nearest
from grappa_dist.search.bf16 import Bf16Generator
from grappa_dist.search.candidates import CandidateGenerator, Float32Generator, joined
from grappa_dist.search.fixed_point import GRID, LARGEST, NORM_LIMIT, exact_square, to_grid
from grappa_dist.search.in_flight import Work, in_flight, sent
from grappa_dist.storage import allocate

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK_ROWS = 16384  # rows worked on at once: enough that their products outweigh the calls around them
PIECE = 2**16  # rows processed together where only integers per row are read
_RUN = 32  # mean length of a run of consecutive rows; shorter runs are copied together instead of viewed one by one
_GRID_ROWS = 128  # rows checked at once, in a core's cache


@dataclass(frozen=True)
class Scanned:
    """What a check of some rows of a shard found."""

    shard: int
    problem: str  # the first row at fault, "" for none
    plain: bool  # they can be used as stored: all are on the grid, good or not


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

    def labels_by_shard(self, labels: np.ndarray) -> list[np.ndarray]:
        """Labels of the good rows, (n,), as those of all rows of each shard, (P,) int32, -1 for bad rows."""
        parts, first = [], 0
        for good in self.good:
            part, num = np.full(len(good), -1, dtype=np.int32), int(good.sum())
            part[good] = labels[first : first + num]
            parts.append(part)
            first += num
        return parts

    @cached_property
    def good_before(self) -> np.ndarray:
        """How many good rows come before each of the rows, (rows,) int64."""
        good = np.concatenate([*self.good, np.zeros(0, dtype=bool)])
        before: np.ndarray = np.cumsum(good) - good
        return before

    @cached_property
    def starts(self) -> np.ndarray:
        """Position of the first row of every shard and, last, the number of rows."""
        return np.cumsum([0, *(len(shard) for shard in self.shards)])

    def positions(self, block_rows: int, threads: int = 1) -> Iterator[Tensor]:
        """Positions of the good rows among the rank's rows, ascending, (P,) int64 by blocks; no row is read.

        Blocks are of about the same size, span shards, and their number is about a multiple of the threads.
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

        Consecutive rows of one plain shard are a view: a memory map is read only where it is used. A few bad rows only
        make more views; rows that are mostly not consecutive are copied, once, into one piece.

        Args:
            plain: for each shard whether it lies on the grid as stored; by default all rows are rounded to the grid.
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
        """The first shard with any of the ascending positions, and the first of them in it and in each later shard."""
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
        """What is wrong with the shapes of a shard, by its name; "" when nothing is. No row is read."""
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
        """Checks every row of one of `parts`."""
        i, some = part
        rows = self.shards[i][some]
        found = row_problem(rows, self.good[i][some])
        problem = f"{self._name(i)}: row {some.start + found[0]} {found[1]}" if found else ""
        return Scanned(i, problem, plain=not problem and on_grid(rows))

    def _name(self, shard: int) -> str:
        return self.names[shard] if self.names else f"shard {shard}"


def as_tensor(rows: np.ndarray) -> Tensor:
    """The same memory; a copy where it is read-only, which torch does not support."""
    return torch.from_numpy(rows if rows.flags.writeable else np.array(rows))


def _even_step(num: int, most: int, threads: int) -> int:
    """Rows per block, such that the number of blocks is about a multiple of the threads where there are several."""
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


def never_stop() -> bool:
    """The default of `stop_requested`."""
    return False


@dataclass(frozen=True)
class RowBlock:
    """Some good rows of a rank, which are read on demand."""

    positions: Tensor  # (P,) among the rank's rows, in host memory
    places: slice  # among its good rows
    squares: Tensor  # (P,) float64, exact |x|^2
    read: Callable[[Tensor], list[Tensor]]  # ascending positions -> grid rows on the device, in pieces

    def take(self, rows: Tensor) -> list[Tensor]:
        """Grid rows at ascending places in the block: pieces (p, D) in order, not yet copied together."""
        return self.read(self.positions[rows.cpu()])

    @property
    def x(self) -> Tensor:
        """All of them, (P, D)."""
        return joined(self.read(self.positions))


@dataclass(frozen=True)
class ShardedRows:
    """The rows of this rank, with their place among the rows of all ranks, and the passes and sums over all ranks."""

    comm: Comm
    rows: Rows
    dim: int
    first: int  # place of this rank's first row among all
    num_good: int  # over all ranks
    block_rows: int
    device: torch.device
    plain: tuple[bool, ...]  # which of the rank's shards lie on the grid as stored
    threads: int  # blocks worked on at the same time; 1 on a GPU, which is parallel itself
    squares: Tensor  # (good rows,) float64, exact |x|^2 in units of 2**-48; scratch, or on the device
    generator: CandidateGenerator
    stop_requested: Callable[[], bool] = never_stop  # of this rank
    dense: DeviceRows | None = None  # on a device, where passes compare all rows with all centroids (search/dense.py)

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """The results of `work` for this rank's items, in their order; ends when all ranks have done theirs.

        All ranks call it together, for a pass over their rows. There is no collective inside of it, so the others wait
        for a slower rank only at the end.

        Raises:
            Stopped: on all ranks, between two items, when a stop was requested on any of them.
        """
        return until_all_ranks_finish(self.comm, side_by_side(work, items, self.threads), self.stop_requested)

    def read(self, positions: Tensor) -> Tensor:
        """Grid rows (P, D) on the device at some ascending positions among the rank's rows."""
        return joined(self.pieces(positions))

    def pieces(self, positions: Tensor) -> list[Tensor]:
        """The same in pieces (p, D), in order; a single piece on a GPU."""
        if not len(positions):
            return [torch.zeros(0, self.dim, device=self.device)]
        if self.dense is not None and (kept := self.dense.kept_at(self._places_of(positions))) is not None:
            return [kept]
        pieces = self.rows.pieces(positions, self.plain)
        return pieces if self.device.type == "cpu" else [sent(joined(pieces), self.device)]

    def _places_of(self, positions: Tensor) -> Tensor:
        """Places among the good rows of positions of such rows."""
        if self.rows.num_good == len(self.rows):
            return positions
        return torch.from_numpy(self.rows.good_before)[positions.cpu()]

    def passes(self, work: Callable[[DeviceBlock], Work[Result]]) -> Generator[Result, None, None]:
        """As `each`, for the blocks of `dense`, several of them under way."""
        assert self.dense is not None
        works = in_flight(map(work, self.dense.blocks()))
        return until_all_ranks_finish(self.comm, works, self.stop_requested)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions (P,) among the rank's rows, in host memory, and grid rows (P, D) on the device."""
        return ((block.positions, block.x) for block in self.row_blocks())

    def good_positions(self) -> Iterator[Tensor]:
        """Positions of the good rows, ascending, piece by piece; no row is read."""
        return self.rows.positions(PIECE)

    def row_blocks(self) -> Iterator[RowBlock]:
        """The good rows by blocks."""
        first = 0
        for positions in self.rows.positions(self.block_rows, self.threads):
            places = slice(first, first + len(positions))
            yield RowBlock(positions, places, self.squares[places].to(self.device), self.pieces)
            first += len(positions)

    def check_labels(self, num: int) -> None:
        """Raises ValueError where there are fewer good rows than labels, or no label."""
        if not 1 <= num <= self.num_good:
            raise ValueError(f"num_labels must be from 1 to the number of good rows, {self.num_good}, got {num}")

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, of integers or of values that only one rank has; `tensor` may be overwritten."""
        if self.comm.size == 1:
            return tensor
        return self.comm.sum_(tensor.to(wire_device(self.comm))).to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, by rank."""
        if self.comm.size == 1:
            return [tensor]
        return [part.to(tensor.device) for part in self.comm.gather(tensor.to(wire_device(self.comm)))]


def join_rows(
    comm: Comm,
    rows: Rows,
    *,
    block_rows: int | None = None,
    device: torch.device,
    stop_requested: Callable[[], bool] = never_stop,
    dense_bytes: int | None = None,
) -> ShardedRows:
    """This rank's `ShardedRows`, after the rows of all ranks have been checked.

    Args:
        block_rows: rows worked on at once; by default `BLOCK_ROWS`, and on a GPU what a block of fair size has.
        dense_bytes: passes are `dense`, rows of so many bytes stay on the device; by default only on a GPU.

    Raises:
        ValueError: on all ranks, naming the shard and the row, where one rank's rows are not valid.
        Stopped: on all ranks, when a stop was requested on any of them.
    """
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    raise_together(comm, rows.problem())
    plain = _scanned(comm, rows, block_rows or BLOCK_ROWS, stop_requested)
    first, num_good, dim = _among_all_ranks(comm, rows)
    sharded = ShardedRows(
        comm=comm,
        rows=rows,
        dim=dim,
        first=first,
        num_good=num_good,
        block_rows=block_rows or BLOCK_ROWS,
        device=device,
        plain=plain,
        threads=torch.get_num_threads(),
        squares=scratch((0,), torch.float64),
        generator=Float32Generator(nearest),
        stop_requested=stop_requested,
    )
    on_device = device.type == "cuda" or dense_bytes is not None
    return _on_device(sharded, block_rows, dense_bytes) if on_device else _with_squares(sharded)


def _with_squares(sharded: ShardedRows) -> ShardedRows:
    sharded = replace(sharded, squares=scratch((sharded.rows.num_good,), torch.float64))
    return replace(sharded, generator=_fill_squares(sharded))


@dataclass(frozen=True)
class GridRows:
    """The rows of a rank whose centroids are sharded: its own, and those of all ranks that share rows with it."""

    grid: Grid
    own: ShardedRows
    shared: ShardedRows  # passes over them are those of all ranks; sums over ranks count them once per slice
    good_before: int  # good shared rows before its own

    @staticmethod
    def of(own: ShardedRows, grid: Grid, rows: Rows) -> GridRows:
        """After one pass over the shared rows, which were checked when they were joined. All ranks call it together.

        Args:
            rows: those of all ranks that share rows with this one, in the order of these.

        Raises:
            Stopped: on all ranks, when a stop was requested on any of them.
        """
        assert own.dense is None, "centroids are sharded on CPUs only"
        ranks, wire = grid.sharing_rows, wire_device(own.comm)
        nums = torch.cat(ranks.gather(torch.tensor([own.rows.num_good], device=wire))).tolist()
        plain = torch.cat(ranks.gather(torch.tensor(own.plain, dtype=torch.uint8, device=wire)))
        assert (sum(nums), len(plain)) == (rows.num_good, len(rows.shards))
        shared = _with_squares(replace(own, rows=rows, plain=tuple(map(bool, plain.tolist()))))
        return GridRows(grid, own, shared, sum(nums[: ranks.rank]))


def _among_all_ranks(comm: Comm, rows: Rows) -> tuple[int, int, int]:
    """This rank's first place among all rows, how many good rows there are, and D, also on a rank without rows."""
    dim = rows.shards[0].shape[1] if rows.shards else 0
    facts = torch.tensor([[len(rows), rows.num_good, dim]], device=wire_device(comm))
    table = torch.cat(comm.gather(facts)).cpu()  # (ranks, 3)
    dims = sorted({int(d) for d in table[:, 2]} - {0})
    if len(dims) > 1:
        raise ValueError(f"rows must have the same dimension on every rank, found {dims}")
    return int(table[: comm.rank, 0].sum()), int(table[:, 1].sum()), dims[0] if dims else 0


def _on_device(sharded: ShardedRows, block_rows: int | None, num_bytes: int | None) -> ShardedRows:
    """The same with its rows on the device, as far as they fit."""
    device = sharded.device
    num_bytes = memory_for_rows(device) if num_bytes is None else num_bytes

    def pieces(blocks: Generator[DeviceBlock, None, None]) -> Generator[DeviceBlock, None, None]:
        return until_all_ranks_finish(sharded.comm, blocks, sharded.stop_requested)

    placement = Placement(num_bytes, block_rows, kernel=device.type == "cuda" and bf16_is_faster(device))
    dense = placement.place(sharded.rows, sharded.plain, dim=sharded.dim, device=device, pieces=pieces)
    generator = dense.generator if dense.form is not None else sharded.generator
    return replace(
        sharded, dense=dense, squares=dense.squares, generator=generator, block_rows=dense.block_rows, threads=1
    )


def _scanned(comm: Comm, rows: Rows, block_rows: int, stop_requested: Callable[[], bool]) -> tuple[bool, ...]:
    """Which shards lie on the grid as stored; raises on all ranks where a rank finds an invalid row."""
    problem, plain = "", [True] * len(rows.shards)
    scans = side_by_side(rows.scan, rows.parts(block_rows), torch.get_num_threads())
    for scanned in until_all_ranks_finish(comm, _to_first_problem(scans), stop_requested):
        problem = scanned.problem
        plain[scanned.shard] &= scanned.plain
    raise_together(comm, problem)
    return tuple(plain)


def _to_first_problem(scans: Generator[Scanned, None, None]) -> Generator[Scanned, None, None]:
    with closing(scans):
        for scanned in scans:
            yield scanned
            if scanned.problem:
                return


def _fill_squares(sharded: ShardedRows) -> CandidateGenerator:
    """Fills in the rows' exact squared norms, in place; the faster candidate generator for them on this machine."""
    bf16 = bf16_is_faster(sharded.device)

    def measure(positions: Tensor) -> tuple[Tensor, float]:
        pieces = sharded.rows.pieces(positions, sharded.plain)
        residual = max(map(Bf16Generator.residual_norm, pieces)) if bf16 else 0.0
        return torch.cat([exact_square(x) for x in pieces]), residual

    positions = sharded.rows.positions(sharded.block_rows, sharded.threads)
    measured = side_by_side(measure, positions, torch.get_num_threads())
    first, residual = 0, 0.0
    for of_block, residual_of_block in until_all_ranks_finish(sharded.comm, measured, sharded.stop_requested):
        sharded.squares[first : first + len(of_block)] = of_block
        first, residual = first + len(of_block), max(residual, residual_of_block)
    return bf16_generator(sharded.device, residual) if bf16 else sharded.generator


def side_by_side(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """Results in the order of the items, computed on several threads; at most two items per thread are held at a time.

    Until the last result is taken, torch and faiss use one thread in the caller too: otherwise its operations would
    wait for busy cores.
    """
    if threads == 1:
        yield from map(function, items)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield from prefetch(
            function, items, threads=threads, depth=2 * threads - 1, start_thread=lambda: torch.set_num_threads(1)
        )
    finally:
        torch.set_num_threads(before)


def scratch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the CPU, in an unnamed file of the temporary folder (TMPDIR) instead of process memory.

    The operating system caches it in memory as far as possible and writes the rest to disk. Nothing is left behind,
    however the process ends.

    Raises:
        OSError: the disk is too full.
    """
    if not math.prod(shape):
        return torch.zeros(shape, dtype=dtype)
    numbers: np.dtype = torch.zeros(0, dtype=dtype).numpy().dtype
    num_bytes = math.prod(shape) * numbers.itemsize
    with tempfile.TemporaryFile(prefix="grappa-") as file:
        where = f"{tempfile.gettempdir()}: {num_bytes:,} bytes of scratch"
        allocate(file.fileno(), num_bytes, where, "TMPDIR names another place")
        return torch.from_numpy(np.memmap(file, dtype=numbers, mode="r+", shape=shape))
