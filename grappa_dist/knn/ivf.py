"""An approximate k-NN graph by inverted lists, of measured recall: a row is compared only with the rows of p lists.

Coarse centroids are a k-means of the rows, fitted to a sample. A row belongs to the list of its nearest coarse centroid
and is compared, exactly, with the rows of its p nearest lists. p is chosen on a sample of rows, and the recall of the
graph is measured on another sample. Everything is decided in integers, so the graph is a function of the rows, k, the
recall floor and the seed: the same bits on any number of ranks, as long as row ids ascend from rank to rank.

Shapes: P rows of this rank, m rows of a sample, L lists, D dimensions, k neighbours, p probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isqrt, sqrt

import numpy as np
import torch
from torch import Tensor

from grappa_dist.config import ClusteringConfig
from grappa_dist.data.rng import RowDraw
from grappa_dist.distributed.collectives import Comm, wire_device
from grappa_dist.distributed.device_rows import DeviceRows
from grappa_dist.distributed.sharded_rows import Rows, ShardedRows, join_rows, side_by_side
from grappa_dist.kmeans.assignments import exact_search, searched
from grappa_dist.kmeans.ivf import nearest_set
from grappa_dist.kmeans.lloyd import KMeansTask, kmeans
from grappa_dist.kmeans.sampling import Draw, sample_rows
from grappa_dist.knn.block_search import MOST_ROWS, Block, Found, Neighbours, Side, merge, search_one_way, to_scores
from grappa_dist.knn.dense_search import extend_dense
from grappa_dist.knn.exact import Blocks, join_blocks, sharded_knn
from grappa_dist.search.backends import nearest
from grappa_dist.search.candidates import Centroids, nearest_float32, true_products
from grappa_dist.search.fixed_point import exact_dot
from grappa_dist.search.in_flight import Work, finish, in_flight, sent

SAMPLE_ROWS = 1024  # compared with all rows: one half chooses p, the other measures recall
MOST_EXACT_ROWS = 10**7  # that are compared exactly where lists do not suffice: some 150 CPU hours (docs/scale.md)
GATHERED_ROWS = 2**15  # of whole lists that every rank holds at once, at least, before the last list of them
_TASKS = 4  # searches of a list that a device has under way
_FIT_ROWS = 64  # per list, to which coarse centroids are fitted
_FIT_UPDATES = 5


@dataclass(frozen=True)
class Recall:
    """How an approximate graph was searched, with what recall, and at what cost."""

    searched: str  # "lists", or "exact" where lists did not reach the recall floor and all pairs were compared
    recall: float  # share of the k nearest of the sample's rows that are in their lists; 1 where the search was exact
    recall_error: float  # standard error of that, from row to row
    recall_rows: int
    lists: int
    probes: int
    searched_share: float  # of all pairs of rows
    widened: int  # how often p was doubled, because the first sample had estimated too few probes

    @staticmethod
    def exact() -> Recall:
        return Recall("exact", 1.0, 0.0, 0, 1, 1, 1.0, 0)

    @property
    def reached(self) -> str:
        """The recall reached, or the probes that the sample needs, as text."""
        of = f"{self.probes} of {self.lists} lists"
        if not self.recall_rows:
            return f"a sample needs {of}"
        return f"recall is {self.recall:.4f} with a standard error of {self.recall_error:.4f} with {of}"


@dataclass(frozen=True)
class Graph:
    """The neighbours of this rank's rows, and their recall."""

    ids: np.ndarray  # (P, k) int64, -1 where there is none
    scores: np.ndarray  # (P, k) float32, -inf where there is none
    recall: Recall


