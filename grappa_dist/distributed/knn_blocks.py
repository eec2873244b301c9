"""The rows of one rank by blocks, as the searches of the k-NN graph take them.

Shapes: P rows of this rank, m rows of a block, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.rows import as_tensor, on_grid
from grappa_dist.distributed.threads import side_by_side
from grappa_dist.distributed.trial import products_pay
from grappa_dist.knn.block_search import MOST_ROWS, Side
from grappa_dist.ops.knn import Block
from grappa_dist.search.bf16 import HalfProposer
from grappa_dist.search.candidates import norm_of
from grappa_dist.search.fixed_point import exact_square, to_grid

KEPT_BYTES = 2**31  # of own blocks on a device; those beyond are read again for every block that they meet
_BLOCKS = 8  # of a rank, at least, so that threads have equal shares
_LEAST_ROWS = 1024  # of a block that is made for that reason alone


@dataclass(frozen=True)
class _Facts:
    """What is known of a block before it is read again."""

    plain: bool  # it lies on the grid as it is
    norm: float  # the largest |x|
    rest: float  # the largest norm of what bfloat16 leaves out


@dataclass(frozen=True)
class Blocks:
    """The rows of one rank, cut into blocks of about one size.

    A block is read and put on the grid whenever it is asked for; the first ones may be kept on the device instead.
    """

    features: np.ndarray  # (P, D) float32
    ids: np.ndarray  # (P,) int64, ascending
    dim: int
    step: int  # rows of a block
    device: torch.device
    halves: bool
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
        halves: bool | None,
        keep: bool,
    ) -> Blocks:
        """Blocks whose facts are known, or, to `keep`, as many of them on the device as `KEPT_BYTES` hold."""
        step = min(block_rows, MOST_ROWS, max(_LEAST_ROWS, -(-len(ids) // _BLOCKS)))
        pays = products_pay(device) if halves is None else halves
        blocks = Blocks(features, ids, dim, step, device, pays)
        if keep:
            most = KEPT_BYTES // (4 * step * dim)
            return replace(blocks, kept=tuple(blocks.block(i) for i in range(min(len(blocks), most))))
        facts = side_by_side(blocks._look, range(len(blocks)), torch.get_num_threads())
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
        x = as_tensor(self.features[some]).reshape(-1, self.dim).to(self.device)
        return Block(x if plain else to_grid(x), torch.from_numpy(np.array(self.ids[some])).to(self.device))

    def side(self, number: int) -> Side:
        """One block as it is multiplied, on a CPU."""
        facts = self.facts[number]
        return Side.of(self.block(number), halves=self.halves, norm=facts.norm, rest=facts.rest)

    def rows_at(self, places: Tensor) -> Block:
        """Some rows in host memory, by ascending positions."""
        some = places.numpy()
        rows = torch.from_numpy(self.features[some]).reshape(-1, self.dim)
        plain = all(facts.plain for facts in self.facts)
        return Block(rows if plain else to_grid(rows), torch.from_numpy(self.ids[some]))

    @property
    def largest(self) -> tuple[float, float]:
        """The largest norm of own rows, and the largest norm of what bfloat16 leaves out; 0 for no rows."""
        return max((f.norm for f in self.facts), default=0.0), max((f.rest for f in self.facts), default=0.0)

    def _places(self, number: int) -> slice:
        return slice(number * self.step, (number + 1) * self.step)

    def _look(self, number: int) -> _Facts:
        rows = self.block(number).rows
        plain = on_grid(self.features[self._places(number)])
        return _Facts(plain, norm_of(exact_square(rows)), HalfProposer.left_out(rows) if self.halves else 0.0)
