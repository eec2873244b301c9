"""The search for neighbours through lists, on one of the ranks.

Shapes: P rows of this rank, L lists, D dimensions, k neighbours, p probes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grappa_dist.distributed.coarse import Coarse
from grappa_dist.distributed.knn_blocks import Blocks
from grappa_dist.distributed.threads import side_by_side
from grappa_dist.knn.block_search import MOST_ROWS, Found, Side, search_one_way
from grappa_dist.ops.knn import Block, Neighbours

GATHERED_ROWS = 2**15  # of whole lists that every rank holds at once, at least, before the last list of them


@dataclass(frozen=True)
class _Piece:
    """Rows of one list that are searched at once: at most as many as a block may have."""

    number: int  # of the list
    first: int  # among the rows of the list, of all ranks
    after: int

    def __len__(self) -> int:
        return self.after - self.first

    def within(self, before: int, size: int) -> slice:
        """Those of a rank that has `size` rows of the list, `before` more being with earlier ranks."""
        first, after = (min(max(at - before, 0), size) for at in (self.first, self.after))
        return slice(first, after)


@dataclass(frozen=True)
class ListSearch:
    """The search through lists on one of the ranks: lists are gathered some at a time, for everybody's queries."""

    blocks: Blocks
    coarse: Coarse
    k: int
    largest: tuple[float, float]  # of all ranks' rows, the largest norm and what bfloat16 leaves out

    @staticmethod
    def of(blocks: Blocks, coarse: Coarse, k: int) -> ListSearch:
        told = torch.cat(coarse.share.gather(torch.tensor([blocks.largest], dtype=torch.float64)))
        norm, rest = told.max(0).values.tolist()
        return ListSearch(blocks, coarse, k, (norm, rest))

    def run(self, probes: int) -> tuple[Neighbours, float]:
        """The lists of own rows, and which share of all pairs of rows was compared."""
        share, num = self.coarse.share, len(self.coarse)
        own, probed = self.coarse.labels[:, None], self.coarse.probed(probes)
        members, best = _by_list(own, num), Neighbours.none(len(own), self.k)
        others = _by_list(torch.where(probed == own, -1, probed), num)
        compared = sum(self._sweep(members, queries, best) for queries in (members, others))
        return best, int(share.total(torch.tensor(compared))) / share.num_good**2

    def _sweep(self, members: tuple[Tensor, ...], queries: tuple[Tensor, ...], best: Neighbours) -> int:
        """All lists, each for its queries among own rows: once for its own rows, which settles most of what is near."""
        compared = 0
        for group in self._groups():
            tasks = [
                (places, targets)
                for piece, targets in zip(group, self._gather(group, members), strict=True)
                for places in queries[piece.number].split(MOST_ROWS)
                if len(places)
            ]
            compared += sum(len(places) * len(targets.ids) for places, targets in tasks)
            self._search(tasks, best)
        return compared

    def _search(self, tasks: list[tuple[Tensor, Block]], best: Neighbours) -> None:
        halves, (norm, rest) = self.blocks.halves, self.largest

        def work(task: tuple[Tensor, Block, Neighbours]) -> tuple[Tensor, list[Found]]:
            places, targets, so_far = task
            queries = self.blocks.rows_at(places)
            a, b = (Side.of(block, halves=halves, norm=norm, rest=rest) for block in (queries, targets))
            return places, search_one_way(a, b, so_far)

        handed = ((p, t, Neighbours(best.scores[p], best.ids[p])) for p, t in tasks)
        for places, found in side_by_side(work, handed, torch.get_num_threads()):
            for part in found:
                Found(places[part.rows], part.best).into(best)

    def _groups(self) -> Iterator[list[_Piece]]:
        """All rows of all lists, some lists at a time."""
        group: list[_Piece] = []
        for number, size in enumerate(self.coarse.sizes.sum(0).tolist()):
            for first in range(0, size, MOST_ROWS):
                group.append(_Piece(number, first, min(first + MOST_ROWS, size)))
                if sum(map(len, group)) >= GATHERED_ROWS:
                    yield group
                    group = []
        if group:
            yield group

    def _gather(self, group: list[_Piece], members: tuple[Tensor, ...]) -> list[Block]:
        """The rows of each piece, from all ranks, ids ascending."""
        share, numbers = self.coarse.share, [piece.number for piece in group]
        sizes = self.coarse.sizes[:, numbers]  # (ranks, pieces)
        before = (self.coarse.sizes.cumsum(0) - self.coarse.sizes)[:, numbers]
        parts = [
            [piece.within(b, s) for piece, b, s in zip(group, *of_rank, strict=True)]
            for of_rank in zip(before.tolist(), sizes.tolist(), strict=True)
        ]
        own = torch.cat([members[n][part] for n, part in zip(numbers, parts[share.comm.rank], strict=True)])
        mine = self.blocks.rows_at(own)
        counts = [[part.stop - part.start for part in of_rank] for of_rank in parts]
        rows, ids = (
            [torch.split(t, c) for t, c in zip(share.gather(tensor), counts, strict=True)]
            for tensor in (mine.rows, mine.ids)
        )
        of_pieces = zip(zip(*rows, strict=True), zip(*ids, strict=True), strict=True)
        return [Block(torch.cat(r), torch.cat(i)) for r, i in of_pieces]


def _by_list(lists: Tensor, num_lists: int) -> tuple[Tensor, ...]:
    """Of each list the rows (of some (P, p)) that name it, ascending; -1 names none."""
    order = lists.flatten().argsort(stable=True) // lists.shape[1]
    sizes = torch.bincount(lists.flatten() + 1, minlength=num_lists + 1).tolist()
    return torch.split(order, sizes)[1:]
