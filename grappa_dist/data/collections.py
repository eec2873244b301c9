"""Labelled collections made into shards: which classes train, which test, and the tars of both."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image

from grappa_dist.data.loader import read_batches
from grappa_dist.data.randomness import permutation
from grappa_dist.data.sources import Columns, Item, csv_items, folder_items, open_source
from grappa_dist.data.transforms import BadImage, decode
from grappa_dist.data.writer import ShardWriter

SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class CollectionConfig:
    """How images become shards."""

    label_column: str | None = None  # None: "fine", which may be absent where no label is needed
    task_column: str = "dataset"
    task: str | None = None  # one name for all images of every pair
    split: Literal["classes", "column", "none"] = "classes"
    image_size: int | None = None  # shorter side of what is larger; None copies the files as they are
    images_per_shard: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("classes", "column", "none"):
            raise ValueError(f"split must be classes, column or none, got {self.split!r}")
        for name in ("image_size", "images_per_shard"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")


def make_shards(
    pairs: Sequence[tuple[str | None, str]], out: Path, cfg: CollectionConfig, *, tell: Callable[[str], None]
) -> str:
    """Table of what is in OUT/train and OUT/test, which it writes from pairs of (CSV or None, images).

    Args:
        tell: hears a line about progress now and then.
    """
    splits = split_items(_items(pairs, cfg), cfg.split)
    for split in SPLITS:
        if not splits[split] and (out / split).exists():
            raise ValueError(f"{out / split}: exists, but these images have no {split} part; choose another folder")
    for split in SPLITS:
        if splits[split]:
            _write(splits[split], out / split, cfg, tell)
    return table(splits)


def _items(pairs: Sequence[tuple[str | None, str]], cfg: CollectionConfig) -> list[Item]:
    columns = Columns(
        label=cfg.label_column or "fine",
        label_required=cfg.split == "classes" or cfg.label_column is not None,
        task=cfg.task_column,
        split="split" if cfg.split == "column" else None,
        task_name=cfg.task,
    )
    items: list[Item] = []
    for csv, images in pairs:
        source = open_source(images)
        if csv is not None:
            items += csv_items(csv, source, columns)
        elif cfg.split == "column":
            raise ValueError(f"{images}: --split column needs a CSV with a column 'split'")
        else:
            items += folder_items(source, cfg.task, labelled=cfg.split == "classes")
    return items


def split_items(items: Sequence[Item], split: str) -> dict[str, list[Item]]:
    """The images that train and those that test, each in the order given."""
    if split == "classes":
        train = train_classes(items)
        sides = ["train" if (item.task, item.label) in train else "test" for item in items]
    elif split == "column":
        sides = [_side_of(item) for item in items]
    else:
        sides = ["train"] * len(items)
    return {name: [item for item, side in zip(items, sides, strict=True) if side == name] for name in SPLITS}


def train_classes(items: Sequence[Item]) -> set[tuple[str, str | None]]:
    """(task, label) of every class that trains: in each task the first half, rounded up, by name."""
    labels: dict[str, set[str]] = defaultdict(set)
    for item in items:
        assert item.label is not None, f"{item.said}: taken without a label"
        labels[item.task].add(item.label)
    return {(task, label) for task, names in labels.items() for label in sorted(names)[: (len(names) + 1) // 2]}


def _side_of(item: Item) -> str:
    if item.split not in SPLITS:
        raise ValueError(f"{item.said}: split is {item.split!r}; expected {' or '.join(SPLITS)}")
    return item.split


def _write(items: Sequence[Item], folder: Path, cfg: CollectionConfig, tell: Callable[[str], None]) -> None:
    """Shards of one split; the train rows are mixed, the test rows keep their order."""
    if folder.name == "train":
        items = [items[i] for i in permutation(len(items), "order of a collection", cfg.seed).tolist()]
    threads, told = min(8, os.cpu_count() or 1), time.monotonic()
    with ShardWriter(folder, rows_per_shard=cfg.images_per_shard) as writer:
        contents = read_batches(items, lambda item: _content(item, cfg.image_size), threads=threads)
        for item, (data, suffix, good) in zip(items, contents, strict=True):
            row = writer.write(data, suffix, item.label, None if item.label is None else item.task)
            if not good:
                tell(f"{folder.name}: {item.said} does not decode; it keeps row {row}")
            if time.monotonic() - told > 5:
                told = time.monotonic()
                tell(f"{folder.name}: {row + 1:,} of {len(items):,} images")
    done = "was finished before, with these images" if writer.reused else "written"
    tell(f"{folder}: {len(items):,} images in {len(writer.shards):,} shards, {done}")


def _content(item: Item, image_size: int | None) -> tuple[bytes, str, bool]:
    """Bytes and suffix to be written, and whether the image decodes where that was tried."""
    data = item.source.read(item.name)
    if image_size is None:
        return data, item.suffix, True
    try:
        image = decode(data)
    except BadImage:
        return data, item.suffix, False
    scale = image_size / min(image.size)
    if scale >= 1:
        return data, item.suffix, True
    width, height = (max(image_size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    if item.suffix == "png":
        image.save(buffer, "PNG")
        return buffer.getvalue(), "png", True
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), "jpg", True


def table(splits: dict[str, list[Item]]) -> str:
    """Classes and images of every task on both sides, as lines of text."""
    tasks = sorted({item.task for items in splits.values() for item in items})
    lines = [("task", *(f"{split} {what}" for split in SPLITS for what in ("classes", "images")))]
    for task in [*tasks, "all"]:
        cells = []
        for split in SPLITS:
            items = [item for item in splits[split] if task in (item.task, "all")]
            cells += [len({(item.task, item.label) for item in items if item.label is not None}), len(items)]
        lines.append((task, *(f"{cell:,}" for cell in cells)))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
