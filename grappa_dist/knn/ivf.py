"""An approximate k-NN graph whose recall is measured: a row is compared with the rows of its p nearest lists, exactly.

p is as large as a sample says that it must be, and what the graph has found of the true neighbours is measured on
another sample. The graph is a function of the rows, k, the floor and the seed: the same bits on any number of ranks, as
long as their row ids ascend from rank to rank.

Shapes: P rows of this rank, m rows of a sample, L lists, D dimensions, k neighbours, p probes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from grappa_dist.distributed.coarse import Coarse
from grappa_dist.distributed.collectives import Comm, wire_device
from grappa_dist.distributed.knn_blocks import Blocks
from grappa_dist.distributed.list_search import ListSearch
from grappa_dist.distributed.rows import Rows
from grappa_dist.distributed.sharded_rows import Share, join_rows
from grappa_dist.distributed.threads import side_by_side
from grappa_dist.kmeans.sampling import Draw
from grappa_dist.knn.block_search import MOST_ROWS, Found, Side, search_one_way
from grappa_dist.knn.exact import join_blocks, sharded_knn
from grappa_dist.ops.knn import Block, Neighbours, merge, to_scores
from grappa_dist.search.candidates import true_products

SAMPLE_ROWS = 1024  # compared with all rows; half of them choose p, half measure recall
MOST_EXACT_ROWS = 10**7  # that are compared exactly where lists do not do: some 150 CPU hours (docs/scale.md)
_SAMPLE = 6  # names the draw


@dataclass(frozen=True)
class Recall:
    """What an approximate graph found, and at what cost."""

    searched: str  # "lists", or "exact" where lists did not do and all pairs were compared
    recall: float  # share of the k nearest of the sample's rows that are in their lists; 1 where the search was exact
    recall_error: float  # standard error of that, from row to row
    recall_rows: int
    lists: int
    probes: int
    searched_share: float  # of all pairs of rows
    widened: int  # times that more probes were needed than the sample had said

    @staticmethod
    def exact() -> Recall:
        return Recall("exact", 1.0, 0.0, 0, 1, 1, 1.0, 0)

    @property
    def reached(self) -> str:
        of = f"{self.probes} of {self.lists} lists"
        if not self.recall_rows:
            return f"a sample asks for {of}"
        return f"recall is {self.recall:.4f} with a standard error of {self.recall_error:.4f} with {of}"


@dataclass(frozen=True)
class Graph:
    """The lists of this rank's rows, and what they are worth."""

    ids: np.ndarray  # (P, k) int64, -1 where there is none
    scores: np.ndarray  # (P, k) float32, -inf where there is none
    recall: Recall


def listed_knn(
    comm: Comm,
    features: np.ndarray,
    ids: np.ndarray,
    k: int,
    *,
    floor: float,
    key: tuple[int, int],
    tell: Callable[[str], None] = lambda text: None,
) -> Graph:
    """As `sharded_knn`, but of each row's candidates only: the rows of its p nearest lists.

    Where recall, less twice its standard error, stays below the floor p grows; where p would be half of the lists, the
    search is exact.

    Args:
        ids: row ids (P,) int64, ascending on a rank and from rank to rank: samples and lists go by the place of a row
            among those of all ranks, which is then the same for any number of ranks.
        floor: least share of true neighbours that must be found, below 1.
        key: seed and epoch; lists are drawn by the seed, the samples by both.
        tell: hears of an exact search before it begins.

    Raises:
        ValueError: on all ranks, where ids do not ascend so, one rank's rows are unfit, or lists do not reach the floor
            and there are more rows than are compared exactly.
    """
    cpu = torch.device("cpu")
    blocks = join_blocks(comm, features, ids, k, block_rows=MOST_ROWS, device=cpu)
    _check_order(comm, ids)
    share = join_rows(comm, Rows([features], [np.ones(len(features), dtype=bool)]), device=cpu)
    told = Recall.exact()
    if share.num_good:
        found, last = _through_lists(share, blocks, k, floor=floor, key=key)
        if found is not None:
            return Graph(found.ids.numpy(), to_scores(found).numpy(), last)
        _allow_exact(share.num_good, floor, last, tell)
        told = replace(told, lists=last.lists, probes=last.lists, widened=last.widened)
    return Graph(*sharded_knn(comm, features, ids, k), told)


