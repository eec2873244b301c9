"""The k-NN graph of an epoch: features of the model of the moment, their neighbours, and what can be said of both.

Shapes: P good rows of this rank, k neighbours, b rows of a padded batch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import RowArrays, own_shards, rows_file
from grappa_dist.config import FuseConfig
from grappa_dist.distributed.worker import RankContext, wait_for_slower_ranks
from grappa_dist.files import sync, write_json
from grappa_dist.knn.block_search import are_duplicates, without_duplicates
from grappa_dist.knn.exact import sharded_knn
from grappa_dist.knn.ivf import Graph, Recall, listed_knn
from grappa_dist.models import Grappa
from grappa_dist.stages.embed import Embedding, embed_rows
from grappa_dist.training.batches import TrainingImages

SAVE_S = 60.0  # between two notes of how far the features of a graph are
EXACT_ROWS = 10**6  # up to so many `auto` is exact (docs/scale.md)


def graph_kind(settings: FuseConfig, num_rows: int) -> Literal["exact", "approximate"]:
    """How neighbours are found, `auto` settled by the number of rows: not by the machine, it is part of the result."""
    if settings.graph != "auto":
        return settings.graph
    return "exact" if num_rows <= EXACT_ROWS else "approximate"


@dataclass(frozen=True)
class Part:
    """Some whole batches of one shard: places among its good rows."""

    shard: int
    first: int
    after: int


def own_batches(good: Sequence[int], batch: int, rank: int, size: int) -> list[Part]:
    """The batches of each rank, consecutive ones and equally many, give or take one.

    A batch holds rows of one shard, so that features do not depend on who embeds it.

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


def _begun(path: Path, note: Path, shape: tuple[int, int]) -> tuple[NDArray[np.float32], int]:
    """A map of features, and how many of its rows an attempt that was stopped has left there."""
    if not shape[0]:  # which no map can have
        return np.zeros(shape, dtype=np.float32), 0
    if path.exists() and note.exists():
        features: NDArray[np.float32] = np.lib.format.open_memmap(path, mode="r+")
        if features.shape == shape:
            return features, int(json.loads(note.read_text()))
    note.unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape), 0


def _note(features: NDArray[np.float32], reached: int, note: Path) -> None:
    if isinstance(features, np.memmap):
        features.flush()
        write_json(note, reached)


