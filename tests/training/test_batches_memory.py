"""What a rank of a training job holds does not grow with the number of images."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np

from grappa_dist.artifacts import RowArrays
from grappa_dist.checksums import forget
from grappa_dist.config import DataConfig
from grappa_dist.data.index import Shard
from grappa_dist.data.shards import ImageShards
from grappa_dist.training.batches import TrainingImages

EACH, BATCH, CLASSES, SETS = 1000, 256, 50, 2  # rows of a shard, images of a step
BYTES_PER_ROW = 2  # at most: 0.8 kB for each shard of a set, its path and its map; labels in memory would take 8


def images_of(shards: int) -> ImageShards:
    """Shards that nobody opens."""
    listed = [Shard(f"{i:06d}.tar", f"/nowhere/{i:06d}.tar", EACH, 1, f"{i:064x}") for i in range(shards)]
    return ImageShards(tuple(listed), tuple(f"{shard.path}.npy" for shard in listed))


def held_in_an_epoch(folder: Path, shards: int) -> int:
    """The most that Python and numpy hold while all batches of an epoch get their rows and labels."""
    images = images_of(shards)
    training = TrainingImages(
        images, np.arange(7, len(images), EACH), DataConfig(train="unread", streams=16), BATCH, 0, 0
    )
    paths = [folder / f"{i}.npy" for i in range(shards)]
    sets = [RowArrays.of(paths, images.starts, CLASSES) for _ in range(SETS)]
    forget()
    tracemalloc.start()
    order, seen = training.order(0), 0
    for step in range(training.steps_per_epoch()):
        rows = np.concatenate(order.of_ranks(step, BATCH, 3))
        labels = np.stack([of_set.take(rows) for of_set in sets])
        assert np.array_equal(labels[0], rows % CLASSES)
        seen += len(rows)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == shards * (EACH - 1)
    return most


def test_labels_and_order_of_four_times_as_many_images_take_a_rank_few_bytes_a_row(tmp_path: Path) -> None:
    few, many = 25, 100
    for i in range(many):
        np.save(tmp_path / f"{i}.npy", ((np.arange(EACH) + i * EACH) % CLASSES).astype(np.int32))
    held_in_an_epoch(tmp_path, 2)  # what is imported and made once
    grown = held_in_an_epoch(tmp_path, many) - held_in_an_epoch(tmp_path, few)
    assert grown < BYTES_PER_ROW * EACH * (many - few), f"{grown / EACH / (many - few):.1f} bytes a row"
