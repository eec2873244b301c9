"""The rows of one rank, and what all ranks know about the rows of all.

Ranks hold the rows in rank order, so a row's place among all rows does not depend on the split. Every number that
travels is an integer.

Shapes: P rows of one block, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from grappa_dist.distributed.collectives import Comm, raise_together, wire_device
from grappa_dist.distributed.long_work import beside_others
from grappa_dist.distributed.rows import Rows, Scanned
from grappa_dist.distributed.scratch import scratch
from grappa_dist.distributed.threads import side_by_side
from grappa_dist.distributed.trial import half_proposer, halves_pay
from grappa_dist.search.backends import nearest
from grappa_dist.search.bf16 import HalfProposer
from grappa_dist.search.candidates import FloatProposer, Proposer, joined
from grappa_dist.search.fixed_point import exact_square

BLOCK_ROWS = 16384  # rows worked on at once: enough that their products outweigh the calls around them
PIECE = 2**16  # rows looked at at once, by integers alone

Item = TypeVar("Item")
Result = TypeVar("Result")


def never() -> bool:
    """Nobody asks to stop."""
    return False


@dataclass(frozen=True)
class RowBlock:
    """Some good rows of a rank, read when they are asked for."""

    positions: Tensor  # (P,) among the rank's rows, in host memory
    places: slice  # among its good rows
    squares: Tensor  # (P,) float64, exact |x|^2
    read: Callable[[Tensor], list[Tensor]]  # ascending positions -> grid rows on the device, in pieces

    def take(self, rows: Tensor) -> list[Tensor]:
        """Grid rows at ascending places in the block: pieces (p, D) in order, which nobody has copied together yet."""
        return self.read(self.positions[rows.cpu()])

    @property
    def x(self) -> Tensor:
        """All of them, (P, D)."""
        return joined(self.read(self.positions))


@dataclass(frozen=True)
class Share:
    """The rows of this rank, and what all ranks know about the rows of all."""

    comm: Comm
    rows: Rows
    dim: int
    first: int  # place of this rank's first row among all
    num_good: int  # over all ranks
    block_rows: int
    device: torch.device
    plain: tuple[bool, ...]  # which of the rank's shards need no preparation
    threads: int  # so many blocks are worked on side by side; a GPU has threads of its own
    squares: Tensor  # (good rows,) float64 scratch, exact |x|^2 in units of 2**-48
    proposer: Proposer
    stop_requested: Callable[[], bool] = never  # of this rank

    def each(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """What `work` makes of this rank's items, in their order; ends when all ranks have done theirs.

        All ranks call it together, for a pass over their rows. None of them meets another inside of it, so one that is
        slower than the others may take its time.

        Raises:
            Stopped: on all ranks, between two items, when any was asked to stop.
        """
        return beside_others(self.comm, side_by_side(work, items, self.threads), self.stop_requested)

    def read(self, positions: Tensor) -> Tensor:
        """Grid rows (P, D) on the device at some ascending positions among the rank's rows."""
        return joined(self.pieces(positions))

    def pieces(self, positions: Tensor) -> list[Tensor]:
        """The same in pieces (p, D), in order; a GPU gets them in one."""
        if not len(positions):
            return [torch.zeros(0, self.dim, device=self.device)]
        pieces = self.rows.pieces(positions, self.plain)
        return pieces if self.device.type == "cpu" else [joined(pieces).to(self.device)]

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
        """Raises where the rows of all ranks cannot have so many labels."""
        if not 1 <= num <= self.num_good:
            raise ValueError(f"num_labels must be from 1 to the number of good rows, {self.num_good}, got {num}")

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, of integers or of what one rank alone has; `tensor` may serve as room for it."""
        return self.comm.sum_(tensor.to(wire_device(self.comm))).to(tensor.device)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [part.to(tensor.device) for part in self.comm.gather(tensor.to(wire_device(self.comm)))]


def join_rows(
    comm: Comm,
    rows: Rows,
    *,
    block_rows: int = BLOCK_ROWS,
    device: torch.device,
    stop_requested: Callable[[], bool] = never,
) -> Share:
    """This rank's share, once every rank's rows are fit for it."""
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    raise_together(comm, rows.problem())
    plain = _scanned(comm, rows, block_rows, stop_requested)
    dim = rows.shards[0].shape[1] if rows.shards else 0
    facts = torch.tensor([[len(rows), rows.num_good, dim]], device=wire_device(comm))
    table = torch.cat(comm.gather(facts)).cpu()  # (ranks, 3)
    dims = sorted({int(d) for d in table[:, 2]} - {0})
    if len(dims) > 1:
        raise ValueError(f"rows must have the same dimension on every rank, found {dims}")
    first, num_good = int(table[: comm.rank, 0].sum()), int(table[:, 1].sum())
    share = Share(
        comm=comm,
        rows=rows,
        dim=dims[0] if dims else 0,
        first=first,
        num_good=num_good,
        block_rows=block_rows,
        device=device,
        plain=plain,
        threads=1 if device.type == "cuda" else torch.get_num_threads(),
        squares=scratch((rows.num_good,), torch.float64),
        proposer=FloatProposer(nearest),
        stop_requested=stop_requested,
    )
    return replace(share, proposer=_measure(share))


def _scanned(comm: Comm, rows: Rows, block_rows: int, stop_requested: Callable[[], bool]) -> tuple[bool, ...]:
    """Which shards are plain, once every rank has looked at all of its rows and none has found one at fault."""
    problem, plain = "", [True] * len(rows.shards)
    scans = side_by_side(rows.scan, rows.parts(block_rows), torch.get_num_threads())
    for scanned in beside_others(comm, _to_first_problem(scans), stop_requested):
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


def _measure(share: Share) -> Proposer:
    """Fills in the rows' exact squared norms; the faster way to propose centroids to them on this machine."""
    halves = halves_pay(share.device)

    def measure(positions: Tensor) -> tuple[Tensor, float]:
        pieces = share.rows.pieces(positions, share.plain)
        rest = max(map(HalfProposer.left_out, pieces)) if halves else 0.0
        return torch.cat([exact_square(x) for x in pieces]), rest

    positions = share.rows.positions(share.block_rows, share.threads)
    measured = side_by_side(measure, positions, torch.get_num_threads())
    first, rest = 0, 0.0
    for of_block, left_out in beside_others(share.comm, measured, share.stop_requested):
        share.squares[first : first + len(of_block)] = of_block
        first, rest = first + len(of_block), max(rest, left_out)
    return half_proposer(share.device, rest) if halves else share.proposer