class Graphs:
    """Makes the graph of every epoch, by all ranks of a job together; one that is there is kept for whoever resumes."""

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
        """Row ids of the neighbours of every row, (n, k) int64 by shard, -1 where there is none."""
        images = self._training.images
        folder, partial = self._folder / f"epoch-{epoch}", self._folder / f"epoch-{epoch}.partial"
        if not self._context.of_rank_0(folder.exists()):
            self._make(epoch, partial)
            if self._context.comm.rank == 0:
                sync(partial)
                os.rename(partial, folder)
                sync(folder.parent)
        self._context.comm.barrier()
        return RowArrays.of((folder / rows_file(i) for i in range(len(images.shards))), images.starts)

    def _make(self, epoch: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        kind = graph_kind(self._settings, len(self._training.images))
        self._context.report({"phase": f"epoch {epoch}: embedding for the k-NN graph"})
        ids, features = self._embed_own(folder)
        self._context.report({"phase": f"epoch {epoch}: {kind} k-NN graph"})
        graph = self._search(epoch, kind, features, ids)
        k, cosine = self._settings.neighbours, self._settings.duplicate_cosine
        copies = are_duplicates(graph.ids[:, :k], graph.scores[:, :k], cosine)
        near = without_duplicates(graph.ids, graph.scores, cosine, k) if self._settings.skip_duplicates else graph.ids
        self._write(folder, ids, near)
        found: dict[str, Any] = {"epoch": epoch, "graph": kind, **asdict(graph.recall)}
        if kind == "approximate":
            recall = graph.recall
            said = "exact" if recall.searched == "exact" else f"{recall.recall:.3f} ± {recall.recall_error:.3f}"
            self._context.report({"phase": f"epoch {epoch}: k-NN graph with recall {said}"})
        self._describe(folder, ids, near, {**found, **self._duplicates(near, copies)})

    def _embed_own(self, folder: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids of this rank's share of the good rows, ascending, and their features by the current model, on disk."""
        images, comm, batch = self._training.images, self._context.comm, self._embedding.batch_size
        bad_of = np.diff(np.searchsorted(np.sort(self._training.bad), images.starts))
        parts = own_batches((np.diff(images.starts) - bad_of).tolist(), batch, comm.rank, comm.size)
        own = [self._good_of(part.shard)[part.first : part.after] for part in parts]
        ids = np.concatenate([*own, np.zeros(0, dtype=np.int64)])
        name = f"features-{comm.rank}-of-{comm.size}"
        features, done = _begun(folder / f"{name}.npy", folder / f"{name}.json", (len(ids), self._model.embed_dim))
        wait_for_slower_ranks(self._context, self._embed(own, features, done, folder / f"{name}.json"))
        return ids, features

    def _embed(
        self, own: Sequence[NDArray[np.int64]], features: NDArray[np.float32], done: int, note: Path
    ) -> Generator[None, None, None]:
        """Fills in features by batches, after those of the first `done` rows, and notes from time to time how many."""
        first, reached, saved = 0, done, time.monotonic()
        try:
            for some in own:
                left = some[max(0, done - first) :]  # whole batches are done
                start = first + len(some) - len(left)
                for place, unit, _ in embed_rows(
                    self._model, self._training.images, left, device=self._context.device, how=self._embedding
                ):
                    features[start + place.start : start + place.stop] = unit
                    reached = start + place.stop
                    if time.monotonic() - saved > SAVE_S:
                        _note(features, reached, note)
                        saved = time.monotonic()
                    yield
                first += len(some)
        finally:
            _note(features, reached, note)

    def _good_of(self, shard: int) -> NDArray[np.int64]:
        rows = self._training.images.shard_rows(shard)
        return np.setdiff1d(np.arange(rows.start, rows.stop), self._training.bad, assume_unique=True)

    def _search(self, epoch: int, kind: str, features: NDArray[np.float32], ids: NDArray[np.int64]) -> Graph:
        """Scores are exact and rounded once, so what counts as a near-duplicate does not depend on ranks."""
        comm = self._context.comm
        asked = self._settings.neighbours * (2 if self._settings.skip_duplicates else 1)
        if kind == "exact":
            return Graph(*sharded_knn(comm, features, ids, asked, device=self._context.device), Recall.exact())
        return listed_knn(
            comm,
            features,
            ids,
            asked,
            floor=self._settings.recall_floor,
            key=(self._training.seed, epoch),
            tell=lambda text: self._context.report({"phase": f"epoch {epoch}: {text}"}),
        )

    def _write(self, folder: Path, ids: NDArray[np.int64], near: NDArray[np.int64]) -> None:
        """A table for each shard, to which every rank that has rows of it writes these; all of it on the disk."""
        images, comm = self._training.images, self._context.comm
        for shard in own_shards(images.starts.tolist(), comm.rank, comm.size):
            path = folder / rows_file(shard)
            np.save(path, np.full((images.shards[shard].rows, near.shape[1]), -1, dtype=np.int64))
            sync(path)
        comm.barrier()
        owners = np.searchsorted(images.starts, ids, side="right") - 1
        for shard in np.unique(owners).tolist():
            inside = owners == shard
            places = ids[inside] - images.starts[shard]
            table = np.full((int(places[-1] - places[0]) + 1, near.shape[1]), -1, dtype=np.int64)
            table[places - places[0]] = near[inside]
            path = folder / rows_file(shard)
            # Not through a map: two machines that write to one page of it would undo each other's rows.
            with open(path, "r+b") as handle:
                header = os.path.getsize(path) - images.shards[shard].rows * table[0].nbytes
                handle.seek(header + int(places[0]) * table[0].nbytes)
                handle.write(table.tobytes())
            sync(path)  # what one machine syncs is what it wrote itself

    def _duplicates(self, near: NDArray[np.int64], copies: NDArray[np.bool_]) -> dict[str, float]:
        """How many of all rows have near-duplicates among their k nearest, and how many have no neighbour left."""
        counts = [len(near), int(copies.any(1).sum()), int(copies.sum()), int((near < 0).all(1).sum())]
        rows, with_copies, pairs, alone = self._sum(counts)
        return {
            "duplicate_cosine": self._settings.duplicate_cosine,
            "rows_with_duplicates_share": with_copies / max(1, rows),
            "duplicate_pairs": pairs,
            "rows_without_neighbour": alone,
        }

    def _sum(self, counts: list[int]) -> list[int]:
        return self._context.comm.sum_(torch.tensor(counts, device=self._context.device)).tolist()

    def _describe(self, folder: Path, ids: NDArray[np.int64], near: NDArray[np.int64], figures: dict[str, Any]) -> None:
        """Rank 0 writes what is said of the graph: also how often neighbours share each pseudo-label."""
        valid = near >= 0
        shares = {}
        for k, labels in self._labels.items():
            same = (labels.take(near.clip(0).ravel()).reshape(near.shape) == labels.take(ids)[:, None]) & valid
            counts = self._sum([int(same.sum()), int(valid.sum())])
            shares[f"k={k}"] = counts[0] / max(1, counts[1])
        self._context.comm.barrier()
        if self._context.comm.rank == 0:
            for scratch in folder.glob("features-*"):
                scratch.unlink()
            write_json(folder / "statistics.json", {**figures, "neighbours_share_pseudo_label": shares})