def approximate_knn(
    comm: Comm,
    features: np.ndarray,
    ids: np.ndarray,
    k: int,
    *,
    recall_floor: float,
    key: tuple[int, int],
    log: Callable[[str], None] = lambda text: None,
    device: torch.device | str = "cpu",
    dense_bytes: int | None = None,
) -> Graph:
    """As `sharded_knn`, but each row is compared only with the rows of its p nearest lists.

    While recall, less twice its standard error, is below `recall_floor`, p is doubled; from half of the lists on, all
    rows are compared.

    Args:
        ids: row ids (P,) int64, ascending on a rank and from rank to rank: samples and lists depend on the place of a
            row among those of all ranks, which is then the same for any number of ranks.
        recall_floor: least share of true neighbours that must be found, below 1.
        key: seed and epoch; lists are drawn by the seed, the samples by both.
        log: called with a line before an exact search begins. `device`, `dense_bytes`: as of `join_rows`.

    Raises:
        ValueError: on all ranks, where ids do not ascend so, one rank's rows are not valid, or lists do not reach the
            recall floor and there are more rows than are compared exactly.
    """
    blocks, sharded = _joined(comm, features, ids, k, on=(torch.device(device), dense_bytes))
    exact = Recall.exact()
    if sharded.num_good:
        found, last = _search_lists(sharded, blocks, k, recall_floor=recall_floor, key=key)
        if found is not None:
            return Graph(found.ids.cpu().numpy(), to_scores(found).cpu().numpy(), last)
        _allow_exact(sharded.num_good, recall_floor, last, log)
        exact = replace(exact, lists=last.lists, probes=last.lists, widened=last.widened)
    return Graph(*sharded_knn(comm, features, ids, k, device=device, copies=sharded.dense is not None), exact)


def _joined(
    comm: Comm, features: np.ndarray, ids: np.ndarray, k: int, *, on: tuple[torch.device, int | None]
) -> tuple[Blocks, ShardedRows]:
    """The rows of all ranks, all of them good, on a device with so many bytes for them."""
    device, dense_bytes = on
    dense = device.type == "cuda" or dense_bytes is not None
    kept = 0 if dense else None  # a device reads rows from the second
    blocks = join_blocks(comm, features, ids, k, block_rows=MOST_ROWS, device=device, kept_bytes=kept)
    _check_order(comm, ids)
    rows = Rows([features], [np.ones(len(features), dtype=bool)])
    return blocks, join_rows(comm, rows, device=device, dense_bytes=dense_bytes)


def _search_lists(
    sharded: ShardedRows, blocks: Blocks, k: int, *, recall_floor: float, key: tuple[int, int]
) -> tuple[Neighbours | None, Recall]:
    """Neighbours whose recall reaches the floor, None where no p does, and what was measured last."""
    lists = InvertedLists.of(sharded, key[0])
    with true_products():
        choosing, measuring = Sample.two_of(sharded, blocks, (k, *key))
        probes = choosing.probes_for(lists, blocks.ids, recall_floor + (1 - recall_floor) / 4)
        last = Recall("lists", 0.0, 0.0, 0, len(lists), probes, 0.0, 0)
        while 2 * probes < len(lists):
            found, searched = ListSearch.of(blocks, lists, k).run(probes)
            recall, error = measuring.recall(sharded.comm, blocks.ids, found.ids.cpu())
            last = Recall(
                "lists", recall, error, len(measuring.ids), len(lists), probes, searched, widened=last.widened
            )
            if recall - 2 * error >= recall_floor:
                return found, last
            probes, last = 2 * probes, replace(last, widened=last.widened + 1)
    return None, last


def _allow_exact(num: int, recall_floor: float, last: Recall, log: Callable[[str], None]) -> None:
    """Logs that the search will be exact; raises ValueError where there are too many rows for that."""
    failed = f"lists do not reach fuse.recall_floor={recall_floor}: {last.reached}"
    if num > MOST_EXACT_ROWS:
        raise ValueError(f"{failed}; {num} rows are too many for an exact search, set a lower fuse.recall_floor")
    log(f"{failed}; comparing all pairs of {num} rows")


def _check_order(comm: Comm, ids: np.ndarray) -> None:
    """Raises ValueError on all ranks where the ids of one begin below the last id of lower ranks."""
    edges = torch.from_numpy(ids[[0, -1]] if len(ids) else ids[:0]).to(wire_device(comm))
    last, of = -1, 0
    for rank, ends in enumerate(comm.gather(edges)):
        first, after = ends.tolist() or (last + 1, last)
        if first <= last:
            raise ValueError(
                f"row ids must ascend from rank to rank: rank {of} ends with {last}, rank {rank} begins with {first}"
            )
        last, of = (after, rank) if len(ends) else (last, of)


def num_lists_of(num_rows: int) -> int:
    """About twice the square root: then finding a row's lists costs about as much as searching eight of them."""
    return max(1, min(num_rows, 2 * isqrt(num_rows)))


