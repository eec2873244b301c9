"""The good rows of one rank on its device: as many as fit stay there, the others come from pinned memory in every pass.

A pass goes over blocks of rows in order. Blocks that do not stay are read and copied in a thread while earlier ones are
worked on: the next one is in pinned memory, and the copy of another overlaps the products of the one before it.

Shapes: n good rows of this rank, m of them that stay, P of one block, D dimensions, E columns of their form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from grappa_dist.prefetch import prefetch
from grappa_dist.search.bf16 import TritonGenerator
from grappa_dist.search.candidates import CandidateGenerator, Float32Generator, joined
from grappa_dist.search.dense import DenseRows
from grappa_dist.search.fixed_point import GRID, exact_square
from grappa_dist.search.in_flight import sent

SHARE = 0.6  # of the device's free memory for rows; the rest is for centroids, sums, tables and blocks on their way
_BLOCK_BYTES = 2**28  # of the rows of one block, at most
_BLOCKS = 8  # that the bytes for rows hold, at least
_READ_AHEAD = 2  # blocks in pinned memory


class HostRows(Protocol):
    """The rows in host memory (distributed/sharded_rows.py)."""

    @property
    def num_good(self) -> int: ...

    def positions(self, block_rows: int) -> Iterator[Tensor]: ...

    def pieces(self, positions: Tensor, plain: Sequence[bool]) -> list[Tensor]: ...


@dataclass(frozen=True)
class DeviceBlock:
    """Some good rows of a rank, consecutive among these, on the device."""

    positions: Tensor  # (P,) among all of the rank's rows, ascending, in host memory
    places: slice  # among its good rows
    rows: DenseRows

    def at(self) -> Tensor | slice:
        """The positions as an index of a tensor on the device: a range where no bad row lies between."""
        first, num = int(self.positions[0]), len(self.positions)
        if int(self.positions[-1]) - first == num - 1:
            return slice(first, first + num)
        return sent(self.positions, self.rows.x.device)


@dataclass(frozen=True)
class DeviceRows:
    """See the head of this file."""

    host: HostRows
    plain: tuple[bool, ...]
    device: torch.device
    dim: int
    num_bytes: int  # for rows
    block_rows: int
    generator: CandidateGenerator
    x: Tensor  # (m, D), whole blocks
    form: Tensor | None  # (m, E), where the generator is the kernel's
    squares: Tensor  # (n,) float64, exact |x|^2

    @property
    def num_kept(self) -> int:
        return len(self.x)

    def describe(self) -> str:
        """How many rows stay, as text."""
        kept, num = self.num_kept, self.host.num_good
        size = f"{(self.x.nbytes + (0 if self.form is None else self.form.nbytes)) / 2**30:.1f} GiB"
        others = "" if kept == num else ", the others are read again in every pass"
        return f"{kept:,} of {num:,} rows stay on {self.device} ({size}){others}"

    def blocks(self) -> Generator[DeviceBlock, None, None]:
        """All good rows, in order."""
        places = self._places()
        staged = (
            map(self._stage, places)
            if self.num_kept == self.host.num_good
            else prefetch(self._stage, places, threads=1, depth=_READ_AHEAD)
        )
        for positions, some, host in staged:
            x = self.x[some] if host is None else _uploaded(host, self.device)
            form = self.form_of(x) if host is not None or self.form is None else self.form[some]
            yield DeviceBlock(positions, some, DenseRows(x, self.squares[some], form))

    def kept_at(self, places: Tensor) -> Tensor | None:
        """Rows (m, D) at ascending places (m,) among the good rows, in host memory; None where some are not kept."""
        if not len(places) or int(places[-1]) >= self.num_kept:
            return None
        first, num = int(places[0]), len(places)
        if int(places[-1]) - first == num - 1:
            return self.x[first : first + num]
        return self.x.index_select(0, sent(places, self.device))

    def _places(self) -> Iterator[tuple[Tensor, slice]]:
        first = 0
        for positions in self.host.positions(self.block_rows):
            yield positions, slice(first, first + len(positions))
            first += len(positions)

    def _stage(self, block: tuple[Tensor, slice]) -> tuple[Tensor, slice, Tensor | None]:
        positions, places = block
        if places.stop <= self.num_kept:
            return positions, places, None
        x = joined(self.host.pieces(positions, self.plain))
        return positions, places, x.pin_memory() if self.device.type == "cuda" else x

    def form_of(self, x: Tensor) -> Tensor | None:
        """The form of some rows, where the generator needs one."""
        return self.generator.row_form(x) if isinstance(self.generator, TritonGenerator) else None


def _uploaded(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made on a stream of its own."""
    if device.type != "cuda":
        return host
    current, copies = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copies):
        x = host.to(device, non_blocking=True)
    current.wait_stream(copies)
    x.record_stream(current)
    return x


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def memory_for_rows(device: torch.device) -> int:
    """Bytes that rows may take on a device: a share of what is free."""
    return int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 2**40


