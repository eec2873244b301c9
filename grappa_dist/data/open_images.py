"""The images of a run: the user's shards, or the shards of a data set that a function of the config generates."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from grappa_dist.artifacts import Artifact, Store
from grappa_dist.bucket import here
from grappa_dist.config import DataConfig, Resources
from grappa_dist.console import pluralize
from grappa_dist.data.block_cache import CacheSettings
from grappa_dist.data.decoding import BadImage
from grappa_dist.data.index import describe_missing
from grappa_dist.data.rng import Purpose, permutation
from grappa_dist.data.shards import ImageShards
from grappa_dist.data.writer import ShardWriter
from grappa_dist.functions import check_arguments, import_function

ROWS_PER_SHARD = 256  # of a generated data set
INDEXING_S = 5.0  # between two lines about tars that have to be read


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
        log: gets a line now and then about tars that are read to the end, one for what is passed over in a folder, and
            one for each way in which images are missing.
    """
    index, cache, on_read = store.root / "index", cache_of(where or Resources()), _read_tars_logger(log)
    if data.collection:
        generated = generated_data_set(store, data)
        folder = generated.path
        for name in generated.files if generated.complete else ():
            here(folder / name)
        return ImageShards.open([folder / "train"], index), ImageShards.open([folder / "test"], index)
    how: dict[str, Any] = {"write": write_index, "on_read": on_read, "log": lambda line: log(f"warning: {line}")}
    train = ImageShards.open(data.train, index, cache, **how)
    test = ImageShards.open(data.test, index, cache, **how) if data.test else None
    for line in describe_missing([*train.shards, *(test.shards if test else ())]):
        log(f"warning: {line}")
    if not len(train):
        raise ValueError(f"data.train={list(data.train)}: the shards hold no images (jpg, jpeg, png, webp)")
    return train, test


def _read_tars_logger(log: Callable[[str], None]) -> Callable[[], None]:
    """Counts tars that were read to the end, for any number of threads, and logs the count every INDEXING_S."""
    lock, count, logged = threading.Lock(), 0, time.monotonic()

    def on_read() -> None:
        nonlocal count, logged
        with lock:
            count += 1
            if time.monotonic() - logged > INDEXING_S:
                logged = time.monotonic()
                log(f"load: {pluralize(count, 'tar')} without an index, or newer than it, read to the end")

    return on_read


def cache_of(where: Resources) -> CacheSettings:
    return CacheSettings(where.cache_dir, where.cache_bytes, where.requests_in_flight)


def generated_data_set(store: Store, data: DataConfig) -> Artifact:
    settings = {"collection": data.collection, "kwargs": data.collection_kwargs, "rows_per_shard": ROWS_PER_SHARD}
    return store.artifact("collection", settings, {})


def generated_artifacts(store: Store, data: DataConfig) -> list[Artifact]:
    """The data set that the program generates; none where the shards are the user's."""
    return [generated_data_set(store, data)] if data.collection else []


def is_generated(data: DataConfig, store: Store) -> bool:
    """Whether nothing is left to generate: there is such a data set, or the shards are the user's."""
    return data.collection is None or generated_data_set(store, data).complete


def generate_data_set(data: DataConfig, artifact: Artifact) -> None:
    """Writes the shards of a generated data set; its function yields items with split, task, label, encoded, suffix."""
    if artifact.complete:
        return
    generated = list(generator_of(data)(**data.collection_kwargs))
    folder = artifact.begin()
    for split in ("train", "test"):
        items = [item for item in generated if item.split == split]
        with ShardWriter(folder / split, rows_per_shard=ROWS_PER_SHARD) as writer:
            for i in permutation(len(items), Purpose.DATA_SET_ORDER).tolist():
                item = items[i]
                writer.write(item.encoded, item.suffix, label=item.label, task=item.task)
    artifact.commit()


def generated_sizes(data: DataConfig) -> dict[str, int]:
    """How many images a data set will have, without generating it: the `sizes` beside its function.

    Raises:
        ValueError: it could not be generated, as far as that is seen without trying, or there is no `sizes`.
    """
    generator_of(data)
    name = f"{str(data.collection).partition(':')[0]}:sizes"
    try:
        sizes = import_function("data.collection", name)
    except ValueError as error:
        raise ValueError(
            f"data.collection={data.collection}: a plan needs the numbers of images; beside the function, expected "
            'sizes(**collection_kwargs) -> {"train": ..., "test": ...}'
        ) from error
    kwargs = {k: v for k, v in data.collection_kwargs.items() if k != "seed"}
    check_arguments(f"data.collection_kwargs={data.collection_kwargs}, for {name}", sizes, kwargs)
    return dict(sizes(**kwargs))


def generator_of(data: DataConfig) -> Callable[..., Iterable[Any]]:
    """The function that generates a data set.

    Raises:
        ValueError: there is none, or it does not take these arguments.
    """
    function = import_function("data.collection", str(data.collection))
    check_arguments(f"data.collection_kwargs={data.collection_kwargs}", function, data.collection_kwargs)
    return function


def ends_of(*data_sets: ImageShards) -> tuple[ImageShards, ...]:
    """The shards of the first and of the last image of each: few enough to be sent to every node."""
    return tuple(
        images.part(shard)
        for images in data_sets
        for shard in sorted({images.locate(row)[0] for row in (0, len(images) - 1)})
    )


def read_a_little(parts: Iterable[ImageShards]) -> None:
    """Reads the first and the last image of each: raises what prevents that, except for a bad image."""
    for images in parts:
        for row in {0, len(images) - 1}:
            with contextlib.suppress(BadImage):
                images.image_bytes(row)
