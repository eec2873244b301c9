"""What a training job reads: the images of global batches, the same rows and crops on any number of ranks.

Shapes: B images of this rank, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grappa_dist.config import BackboneConfig, Config, DataConfig
from grappa_dist.data.decoding import BadImage, Picture, Pixels
from grappa_dist.data.device_batches import Memory, device_batches
from grappa_dist.data.epoch_order import EpochOrder, RowIds
from grappa_dist.data.loader import Images, load_images
from grappa_dist.data.rng import Purpose, generator, view_generator
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.transforms import Preprocess
from grappa_dist.distributed.collectives import Comm
from grappa_dist.models.spec import backbone_settings
from grappa_dist.prefetch import Threads

EPOCHS_AT_ONCE = 4  # whose order is kept: threads read some steps ahead


@dataclass(frozen=True)
class Turns:
    """Rows that stand for others: in each epoch one of them is shown, drawn by (seed, epoch, row)."""

    members: Mapping[int, tuple[int, ...]]  # by the row that stands for them

    def shown(self, row: int, seed: int, epoch: int) -> int:
        """The row whose image is shown in place of a row."""
        if row not in self.members:
            return row
        all_of_them = (row, *self.members[row])
        return all_of_them[int(generator(Purpose.TURN, seed, epoch, row).integers(len(all_of_them)))]


@dataclass(frozen=True)
class _InTurn:
    """Images of which some are shown in place of others; rows keep their ids."""

    base: ImageShards
    turns: Turns
    seed: int
    epoch: int

    def _shown(self, row: int) -> int:
        return self.turns.shown(row, self.seed, self.epoch)

    def __len__(self) -> int:
        return len(self.base)

    def images(self, rows: Iterable[int]) -> Iterator[bytes | BadImage]:
        return self.base.images(self._shown(row) for row in rows)

    def where(self, row: int) -> str:
        return self.base.where(self._shown(row))

    def name(self, row: int) -> str:
        return self.base.name(self._shown(row))

    def key(self, row: int) -> str:
        return self.base.key(self._shown(row))

    def labels(self, row: int) -> dict[str, Any] | None:
        return self.base.labels(self._shown(row))


@dataclass(frozen=True)
class TrainingImages:
    """The images of a training job and their order: the same global batches on any number of ranks."""

    images: ImageShards
    bad: RowIds
    data: DataConfig
    global_batch: int
    seed: int
    decode_threads: Threads
    turns: Turns | None = None

    @staticmethod
    def of(
        config: Config, images: ImageShards, bad: RowIds, global_batch: int, *, turns: Turns | None = None
    ) -> TrainingImages:
        """All images but the rows `bad`, in batches of `global_batch` images over all ranks."""
        threads = config.resources.decode_threads
        return TrainingImages(images, bad, config.data, global_batch, config.seed, threads, turns)

    def shown(self, epoch: int) -> Images:
        """The images as an epoch shows them."""
        return self.images if self.turns is None else _InTurn(self.images, self.turns, self.seed, epoch)

    def order(self, epoch: int) -> EpochOrder:
        data = self.data
        return EpochOrder(
            self.images, self.bad, seed=self.seed, epoch=epoch, streams=data.streams, window=data.shuffle_window
        )

    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.images) - len(self.bad), self.global_batch)

    def num_steps(self, epochs: int) -> int:
        return epochs * self.steps_per_epoch()

    def rank_share(self, ranks: int) -> int:
        return rank_share(self.global_batch, ranks, self.data.streams)


def steps_per_epoch(num_rows: int, global_batch: int) -> int:
    return -(-num_rows // global_batch)


def rank_share(global_batch: int, ranks: int, streams: int) -> int:
    """The most images of a batch that one of R ranks may have: it reads every R-th stream, and streams whole."""
    rounds, rest = divmod(global_batch, streams)
    of_first = np.arange(streams) % ranks == 0  # rank 0, which has as many streams as any
    before = np.concatenate([[0], np.cumsum(np.tile(of_first, 2))])
    return int(rounds * of_first.sum() + (before[rest : rest + streams] - before[:streams]).max())


def trained_by(backbone: BackboneConfig, data: DataConfig, seed: int, **recipe: object) -> dict[str, object]:
    """The settings that decide the result of a training job: its recipe, the backbone, and the rows of a batch."""
    order = data.model_dump(include={"streams", "shuffle_window"})
    if data.exclude and data.duplicates == "weigh":
        order["duplicates"] = data.duplicates
    return {"backbone": backbone_settings(backbone), **recipe, "data": order, "seed": seed}


def describe_idle_ranks(data: DataConfig, ranks: int) -> str:
    """The warning for a training job with more ranks than there are streams to read; "" for any other."""
    if ranks <= data.streams:
        return ""
    return (
        f"warning: {ranks} ranks, but data.streams={data.streams}, and a rank reads whole streams: "
        f"{ranks - data.streams} ranks have no images; at least data.streams={ranks} would give all of them some "
        "(it changes the order of the images, so the result), or ask for fewer ranks"
    )


def augmented(
    training: TrainingImages,
    preprocess: Preprocess,
    rows: Sequence[int] | RowIds,
    *,
    epoch: int,
    area: float,
    memory: Memory | None = None,
) -> Pixels:
    """A random crop of each row in an epoch, of at least `area` of its image: (B, S, S, 3).

    Args:
        memory: gives what they are written to.
    """
    size = preprocess.image_size
    into = None if memory is None else memory((len(rows), size, size, 3))

    def make(image: Picture, row: int) -> Pixels:
        return preprocess.augment(image, view_generator(training.seed, epoch, row, 0), area)

    return load_images(training.shown(epoch), rows, make, (size, size, 3), into=into)


def augmented_batches(
    training: TrainingImages, preprocess: Preprocess, comm: Comm, steps: range, *, area: float, device: torch.device
) -> Generator[tuple[Tensor, RowIds], None, None]:
    """This rank's crops, (B, S, S, 3) uint8 on the device, and row ids of some steps, read ahead.

    Args:
        steps: counted through all epochs.
    """
    per_epoch = training.steps_per_epoch()
    order = lru_cache(maxsize=EPOCHS_AT_ONCE)(training.order)  # each holds a window of every stream

    def read(step: int, memory: Memory) -> RowIds:
        epoch, t = divmod(step, per_epoch)
        rows = order(epoch).batch(t, training.global_batch, comm.rank, comm.size)
        augmented(training, preprocess, rows, epoch=epoch, area=area, memory=memory)
        return rows

    return device_batches(steps, read, device, threads=training.decode_threads)