@dataclass(frozen=True)
class InvertedLists:
    """Rows of all ranks in lists of near rows: the coarse centroids, and the list of each row of this rank."""

    sharded: ShardedRows
    centroids: Centroids  # coarse, (L, D)
    labels: Tensor  # (P,) int32, the list of each own row
    sizes: Tensor  # (ranks, L) int64, rows of each list on each rank

    @staticmethod
    def of(sharded: ShardedRows, seed: int) -> InvertedLists:
        """The lists of rows of which all are good; all ranks together have at least one."""
        num = num_lists_of(sharded.num_good)
        sample = sample_rows(sharded, num * _FIT_ROWS, *RowDraw.KNN_FIT_SAMPLE.key(seed, num))
        fit = kmeans(sample, num, KMeansTask(ClusteringConfig(iterations=_FIT_UPDATES), seed=seed))
        centroids = Centroids.of(torch.from_numpy(fit.centroids))
        labels = torch.zeros(len(sharded.rows), dtype=torch.int32, device=sharded.device)
        search = exact_search(sharded, centroids.values.to(sharded.device))
        for assigned in searched(sharded, search, sharded.blocks()):
            labels[sent(assigned.positions, sharded.device)] = assigned.found.labels.int()
        labels = labels.cpu()
        counts = torch.bincount(labels, minlength=num)
        return InvertedLists(sharded, centroids, labels, torch.stack(sharded.gather(counts[None])).reshape(-1, num))

    def __len__(self) -> int:
        return len(self.centroids.values)

    def probed(self, probes: int) -> Tensor:
        """The nearest lists of each own row, (P, p) int32, in no order."""
        probed = torch.zeros((len(self.labels), min(probes, len(self))), dtype=torch.int32)
        search = nearest if self.sharded.dense is None else nearest_float32
        centroids = Centroids.of(self.centroids.values.to(self.sharded.device))

        def work(block: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            positions, x = block
            return positions, nearest_set(x, centroids, probed.shape[1], search).int().cpu()

        for positions, lists in self.sharded.each(work, self.sharded.blocks()):
            probed[positions] = lists
        return probed

    def lists_of(self, ids: np.ndarray, own_ids: np.ndarray) -> Tensor:
        """The list of each row in `ids`, which may be on any rank; -1 for id -1. All ranks pass the same ids."""
        places = np.searchsorted(own_ids, ids)
        here = np.zeros(ids.shape, dtype=bool)
        if len(own_ids):
            here = own_ids[np.minimum(places, len(own_ids) - 1)] == ids
        found = torch.zeros(ids.shape, dtype=torch.int64)
        found[torch.from_numpy(here)] = self.labels[torch.from_numpy(places[here])].long() + 1
        return self.sharded.total(found) - 1

    def num_nearer(self, x: Tensor, lists: Tensor) -> Tensor:
        """How many lists are nearer to each row (m, D) than each of the lists (m, k): (m, k) int64."""
        far = self.centroids.squares - 2 * exact_dot(x, self.centroids.values)  # (m, L), less |x|^2
        order = far.argsort(dim=1, stable=True)  # of equal ones the lower first
        places = torch.empty_like(order).scatter_(1, order, torch.arange(len(self)).expand_as(order))
        return places.gather(1, lists.clamp(min=0))


@dataclass(frozen=True)
class _Piece:
    """Rows of one list that are searched at once: at most `MOST_ROWS`."""

    number: int  # of the list
    first: int  # among the rows of the list, of all ranks
    after: int

    def __len__(self) -> int:
        return self.after - self.first

    def within(self, before: int, size: int) -> slice:
        """Which of them are on a rank that has `size` rows of the list, after `before` rows on lower ranks."""
        first, after = (min(max(at - before, 0), size) for at in (self.first, self.after))
        return slice(first, after)


@dataclass(frozen=True)
class ListSearch:
    """The search of one rank: some lists at a time are gathered on all ranks, for the queries of each rank."""

    blocks: Blocks
    lists: InvertedLists
    k: int
    # Over all ranks, the largest norm of a row and of what bfloat16 leaves out of it; (0, 0) on a device, without them
    largest: tuple[float, float]

    @staticmethod
    def of(blocks: Blocks, lists: InvertedLists, k: int) -> ListSearch:
        if lists.sharded.dense is not None:
            return ListSearch(blocks, lists, k, (0.0, 0.0))
        largest = torch.cat(lists.sharded.gather(torch.tensor([blocks.largest], dtype=torch.float64)))
        norm, residual = largest.max(0).values.tolist()
        return ListSearch(blocks, lists, k, (norm, residual))

    def run(self, probes: int) -> tuple[Neighbours, float]:
        """The neighbours of own rows, and which share of all pairs of rows was compared."""
        sharded, num = self.lists.sharded, len(self.lists)
        own, probed = self.lists.labels[:, None], self.lists.probed(probes)
        members, best = _by_list(own, num), Neighbours.none(len(own), self.k, sharded.device)
        others = _by_list(torch.where(probed == own, -1, probed), num)
        compared = sum(self._sweep(members, queries, best) for queries in (members, others))
        return best, int(sharded.total(torch.tensor(compared))) / sharded.num_good**2

    def _sweep(self, members: tuple[Tensor, ...], queries: tuple[Tensor, ...], best: Neighbours) -> int:
        """Searches all lists for their queries among own rows, (P, k) in place; the number of pairs compared.

        First the queries are the rows of the list itself: most neighbours are found there, which raises thresholds.
        """
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
        if self.lists.sharded.dense is not None:
            for _ in in_flight((self._search_dense(*task, best) for task in tasks), _TASKS):
                pass
            return
        bf16, (norm, residual) = self.blocks.bf16, self.largest

        def work(task: tuple[Tensor, Block, Neighbours]) -> tuple[Tensor, list[Found]]:
            places, targets, so_far = task
            queries = self.blocks.rows_at(places)
            a, b = (Side.of(block, bf16=bf16, norm=norm, residual=residual) for block in (queries, targets))
            return places, search_one_way(a, b, so_far)

        items = ((p, t, Neighbours(best.scores[p], best.ids[p])) for p, t in tasks)
        for places, found in side_by_side(work, items, torch.get_num_threads()):
            for part in found:
                Found(places[part.rows], part.best).merge_into(best)

    def _search_dense(self, places: Tensor, targets: Block, best: Neighbours) -> Work[None]:
        """One of these tasks on a device; other tasks may have changed the lists in the meantime."""
        at = sent(places, best.ids.device)
        none = Neighbours.none(len(at), self.k, at.device)
        found = yield from extend_dense(none, self._rows_at(places), targets, least=best.scores[at, -1])
        Found(at, found).merge_into(best)

    def _rows_at(self, places: Tensor) -> Block:
        """Some own rows where they are searched."""
        sharded = self.lists.sharded
        if sharded.dense is None:
            return self.blocks.rows_at(places)
        ids = sent(torch.from_numpy(self.blocks.ids[places.numpy()]), sharded.device)
        if bool((places.diff() >= 0).all()):
            return Block(sharded.read(places), ids)
        ascending, order = places.sort()
        return Block(sharded.read(ascending)[sent(order.argsort(), sharded.device)], ids)

    def _groups(self) -> Iterator[list[_Piece]]:
        """All rows of all lists, some lists at a time."""
        group: list[_Piece] = []
        for number, size in enumerate(self.lists.sizes.sum(0).tolist()):
            for first in range(0, size, MOST_ROWS):
                group.append(_Piece(number, first, min(first + MOST_ROWS, size)))
                if sum(map(len, group)) >= GATHERED_ROWS:
                    yield group
                    group = []
        if group:
            yield group

    def _gather(self, group: list[_Piece], members: tuple[Tensor, ...]) -> list[Block]:
        """The rows of each piece, from all ranks, ids ascending."""
        sharded, numbers = self.lists.sharded, [piece.number for piece in group]
        sizes = self.lists.sizes[:, numbers]  # (ranks, pieces)
        before = (self.lists.sizes.cumsum(0) - self.lists.sizes)[:, numbers]
        parts = [
            [piece.within(b, s) for piece, b, s in zip(group, *of_rank, strict=True)]
            for of_rank in zip(before.tolist(), sizes.tolist(), strict=True)
        ]
        own = torch.cat([members[n][part] for n, part in zip(numbers, parts[sharded.comm.rank], strict=True)])
        mine = self._rows_at(own)
        counts = [[part.stop - part.start for part in of_rank] for of_rank in parts]
        rows, ids = (
            [torch.split(t, c) for t, c in zip(sharded.gather(tensor), counts, strict=True)]
            for tensor in (mine.rows, mine.ids)
        )
        of_pieces = zip(zip(*rows, strict=True), zip(*ids, strict=True), strict=True)
        return [Block(torch.cat(r), torch.cat(i)) for r, i in of_pieces]


def _by_list(lists: Tensor, num_lists: int) -> tuple[Tensor, ...]:
    """The rows of `lists` (P, p) that contain each list, ascending; -1 means no list."""
    order = lists.flatten().argsort(stable=True) // lists.shape[1]
    sizes = torch.bincount(lists.flatten() + 1, minlength=num_lists + 1).tolist()
    return torch.split(order, sizes)[1:]


@dataclass(frozen=True)
class Sample:
    """Some rows of all ranks, the same on all of them, with their true neighbours."""

    rows: Tensor  # (m, D)
    ids: Tensor  # (m,)
    near: Tensor  # (m, k) ids, -1 where there is none

    @staticmethod
    def two_of(sharded: ShardedRows, blocks: Blocks, key: tuple[int, int, int]) -> tuple[Sample, Sample]:
        """Two disjoint samples, drawn by `key`: (k, seed, epoch)."""
        k, seed, epoch = key
        draw = Draw.of(sharded, min(SAMPLE_ROWS, sharded.num_good), *RowDraw.KNN_RECALL.key(seed, k, epoch))
        parts = list(draw.blocks())
        own = torch.cat([p for p, _ in parts]) if parts else torch.zeros(0, dtype=torch.int64)
        x = torch.cat([x for _, x in parts]) if parts else torch.zeros(0, sharded.dim)
        rows = torch.cat(sharded.gather(x)).cpu()
        ids = torch.cat(sharded.gather(torch.from_numpy(blocks.ids)[own]))
        if sharded.dense is None:
            best = _nearest_by_blocks(blocks, Block(rows, ids), k)
        else:
            best = _nearest_dense(sharded.dense, blocks.ids, Block(rows, ids), k)
        whole = Neighbours.none(len(ids), k)
        for scores, near in zip(sharded.gather(best.scores), sharded.gather(best.ids), strict=True):
            whole = merge(whole, Neighbours(scores, near))
        every_other = [slice(start, None, 2) for start in (0, 1)]
        first, second = (Sample(rows[some], ids[some], whole.ids[some]) for some in every_other)
        return first, second if len(second.ids) else first

    def probes_for(self, lists: InvertedLists, own_ids: np.ndarray, recall: float) -> int:
        """The least number of lists that finds at least the share `recall` of the sample's neighbours."""
        real = self.near >= 0
        if not bool(real.any()):
            return 1
        needed = lists.num_nearer(self.rows, lists.lists_of(self.near.numpy(), own_ids))[real].sort().values + 1
        return int(needed[min(len(needed), max(1, -int(-recall * len(needed) // 1))) - 1])

    def recall(self, comm: Comm, own_ids: np.ndarray, found: Tensor) -> tuple[float, float]:
        """The share of the sample's true neighbours that were found, over all ranks, and its standard error.

        Args:
            found: ids of the neighbours found for own rows, (P, k).
        """
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


def _nearest_by_blocks(blocks: Blocks, sample: Block, k: int) -> Neighbours:
    """The k nearest of some rows among all own ones."""
    queries, best = Side.of(sample, bf16=blocks.bf16), Neighbours.none(len(sample.ids), k)

    def work(item: tuple[int, Neighbours]) -> list[Found]:
        return search_one_way(queries, blocks.side(item[0]), item[1])

    items = ((i, Neighbours(best.scores.clone(), best.ids)) for i in range(len(blocks)))
    for found in side_by_side(work, items, torch.get_num_threads()):
        for part in found:
            part.merge_into(best)
    return best


def _nearest_dense(dense: DeviceRows, own_ids: np.ndarray, sample: Block, k: int) -> Neighbours:
    """The same on a device."""
    queries = Block(sample.rows.to(dense.device), sample.ids.to(dense.device))
    best = Neighbours.none(len(sample.ids), k, dense.device)
    for block in dense.blocks():
        ids = torch.from_numpy(own_ids[block.positions.numpy()]).to(dense.device)
        best = finish(extend_dense(best, queries, Block(block.rows.x, ids)))
    return Neighbours(best.scores.cpu(), best.ids.cpu())
