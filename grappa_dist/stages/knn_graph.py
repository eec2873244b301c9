"""The k-NN graph of an epoch: features by the current model, their nearest neighbours, and statistics of both.

Shapes: P good rows of this rank, k neighbours, b rows of a padded batch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from grappa_dist.artifacts import RowArrays, own_shards, rows_file
from grappa_dist.bucket import bucket_of, here, refreshed_folder, withdraw
from grappa_dist.checksums import forget_maps
from grappa_dist.config import FuseConfig
from grappa_dist.distributed.collectives import wire_device
from grappa_dist.distributed.worker import RankContext, wait_for_slower_ranks
from grappa_dist.files import (
    Sum,
    hide_damaged,
    make_folder,
    read_json,
    record_of,
    recorded,
    remove_folder,
    remove_recorded,
    rename,
    save_array,
    sync,
    write_json,
)
from grappa_dist.knn.block_search import are_duplicates, without_duplicates
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Graph, Recall, approximate_knn
from grappa_dist.lack_of_memory import naming_lack_of_memory
from grappa_dist.models import Grappa
from grappa_dist.stages.embed import Embedding, RowSet, embed_row_sets
from grappa_dist.storage import allocate, tried_again
from grappa_dist.training.batches import TrainingImages

STATISTICS_FILE = "statistics.json"
SAVE_S = 60.0  # between two records of how many features of a graph are computed
EXACT_ROWS = 10**6  # up to this many rows `auto` is exact (docs/scale.md)


def graph_kind(settings: FuseConfig, num_rows: int) -> Literal["exact", "approximate"]:
    """How neighbours are found; `auto` depends on the number of rows and not on the machine: it changes the result."""
    if settings.graph != "auto":
        return settings.graph
    return "exact" if num_rows <= EXACT_ROWS else "approximate"


def _less_memory(settings: FuseConfig, kind: str) -> str:
    """Settings under which a graph takes less of a GPU's memory."""
    lower = f"lower fuse.neighbours={settings.neighbours}"
    return f"{lower}, or take fuse.graph=approximate" if kind == "exact" else lower


def remove_neighbours(folder: Path, epochs: Iterable[int]) -> None:
    """Removes the neighbours of the graphs of some epochs, and keeps their statistics.

    Args:
        folder: of all graphs of a job.
    """
    for epoch in epochs:
        of_epoch = folder / f"epoch-{epoch}"
        bucket = bucket_of(of_epoch)
        if bucket is not None:
            of_rows = [name for name in bucket.names(bucket.name_of(of_epoch)) if "rows-" in name]
            bucket.remove(sorted(of_rows, key=lambda name: not name.endswith(f"/{rows_file(0)}")))
        for path in sorted(of_epoch.glob("rows-*.npy")):  # the first says that all are there
            remove_recorded(path)


@dataclass(frozen=True)
class Part:
    """Some whole batches of one shard, as the range [first, after) among its good rows."""

    shard: int
    first: int
    after: int