def _through_lists(
    share: Share, blocks: Blocks, k: int, *, floor: float, key: tuple[int, int]
) -> tuple[Neighbours | None, Recall]:
    """The lists of neighbours that are good enough, if any are, and what was measured last."""
    coarse = Coarse.of(share, key[0])
    with true_products():
        choosing, measuring = Sample.two_of(share, blocks, (k, *key))
        probes = choosing.probes_for(coarse, blocks.ids, floor + (1 - floor) / 4)
        last = Recall("lists", 0.0, 0.0, 0, len(coarse), probes, 0.0, 0)
        while 2 * probes < len(coarse):
            found, searched = ListSearch.of(blocks, coarse, k).run(probes)
            recall, error = measuring.recall(share.comm, blocks.ids, found.ids)
            last = Recall(
                "lists", recall, error, len(measuring.ids), len(coarse), probes, searched, widened=last.widened
            )
            if recall - 2 * error >= floor:
                return found, last
            probes, last = 2 * probes, replace(last, widened=last.widened + 1)
    return None, last


def _allow_exact(num: int, floor: float, last: Recall, tell: Callable[[str], None]) -> None:
    """Says that the search will be exact, or that there are too many rows for that."""
    failed = f"lists do not reach fuse.recall_floor={floor}: {last.reached}"
    if num > MOST_EXACT_ROWS:
        raise ValueError(f"{failed}; {num} rows are too many for an exact search, set a lower floor")
    tell(f"{failed}; comparing all pairs of {num} rows")


def _check_order(comm: Comm, ids: np.ndarray) -> None:
    """Raises on all ranks where one begins below the end of those before it."""
    edges = torch.from_numpy(ids[[0, -1]] if len(ids) else ids[:0]).to(wire_device(comm))
    last, of = -1, 0
    for rank, ends in enumerate(comm.gather(edges)):
        first, after = ends.tolist() or (last + 1, last)
        if first <= last:
            raise ValueError(
                f"row ids must ascend from rank to rank: rank {of} ends with {last}, rank {rank} begins with {first}"
            )
        last, of = (after, rank) if len(ends) else (last, of)


@dataclass(frozen=True)
class Sample:
    """Some rows of all ranks, the same on all of them, with their true neighbours."""

    rows: Tensor  # (m, D)
    ids: Tensor  # (m,)
    near: Tensor  # (m, k) ids, -1 where there is none

    @staticmethod
    def two_of(share: Share, blocks: Blocks, what: tuple[int, int, int]) -> tuple[Sample, Sample]:
        """Two disjoint samples, by (k, seed, epoch)."""
        k, seed, epoch = what
        draw = Draw.of(share, min(SAMPLE_ROWS, share.num_good), seed, k, epoch, _SAMPLE)
        parts = list(draw.blocks())
        own = torch.cat([p for p, _ in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        x = torch.cat([x for _, x in parts]) if parts else torch.zeros(0, share.dim)
        rows = torch.cat(share.gather(x))
        ids = torch.cat(share.gather(torch.from_numpy(blocks.ids)[own]))
        queries, best = Side.of(Block(rows, ids), halves=blocks.halves), Neighbours.none(len(ids), k)

        def work(item: tuple[int, Neighbours]) -> list[Found]:
            return search_one_way(queries, blocks.side(item[0]), item[1])

        handed = ((i, Neighbours(best.scores.clone(), best.ids)) for i in range(len(blocks)))
        for found in side_by_side(work, handed, torch.get_num_threads()):
            for part in found:
                part.into(best)
        whole = Neighbours.none(len(ids), k)
        for scores, near in zip(share.gather(best.scores), share.gather(best.ids), strict=True):
            whole = merge(whole, Neighbours(scores, near))
        halves = [slice(part, None, 2) for part in (0, 1)]
        first, second = (Sample(rows[half], ids[half], whole.ids[half]) for half in halves)
        return first, second if len(second.ids) else first

    def probes_for(self, coarse: Coarse, own_ids: np.ndarray, recall: float) -> int:
        """The least number of lists that finds so large a share of the sample's neighbours."""
        real = self.near >= 0
        if not bool(real.any()):
            return 1
        needed = coarse.rank_of(self.rows, coarse.lists_of(self.near.numpy(), own_ids))[real].sort().values + 1
        return int(needed[min(len(needed), max(1, -int(-recall * len(needed) // 1))) - 1])

    def recall(self, comm: Comm, own_ids: np.ndarray, found: Tensor) -> tuple[float, float]:
        """The share of true neighbours among those found for own rows (P, k), of all ranks, and its standard error."""
        wanted = self.ids.numpy()
        here = np.flatnonzero(np.isin(wanted, own_ids))
        lists = found[torch.from_numpy(np.searchsorted(own_ids, wanted[here]))]
        true = self.near[torch.from_numpy(here)]
        hits = ((true[:, :, None] == lists[:, None]).any(2) & (true >= 0)).sum(1)
        sums = torch.stack([hits.sum(), hits.square().sum()])
        first, second = comm.sum_(sums.to(wire_device(comm))).tolist()
        rows, each = len(wanted), int((self.near[:1] >= 0).sum())  # every row has as many true neighbours
        if not each:
            return 1.0, 0.0
        return first / (rows * each), sqrt(max(0, rows * second - first**2) / rows) / (rows * each)
