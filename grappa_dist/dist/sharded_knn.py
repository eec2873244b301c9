"""The exact k-NN graph of rows spread over the ranks of one job: blocks of rows travel, lists of neighbours stay.

The result is that of brute force with exact scores, bit for bit, on any number of ranks and for any block size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from grappa_dist.dist.comm import Comm
from grappa_dist.dist.search import largest, raise_together, row_problem, wire_device
from grappa_dist.ops.exact import to_grid
from grappa_dist.ops.knn import Block, Neighbours, extend, to_scores


def sharded_knn(
    comm: Comm,
    features: np.ndarray,
    ids: np.ndarray,
    k: int,
    *,
    block_rows: int = 8192,
    device: torch.device | str = "cpu",
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest other rows of each own row: row ids (P, k) int64 and inner products (P, k) float32, best first.

    Equal inner products are in the order of row ids; where fewer than k other rows exist, id -1 and score -inf fill up.

    Args:
        features: own unit rows (P, D) float32, possibly memory-mapped, possibly none; bad rows left out.
        ids: their row ids (P,) int64, different over all ranks.
        block_rows: rows that travel, and rows compared with them, at once; memory, not the result, depends on it.
    """
    if k < 1 or block_rows < 1:
        raise ValueError(f"k and block_rows must be at least 1, got {k} and {block_rows}")
    raise_together(comm, _problem(features, ids, block_rows))
    own = Blocks(features, ids, _dimension(comm, features), block_rows, torch.device(device))
    best = [Neighbours.none(len(some.ids), k, device) for some in own]
    counts = comm.gather(torch.tensor([len(own)], device=wire_device(comm)))
    for number in range(int(torch.cat(counts).max())):
        travelling = own[number]  # an empty block where this rank has no more
        for hop in range(comm.size):
            if hop:
                travelling = _shift(comm, travelling)
            targets = Block.of(travelling.rows, travelling.ids)
            best = [extend(so_far, queries, targets, largest) for so_far, queries in zip(best, own, strict=True)]
    if not best:
        return np.zeros((0, k), dtype=np.int64), np.zeros((0, k), dtype=np.float32)
    return torch.cat([b.ids for b in best]).cpu().numpy(), torch.cat([to_scores(b) for b in best]).cpu().numpy()


@dataclass(frozen=True)
class Blocks:
    """Own rows by blocks on the device, each put on the grid when asked for."""

    features: np.ndarray  # (P, D) float32
    ids: np.ndarray  # (P,) int64
    dim: int
    block_rows: int
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.ids) // self.block_rows)

    def __getitem__(self, number: int) -> Block:
        some = slice(number * self.block_rows, (number + 1) * self.block_rows)
        rows = torch.from_numpy(np.array(self.features[some])).reshape(-1, self.dim)
        return Block(to_grid(rows).to(self.device), torch.from_numpy(np.array(self.ids[some])).to(self.device))

    def __iter__(self) -> Iterator[Block]:
        return (self[number] for number in range(len(self)))


def _shift(comm: Comm, block: Block) -> Block:
    wire, device = wire_device(comm), block.ids.device
    rows, ids = (comm.shift(t.to(wire)).to(device) for t in (block.rows, block.ids))
    return Block(rows, ids)


def _dimension(comm: Comm, features: np.ndarray) -> int:
    """D, also where this rank has no row to tell."""
    told = torch.tensor([features.shape[1] if len(features) else 0], device=wire_device(comm))
    dims = sorted({int(d) for d in comm.gather(told)} - {0})
    if len(dims) > 1:
        raise ValueError(f"features must have the same dimension on every rank, found {dims}")
    return dims[0] if dims else 1


def _problem(features: np.ndarray, ids: np.ndarray, block_rows: int) -> str:
    """What is wrong with this rank's rows, naming the row id; "" when nothing is."""
    if features.ndim != 2 or features.dtype != np.float32:
        return f"features must be (rows, dimensions) float32, found {features.shape} {features.dtype}"
    if ids.shape != (len(features),) or ids.dtype != np.int64:
        return f"ids must be ({len(features)},) int64, found {ids.shape} {ids.dtype}"
    for start in range(0, len(ids), block_rows):
        block = features[start : start + block_rows]
        if found := row_problem(block, np.ones(len(block), dtype=bool)):
            return f"features: row {ids[start + found[0]]} {found[1]}"
    return ""
