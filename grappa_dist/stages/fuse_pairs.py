"""The image pairs of fuse: two views of one image, or views of an image and of one of its nearest neighbours.

Shapes: B anchors of this rank, S pixels a side, k neighbours.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from grappa_dist.artifacts import RowArrays, rows_file
from grappa_dist.config import FuseConfig
from grappa_dist.data.decoding import Picture, Pixels
from grappa_dist.data.device_batches import Memory, device_batches
from grappa_dist.data.loader import load_images
from grappa_dist.data.rng import Purpose, generator, view_generator
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.worker import RankContext
from grappa_dist.models import Grappa
from grappa_dist.stages.embed import Embedding
from grappa_dist.stages.knn_graph import STATISTICS_FILE, Graphs, remove_neighbours
from grappa_dist.training.batches import EPOCHS_AT_ONCE, TrainingImages
from grappa_dist.training.checkpoints import oldest_step


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
        self._context, self._training, self._preprocess = context, training, preprocess
        self._settings, self._neighbours, self._folder = settings, neighbours, folder
        self._graphs = Graphs(
            context, training, model, settings=settings, embedding=embedding, labels=labels, folder=folder
        )
        self._per_epoch, self._steps = training.steps_per_epoch(), training.num_steps(settings.epochs)
        self._new_graphs = neighbours and settings.refresh  # by the model as it is when an epoch begins
        self._removed_before = 1  # the first graph is kept: it is the same in every run
        self._batches: Generator[tuple[Tensor, None], None, None] | None = None
        self._order = lru_cache(maxsize=1)(training.order)
        self.waited_s = 0.0  # for the pixels of the last step
        self.of_ranks: list[int] = []  # pairs of each rank in the last step

    def begin(self, step: int) -> None:
        """Prepares the pairs from a step to the end, or to that of its epoch where the next one has another graph."""
        self.close()
        epoch = step // self._per_epoch
        graph = self._graphs.of(epoch if self._new_graphs else 0) if self._neighbours else None
        self._remove_old_graphs()
        comm, batch, side = self._context.comm, self._training.global_batch, self._preprocess.image_size
        order = lru_cache(maxsize=EPOCHS_AT_ONCE)(self._training.order)  # each holds a window of every stream

        def read(at: int, memory: Memory) -> None:
            epoch, t = divmod(at, self._per_epoch)
            rows = order(epoch).batch(t, batch, comm.rank, comm.size)
            pixels = memory((2 * len(rows), side, side, 3)).reshape(2, len(rows), side, side, 3)
            if graph is None:  # so that an image is read and decoded once for both views
                self._read_views(rows, epoch, (0, 1), pixels)
                return
            self._read_views(rows, epoch, (0,), pixels[:1])
            self._read_views(self._partners(rows, epoch, graph), epoch, (1,), pixels[1:])

        steps = range(step, (epoch + 1) * self._per_epoch if self._new_graphs else self._steps)
        self._batches = device_batches(steps, read, self._context.device, threads=self._training.decode_threads)

    def _remove_old_graphs(self) -> None:
        """Removes the neighbours of epochs that no restart needs; by now no rank reads the graph of an earlier one."""
        if self._context.comm.rank == 0:
            first_needed = oldest_step(self._folder.parent) // self._per_epoch
            remove_neighbours(self._folder, range(self._removed_before, first_needed))
            self._removed_before = max(self._removed_before, first_needed)

    def kept_files(self) -> list[str]:
        """The statistics of all graphs, and the neighbours of the first and the last, in the folder of the job."""
        epochs = range(self._settings.epochs if self._settings.refresh else 1)
        files = [rows_file(shard) for shard in range(len(self._training.images.shards))]
        kept = [f"knn/epoch-{at}/{file}" for at in sorted({0, epochs[-1]}) for file in files]
        return [*kept, *(f"knn/epoch-{at}/{STATISTICS_FILE}" for at in epochs)]

    def at(self, step: int) -> Tensor:
        """The pairs of a step, (2B, S, S, 3) uint8 on the device: all anchors, then their partners. Steps must come in
        order."""
        if self._batches is None or (self._new_graphs and step % self._per_epoch == 0):
            self.begin(step)
        assert self._batches is not None
        began = time.perf_counter()
        pixels, _ = next(self._batches)
        self.waited_s = time.perf_counter() - began
        epoch, t = divmod(step, self._per_epoch)
        rows = self._order(epoch).of_ranks(t, self._training.global_batch, self._context.comm.size)
        self.of_ranks = [len(of_rank) for of_rank in rows]
        return pixels

    def close(self) -> None:
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _read_views(self, rows: NDArray[np.int64], epoch: int, views: tuple[int, ...], pixels: Pixels) -> None:
        """Writes the given views of each row to `pixels`, (views, B, S, S, 3)."""
        seed = self._training.seed

        def make(image: Picture, row: int) -> Pixels:
            rngs = [view_generator(seed, epoch, row, view) for view in views]
            return self._preprocess.views(image, rngs, self._settings.min_crop_area)

        by_row = pixels.swapaxes(0, 1)
        load_images(self._training.shown(epoch), rows, make, by_row.shape[1:], into=by_row)

    def _partners(self, rows: NDArray[np.int64], epoch: int, graph: RowArrays) -> NDArray[np.int64]:
        """One neighbour of each row, drawn by (seed, epoch, row); the row itself if it has none."""
        partners = rows.copy()
        for i, (row, near) in enumerate(zip(rows.tolist(), graph.take(rows), strict=True)):
            found = near[near >= 0]
            if len(found):
                partners[i] = found[generator(Purpose.NEIGHBOUR, self._training.seed, epoch, row).integers(len(found))]
        return partners