def batches_of_rank(good: Sequence[int], batch: int, rank: int, size: int) -> list[Part]:
    """The batches of one rank: consecutive, and as many as any other rank has, give or take one.

    A batch holds rows of one shard, so that features do not depend on the rank that embeds it.

    Args:
        good: the number of good rows of each shard.
    """
    batches = -(-np.asarray(good, dtype=np.int64) // batch)
    starts = np.concatenate([[0], batches.cumsum()])  # the first batch of every shard
    first, after = (int(starts[-1]) * r // size for r in (rank, rank + 1))
    parts = []
    for shard in range(int(np.searchsorted(starts, first, side="right")) - 1, len(good)):
        if starts[shard] >= after:
            break
        here = [(min(max(at - int(starts[shard]), 0), int(batches[shard]))) * batch for at in (first, after)]
        if here[0] < here[1]:
            parts.append(Part(shard, here[0], min(here[1], good[shard])))
    return parts


class Graphs:
    """Builds the graph of every epoch, by all ranks of a job together; a resumed job finds those that are complete."""

    def __init__(
        self,
        context: RankContext,
        training: TrainingImages,
        model: Grappa,
        *,
        settings: FuseConfig,
        embedding: Embedding,
        labels: Mapping[int, RowArrays],
        folder: Path,
    ) -> None:
        self._context, self._training, self._model = context, training, model
        self._settings, self._embedding, self._labels, self._folder = settings, embedding, labels, folder

    def of(self, epoch: int) -> RowArrays:
        """Row ids of the neighbours of every row, (n, k) int64 by shard; -1: none."""
        images = self._training.images
        folder, partial = self._folder / f"epoch-{epoch}", self._folder / f"epoch-{epoch}.partial"
        forget_maps(self._folder)
        refreshed_folder(folder, STATISTICS_FILE)
        is_there = here(folder / rows_file(0)).exists()
        if not self._context.of_rank_0(is_there) or self._set_aside_damaged(folder):
            self._make(epoch, partial)
            if bucket_of(folder) is not None:
                self._send(partial, folder)
            elif self._context.comm.rank == 0:
                remove_folder(folder)  # one whose neighbours were removed
                sync(partial)
                rename(partial, folder)
                sync(folder.parent)
        self._context.comm.barrier()
        return RowArrays.of((folder / rows_file(i) for i in range(len(images.shards))), images.starts)

    def _send(self, partial: Path, folder: Path) -> None:
        """Puts this rank's files into the bucket of the run, where the graph appears with its statistics."""
        comm, bucket = self._context.comm, bucket_of(folder)
        assert bucket is not None
        for path in (partial / name for own in self._own_files() for name in (own, record_of(partial / own).name)):
            bucket.put(path, bucket.name_of(folder / path.name))
        comm.barrier()
        if comm.rank == 0:
            bucket.put(partial / STATISTICS_FILE, bucket.name_of(folder / STATISTICS_FILE))
        comm.barrier()
        refreshed_folder(folder, STATISTICS_FILE)
        remove_folder(partial)

    def _set_aside_damaged(self, folder: Path) -> bool:
        """Whether the graph of an earlier attempt is damaged, on any rank's shards; it is set aside."""
        comm, own = self._context.comm, [folder / name for name in self._own_files()]
        damaged = any(not here(path).exists() or recorded(path) not in (None, Sum.of(path)) for path in own)
        if not self._sum([int(damaged)])[0]:
            return False
        if comm.rank == 0:
            self._context.note(f"k-NN graph {folder} is damaged; set aside as {hide_damaged(folder).name}, made anew")
            withdraw(folder, STATISTICS_FILE)
        comm.barrier()
        return True

    def _own_files(self) -> list[str]:
        comm, starts = self._context.comm, self._training.images.starts.tolist()
        return [rows_file(shard) for shard in own_shards(starts, comm.rank, comm.size)]

    def _make(self, epoch: int, folder: Path) -> None:
        make_folder(folder)
        kind = graph_kind(self._settings, len(self._training.images))
        self._context.report({"phase": f"epoch {epoch}: embedding for the k-NN graph"})
        ids, features = self._features(folder)
        self._context.report({"phase": f"epoch {epoch}: {kind} k-NN graph"})
        with naming_lack_of_memory(f"the k-NN graph of epoch {epoch}", _less_memory(self._settings, kind)):
            graph = self._search(epoch, kind, features, ids)
        k, cosine = self._settings.neighbours, self._settings.duplicate_cosine
        copies = are_duplicates(graph.ids[:, :k], graph.scores[:, :k], cosine)
        near = without_duplicates(graph.ids, graph.scores, cosine, k) if self._settings.skip_duplicates else graph.ids
        self._write_neighbours(folder, ids, near)
        found: dict[str, Any] = {"epoch": epoch, "graph": kind, **asdict(graph.recall)}
        if kind == "approximate":
            recall = graph.recall
            figure = "exact" if recall.searched == "exact" else f"{recall.recall:.3f} ± {recall.recall_error:.3f}"
            self._context.report({"phase": f"epoch {epoch}: k-NN graph with recall {figure}"})
        self._write_statistics(folder, ids, near, {**found, **self._duplicates(near, copies)})

    def _features(self, folder: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids of this rank's share of the good rows, ascending, and their features by the current model, on disk."""
        images, comm, batch = self._training.images, self._context.comm, self._embedding.batch_size
        bad_of = np.diff(np.searchsorted(np.sort(self._training.bad), images.starts))
        parts = batches_of_rank((np.diff(images.starts) - bad_of).tolist(), batch, comm.rank, comm.size)
        rows = [self._good_of(part.shard)[part.first : part.after] for part in parts]
        ids = np.concatenate([*rows, np.zeros(0, dtype=np.int64)])
        name = f"features-{comm.rank}-of-{comm.size}"
        progress = folder / f"{name}.json"
        features = _Features(folder / f"{name}.npy", progress, (len(ids), self._model.embed_dim))
        wait_for_slower_ranks(self._context, self._embed(rows, features))
        return ids, features.rows

    def _embed(self, rows: Sequence[NDArray[np.int64]], features: _Features) -> Generator[None, None, None]:
        """Fills in the features that are not saved yet by batches, and saves them from time to time."""
        done = reached = features.reached
        first, saved = 0, time.monotonic()
        parts = list[RowSet]()
        for some in rows:
            parts.append(RowSet(self._training.images, some[max(0, done - first) :]))  # `done` ends a batch
            first += len(some)
        try:
            with contextlib.closing(
                embed_row_sets(self._model, parts, device=self._context.device, how=self._embedding)
            ) as batches:
                for batch in batches:
                    features.rows[reached : reached + len(batch.rows)] = batch.unit
                    reached += len(batch.rows)
                    if time.monotonic() - saved > SAVE_S:
                        features.save(reached)
                        saved = time.monotonic()
                    yield
        finally:
            features.save(reached)

    def _good_of(self, shard: int) -> NDArray[np.int64]:
        rows = self._training.images.shard_rows(shard)
        return np.setdiff1d(np.arange(rows.start, rows.stop), self._training.bad, assume_unique=True)

    def _search(self, epoch: int, kind: str, features: NDArray[np.float32], ids: NDArray[np.int64]) -> Graph:
        """The nearest others; their scores are exact and rounded once, so near-duplicates do not depend on ranks."""
        comm = self._context.comm
        asked = self._settings.neighbours * (2 if self._settings.skip_duplicates else 1)
        if kind == "exact":
            return Graph(*sharded_knn(comm, features, ids, asked, device=self._context.device), Recall.exact())
        return approximate_knn(
            comm,
            features,
            ids,
            asked,
            recall_floor=self._settings.recall_floor,
            key=(self._training.seed, epoch),
            log=lambda text: self._context.report({"phase": f"epoch {epoch}: {text}"}),
            device=self._context.device,
        )

    def _write_neighbours(self, folder: Path, ids: NDArray[np.int64], near: NDArray[np.int64]) -> None:
        """Writes a table for each shard, every rank the rows that it has, and syncs them to the disk."""
        images, comm = self._training.images, self._context.comm
        starts = images.starts.tolist()
        shards = [own_shards(starts, rank, comm.size) for rank in range(comm.size)]
        ids, near = self._to_owners(ids, near, [(starts[of.start], starts[of.stop]) for of in shards])
        for shard in shards[comm.rank]:
            first, after = np.searchsorted(ids, starts[shard : shard + 2])
            table = np.full((images.shards[shard].rows, near.shape[1]), -1, dtype=np.int64)
            table[ids[first:after] - starts[shard]] = near[first:after]
            save_array(folder / rows_file(shard), table, summed=True)
        comm.barrier()

    def _to_owners(
        self, ids: NDArray[np.int64], near: NDArray[np.int64], rows: Sequence[tuple[int, int]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids, ascending, and neighbours of this rank's rows, of which every rank has some.

        Args:
            rows: first and after of each rank's.
        """
        comm, wire = self._context.comm, wire_device(self._context.comm)
        table = torch.from_numpy(np.concatenate([ids[:, None], near], 1)).to(wire)
        parts = [table[slice(*np.searchsorted(ids, of_rank).tolist())] for of_rank in rows]
        counts = torch.tensor([[len(part) for part in parts]], device=wire)
        sent = torch.cat(comm.gather(counts))[:, comm.rank].tolist()
        found = torch.cat(comm.exchange(parts, [(count, table.shape[1]) for count in sent])).cpu().numpy()
        return found[:, 0], found[:, 1:]

    def _duplicates(self, near: NDArray[np.int64], copies: NDArray[np.bool_]) -> dict[str, float]:
        """How many of all rows have near-duplicates among their k nearest, and how many have no neighbour."""
        counts = [len(near), int(copies.any(1).sum()), int(copies.sum()), int((near < 0).all(1).sum())]
        rows, with_copies, pairs, without = self._sum(counts)
        return {
            "duplicate_cosine": self._settings.duplicate_cosine,
            "rows_with_duplicates_share": with_copies / max(1, rows),
            "duplicate_pairs": pairs,
            "rows_without_neighbour": without,
        }

    def _sum(self, counts: list[int]) -> list[int]:
        return self._context.comm.sum_(torch.tensor(counts, device=self._context.device)).tolist()

    def _write_statistics(
        self, folder: Path, ids: NDArray[np.int64], near: NDArray[np.int64], figures: dict[str, Any]
    ) -> None:
        """Rank 0 writes the statistics of the graph, with how often neighbours share each pseudo-label."""
        valid = near >= 0
        shares = {}
        for k, labels in self._labels.items():
            same = (labels.take(near.clip(0).ravel()).reshape(near.shape) == labels.take(ids)[:, None]) & valid
            counts = self._sum([int(same.sum()), int(valid.sum())])
            shares[f"k={k}"] = counts[0] / max(1, counts[1])
        self._context.comm.barrier()
        if self._context.comm.rank == 0:
            for file in folder.glob("features-*"):
                file.unlink()
            write_json(folder / STATISTICS_FILE, {**figures, "neighbours_share_pseudo_label": shares})


class _Features:
    """Features on disk, (n, D), filled in from the first row on; an interrupted attempt's are gone on with.

    Their checksums are saved with how many there are: `progress` has [first row, row after, xxh3] of each part.
    """

    def __init__(self, path: Path, progress: Path, shape: tuple[int, int]) -> None:
        self._progress, self._parts = progress, list[tuple[int, int, str]]()
        self.rows: NDArray[np.float32] = np.zeros(shape, dtype=np.float32)
        if not shape[0]:  # a memory map cannot be empty
            return
        if path.exists() and progress.exists():
            with contextlib.suppress(ValueError, TypeError):  # damaged, or of an earlier version
                found: NDArray[np.float32] = np.lib.format.open_memmap(path, mode="r+")
                if found.shape == shape and found.dtype == np.float32:
                    self.rows = found
                    for first, after, known in read_json(progress):
                        if first != self.reached or xxh3_64_hexdigest(found[first:after].tobytes()) != known:
                            break
                        self._parts.append((first, after, known))
                    return
        self._parts = []
        progress.unlink(missing_ok=True)
        self.rows = tried_again(lambda: np.lib.format.open_memmap(path, "w+", np.dtype(np.float32), shape), path)
        with open(path, "r+b") as file:
            allocate(file.fileno(), path.stat().st_size, path)

    @property
    def reached(self) -> int:
        """The first row that is not saved."""
        return self._parts[-1][1] if self._parts else 0

    def save(self, reached: int) -> None:
        if isinstance(self.rows, np.memmap) and reached > self.reached:
            self.rows.flush()
            checksum = xxh3_64_hexdigest(self.rows[self.reached : reached].tobytes())
            self._parts.append((self.reached, reached, checksum))
            write_json(self._progress, self._parts)
