"""The image pairs of fuse: two views of one image, or views of an image and of one of its nearest neighbours.

Shapes: B anchors of this rank, S pixels a side, k neighbours, P rows of one shard.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from grappa_dist.artifacts import RowArrays, sync_folder, write_json
from grappa_dist.config import FuseConfig
from grappa_dist.data.loader import load_images, read_batches
from grappa_dist.data.randomness import generator
from grappa_dist.data.transforms import Picture, Preprocess, view_generator
from grappa_dist.dist.sharded_knn import sharded_knn
from grappa_dist.dist.workers import RankContext
from grappa_dist.models import Grappa
from grappa_dist.ops.knn import are_duplicates, without_duplicates
from grappa_dist.stages.embed import Embedding, embed_rows
from grappa_dist.stages.pseudo_label import own_shards, rows_file
from grappa_dist.stages.training import TrainingImages

Pixels = NDArray[np.uint8]


class Pairs:
    """Pixels of the pairs of every step; with neighbours, also the k-NN graph of every epoch."""

    def __init__(
        self,
        context: RankContext,
        training: TrainingImages,
        model: Grappa,
        preprocess: Preprocess,
        *,
        settings: FuseConfig,
        neighbours: bool,
        embedding: Embedding,
        labels: Mapping[int, RowArrays],
        folder: Path,
    ) -> None:
        self._context, self._training, self._model, self._preprocess = context, training, model, preprocess
        self._settings, self._neighbours, self._embedding = settings, neighbours, embedding
        self._labels, self._folder = labels, folder
        self._per_epoch = training.steps_per_epoch()
        self._batches: Generator[Pixels, None, None] | None = None

    def begin(self, step: int) -> None:
        """Readies the pairs from a step to the end of its epoch."""
        self.close()
        epoch, t = divmod(step, self._per_epoch)
        graph = self._graph(epoch if self._settings.refresh else 0) if self._neighbours else None
        order = self._training.order(epoch)
        comm, batch = self._context.comm, self._training.global_batch

        def read(at: int) -> Pixels:
            rows = order.batch_share(at, batch, comm.rank, comm.size)
            if graph is None:  # both views of an image that is read and decoded once
                return self._views(rows, epoch, (0, 1))
            return np.concatenate(
                [self._views(rows, epoch, (0,)), self._views(self._partners(rows, epoch, graph), epoch, (1,))]
            )

        self._batches = read_batches(range(t, self._per_epoch), read, threads=self._training.decode_threads)

    def at(self, step: int) -> Pixels:
        """The pairs of a step, (2B, S, S, 3): all anchors, then their partners. Steps are asked for in order."""
        if step % self._per_epoch == 0 or self._batches is None:
            self.begin(step)
        assert self._batches is not None
        return next(self._batches)

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _views(self, rows: NDArray[np.int64], epoch: int, views: tuple[int, ...]) -> Pixels:
        """Some views of each row, (views x B, S, S, 3): the first views of all rows, then the next ones."""
        side, seed = self._preprocess.image_size, self._training.seed

        def make(image: Picture, row: int) -> Pixels:
            rngs = [view_generator(seed, epoch, row, view) for view in views]
            return self._preprocess.views(image, rngs, self._settings.min_crop_area)

        pixels = load_images(self._training.images, rows, make, (len(views), side, side, 3))
        return np.ascontiguousarray(pixels.swapaxes(0, 1)).reshape(-1, side, side, 3)

    def _partners(self, rows: NDArray[np.int64], epoch: int, graph: RowArrays | None) -> NDArray[np.int64]:
        """One of each row's neighbours, by (seed, epoch, row); the row itself without a graph or a neighbour."""
        if graph is None or not len(rows):
            return rows
        partners = rows.copy()
        for i, (row, near) in enumerate(zip(rows.tolist(), graph.take(rows), strict=True)):
            found = near[near >= 0]
            if len(found):
                partners[i] = found[generator("neighbour", self._training.seed, epoch, row).integers(len(found))]
        return partners

    def _graph(self, epoch: int) -> RowArrays:
        """The k-NN graph of the current model's features, made once an epoch and kept for whoever resumes."""
        images, comm = self._training.images, self._context.comm
        folder, partial = self._folder / f"epoch-{epoch}", self._folder / f"epoch-{epoch}.partial"
        if not folder.exists():
            partial.mkdir(parents=True, exist_ok=True)
            self._context.report({"phase": f"epoch {epoch}: embedding for the k-NN graph"})
            shards = own_shards(images.starts.tolist(), comm.rank, comm.size)
            ids, features = self._embed_own(shards, partial)
            self._context.raise_if_stopping()
            self._context.report({"phase": f"epoch {epoch}: k-NN graph"})
            near, copies = self._neighbours_of(features, ids)
            for shard in shards:
                rows = images.shard_rows(shard)
                table = np.full((len(rows), near.shape[1]), -1, dtype=np.int64)
                inside = (ids >= rows.start) & (ids < rows.stop)
                table[ids[inside] - rows.start] = near[inside]
                np.save(partial / rows_file(shard), table)
            self._describe(partial, ids, near, {"epoch": epoch, **self._duplicates(near, copies)})
            if comm.rank == 0:
                os.rename(partial, folder)
                sync_folder(folder.parent)
        comm.barrier()
        return RowArrays(
            tuple(str(folder / rows_file(i)) for i in range(len(images.shards))), tuple(images.starts.tolist())
        )

    def _embed_own(self, shards: range, partial: Path) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids of this rank's good rows and their features, on disk."""
        images = self._training.images
        first, after = (int(images.starts[shards.start]), int(images.starts[shards.stop])) if shards else (0, 0)
        ids = np.setdiff1d(np.arange(first, after), self._training.bad, assume_unique=True)
        path = partial / f"features-{self._context.comm.rank}.npy"
        shape = (len(ids), self._model.embed_dim)
        features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape) if len(ids) else None
        for shard in shards:  # a batch holds rows of one shard, so that features do not depend on who embeds which
            first, after = (int(np.searchsorted(ids, images.starts[i])) for i in (shard, shard + 1))
            part = ids[first:after]
            for place, unit, _ in embed_rows(
                self._model, images, part, device=self._context.device, how=self._embedding
            ):
                assert features is not None
                features[first + place.start : first + place.stop] = unit
        return ids, np.zeros(shape, dtype=np.float32) if features is None else features

    def _neighbours_of(
        self, features: NDArray[np.float32], ids: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Row ids of each own row's neighbours, and which of its k nearest are near-duplicates, both (P, k).

        Cosines are exact and rounded once, so what counts as one does not depend on ranks.
        """
        k, cosine = self._settings.neighbours, self._settings.duplicate_cosine
        asked = 2 * k if self._settings.skip_duplicates else k
        near, scores = sharded_knn(self._context.comm, features, ids, asked, device=self._context.device)
        copies = are_duplicates(near[:, :k], scores[:, :k], cosine)
        return (without_duplicates(near, scores, cosine, k) if self._settings.skip_duplicates else near), copies

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

    def _describe(
        self, partial: Path, ids: NDArray[np.int64], near: NDArray[np.int64], figures: dict[str, float]
    ) -> None:
        """Rank 0 writes what is said of the graph: also how often neighbours share each pseudo-label."""
        valid = near >= 0
        shares = {}
        for k, labels in self._labels.items():
            same = (labels.take(near.clip(0).ravel()).reshape(near.shape) == labels.take(ids)[:, None]) & valid
            counts = self._sum([int(same.sum()), int(valid.sum())])
            shares[f"k={k}"] = counts[0] / max(1, counts[1])
        self._context.comm.barrier()
        if self._context.comm.rank == 0:
            for scratch in partial.glob("features-*.npy"):
                scratch.unlink()
            write_json(partial / "statistics.json", {**figures, "neighbours_share_pseudo_label": shares})
