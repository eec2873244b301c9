"""collect: where the images come from, either the user's shards or a collection that a function draws."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterable
from typing import Any

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.config import DataConfig, Resources
from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.decoding import BadImage
from grappa_dist.data.index import describe_missing
from grappa_dist.data.rng import Purpose, permutation
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter

ROWS_PER_SHARD = 256
INDEXING_S = 5.0  # between two lines about tars that have to be read


def collection_of(store: Store, data: DataConfig) -> Artifact:
    settings = {"collection": data.collection, "kwargs": data.collection_kwargs, "rows_per_shard": ROWS_PER_SHARD}
    return store.artifact("collection", settings, {})


def draw_collection(data: DataConfig, artifact: Artifact) -> None:
    """Draws a collection into shards; the function yields items with split, task, label, encoded and suffix."""
    if artifact.complete:
        return
    folder = artifact.begin()
    drawings = list(_call(data))
    for split in ("train", "test"):
        items = [d for d in drawings if d.split == split]
        with ShardWriter(folder / split, rows_per_shard=ROWS_PER_SHARD) as writer:
            for i in permutation(len(items), Purpose.DATA_SET_ORDER).tolist():
                item = items[i]
                writer.write(item.encoded, item.suffix, label=item.label, task=item.task)
    artifact.commit()


def open_images(
    data: DataConfig,
    store: Store,
    where: Resources | None = None,
    *,
    write_index: bool = True,
    log: Callable[[str], None] = lambda text: None,
) -> tuple[ImageShards, ImageShards | None]:
    """Training and test images; test is None where there are none, and the training images are looked at instead.

    Args:
        say: hears now and then how many tars had to be read to the end, and which images are lost in them.
    """
    index, cache, heard = store.root / "index", cache_of(where or Resources()), time.monotonic()

    def tell(count: int) -> None:
        nonlocal heard
        if time.monotonic() - heard > INDEXING_S:
            heard = time.monotonic()
            log(f"collect: {count} tars without an index, or newer than theirs, read to the end")

    if data.collection:
        folder = collection_of(store, data).path
        return ImageShards.open([folder / "train"], index), ImageShards.open([folder / "test"], index)
    train = ImageShards.open(data.train, index, cache, write=write_index, tell=tell)
    test = ImageShards.open(data.test, index, cache, write=write_index, tell=tell) if data.test else None
    for line in describe_missing([*train.shards, *(test.shards if test else ())]):
        log(f"warning: {line}")
    if not len(train):
        raise ValueError(f"data.train={list(data.train)}: the shards hold no images (jpg, jpeg, png, webp)")
    return train, test


def ends_of(*collections: ImageShards) -> tuple[ImageShards, ...]:
    """The shards of the first and of the last image of each: few enough to be sent to every node."""
    return tuple(
        images.part(shard)
        for images in collections
        for shard in sorted({images.locate(row)[0] for row in (0, len(images) - 1)})
    )


def read_a_little(parts: Iterable[ImageShards]) -> None:
    """Reads the first and the last image of each, or raises what is in the way; a bad image is not."""
    for images in parts:
        for row in {0, len(images) - 1}:
            with contextlib.suppress(BadImage):
                images.image_bytes(row)


def cache_of(where: Resources) -> CacheSettings:
    return CacheSettings(where.cache_dir, where.cache_bytes, where.requests_in_flight)


def collection_sizes(data: DataConfig) -> dict[str, int]:
    """How many images a collection will have, without drawing it: the `sizes` beside its function."""
    module = _module(data)
    return dict(module.sizes(**{k: v for k, v in data.collection_kwargs.items() if k != "seed"}))


def _call(data: DataConfig) -> Iterable[Any]:
    assert data.collection is not None
    function = data.collection.split(":")[1]
    module = _module(data)
    if not hasattr(module, function):
        raise ValueError(f"data.collection={data.collection}: the module has no {function!r}")
    try:
        return getattr(module, function)(**data.collection_kwargs)
    except TypeError as error:
        raise ValueError(f"data.collection_kwargs={data.collection_kwargs}: {error}") from error


def _module(data: DataConfig) -> Any:
    assert data.collection is not None
    try:
        return importlib.import_module(data.collection.split(":")[0])
    except ModuleNotFoundError as error:
        raise ValueError(f"data.collection={data.collection}: {error}; is its folder on PYTHONPATH?") from error


def has_drawn(data: DataConfig, store: Store) -> bool:
    return data.collection is None or collection_of(store, data).complete