@dataclass(frozen=True)
class Placement:
    """What is chosen before rows are placed on a device."""

    num_bytes: int  # for rows
    block_rows: int | None = None  # by default as many as a block of fair size has
    kernel: bool = False  # whether bfloat16 products by the fused kernel are used

    def place(
        self,
        host: HostRows,
        plain: tuple[bool, ...],
        *,
        dim: int,
        device: torch.device,
        pieces: Callable[[Generator[DeviceBlock, None, None]], Iterator[DeviceBlock]] = lambda blocks: blocks,
    ) -> DeviceRows:
        """The rows on the device, after one pass that copies them and computes their squared norms.

        Args:
            pieces: passes the blocks on, and may stop.
        """
        form = TritonGenerator(0.0) if self.kernel else Float32Generator()
        width = 0
        if isinstance(form, TritonGenerator):
            width = form.row_form(torch.zeros(1, max(1, dim))).shape[1]
        row_bytes = max(1, 4 * dim + 2 * width)
        step = self.block_rows or max(1, min(_BLOCK_BYTES, self.num_bytes // _BLOCKS) // row_bytes)
        kept = 0
        for positions in host.positions(step):  # whole blocks
            if (kept + len(positions)) * row_bytes > self.num_bytes:
                break
            kept += len(positions)
        rows = DeviceRows(
            host=host,
            plain=plain,
            device=device,
            dim=dim,
            num_bytes=self.num_bytes,
            block_rows=step,
            generator=form,
            x=torch.empty(0, dim, device=device),
            form=torch.empty(0, width, dtype=torch.bfloat16, device=device) if self.kernel else None,
            squares=torch.zeros(host.num_good, dtype=torch.float64, device=device),
        )
        return _filled(rows, kept, pieces)


def _filled(
    rows: DeviceRows, kept: int, pieces: Callable[[Generator[DeviceBlock, None, None]], Iterator[DeviceBlock]]
) -> DeviceRows:
    """Copies the first rows, computes squared norms of all, and what bfloat16 takes from them at most."""
    x = torch.empty(kept, rows.dim, device=rows.device)
    form = None if rows.form is None else rows.form.new_empty(kept, rows.form.shape[1])
    largest = torch.zeros(1, dtype=torch.float64, device=rows.device)
    for block in pieces(rows.blocks()):
        some, of_block = block.places, block.rows
        rows.squares[some] = exact_square(of_block.x)
        if some.stop <= kept:
            x[some] = of_block.x
        if of_block.form is not None:
            left_out = exact_square(of_block.x - of_block.form[:, : rows.dim].float())
            largest = torch.maximum(largest, left_out.max())
            if form is not None and some.stop <= kept:
                form[some] = of_block.form
    generator = rows.generator
    if isinstance(generator, TritonGenerator):
        generator = replace(generator, residual=math.sqrt(float(largest)) / GRID)
    return replace(rows, x=x, form=form, generator=generator)
